"""Calls under a seed, and comparisons of their values that say in words how they differ."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thinned.compare.figures import decimal, significant
from thinned.compare.implementation import first
from thinned.compare.settings import Settings

__all__ = ["P_ERROR", "TOLERANCE_ULP", "departure", "same", "scale_of", "ulps_off", "under_seed"]

REALISED = 2**-32  # a keep probability realised with 32 bits is right
P_ERROR = 2**-25  # the rounding of a p below 1 that a layer holds in float32, such as in a buffer
TOLERANCE_ULP = 2.0  # a rounded scale costs up to 1 ulp of the product, rounding the product 1/2


def departure(
    y: Tensor,
    x: Tensor,
    kept: Tensor | None = None,
    scale: float | None = None,
    p_error: float = REALISED,
) -> str | None:
    """None if each element of ``y`` is ``x * scale`` where kept and 0 elsewhere, else a complaint.

    Args:
        y: the tensor to judge.
        x: the input, without zeros, so that a zero in ``y`` means dropped.
        kept: the mask that ``y`` has to have; without it, any mask.
        scale: the factor of kept elements; without it, any factor that is the same for all.
        p_error: what the layer's p may be off by.
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
    off = ulps_off(y, x, own_scale if scale is None else scale, p_error)
    if off <= TOLERANCE_ULP:
        return None
    if scale is None or math.isclose(own_scale, scale, rel_tol=1e-3):
        return f"kept values {decimal(off)} ulp off"
    return f"scaled by {significant(own_scale, 4)}, not {significant(scale, 4)}"


def scale_of(y: Tensor, x: Tensor) -> float:
    """The factor of kept elements: the median of ``y/x``."""
    kept = y != 0
    return float((y[kept].double() / x[kept].double()).median())


def ulps_off(y: Tensor, x: Tensor, scale: float, p_error: float = REALISED) -> float:
    """The largest distance of kept values from ``x * scale``, in units of the last place of ``x``'s dtype.

    A keep probability that is off by ``p_error`` makes a relative error of ``p_error * scale``: forgiven.
    """
    kept = y != 0
    if not kept.any():
        return 0.0
    exact = x[kept].double() * scale
    limits = torch.finfo(x.dtype)
    binade = torch.frexp(exact).exponent - 1
    ulp = torch.ldexp(torch.full_like(exact, limits.eps), binade).clamp(min=limits.tiny * limits.eps)
    error = (y[kept].double() - exact).abs() - exact.abs() * p_error * scale
    return float((error.clamp(min=0) / ulp).nan_to_num(nan=torch.inf).max())


def under_seed(settings: Settings, call: Callable[..., Any], *inputs: Tensor, offset: int = 0) -> Tensor:
    """The first output of a call, from the settings' seed plus ``offset``."""
    torch.manual_seed(settings.seed + offset)
    return first(call(*inputs))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and values, NaN included."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
