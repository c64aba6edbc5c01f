"""Dropout inside attention: DropHead, DropKey."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, Masked, P, normal, ones
from thinned.compare.laws.chance import binomial_bounds
from thinned.compare.laws.law import Finding, Law, Level, holds_if, nothing_wrong
from thinned.compare.laws.values import departure
from thinned.compare.layers._entry import Entry, Workload, for_mask
from thinned.compare.layers._peers import Formula
from thinned.compare.settings import DTYPES, Settings
from thinned.layers.attention import DropHead, DropKey

__all__ = ["ENTRIES"]


class DropHeadFormula(Formula):
    def __init__(self, p: float = 0.5, dim: int = 1, normalize: str = "kept") -> None:
        super().__init__(p)
        self.dim, self.normalize = dim, normalize

    def drop(self, x: Tensor) -> Tensor:
        shape = [size if d in (0, self.dim % x.dim()) else 1 for d, size in enumerate(x.shape)]
        mask = (torch.rand(shape, device=x.device) < 1 - self.p).to(x.dtype)
        if self.normalize == "expected":
            return x * (mask / (1 - self.p) if self.p < 1 else mask)
        return x * mask * x.shape[self.dim] / mask.sum(self.dim, keepdim=True)


class DropKeyFormula(Formula):
    """Algorithm 1 of the paper."""

    def __init__(self, p: float = 0.5, broadcast_dims: Sequence[int] = ()) -> None:
        super().__init__(p)
        self.broadcast_dims = broadcast_dims

    def drop(self, logits: Tensor) -> Tensor:
        shared = {d % logits.dim() for d in self.broadcast_dims}
        shape = [1 if d in shared else size for d, size in enumerate(logits.shape)]
        dropped = torch.bernoulli(logits.new_full(shape, self.p))
        return logits + dropped * -1e12


SAMPLES, HEADS = 50_000, 4


def share_of_kept(layer: Case, settings: Settings) -> Finding:
    """Forward and backward, for each number of heads that a sample may have kept."""
    x = settings.normal(1000, HEADS, 2, 3, dtype=torch.float32).requires_grad_()
    upstream = settings.normal(*x.shape, dtype=torch.float32).flip(0)
    y = layer.make(p=0.5)(x)
    if y.isnan().any():
        return holds_if(False, "NaN with no head kept")
    (gradient,) = torch.autograd.grad(y, x, upstream)
    kept = (y != 0).any(-1).any(-1)
    for count in range(HEADS + 1):
        rows = kept.sum(1) == count
        scale = HEADS / max(1, count)
        mask = kept[rows][..., None, None].expand(-1, -1, 2, 3)
        complaint = departure(y.detach()[rows], x.detach()[rows], mask, scale)
        complaint = complaint or departure(gradient[rows], upstream[rows], mask, scale)
        if complaint:
            return holds_if(False, f"{complaint} with {count} of {HEADS} kept")
    return holds_if(True, "H / kept")


def mean_of_kept(layer: Case, settings: Settings) -> Finding:
    """A sample of ones has mean 1, or 0 without any head; the number of those is binomial."""
    p = 0.4
    y = layer.make(p=p)(settings.ones(SAMPLES, HEADS, 1, 1, dtype=torch.float32)).double()
    mean = y.mean((1, 2, 3))
    lost = int((mean == 0).sum())
    if not torch.allclose(mean[mean != 0], torch.ones((), dtype=mean.dtype), rtol=1e-6):
        return holds_if(False, "NaN" if mean.isnan().any() else "heads' sum changed")
    low, high = binomial_bounds(SAMPLES, p**HEADS)
    return holds_if(low <= lost <= high, f"{float(mean.mean()):.4f} x")


CAUSAL = torch.full((6, 6), -math.inf).triu(1)


def _logits(settings: Settings) -> Tensor:
    return settings.normal(2000, 2, 6, 6, dtype=torch.float32)


def weights(layer: Case, settings: Settings) -> Finding:
    """Against a softmax over the kept keys alone, for queries that have any."""
    x = _logits(settings)
    y = layer.make(p=0.5)(x)
    kept = y > -1e10
    some = kept.any(-1)
    wanted = x.masked_fill(~kept, -math.inf).softmax(-1)
    close = torch.allclose(y.softmax(-1)[some], wanted[some], rtol=1e-5, atol=1e-7)
    return holds_if(close and bool((~kept).any()), "of the kept keys" if close else "others")


def no_keys(layer: Case, settings: Settings) -> Finding:
    """The softmax at p = 1 is 1/6 for each of 6 keys, in each dtype."""
    for name, dtype in DTYPES.items():
        weight = layer.make(p=1.0)(_logits(settings)[:10].to(dtype)).softmax(-1)
        if weight.isnan().any():
            return holds_if(False, f"NaN in {name}")
        if not torch.allclose(weight, torch.full_like(weight, 1 / 6), rtol=2**-7):
            return holds_if(False, f"unequal in {name}")
    return holds_if(True, "equal weights")


def forbidden_keys(layer: Case, settings: Settings) -> Finding:
    """A causal mask of -inf, whose first query has a single key."""
    module, x, causal = layer.make(p=0.5), _logits(settings), CAUSAL.to(settings.device)
    for where, y in {"before": module(x + causal), "after": module(x) + causal}.items():
        weight = y.softmax(-1)
        if weight.isnan().any():
            return holds_if(False, f"NaN, added {where}")
        if weight.triu(1).any():
            return holds_if(False, f"attended to, added {where}")
    return holds_if(True, "no weight")


def gradient_of_dropped(layer: Case, settings: Settings) -> Finding:
    """The gradient equals dL/dy where a logit was kept, and is 0 elsewhere."""
    x = _logits(settings).requires_grad_()
    y = layer.make(p=0.5)(x)
    upstream = settings.normal(*x.shape, dtype=torch.float32).flip(0)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    kept = y > -1e10
    return nothing_wrong(departure(gradient, upstream, kept, 1.0), "that of kept logits")


def zeros_for_dropped(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return torch.where(y < -1e10, 0, y)


_heads, _keys = partial(Law, "heads"), partial(Law, "keys")

ENTRIES = [
    Entry(
        DropHead,
        functional="drop_head, drop_head_attention",
        mask="(N, H, 1, 1)",
        source="Zhou et al. 2020, section 3",
        peer=Implementation("formula", DropHeadFormula),
        example=Example(normal(3, 4, 5, 6)),
        workload=Workload(ones(16, 16, 64, 64)),
        masked=Masked((4000, 8, 2, 3), shared=(2, 3), arguments={"normalize": "expected"}),
        special=[
            *for_mask(
                Masked((4000, 8, 2, 3), shared=(2, 3)),
                "by kept",
                (f"drop rate at p = {P}", "sharing", "neighbours", "calls", "p = 1", "dropped NaN or inf"),
            ),
            _heads(
                "share of kept",
                "kept heads and their gradients count H / kept",
                share_of_kept,
                why="A sample's attention output grows or shrinks with the number of heads it kept.",
            ),
            _heads(
                "mean of kept",
                "E[y] = (1 - p^H) x, and a sample's mean is kept",
                mean_of_kept,
                why="Attention has another mean in training than in evaluation, or NaN without a head.",
            ),
        ],
    ),
    Entry(
        DropKey,
        mask="(N, H, L_q, L_k), or 1 along broadcast_dims",
        source="Li et al. 2023, section 3",
        peer=Implementation("formula", DropKeyFormula),
        example=Example(normal(3, 4, 5, 6)),
        workload=Workload(ones(16, 4, 128, 128)),
        masked=Masked((2000, 8, 3, 3), scale=lambda _: 1.0, through=lambda _: zeros_for_dropped),
        exempt={
            "complex": "logits are real",
            "dropped NaN or inf": "the softmax of a query with a NaN is NaN, whatever is dropped",
        },
        special=[
            *for_mask(
                Masked(
                    (2000, 8, 3, 3),
                    shared=(1, 2),
                    arguments={"broadcast_dims": (1, 2)},
                    through=lambda _: zeros_for_dropped,
                ),
                "whole keys",
                ("sharing",),
            ),
            _keys(
                "weights",
                "the softmax is that of the kept keys alone",
                weights,
                why="Dropped keys still get attention, or the weights no longer sum to 1.",
            ),
            _keys(
                "no keys",
                "at p = 1 all weights are equal, in each dtype",
                no_keys,
                level=Level.UNLIKE_TORCH,
                why="A query that loses all its keys turns the batch into NaN.",
            ),
            _keys(
                "forbidden keys",
                "what -inf forbids has no weight",
                forbidden_keys,
                why="A causal model looks into the future, or pads are attended to.",
            ),
            _keys(
                "gradient of dropped",
                "a dropped logit has no gradient",
                gradient_of_dropped,
                level=Level.NICETY,
                why="Weights are changed for keys that took no part.",
            ),
        ],
    ),
]
