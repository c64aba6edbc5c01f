"""The operations by the compiled kernel: the CPU's backend.

``THINNED_ISA`` in the environment forces a lower instruction set than the machine has.
"""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

import thinned.backends._native as _native
from thinned.backends.rows import by_rows
from thinned.geometry import Geometry, shared_cached

__all__ = ["fold", "fold_many", "keep_mask", "masked_affine", "uniform"]

if wanted := os.environ.get("THINNED_ISA"):
    _native.set_isa(wanted)

_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for code, name in enumerate(_native.dtypes)}


def masked_affine(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    out: Tensor | None = None,
) -> Tensor:
    """``keep ? x * scale + shift : fill``, into ``out`` if given; see :func:`thinned.op.masked_affine`."""
    target = torch.empty_like(x) if out is None else out
    if (
        geometry is None
        and isinstance(key, int)
        and x.is_contiguous()
        and (out is None or out.is_contiguous())
    ):
        # Positions in memory are mask indices: one dimension says it all.
        _native.flat(
            x.data_ptr(), target.data_ptr(), _CODES[x.dtype], x.numel(), T, scale, shift, fill, key
        )  # fmt: skip
        return target
    strides, base = shared_cached(x.shape) if geometry is None else geometry
    one_key, keys = 0, 0
    key_strides: tuple[int, ...] = ()
    if isinstance(key, int):
        one_key = key
    elif key.dim():
        keys, key_strides = key.data_ptr(), key.stride()
    else:
        one_key = int(key.item())
    _native.strided(
        x.data_ptr(), target.data_ptr(), _CODES[x.dtype], x.shape, x.stride(), target.stride(), strides, base,
        T, scale, shift, fill, one_key, keys, key_strides,
    )  # fmt: skip
    return target


def fold(key: Tensor, data: int) -> Tensor:
    """The child of one key; see :meth:`thinned.Key.fold`."""
    out = torch.empty_like(key)
    _native.fold(out.data_ptr(), key.data_ptr(), data)
    return out


def fold_many(keys: Tensor, data: Tensor) -> Tensor:
    """The children of int64 keys, which broadcast against int64 data; see :meth:`thinned.Key.fold`."""
    if keys.dim() and data.dim():
        keys, data = torch.broadcast_tensors(keys, data)
    keys, data = keys.contiguous(), data.contiguous()
    out = torch.empty_like(data if data.dim() else keys)
    steps = int(keys.dim() > 0), int(data.dim() > 0)
    _native.fold_many(out.data_ptr(), keys.data_ptr(), steps[0], data.data_ptr(), steps[1], out.numel())
    return out


def keep_mask(key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
    """Which elements are kept, as a bool tensor; see :func:`thinned.op.keep_mask`."""
    out = torch.empty(shape, dtype=torch.bool, device="cpu")
    return masked_affine(out, key, geometry, T, 1.0, 0.0, 0.0, out)


def uniform(key: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """The numbers behind the masks, less ``2**31``, as int32; see :func:`thinned.op.uniform`."""
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.int32, device="cpu")
    return by_rows(key, shape, geometry, _numbers)


def _numbers(first: Tensor, key: Tensor, count: int) -> Tensor:
    out = torch.empty((*first.shape, count), dtype=torch.int32, device="cpu")
    first, key = first.contiguous(), key.contiguous()
    _native.numbers(out.data_ptr(), key.data_ptr(), first.data_ptr(), first.numel(), count)
    return out
