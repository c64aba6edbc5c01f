"""Dropout of what is smallest in magnitude: TargetedDropout."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from thinned.compare.implementation import Case, Example, Implementation, Masked, P
from thinned.compare.laws.chance import (
    associate,
    disjoint_pairs,
    elements_to_show,
    strongest,
    within_binomial,
)
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import Formula
from thinned.compare.settings import Settings
from thinned.layers.targeted import TargetedDropout

__all__ = ["ENTRIES"]


class TargetedDropoutFormula(Formula):
    """The authors' candidates: weights below the sorted magnitude at the fraction."""

    def __init__(self, p: float = 0.5, target: float = 0.5, kind: str = "weight") -> None:
        super().__init__(p)
        self.target, self.kind = target, kind

    def drop(self, weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        size = flat.abs() if self.kind == "weight" else flat.norm(dim=1)
        threshold = size.sort(-1)[0][..., int(self.target * size.shape[-1]), None]
        candidates = size < threshold
        dropped = candidates & (torch.rand_like(size) < self.p)
        dropped = dropped.view(weight.shape if self.kind == "weight" else (-1, *(1,) * (weight.dim() - 1)))
        return weight * (1 - dropped.to(weight.dtype))


TARGET = 0.4
RATE_BIAS = 0.02
SHAPES = {"weight": (1000, 200), "unit": (20_000, 10)}


def _weight(settings: Settings, kind: str, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A weight and its candidates, by sorting it."""
    weight = settings.normal(*SHAPES[kind], dtype=dtype)
    size = weight.abs() if kind == "weight" else weight.norm(dim=1)
    order = size.argsort(dim=-1, stable=True)
    count = round(TARGET * size.shape[-1])
    candidates = torch.zeros_like(size, dtype=torch.bool).scatter(-1, order[..., :count], True)
    return weight, candidates if kind == "weight" else candidates[:, None].expand(weight.shape)


def candidates(layer: Case, settings: Settings, kind: str) -> Finding:
    """At p = 1 exactly the candidates are dropped."""
    weight, expected = _weight(settings, kind)
    y = layer.make(p=1.0, target=TARGET, kind=kind)(weight)
    wrong = int(((y == 0) != expected).sum())
    return holds_if(not wrong, f"{wrong} weights differ" if wrong else "the smallest")


def fraction(layer: Case, settings: Settings) -> Finding:
    """A half-precision weight has many equal magnitudes at the boundary."""
    weight, _ = _weight(settings, "weight", torch.bfloat16)
    y = layer.make(p=1.0, target=TARGET)(weight)
    counts = (y == 0).sum(1)
    wanted = round(TARGET * weight.shape[1])
    right = bool((counts == wanted).all())
    return holds_if(right, f"{wanted}" if right else f"{int(counts.min())} to {int(counts.max())}")


def all_targeted(layer: Case, settings: Settings) -> Finding:
    """At p = 1 no weight is dropped for target = 0, and every weight for target = 1."""
    weight, _ = _weight(settings, "weight")
    none, every = (layer.make(p=1.0, target=target)(weight).count_nonzero() for target in (0.0, 1.0))
    return holds_if(none == weight.numel() and every == 0, f"{none} and {every} stay")


def rate(layer: Case, settings: Settings, kind: str) -> Finding:
    """Counts dropped candidates, in so many calls that a rate 2 % off shows."""
    weight, chosen = _weight(settings, kind)
    if kind == "unit":
        chosen = chosen[:, 0]
    module = layer.make(p=P, target=TARGET, kind=kind)
    calls = math.ceil(elements_to_show(RATE_BIAS, math.sqrt((1 - P) / P)) / int(chosen.sum()))
    dropped = 0
    for _ in range(calls):
        zeros = module(weight) == 0
        dropped += int((zeros if kind == "weight" else zeros[:, 0]).sum())
    n = calls * int(chosen.sum())
    return within_binomial(dropped, n, P)


def independence(layer: Case, settings: Settings) -> Finding:
    """Fisher's exact test on the candidates dropped: between two calls, and between neighbours."""
    weight, chosen = _weight(settings, "weight")
    module = layer.make(p=P, target=TARGET)
    first, second = ((module(weight) == 0)[chosen] for _ in range(2))
    found = [associate(first, second, "two calls")]
    found += [associate(*pair, "neighbours") for pair in disjoint_pairs(first, lag=1)]
    return strongest(found)


def others(layer: Case, settings: Settings, kind: str) -> Finding:
    """Weights above the threshold, and candidates that are kept, are equal bit for bit."""
    weight, chosen = _weight(settings, kind)
    y = layer.make(p=P, target=TARGET, kind=kind)(weight)
    stays = torch.equal(y[~chosen], weight[~chosen])
    unscaled = torch.equal(y[y != 0], weight[y != 0])
    together = kind == "weight" or bool(((y == 0) == (y[:, :1] == 0)).all())
    return holds_if(stays and unscaled and together, "as they were" if stays and unscaled else "changed")


FAMILY = "targeted"
_law = partial(Law, FAMILY)

ENTRIES = [
    Entry(
        TargetedDropout,
        mask='(out, in, *) for "weight", (out, 1, *) for "unit"',
        source="Gomez et al. 2019, section 3",
        peer=Implementation("formula", TargetedDropoutFormula),
        example=Example(
            # Magnitudes that every dtype tells apart.
            lambda dtype: ((torch.randperm(120) - 59.75).view(8, 5, 3).to(dtype) / 16,),
            {"p": 0.5, "target": 0.6},
            saved_bytes=1.0,
        ),
        workload=Workload(lambda: (torch.randn(1024, 1024),), {"p": 0.5, "target": 0.5}),
        masked=Masked((1000, 200), arguments={"target": 1.0}, scale=lambda _: 1.0),
        exempt={"permuted input": "the output is contiguous"},
        special=[
            *(
                law
                for kind in ("weight", "unit")
                for law in (
                    _law(
                        f"candidates, {kind}",
                        f"at p = 1 the {TARGET:.0%} of smallest magnitude are dropped, and nothing else",
                        partial(candidates, kind=kind),
                        why="Large weights, which pruning is to keep, are dropped.",
                    ),
                    _law(
                        f"rate, {kind}",
                        f"the number of dropped candidates is binomial with p = {P}",
                        partial(rate, kind=kind),
                        why="The network is prepared for another amount of pruning than p says.",
                    ),
                    _law(
                        f"others, {kind}",
                        "what is no candidate stays, and so does a candidate that is kept, unscaled",
                        partial(others, kind=kind),
                        why="The weights that pruning keeps are not those that were trained.",
                    ),
                )
            ),
            _law(
                "equal magnitudes",
                "bfloat16 weights of equal size do not change the fraction",
                fraction,
                level=Level.NICETY,
                why="In half precision, where many weights are equal, too few or too many are dropped.",
            ),
            _law(
                "target = 0, 1",
                "no weight is a candidate, and every weight is",
                all_targeted,
                level=Level.UNLIKE_TORCH,
                why="The ends of a schedule of the target drop too few or too many weights.",
            ),
            _law(
                "independence",
                "candidates and calls are independent of each other",
                independence,
                why="Weights that are to be pruned learn to rely on each other.",
            ),
        ],
    )
]
