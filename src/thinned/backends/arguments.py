"""Argument checks that every backend makes before it reads or writes anything."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from thinned.backends.strata import MOST
from thinned.geometry import Geometry, span

__all__ = [
    "DTYPES",
    "check_draw",
    "check_dtype",
    "check_key",
    "check_mask",
    "check_out",
    "checked_out",
    "is_product",
]

_FINITE = torch.finfo(torch.float32).max
DTYPES = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise RuntimeError for a dtype that :func:`thinned.op.masked_affine` is not defined on."""
    if dtype not in DTYPES:
        accepted = ", ".join(sorted(map(str, DTYPES)))
        raise RuntimeError(
            f"masked_affine needs a floating-point or complex tensor, got {dtype}; accepted: {accepted}"
        )


def is_product(scale: float, shift: float, fill: float) -> bool:
    """Whether a result is ``x * scale`` or +0, with a scale of any finite number above 0 in float32."""
    return not shift and not fill and math.copysign(1.0, fill) > 0 and 0 < scale < _FINITE


def check_out(x: Tensor, out: Tensor) -> None:
    """Raise RuntimeError unless ``out`` has the shape, dtype and device of ``x``."""
    if out is not x and (out.shape != x.shape or out.dtype != x.dtype or out.device != x.device):
        raise RuntimeError(
            f"out of shape {tuple(out.shape)}, {out.dtype} on {out.device} does not fit x of shape "
            f"{tuple(x.shape)}, {x.dtype} on {x.device}; accepted: a tensor like x"
        )


def checked_out(x: Tensor, key: int | Tensor, out: Tensor | None) -> Tensor:
    """``out``, or a new tensor like ``x``; RuntimeError if ``x``, ``key`` and ``out`` do not fit together."""
    check_dtype(x.dtype)
    if isinstance(key, Tensor):
        check_key(key, x.shape, x.device)
    if out is None:
        return torch.empty_like(x)
    check_out(x, out)
    return out


def check_key(key: Tensor, shape: tuple[int, ...], device: torch.device | None = None) -> None:
    """Raise RuntimeError unless ``key`` is int64, of the shape of leading dimensions, and on ``device``."""
    if key.dtype != torch.int64:
        raise RuntimeError(f"keys must be int64, got {key.dtype} of shape {tuple(key.shape)}")
    if device is not None and key.device != device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but the keys are on {key.device} and the tensor "
            f"is on {device}"
        )
    if key.shape != shape[: key.dim()]:
        accepted = ", ".join(str(tuple(shape[:dims])) for dims in range(len(shape) + 1))
        raise RuntimeError(
            f"keys of shape {tuple(key.shape)} do not fit a tensor of shape {tuple(shape)}; accepted: the "
            f"shape of its leading dimensions, one of {accepted}"
        )


def check_draw(draw: Tensor, strata: int, key: Tensor) -> None:
    """Raise RuntimeError unless ``draw`` is int64, on the keys' device, and of their shape or one number."""
    if not 1 <= strata <= MOST:
        raise RuntimeError(f"strata must be in 1 .. {MOST}, got {strata}")
    if draw.dtype != torch.int64:
        raise RuntimeError(f"draws must be int64, got {draw.dtype} of shape {tuple(draw.shape)}")
    if draw.device != key.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but the draws are on {draw.device} and the keys "
            f"are on {key.device}"
        )
    if draw.dim() and draw.shape != key.shape:
        raise RuntimeError(
            f"draws of shape {tuple(draw.shape)} do not fit keys of shape {tuple(key.shape)}; accepted: the "
            "same shape, or ()"
        )


def check_mask(shape: tuple[int, ...], geometry: Geometry, T: int = 0) -> None:
    """Raise RuntimeError for a geometry that does not fit ``shape`` or a ``T`` outside 0 .. 2**32."""
    _check_geometry(shape, *geometry)
    if not 0 <= T <= 2**32:
        raise RuntimeError(f"T must be in 0 .. 2**32, got {T}")


@lru_cache(maxsize=4096)
def _check_geometry(shape: tuple[int, ...], strides: tuple[int, ...], base: int) -> None:
    if len(strides) != len(shape):
        raise RuntimeError(
            f"mask strides {strides} do not fit a tensor of shape {tuple(shape)}; accepted: {len(shape)} "
            "strides, one for each dimension"
        )
    if 0 in shape:
        return
    if min(strides, default=0) < 0 or base < 0:
        raise RuntimeError(f"mask strides and base must be 0 or more, got strides {strides} and base {base}")
    if span(shape, strides) > 2**60 or base + span(shape, strides) >= 2**63:
        raise RuntimeError(
            f"mask strides {strides} over shape {tuple(shape)} from base {base} reach too far; accepted: "
            "2**60 mask indices from the first to the last, and a last one below 2**63 - 1"
        )
