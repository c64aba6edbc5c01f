"""Dropout of blocks: DropBlock1d, DropBlock2d, DropBlock3d."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from scipy import optimize, stats
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.compare.implementation import Case, Example, Implementation, Masked, P, normal, ones
from thinned.compare.laws.chance import DEVIATIONS, FALSE_ALARM, associate, elements_to_show, strongest
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.laws.values import TOLERANCE_ULP, scale_of, ulps_off
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import Formula, from_library
from thinned.compare.settings import Settings
from thinned.layers.block import DropBlock1d, DropBlock2d, DropBlock3d

__all__ = ["ENTRIES", "Blocks"]

RATE_BIAS = 0.02
CHANNELS = 64
MAX_POOL = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}


class DropBlockFormula(Formula):
    """Algorithm 1 of the paper, with its approximate probability of a seed."""

    def __init__(
        self, p: float, block_size: int, inplace: bool = False, couple_channels: bool = False
    ) -> None:
        super().__init__(p)
        if not 0 <= p <= 1:
            raise ValueError(f"p has to be between 0 and 1, but got {p}")
        self.block_size, self.inplace, self.coupled = block_size, inplace, couple_channels

    def drop(self, x: Tensor) -> Tensor:
        dims, sizes = x.dim() - 2, x.shape[2:]
        block = min(self.block_size, *sizes)
        places = [size - block + 1 for size in sizes]
        gamma = self.p * math.prod(sizes) / (block**dims * math.prod(places))
        masks = (len(x), 1 if self.coupled else x.shape[1])
        seeds = (torch.rand(*masks, *places, device=x.device) < gamma).to(x.dtype)
        mask = 1 - MAX_POOL[dims](F.pad(seeds, [block - 1] * 2 * dims), block, stride=1)
        mask = mask * (mask.numel() / mask.float().sum().clamp(min=1)).to(x.dtype)
        return x.mul_(mask) if self.inplace else x * mask


def _torchvision(layer: Any) -> Callable[..., nn.Module]:
    def make(p: float, block_size: int, inplace: bool = False, couple_channels: bool = False) -> nn.Module:
        if block_size % 2 == 0:
            raise NotImplementedError("block size should be odd")
        if couple_channels:
            raise NotImplementedError("one mask for all channels")
        made: nn.Module = layer(p, block_size, inplace)
        return made

    return make


@dataclass(frozen=True)
class Blocks:
    """The law of one mask, computed from which seeds lie under which blocks.

    Attributes:
        sizes: of the map.
        block: the size of a block in each dimension.
        p: the expected share of dropped positions.
    """

    sizes: tuple[int, ...]
    block: int
    p: float = P

    @cached_property
    def cover(self) -> Tensor:
        """1 where the block of a seed covers a position, for each position and each seed."""
        cover = torch.ones(1, 1, dtype=torch.float64)
        for size in self.sizes:
            block = min(self.block, size)
            behind = torch.arange(size)[:, None] - torch.arange(size - block + 1)
            cover = torch.kron(cover, ((behind >= 0) & (behind < block)).double())
        return cover

    @cached_property
    def seedless(self) -> float:
        """The probability 1 - gamma that a place holds no seed."""
        n = self.cover.sum(1)
        return float(optimize.brentq(lambda r: float((r**n).mean()) - (1 - self.p), 0, 1, xtol=1e-14))

    @cached_property
    def dropped(self) -> Tensor:
        """The probability that each position is dropped."""
        return (1 - self.seedless ** self.cover.sum(1)).reshape(self.sizes)

    @cached_property
    def variance(self) -> float:
        """That of the dropped share of one mask: two positions are kept if no seed of either is set."""
        n = self.cover.sum(1)
        either = n[:, None] + n - self.cover @ self.cover.T
        return float((self.seedless**either).mean()) - (1 - self.p) ** 2

    def drops(self, layer: Case, masks: int, settings: Settings, **arguments: Any) -> Tensor:
        """True where dropped, for at least so many masks: of shape ``(samples, channels, *sizes)``."""
        module = layer.make(p=self.p, block_size=self.block, **arguments)
        rows = max(2, 2**20 // (CHANNELS * math.prod(self.sizes)))
        x = settings.ones(rows, CHANNELS, *self.sizes, dtype=torch.float32)
        y = torch.cat([module(x) for _ in range(math.ceil(masks / (rows * CHANNELS)))])
        if y.shape[1:] != x.shape[1:]:
            raise ValueError(f"shape {tuple(x.shape)} became {tuple(y.shape)}")
        return y == 0


def rate(layer: Case, settings: Settings, *, blocks: Blocks) -> Finding:
    """The mean over masks of the dropped share, whose variance is that of the law, so that 2 % off shows."""
    masks = elements_to_show(RATE_BIAS, math.sqrt(blocks.variance) / blocks.p)
    share = blocks.drops(layer, masks, settings).flatten(2).double().mean(2)
    mean, bound = float(share.mean()), DEVIATIONS * math.sqrt(blocks.variance / share.numel())
    holds = abs(mean - blocks.p) <= bound
    measured = f"{mean:#.4g}"
    beyond = f"{measured}, beyond {blocks.p} ± {bound:.2g}"
    return holds_if(holds, measured if holds else beyond, masks=share.numel(), rate=mean, bound=bound)


def positions(layer: Case, settings: Settings, *, blocks: Blocks) -> Finding:
    """At each position, the number of masks that drop it is binomial."""
    drops = blocks.drops(layer, 50_000, settings).flatten(0, 1)
    counts = drops.sum(0).flatten().tolist()
    expected = blocks.dropped.flatten().tolist()
    unlikely = [stats.binomtest(n, len(drops), p).pvalue for n, p in zip(counts, expected, strict=True)]
    worst = min(range(len(counts)), key=lambda i: unlikely[i])
    measured = f"{counts[worst] / len(drops):.4f} of {expected[worst]:.4f}"
    return holds_if(unlikely[worst] * len(counts) >= FALSE_ALARM, measured, pvalue=unlikely[worst])


def union(layer: Case, settings: Settings, *, blocks: Blocks) -> Finding:
    """Every dropped position lies in a block that is dropped: exact, for each mask."""
    dropped = blocks.drops(layer, 1000, settings).flatten(0, 1)[:, None].float()
    dims = len(blocks.sizes)
    block = [min(blocks.block, size) for size in blocks.sizes]
    seeds = -MAX_POOL[dims](-dropped, block, stride=1)
    padding = [n - 1 for n in reversed(block) for _ in range(2)]
    covered = MAX_POOL[dims](F.pad(seeds, padding), block, stride=1)
    outside = int((dropped > covered).sum())
    return holds_if(outside == 0 and bool(dropped.any()), f"{outside} of {int(dropped.sum())} outside")


def independence(layer: Case, settings: Settings, *, blocks: Blocks) -> Finding:
    """One position of each mask: channels, samples and calls; and two positions a block apart."""
    one, two = (blocks.drops(layer, 30_000, settings).flatten(2) for _ in range(2))
    middle = one[..., one.shape[2] // 2]
    found = [associate(middle.flatten(), two[..., one.shape[2] // 2].flatten(), "two calls")]
    for dim, where in enumerate(("samples", "channels")):
        pairs = middle.movedim(dim, 0)[: middle.shape[dim] // 2 * 2]
        found.append(associate(pairs[::2].flatten(), pairs[1::2].flatten(), where))
    for dim, size in enumerate(blocks.sizes):
        if size > blocks.block:
            apart = blocks.block * math.prod(blocks.sizes[dim + 1 :])
            found.append(associate(one[..., 0].flatten(), one[..., apart].flatten(), f"dimension {dim}"))
    return strongest(found)


def coupled(layer: Case, settings: Settings, *, blocks: Blocks) -> Finding:
    """With couple_channels, all channels of a sample lose the same positions, and samples do not."""
    drops = blocks.drops(layer, 1000, settings, couple_channels=True)
    same = bool((drops == drops[:, :1]).all())
    return holds_if(same and not bool((drops == drops[:1]).all()), "one mask" if same else "masks differ")


def own_scale(layer: Case, settings: Settings, *, blocks: Blocks) -> Finding:
    """The scale of each sample is 1/(1-p), or 1 over the share that is kept of that sample."""
    x = settings.normal(16, 8, *blocks.sizes, dtype=torch.float32)
    y = layer.make(p=blocks.p, block_size=blocks.block)(x)
    for i in range(len(x)):
        kept = float((y[i] != 0).double().mean())
        if kept and all(
            ulps_off(y[i], x[i], scale) > TOLERANCE_ULP for scale in (1 / (1 - blocks.p), 1 / kept)
        ):
            found = f"{scale_of(y[i], x[i]):.4f}, where {kept:.0%} of the sample are kept"
            return holds_if(False, found)
    return holds_if(True, f"{scale_of(y, x):.4f}")


FAMILY = "blocks"


def _laws(sizes: tuple[int, ...]) -> list[Law]:
    odd, even = Blocks(sizes, 3), Blocks(sizes, 4)
    wide = Blocks(tuple(range(3, 3 + len(sizes))), 7)
    exact = f"the expected share of dropped positions is p = {P}"
    places = "a position is dropped as often as the number of blocks over it says"
    whole = "what is dropped is a union of whole blocks"
    law = partial(Law, FAMILY)
    of_rate = partial(
        law, why="Less or more of the map is dropped than p says, and than results are reported for."
    )
    of_places = partial(law, why="Borders and middle of a map are dropped at other rates than in the paper.")
    of_union = partial(law, why="Fragments of a block keep the information that the block is to hide.")
    return [
        of_rate("rate", exact, partial(rate, blocks=odd)),
        of_rate("rate, even blocks", f"{exact}, for a block of 4", partial(rate, blocks=even)),
        of_rate("rate, wide blocks", f"{exact}, for a block wider than the map", partial(rate, blocks=wide)),
        of_places("positions", places, partial(positions, blocks=odd)),
        of_places("positions, even blocks", f"{places}, for a block of 4", partial(positions, blocks=even)),
        of_union("union of blocks", whole, partial(union, blocks=odd)),
        of_union("union, even blocks", f"{whole}, for a block of 4", partial(union, blocks=even)),
        law(
            "independence",
            "channels, samples, calls and positions a block apart are independent",
            partial(independence, blocks=odd),
            why="Units learn to rely on each other, which dropout is there to prevent.",
        ),
        law(
            "coupled channels",
            "couple_channels gives each sample one mask",
            partial(coupled, blocks=odd),
            why="Another channel still shows what the block is to hide.",
        ),
        law(
            "scale",
            "a sample's scale depends on no other sample",
            partial(own_scale, blocks=odd),
            level=Level.NICETY,
            why="A sample's output changes with the batch that it is in.",
        ),
    ]


IN_BLOCKS = (
    *(f"drop rate at p = {P}", "mean, variance", "neighbours", "lags", "rows", "counts", "calls"),
    "contents",
)


def _entry(
    layer: type[nn.Module],
    shape: str,
    sizes: tuple[int, ...],
    peer: Implementation,
    workload: tuple[int, ...],
    source: str = "",
) -> Entry:
    return Entry(
        layer,
        mask=f"(N, C, {shape}), or (N, 1, {shape})",
        source=f"Ghiasi et al. 2018, sections 3 and 3.1{source}",
        peer=peer,
        example=Example(normal(3, 4, *sizes), {"p": 0.5, "block_size": 3}),
        workload=Workload(ones(*workload), {"p": 0.1, "block_size": 7}),
        masked=Masked((8, 16, *sizes), arguments={"block_size": 3}),
        special=_laws(sizes),
        exempt=dict.fromkeys(IN_BLOCKS, "a block drops neighbours together, as the laws of blocks say"),
    )


ENTRIES = [
    _entry(DropBlock1d, "L", (11,), Implementation("formula", DropBlockFormula), (16, 64, 1024)),
    _entry(
        DropBlock2d,
        "H, W",
        (7, 9),
        from_library("torchvision.ops.drop_block:DropBlock2d", DropBlockFormula, _torchvision),
        (16, 64, 32, 32),
        "; torchvision",
    ),
    _entry(
        DropBlock3d,
        "D, H, W",
        (5, 6, 7),
        from_library("torchvision.ops.drop_block:DropBlock3d", DropBlockFormula, _torchvision),
        (4, 16, 16, 32, 32),
        "; torchvision",
    ),
]
