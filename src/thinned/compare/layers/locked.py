"""Dropout of sequences with one mask for all steps: LockedDropout."""

from __future__ import annotations

from torch import Tensor

from thinned.compare.implementation import Example, Implementation, Masked, normal, ones
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import Formula
from thinned.layers.locked import LockedDropout

__all__ = ["ENTRIES"]


class LockedDropoutFormula(Formula):
    """AWD-LSTM's code."""

    def drop(self, x: Tensor) -> Tensor:
        mask = x.new_empty(1, *x.shape[1:]).bernoulli_(1 - self.p) / (1 - self.p)
        return mask.expand_as(x) * x


ENTRIES = [
    Entry(
        LockedDropout,
        mask="(1, N, C)",
        source="Gal & Ghahramani 2016, section 4; AWD-LSTM",
        peer=Implementation("formula", LockedDropoutFormula),
        example=Example(normal(6, 5, 4)),
        workload=Workload(ones(64, 32, 512), {"p": 0.5}),
        masked=Masked((3, 200, 100), shared=(0,)),
    )
]
