"""Dropout of branches: DropPath, StochasticDepth, Residual."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Example, Implementation, Masked, normal, ones
from thinned.compare.layers._entry import Entry, Workload, for_mask
from thinned.compare.layers._peers import Formula, from_library
from thinned.layers.path import DropPath, StochasticDepth
from thinned.layers.residual import Residual

__all__ = ["ENTRIES"]


class DropPathFormula(nn.Module):
    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        self.drop_prob, self.scale_by_keep = drop_prob, scale_by_keep

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.drop_prob == 0:
            return x
        keep = 1 - self.drop_prob
        mask = (torch.rand(len(x), *(1,) * (x.dim() - 1), device=x.device) < keep).to(x.dtype)
        return x * (mask / keep if self.scale_by_keep and keep else mask)


class StochasticDepthFormula(Formula):
    def __init__(self, p: float, mode: str) -> None:
        super().__init__(p)
        self.mode = mode

    def drop(self, x: Tensor) -> Tensor:
        rows = len(x) if self.mode == "row" else 1
        return x * (torch.rand(rows, *(1,) * (x.dim() - 1), device=x.device) < 1 - self.p) / (1 - self.p)


class MaskedResidual(nn.Module):
    """A block that computes its branch for all rows."""

    def __init__(self, branch: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.branch, self.drop = branch, drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))


def _branch(width: int) -> nn.Module:
    """An MLP; for a width of 0, a branch that returns its input."""
    return (
        nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        if width
        else nn.Identity()
    )


def _residual(p: float, width: int = 0) -> nn.Module:
    return Residual(_branch(width), p)


DROP_PATH = from_library("timm.layers.drop:DropPath", DropPathFormula)


def _masked_residual(p: float, width: int = 0) -> nn.Module:
    return MaskedResidual(_branch(width), DROP_PATH.make(drop_prob=p))


ENTRIES = [
    Entry(
        DropPath,
        mask="(N, 1, ...)",
        source="Huang et al. 2016, section 3; timm",
        peer=DROP_PATH,
        example=Example(normal(6, 5, 4), {"drop_prob": 0.5}, p_name="drop_prob"),
        workload=Workload(ones(64, 64, 256), {"drop_prob": 0.2}),
        masked=Masked((20_000, 2, 3), shared=(1, 2)),
    ),
    Entry(
        StochasticDepth,
        mask='(N, 1, ...) for "row", (1, 1, ...) for "batch"',
        source="Huang et al. 2016, section 3; torchvision",
        peer=from_library("torchvision.ops.stochastic_depth:StochasticDepth", StochasticDepthFormula),
        example=Example(normal(6, 5, 4), {"p": 0.5, "mode": "row"}),
        workload=Workload(ones(64, 64, 256), {"p": 0.2, "mode": "row"}),
        masked=Masked((20_000, 2, 3), shared=(1, 2), arguments={"mode": "row"}),
        special=for_mask(
            Masked((20, 2, 3), shared=(0, 1, 2), arguments={"mode": "batch"}),
            "batch",
            ("sharing", "kept values"),
        ),
    ),
    Entry(
        Residual,
        mask='(N, 1, ...) for "row", (1, 1, ...) for "batch"',
        source="Huang et al. 2016, section 3; DINOv2",
        peer=Implementation(DROP_PATH.name, _masked_residual, f"{DROP_PATH.origin} around the branch"),
        example=Example(normal(6, 5, 4), {"p": 0.5}, identity_in_evaluation=False),
        workload=Workload(ones(64, 64, 256), {"p": 0.4, "width": 256}),
        masked=Masked((20_000, 2, 3), shared=(1, 2), through=lambda _: lambda layer, x: layer(x) - x),
        make=_residual,
    ),
]
