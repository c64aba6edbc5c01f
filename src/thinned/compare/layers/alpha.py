"""Dropout that keeps mean 0 and variance 1 through SELU: AlphaDropout, FeatureAlphaDropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from thinned.compare.laws import Finding
from thinned.compare.laws.chance import (
    DEVIATIONS,
    associate,
    binomial_bounds,
    disjoint_pairs,
    elements_to_show,
    strongest,
)
from thinned.compare.laws.every_layer import general_laws
from thinned.compare.laws.law import holds_if
from thinned.compare.layers.entry import Entry, Example, Implementation, LayerLaw, Workload
from thinned.compare.layers.peers import from_torch
from thinned.compare.settings import Settings
from thinned.layers.alpha import AlphaDropout, FeatureAlphaDropout

__all__ = ["ENTRIES", "Affine"]

FAMILY = "alpha"
P = 0.3
BIAS = 0.02
ALPHA = 1.7580993408473766
TOLERANCE = 1e-6  # relative: a few ulp of float32, of numbers near 1


@dataclass(frozen=True)
class Affine:
    """What the formula makes of x: ``scale * x + shift`` if kept, ``fill`` if dropped."""

    p: float

    @property
    def scale(self) -> float:
        return 1 / math.sqrt((1 - self.p) * (1 + ALPHA**2 * self.p))

    @property
    def shift(self) -> float:
        return self.scale * ALPHA * self.p

    @property
    def fill(self) -> float:
        return self.shift - self.scale * ALPHA

    @property
    def fourth_moment(self) -> float:
        """``E[y**4]`` for standard normal x."""
        kept = 3 * self.scale**4 + 6 * self.scale**2 * self.shift**2 + self.shift**4
        return (1 - self.p) * kept + self.p * self.fill**4

    def dropped(self, y: Tensor) -> Tensor:
        return (y - self.fill).abs() <= TOLERANCE


def moments(layer: Implementation, settings: Settings, p: float) -> Finding:
    """Mean 0 and variance 1 of the output, for independent standard normal inputs and decisions.

    The variance of a sample variance follows from the fourth moment; N is such that 2 % show.
    """
    law = Affine(p)
    n = elements_to_show(BIAS, math.sqrt(law.fourth_moment - 1))
    x = settings.normal(math.ceil(n / 100), 100, 1, dtype=torch.float32)
    y = layer.make(p=p)(x).double()
    n = y.numel()
    mean, variance = float(y.mean()), float(y.var())
    bounds = DEVIATIONS / math.sqrt(n), DEVIATIONS * math.sqrt((law.fourth_moment - 1) / n) + 1 / n
    holds = abs(mean) <= bounds[0] and abs(variance - 1) <= bounds[1]
    beyond = f", beyond ± {bounds[0]:.4f} and 1 ± {bounds[1]:.4f}"
    measured = f"{mean:+.4f}, {variance:.4f}"
    return holds_if(holds, measured if holds else measured + beyond, mean=mean, variance=variance)


def values(layer: Implementation, settings: Settings) -> Finding:
    """The two values, for several p, against the formula in double precision."""
    for p in (0.001, 0.1, P, 0.5, 0.9):
        law = Affine(p)
        x = settings.normal(1000, 50, 2, dtype=torch.float32)
        y = layer.make(p=p)(x).double()
        kept = x.double() * law.scale + law.shift
        allowed = TOLERANCE * (1 + (x.double() * law.scale).abs() + law.shift)
        wrong = ~(((y - law.fill).abs() <= allowed) | ((y - kept).abs() <= allowed))
        if wrong.any():
            example = float(y[wrong][0])
            return holds_if(False, f"{example:.4f} at p = {p}, not {law.fill:.4f} or {kept[wrong][0]:.4f}")
        if not law.dropped(y).any():
            return holds_if(False, f"no element is {law.fill:.4f} at p = {p}")
    return holds_if(True, f"{Affine(P).fill:.4f} at p = {P}")


def rate(layer: Implementation, settings: Settings) -> Finding:
    """Dropped decisions are Binomial(N, p), with N such that a rate 2 % off shows."""
    n = elements_to_show(BIAS, math.sqrt((1 - P) / P))
    x = torch.ones(math.ceil(n / 100), 100, 1, device=settings.device)
    dropped = int(Affine(P).dropped(layer.make(p=P)(x)).sum())
    n = x.numel()
    low, high = binomial_bounds(n, P)
    measured = f"{dropped / n:#.4g}"
    holds = low <= dropped <= high
    beyond = f"{measured}, beyond {low / n:#.4g} to {high / n:#.4g}"
    return holds_if(holds, measured if holds else beyond, elements=n, rate=dropped / n)


def sharing(layer: Implementation, settings: Settings, channels: bool) -> Finding:
    """A channel is kept or dropped as a whole; without channels, no dimension is."""
    y = layer.make(p=P)(torch.ones(100, 100, 3, 2, device=settings.device))
    dropped = Affine(P).dropped(y)
    whole = bool((dropped == dropped[..., :1, :1]).all())
    return holds_if(whole == channels, "one decision a channel" if whole else "one decision an element")


def independence(layer: Implementation, settings: Settings) -> Finding:
    """Neighbouring samples and channels, and the masks of two calls."""
    module, x = layer.make(p=P), torch.ones(300, 200, 1, device=settings.device)
    one, other = (Affine(P).dropped(module(x)).squeeze(-1) for _ in range(2))
    found = [associate(one.flatten(), other.flatten(), "two calls")]
    for dim in range(2):
        found += [associate(*pair, f"dimension {dim}") for pair in disjoint_pairs(one.movedim(dim, 0), lag=1)]
    return strongest(found)


def own_mask(layer: Implementation, settings: Settings) -> Finding:
    """dL/dx is a times dL/dy where x was kept, 0 elsewhere."""
    law = Affine(P)
    x = torch.ones(100, 50, 2, device=settings.device, requires_grad=True)
    upstream = settings.normal(100, 50, 2, dtype=torch.float32)
    y = layer.make(p=P)(x)
    (downstream,) = torch.autograd.grad(y, x, upstream)
    expected = torch.where(law.dropped(y), 0.0, upstream * law.scale)
    right = torch.allclose(downstream, expected, rtol=TOLERANCE, atol=0)
    return holds_if(right, "forward's mask" if right else "other numbers")


def all_dropped(layer: Implementation, settings: Settings) -> Finding:
    x = settings.normal(100, 50, 2, dtype=torch.float32).requires_grad_()
    y = layer.make(p=1.0)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    zeros = not y.count_nonzero() and not gradient.count_nonzero()
    return holds_if(zeros, "zeros" if zeros else "NaN" if y.isnan().any() else "numbers")


def not_finite(layer: Implementation, settings: Settings) -> Finding:
    """Of infinities and NaN, at p = 0.9."""
    x = torch.full((100, 50, 2), math.inf, device=settings.device)
    x[:50] = math.nan
    y = layer.make(p=0.9)(x)
    dropped = y.isfinite()
    right = all(part.any() for part in dropped.split(50)) and bool(Affine(0.9).dropped(y)[dropped].all())
    return holds_if(right, f"{Affine(0.9).fill:.4f}" if right else "NaN")


def in_place(layer: Implementation, settings: Settings) -> Finding:
    x = settings.normal(100, 50, 2, dtype=torch.float32)
    y = layer.make(p=P, inplace=True)(x)
    return holds_if(y is x, "the input" if y is x else "another tensor")


def _laws(channels: bool) -> tuple[LayerLaw, ...]:
    what = "channel" if channels else "element"
    checks: dict[str, tuple[str, Callable[..., Finding]]] = {
        "values": ("a x + aα'p if kept, aα'p - aα' if dropped, for every p", values),
        "rate": (f"the number of dropped decisions is binomial with p = {P}", rate),
        "sharing": (f"one decision for each {what}", partial(sharing, channels=channels)),
        "independence": ("neighbours and calls are independent of each other", independence),
        **{
            f"mean, variance at p = {p}": (
                "of standard normal inputs, 0 and 1 are kept",
                partial(moments, p=p),
            )
            for p in (0.1, 0.5, 0.8)
        },
        "mask of gradient": ("a where kept, 0 where dropped", own_mask),
        "p = 1": ("all values and all gradients are zero", all_dropped),
        "dropped NaN": ("a dropped element has its value, NaN and infinity included", not_finite),
        "inplace": ("inplace=True writes over the input", in_place),
    }
    return tuple(LayerLaw(FAMILY, name, *rest) for name, rest in checks.items())


def _entry(layer: type[nn.Module], peer: type[nn.Module], functional: str, channels: bool) -> Entry:
    example = Example(_inputs, {"p": 0.5})
    return Entry(
        layer,
        functional=functional,
        mask="(N, C, 1, ...)" if channels else "the input's",
        source=f"Klambauer et al. 2017, section 3{'; Tompson et al. 2015' if channels else ''}; PyTorch",
        peer=from_torch(peer),
        laws=(*general_laws(example), *_laws(channels)),
        example=example,
        workload=Workload(
            lambda: (torch.ones(16, 64, 32, 32),), {"p": 0.2}, broadcast=(16, 64, 1, 1) if channels else None
        ),
    )


def _inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(4, 5, 8, dtype=dtype),)


ENTRIES = [
    _entry(AlphaDropout, nn.AlphaDropout, "alpha_dropout", channels=False),
    _entry(FeatureAlphaDropout, nn.FeatureAlphaDropout, "feature_alpha_dropout", channels=True),
]
