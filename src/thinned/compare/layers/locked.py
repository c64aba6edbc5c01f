"""Dropout of sequences with one mask for all steps: LockedDropout."""

from __future__ import annotations

from torch import Tensor, nn

from thinned.compare.implementation import Example, Implementation, Masked, normal, ones
from thinned.compare.layers._entry import Entry, Workload
from thinned.layers.locked import LockedDropout

__all__ = ["ENTRIES"]


class LockedDropoutFormula(nn.Module):
    """That of the code of AWD-LSTM."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
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
