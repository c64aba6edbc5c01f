"""The two operations by the compiled kernel: the CPU's backend.

``THINNED_ISA`` in the environment forces a lower instruction set than the machine has.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

import thinned.backends._native as _native
from thinned.geometry import Geometry

__all__ = ["keep_mask", "masked_affine"]

if wanted := os.environ.get("THINNED_ISA"):
    _native.set_isa(wanted)

_CODES: dict[torch.dtype, int] = {getattr(torch, name): code for code, name in enumerate(_native.dtypes)}


def masked_affine(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    out: Tensor,
) -> Tensor:
    """Write ``keep ? x * scale + shift : fill`` into ``out``; see :func:`thinned.op.masked_affine`."""
    one_key, keys = 0, 0
    key_strides: tuple[int, ...] = ()
    if isinstance(key, int):
        one_key = key
    elif key.dim():
        keys, key_strides = key.data_ptr(), key.stride()
    else:
        one_key = int(key.item())
    code, source, target = _CODES[x.dtype], x.data_ptr(), out.data_ptr()
    if not keys and x.is_contiguous() and out.is_contiguous() and geometry.strides == x.stride():
        # Positions in memory are mask indices: one dimension says it all.
        _native.flat(source, target, code, x.numel(), geometry.base, T, scale, shift, fill, one_key)
    else:
        _native.strided(
            source, target, code, x.shape, x.stride(), out.stride(), geometry.strides, geometry.base, T,
            scale, shift, fill, one_key, keys, key_strides,
        )  # fmt: skip
    return out


def keep_mask(key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
    """Which elements are kept, as a bool tensor; see :func:`thinned.op.keep_mask`."""
    out = torch.empty(shape, dtype=torch.bool, device="cpu")
    return masked_affine(out, key, geometry, T, 1.0, 0.0, 0.0, out)
