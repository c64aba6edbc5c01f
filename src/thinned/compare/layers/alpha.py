"""Dropout that keeps mean 0 and variance 1 through SELU: AlphaDropout, FeatureAlphaDropout."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Masked, normal, ones
from thinned.compare.laws.chance import DEVIATIONS, elements_to_show
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import from_torch
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
    """The formula: ``scale * x + shift`` if kept, ``fill`` if dropped."""

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

    def allowed(self, scaled: Tensor) -> Tensor:
        """How far a kept value may lie from ``scaled + shift``."""
        return TOLERANCE * (1 + scaled.abs() + self.shift)

    def dropped(self, y: Tensor) -> Tensor:
        return (y - self.fill).abs() <= TOLERANCE


def moments(layer: Case, settings: Settings, p: float) -> Finding:
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


def values(layer: Case, settings: Settings) -> Finding:
    """The two values, for several p, against the formula in double precision."""
    for p in (0.001, 0.1, P, 0.5, 0.9):
        law = Affine(p)
        x = settings.normal(1000, 50, 2, dtype=torch.float32)
        y = layer.make(p=p)(x).double()
        kept = x.double() * law.scale + law.shift
        allowed = law.allowed(x.double() * law.scale)
        wrong = ~(((y - law.fill).abs() <= allowed) | ((y - kept).abs() <= allowed))
        if wrong.any():
            example = float(y[wrong][0])
            return holds_if(False, f"{example:.4f} at p = {p}, not {law.fill:.4f} or {kept[wrong][0]:.4f}")
        if not law.dropped(y).any():
            return holds_if(False, f"no element is {law.fill:.4f} at p = {p}")
    return holds_if(True, f"{Affine(P).fill:.4f} at p = {P}")


def as_dropout(layer: nn.Module, x: Tensor, p: float) -> Tensor:
    """With 0 for what was dropped, and ``scale * x`` with the gradient of y where y is the kept value."""
    y: Tensor = layer(x)
    if p == 1:  # zeros
        return y
    law = Affine(p)
    scaled = x.detach() * law.scale
    kept = (y - scaled - law.shift).abs() <= law.allowed(scaled)
    return torch.where(law.dropped(y), 0, torch.where(kept, y - y.detach() + scaled, y))


LAWS = [
    Law(
        FAMILY,
        "values",
        "a x + aα'p if kept, aα'p - aα' if dropped, for every p",
        values,
        why="Activations drift away from the fixed point of SELU, layer by layer.",
    ),
    *(
        Law(
            FAMILY,
            f"mean, variance at p = {p}",
            "the mean 0 and variance 1 of standard normal inputs are kept",
            partial(moments, p=p),
            why="A self-normalising network no longer normalises itself in training.",
        )
        for p in (0.1, 0.5, 0.8)
    ),
]


def _entry(layer: type[nn.Module], peer: type[nn.Module], channels: bool) -> Entry:
    return Entry(
        layer,
        mask="(N, C, 1, ...)" if channels else "the input's",
        source=f"Klambauer et al. 2017, section 3{'; Tompson et al. 2015' if channels else ''}; PyTorch",
        peer=from_torch(peer),
        example=Example(normal(4, 5, 8)),
        workload=Workload(ones(16, 64, 32, 32)),
        masked=Masked(
            (100, 100, 3, 2),
            shared=(2, 3) if channels else (),
            scale=lambda p: Affine(p).scale,
            through=lambda p: partial(as_dropout, p=p),
        ),
        special=LAWS,
        exempt={"complex": "SELU is for real numbers"},
    )


ENTRIES = [
    _entry(AlphaDropout, nn.AlphaDropout, channels=False),
    _entry(FeatureAlphaDropout, nn.FeatureAlphaDropout, channels=True),
]
