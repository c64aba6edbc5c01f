"""Units that keep their previous state: Zoneout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, Masked, normal
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.zoneout import Zoneout

__all__ = ["ENTRIES"]


class ZoneoutFormula(nn.Module):
    """The paper's, as arithmetic."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, candidate: Tensor, previous: Tensor) -> Tensor:
        zoned = (torch.rand_like(candidate) < self.p).to(candidate.dtype) if self.training else self.p
        return zoned * previous + (1 - zoned) * candidate


def of_zeros(layer: nn.Module, x: Tensor) -> Tensor:
    """With a previous state of zeros, zoneout is dropout that scales by 1."""
    y: Tensor = layer(x, torch.zeros_like(x))
    return y


def either_value(layer: Case, settings: Settings) -> Finding:
    """With infinities in the state that is not taken, and 1 beside 1e8."""
    infinity = torch.full((100, 100), float("inf"), device=settings.device)
    y = layer.make(p=0.5)(settings.ones(100, 100, dtype=torch.float32), infinity)
    exact = bool(((y == 1) | (y == infinity)).all())
    y = layer.make(p=0.5)(settings.ones(100, 100, dtype=torch.float32), torch.full_like(y, 1e8))
    exact &= bool(((y == 1) | (y == 1e8)).all())
    return holds_if(exact, "exact" if exact else "NaN" if y.isfinite().all() else "other values")


def expectation(layer: Case, settings: Settings) -> Finding:
    """After eval(), for p of 0, 0.1, 0.5 and 1, against p h' + (1-p) h to 1e-6."""
    candidate = settings.normal(100, 100, dtype=torch.float32)
    previous = candidate.flip(0)
    wrong = [
        p
        for p in (0.0, 0.1, 0.5, 1.0)
        if not torch.allclose(
            layer.make(p=p).eval()(candidate, previous), p * previous + (1 - p) * candidate, atol=1e-6
        )
    ]
    return holds_if(not wrong, f"not at p = {wrong[0]}" if wrong else "the expectation")


ENTRIES = [
    Entry(
        Zoneout,
        mask="(N, H), each step",
        source="Krueger et al. 2017, section 3",
        peer=Implementation("formula", ZoneoutFormula),
        example=Example(normal(6, 5, count=2), identity_in_evaluation=False, saved_bytes=1.0),
        workload=Workload(lambda: (torch.ones(2048, 512), torch.zeros(2048, 512))),
        masked=Masked((20_000, 3), scale=lambda _: 1.0, through=lambda _: of_zeros),
        exempt={"permuted input": "the output is contiguous"},
        special=[
            Law(
                "zoneout",
                "values",
                "each value is one of the two, exactly",
                either_value,
                level=Level.NICETY,
                why="A state that was not taken leaks in: an infinity becomes NaN, small values are lost.",
            ),
            Law(
                "zoneout",
                "expectation",
                "in evaluation p h' + (1-p) h",
                expectation,
                why="States in evaluation have another mean than in training.",
            ),
        ],
    )
]
