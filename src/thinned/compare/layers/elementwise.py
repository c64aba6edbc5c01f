"""Dropout of single elements: Dropout."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.compare.laws.every_layer import general_laws
from thinned.compare.laws.mask import Masked, masked_laws
from thinned.compare.layers.entry import Entry, Example, Workload
from thinned.compare.layers.peers import from_torch
from thinned.layers.dropout import Dropout

__all__ = ["ENTRIES"]


def _rows(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(6, 20, dtype=dtype),)


_example = Example(_rows, {"p": 0.5})

ENTRIES = [
    Entry(
        Dropout,
        functional="dropout",
        mask="the input's",
        source="Srivastava et al. 2014, sections 4 and 10; PyTorch",
        peer=from_torch(torch.nn.Dropout),
        laws=(*general_laws(_example), *masked_laws(Masked((200, 100)))),
        example=_example,
        workload=Workload(lambda: (torch.ones(1024, 1024),), {"p": 0.2}),
    )
]
