"""What is wrong, in words, with a tensor that should be the dropout of another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["TOLERANCE_ULP", "departure", "scale_of", "ulps_off"]

TOLERANCE_ULP = 2.0  # a rounded scale costs up to 1 ulp of the product, rounding the product 1/2


def departure(y: Tensor, x: Tensor, kept: Tensor | None = None, scale: float | None = None) -> str | None:
    """Nothing, if each element of ``y`` is ``x * scale`` where kept and 0 elsewhere.

    Args:
        y: the tensor to judge.
        x: what was dropped from; without zeros, so that a zero in ``y`` means dropped.
        kept: the mask that ``y`` has to have; if not given, any will do.
        scale: what kept elements are multiplied by; if not given, any will do, but one for all.
    """
    if y.shape != x.shape:
        return f"shape {tuple(x.shape)} became {tuple(y.shape)}"
    if kept is None:
        kept = y != 0
    elif not torch.equal(y != 0, kept):
        return f"{(y != 0).ne(kept).double().mean():.0%} of the mask differs"
    if not kept.any():
        return None
    own_scale = scale_of(y, x)
    off = ulps_off(y, x, own_scale if scale is None else scale)
    if off <= TOLERANCE_ULP:
        return None
    if scale is None or math.isclose(own_scale, scale, rel_tol=1e-3):
        return f"kept values {off:.3g} ulp off"
    return f"scaled by {own_scale:.4g}, not {scale:.4g}"


def scale_of(y: Tensor, x: Tensor) -> float:
    """What kept elements were multiplied by: the median of ``y/x``."""
    kept = y != 0
    return float((y[kept].double() / x[kept].double()).median())


def ulps_off(y: Tensor, x: Tensor, scale: float) -> float:
    """The largest distance of kept values from ``x * scale``, in units of the last place of ``x``'s dtype.

    A keep probability realised with 32 bits is right: a relative error of ``2**-32 * scale`` is forgiven.
    """
    kept = y != 0
    if not kept.any():
        return 0.0
    exact = x[kept].double() * scale
    limits = torch.finfo(x.dtype)
    binade = torch.frexp(exact).exponent - 1
    ulp = torch.ldexp(torch.full_like(exact, limits.eps), binade).clamp(min=limits.tiny * limits.eps)
    error = (y[kept].double() - exact).abs() - exact.abs() * 2**-32 * scale
    return float((error.clamp(min=0) / ulp).nan_to_num(nan=torch.inf).max())
