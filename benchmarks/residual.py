"""Residual branches that drop rows: computed for the kept rows alone, masked, or without dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import thinned
from benchmarks.case import Bound, Case, Work
from thinned.compare.layers import ENTRIES
from thinned.compare.memory import saved_by_call

__all__ = ["convnext", "memory", "residual_cases", "vit"]

Branches: TypeAlias = Callable[[], tuple[nn.Module, ...]]

NONE, MASKED = "no dropout", "thinned, masked"
BATCH = 32
RATES = (0.1, 0.2, 0.4)
PROMISED = {0.4: (Bound(NONE, 1 / 1.5), Bound(MASKED, 1 / 1.7))}


def residual_cases(threads: int) -> Iterator[Case]:
    """A training step of stacks of residual blocks, the optimizer's part apart."""
    for (name, arguments), p in product(STACKS.items(), RATES):
        yield Case(
            "residual, forward + backward",
            f"{name}, batch {BATCH}, p = {p}; a step",
            partial(_steps, *arguments, p),
            PROMISED.get(p, ()),
            threads=threads,
            rounds=5 if p in PROMISED else 2,
        )


def memory(p: float) -> dict[str, float]:
    """Bytes that 12 blocks of ViT-T save for backward, for each element of their input."""
    branches, depth, shape = STACKS["12 blocks of ViT-T, 65 tokens"]
    x = torch.randn(BATCH, *shape, requires_grad=True)
    models = {name: _stack(branches, depth, join) for name, join in _joins(p).items()}
    return {name: saved_by_call(model, x, model.parameters()) for name, model in models.items()}


def _stack(branches: Branches, depth: int, join: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Blocks of residual branches."""
    return nn.Sequential(*(join(branch) for _ in range(depth) for branch in branches()))


class Added(nn.Module):
    """``x + drop(branch(x))``."""

    def __init__(self, branch: nn.Module, drop: nn.Module) -> None:
        super().__init__()
        self.branch, self.drop = branch, drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.branch(x))  # type: ignore[no-any-return]


def _joins(p: float) -> dict[str, Callable[[nn.Module], nn.Module]]:
    (peer,) = (entry.peer for entry in ENTRIES if entry.name == "DropPath")
    drops = {NONE: nn.Identity(), peer.origin: peer.make(p), MASKED: thinned.DropPath(p)}
    return {
        **{name: partial(Added, drop=drop) for name, drop in drops.items()},
        "thinned": partial(thinned.Residual, p=p),
    }


def _steps(branches: Branches, depth: int, shape: tuple[int, ...], p: float) -> Work:
    x = torch.randn(BATCH, *shape, requires_grad=True)
    upstream = torch.ones_like(x)

    def step(model: nn.Module) -> None:
        # A branch that no row keeps has no gradients.
        torch.autograd.grad(model(x), [x, *model.parameters()], upstream, allow_unused=True)

    return {name: partial(step, _stack(branches, depth, join)) for name, join in _joins(p).items()}


def vit(width: int = 192, heads: int = 3) -> tuple[nn.Module, ...]:
    """The branches of a block of ViT-T: Dosovitskiy et al. 2021, Touvron et al. 2021."""
    mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
    return tuple(nn.Sequential(nn.LayerNorm(width), part) for part in (Attention(width, heads), mlp))


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def convnext(width: int = 96) -> tuple[nn.Module, ...]:
    """The branch of a block of ConvNeXt: Liu et al. 2022."""
    return (ConvNeXt(width),)


class ConvNeXt(nn.Module):
    """A depthwise convolution, and an MLP along the channels with a layer scale."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.scale = nn.Parameter(torch.full((width,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.depthwise(x).movedim(1, -1)) * self.scale
        return y.movedim(-1, 1)  # type: ignore[no-any-return]


STACKS: dict[str, tuple[Branches, int, tuple[int, ...]]] = {
    "12 blocks of ViT-T, 65 tokens": (vit, 12, (65, 192)),
    "4 blocks of ViT-T, 197 tokens": (vit, 4, (197, 192)),
    "4 blocks of ConvNeXt, 96 x 14 x 14": (convnext, 4, (96, 14, 14)),
}
