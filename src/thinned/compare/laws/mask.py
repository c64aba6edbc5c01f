"""The law of a layer that multiplies by a mask: rate, sharing, independence, scale, mean, variance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thinned.compare.laws import Finding
from thinned.compare.laws.chance import (
    DEVIATIONS,
    associate,
    binomial_bounds,
    disjoint_pairs,
    elements_to_show,
    strongest,
)
from thinned.compare.laws.law import holds_if, nothing_wrong
from thinned.compare.laws.values import departure
from thinned.compare.layers.entry import Implementation, LayerLaw, first
from thinned.compare.settings import Settings

__all__ = ["Masked", "masked_laws"]

RATE_BIAS = 0.02


@dataclass(frozen=True)
class Masked:
    """What the mask of a layer is supposed to be.

    Attributes:
        arguments: the constructor's, apart from the probability ``p``, which is called ``p_name``.
        shape: of an input in which there are many decisions.
        shared: the dimensions along which elements share one decision.
        scale: what a kept element is multiplied by, as a function of ``p``.
    """

    shape: tuple[int, ...]
    shared: tuple[int, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    p: float = 0.3
    p_name: str = "p"
    scale: Callable[[float], float] = field(default=lambda p: 1 / (1 - p))

    def make(self, layer: Implementation, p: float | None = None) -> Callable[..., Any]:
        return layer.make(**{self.p_name: self.p if p is None else p, **self.arguments})

    def ones(self, settings: Settings) -> Tensor:
        return torch.ones(self.shape, device=settings.device)

    def decisions(self, y: Tensor) -> Tensor:
        """True where dropped, each decision once."""
        return self.once(y) == 0

    def once(self, y: Tensor) -> Tensor:
        for dim in self.shared:
            y = y.narrow(dim, 0, 1)
        return y


def rate(layer: Implementation, settings: Settings, masked: Masked) -> Finding:
    """Dropped decisions are Binomial(N, p), with N such that a rate 2 % off shows."""
    n = elements_to_show(RATE_BIAS, math.sqrt((1 - masked.p) / masked.p))
    module, x = masked.make(layer), masked.ones(settings)
    each = masked.decisions(x).numel()
    calls = math.ceil(n / each)
    dropped = sum(int(masked.decisions(first(module(x))).sum()) for _ in range(calls))
    n = calls * each
    low, high = binomial_bounds(n, masked.p)
    measured = f"{dropped / n:#.4g}"
    holds = low <= dropped <= high
    beyond = f"{measured}, beyond {low / n:#.4g} to {high / n:#.4g}"
    return holds_if(holds, measured if holds else beyond, elements=n, rate=dropped / n)


def sharing(layer: Implementation, settings: Settings, masked: Masked) -> Finding:
    """Along shared dimensions all are kept or all dropped."""
    y = first(masked.make(layer)(masked.ones(settings)))
    same = bool(((y != 0) == (masked.once(y) != 0)).all())
    return holds_if(same, "one decision" if same else "decisions differ")


def independence(layer: Implementation, settings: Settings, masked: Masked) -> Finding:
    """Neighbours along each dimension that is not shared, and the masks of two calls."""
    module, x = masked.make(layer), masked.ones(settings)
    first_mask, second_mask = (masked.decisions(first(module(x))) for _ in range(2))
    found = [associate(first_mask.flatten(), second_mask.flatten(), "two calls")]
    for dim, size in enumerate(first_mask.shape):
        if size > 1:
            along = first_mask.movedim(dim, 0)
            found += [associate(*pair, f"dimension {dim}") for pair in disjoint_pairs(along, lag=1)]
    return strongest(found)


def kept_values(layer: Implementation, settings: Settings, masked: Masked) -> Finding:
    x = _normal(masked, settings)
    y = first(masked.make(layer)(x))
    return nothing_wrong(departure(y, x, scale=masked.scale(masked.p)), f"{masked.scale(masked.p):.4g} x")


def moments(layer: Implementation, settings: Settings, masked: Masked) -> Finding:
    """Of ones: mean s(1-p) and variance s² p(1-p), for the scale s, within the bounds of the normal law."""
    p, scale = masked.p, masked.scale(masked.p)
    module, x = masked.make(layer), masked.ones(settings)
    n = elements_to_show(RATE_BIAS, math.sqrt((1 - p) / p))  # at which a rate 2 % off shows in the mean
    calls = math.ceil(n / masked.decisions(x).numel())
    y = torch.cat([masked.once(first(module(x))).double().flatten() for _ in range(calls)])
    mean, variance = float(y.mean()), float(y.var())
    q = 1 - p
    # The variance of a sample variance, from the fourth central moment of a Bernoulli variable.
    fourth = scale**4 * p * q * (p**3 + q**3)
    spread = math.sqrt((fourth - (scale**2 * p * q) ** 2) / y.numel())
    holds = (
        abs(mean - scale * q) <= DEVIATIONS * scale * math.sqrt(p * q / y.numel())
        and abs(variance - scale**2 * p * q) <= DEVIATIONS * spread + 4 * scale**2 / y.numel()
    )
    measured = f"{mean:.4f}, {variance:.4f}"
    wanted = f"{scale * q:.4f}, {scale**2 * p * q:.4f}"
    return holds_if(holds, measured if holds else f"{measured}, not {wanted}", mean=mean, variance=variance)


def own_mask(layer: Implementation, settings: Settings, masked: Masked) -> Finding:
    """dL/dx = dL/dy * mask * scale."""
    x = _normal(masked, settings).requires_grad_()
    upstream = _normal(masked, settings).flip(0)
    y = first(masked.make(layer)(x))
    (downstream,) = torch.autograd.grad(y, x, upstream)
    complaint = departure(downstream, upstream, kept=y != 0, scale=masked.scale(masked.p))
    return nothing_wrong(complaint, "forward's mask")


def all_dropped(layer: Implementation, settings: Settings, masked: Masked) -> Finding:
    x = _normal(masked, settings).requires_grad_()
    y = first(masked.make(layer, p=1.0)(x))
    (gradient,) = torch.autograd.grad(y.sum(), x) if y.requires_grad else (torch.zeros_like(x),)
    zeros = not y.count_nonzero() and not gradient.count_nonzero()
    return holds_if(zeros, "zeros" if zeros else "NaN" if y.isnan().any() else "numbers")


def not_finite(layer: Implementation, settings: Settings, masked: Masked) -> Finding:
    """At p = 0.9 some of many decisions drop."""
    x = torch.full_like(masked.ones(settings), math.nan)
    zeros = int((first(masked.make(layer, p=0.9)(x)) == 0).sum())
    return holds_if(zeros > 0, "0" if zeros else "NaN")


def _normal(masked: Masked, settings: Settings) -> Tensor:
    return settings.normal(*masked.shape, dtype=torch.float32)


FAMILY = "mask"


def masked_laws(masked: Masked) -> tuple[LayerLaw, ...]:
    """The laws of one mask."""
    shared = f"one decision along dimensions {', '.join(map(str, masked.shared))}" if masked.shared else ""
    checks: dict[str, tuple[str, Callable[..., Finding]]] = {
        "rate": (f"the number of dropped decisions is binomial with p = {masked.p}", rate),
        **({"sharing": (shared, sharing)} if masked.shared else {}),
        "independence": ("neighbours and calls are independent of each other", independence),
        "kept values": ("a kept x becomes x times the scale, within 2 ulp", kept_values),
        "mean, variance": ("of ones: s(1-p) and s² p(1-p) for the scale s", moments),
        "mask of gradient": ("backward has the forward's mask and scale", own_mask),
        "p = 1": ("all values and all gradients are zero", all_dropped),
        "dropped NaN": ("a dropped element is 0, NaN included", not_finite),
    }
    return tuple(
        LayerLaw(FAMILY, name, statement, partial(check, masked=masked))
        for name, (statement, check) in checks.items()
    )
