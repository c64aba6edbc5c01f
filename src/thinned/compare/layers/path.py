"""Dropout of whole branches: DropPath, StochasticDepth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thinned.compare.laws.every_layer import general_laws
from thinned.compare.laws.mask import Masked, masked_laws
from thinned.compare.layers.entry import Entry, Example, Workload
from thinned.compare.layers.peers import from_library
from thinned.layers.path import DropPath, StochasticDepth

__all__ = ["ENTRIES"]


class DropPathFormula(nn.Module):
    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        mask = (torch.rand(len(x), *(1,) * (x.dim() - 1)) < keep).to(x.dtype)
        return x * (mask / keep if self.scale_by_keep and keep else mask)


class StochasticDepthFormula(nn.Module):
    def __init__(self, p: float, mode: str) -> None:
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        rows = len(x) if self.mode == "row" else 1
        return x * (torch.rand(rows, *(1,) * (x.dim() - 1)) < 1 - self.p) / (1 - self.p)


def _branch(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(6, 5, 4, dtype=dtype),)


_drop_path = Example(_branch, {"drop_prob": 0.5}, p_name="drop_prob")
_stochastic_depth = Example(_branch, {"p": 0.5, "mode": "row"})
_workload = Workload(lambda: (torch.ones(64, 64, 256),), {"drop_prob": 0.2}, broadcast=(64, 1, 1))

ENTRIES = [
    Entry(
        DropPath,
        functional="drop_path",
        mask="(N, 1, ...)",
        source="Huang et al. 2016, section 3; timm",
        peer=from_library("timm.layers.drop:DropPath", DropPathFormula),
        laws=(
            *general_laws(_drop_path),
            *masked_laws(Masked((20_000, 2, 3), shared=(1, 2), p_name="drop_prob")),
        ),
        example=_drop_path,
        workload=_workload,
    ),
    Entry(
        StochasticDepth,
        functional="stochastic_depth",
        mask='(N, 1, ...) for "row", (1, 1, ...) for "batch"',
        source="Huang et al. 2016, section 3; torchvision",
        peer=from_library("torchvision.ops.stochastic_depth:StochasticDepth", StochasticDepthFormula),
        laws=(
            *general_laws(_stochastic_depth),
            *masked_laws(Masked((20_000, 2, 3), shared=(1, 2), arguments={"mode": "row"})),
        ),
        example=_stochastic_depth,
        workload=Workload(_workload.inputs, {"p": 0.2, "mode": "row"}, _workload.broadcast),
    ),
]
