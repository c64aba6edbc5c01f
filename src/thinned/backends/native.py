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
    key: Tensor,
    geometry: Geometry,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    out: Tensor,
) -> Tensor:
    """Write ``keep ? x * scale + shift : fill`` into ``out``; see :func:`thinned.op.masked_affine`."""
    _fill(x, key, geometry, T, scale, shift, fill, out)
    return out


def keep_mask(key: Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
    """Which elements are kept, as a bool tensor; see :func:`thinned.op.keep_mask`."""
    out = torch.empty(shape, dtype=torch.bool)
    _fill(out, key, geometry, T, 1.0, 0.0, 0.0, out)
    return out


def _fill(
    x: Tensor,
    key: Tensor,
    geometry: Geometry,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    out: Tensor,
) -> None:
    strides, base = geometry
    shape, x_strides, y_strides = x.shape, x.stride(), out.stride()
    if strides == x_strides == y_strides and x.is_contiguous():
        # Positions in memory are mask indices: one dimension says it all.
        shape, strides, x_strides, y_strides = (x.numel(),), (1,), (1,), (1,)
    if key.dim():
        one_key, keys, key_strides = 0, key.data_ptr(), key.stride()
    else:
        one_key, keys, key_strides = key.item() & 0xFFFFFFFFFFFFFFFF, 0, ()
    _native.masked_affine(
        x.data_ptr(), out.data_ptr(), _CODES[x.dtype], shape, x_strides, y_strides, strides, base, T,
        scale, shift, fill, one_key, keys, key_strides,
    )  # fmt: skip
