"""Dropout of single elements: Dropout."""

from __future__ import annotations

from torch import nn

from thinned.compare.implementation import Example, Masked, normal, ones
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import from_torch
from thinned.layers.dropout import Dropout

__all__ = ["ENTRIES"]

ENTRIES = [
    Entry(
        Dropout,
        mask="the input's",
        source="Srivastava et al. 2014, sections 4 and 10; PyTorch",
        peer=from_torch(nn.Dropout),
        example=Example(normal(6, 20)),
        workload=Workload(ones(1024, 1024)),
        masked=Masked(),
        exempt={"saved": "a cost and no law: the table of speed has the bytes of each implementation"},
    )
]
