"""Dropout of layers: LayerDrop."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, P, normal, ones
from thinned.compare.laws.chance import associate, elements_to_show, strongest, within_binomial
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.layer_drop import LayerDrop

__all__ = ["ENTRIES"]


class LayerDropFormula(nn.ModuleList):
    """fairseq's LayerDropModuleList, whose iteration leaves layers out, and the loop over it."""

    def __init__(self, layers: Iterable[nn.Module] | None = None, p: float = 0.5) -> None:
        super().__init__(layers)
        self.p = p

    def __iter__(self) -> Iterator[nn.Module]:
        number = torch.empty(len(self)).uniform_()
        for i, layer in enumerate(super().__iter__()):
            if not self.training or number[i] > self.p:
                yield layer

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class Plus(nn.Module):
    """Adds a power of 2, so that the sum tells which layers ran."""

    def __init__(self, bit: int) -> None:
        super().__init__()
        self.bit = bit

    def forward(self, x: Tensor) -> Tensor:
        return x + 2.0**self.bit


class Bent(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.factor).sin()


def _make(stack: type[nn.ModuleList], p: float, plus: int = 0, bent: int = 0) -> nn.Module:
    layers = [*(Plus(bit) for bit in range(plus)), *(Bent(1.0 + i) for i in range(bent))]
    return stack(layers, p=p)  # type: ignore[call-arg]


DEPTH = 40
RATE_BIAS = 0.05


def _passes(layer: Case, settings: Settings, p: float, passes: int) -> Tensor:
    """True where a layer ran, of shape (passes, DEPTH); raises if an output is no sum of some layers."""
    module = layer.make(p=p, plus=DEPTH)
    x = torch.zeros((), dtype=torch.float64, device=settings.device)
    ran = torch.stack([module(x) for _ in range(passes)]).cpu()
    bits = ran.long()[:, None] >> torch.arange(DEPTH) & 1
    if not torch.equal((bits << torch.arange(DEPTH)).sum(1).double(), ran):
        raise ValueError("an output is not what some of the layers give")
    return bits == 1


def rate(layer: Case, settings: Settings) -> Finding:
    """Counts which of 40 layers ran, in so many passes that a rate 5 % off shows."""
    n = elements_to_show(RATE_BIAS, math.sqrt((1 - P) / P))
    ran = _passes(layer, settings, P, math.ceil(n / DEPTH))
    return within_binomial(int((~ran).sum()), ran.numel(), P)


def independence(layer: Case, settings: Settings) -> Finding:
    """Fisher's exact test on which of 40 layers ran: between passes, and between layers of a pass."""
    ran = _passes(layer, settings, P, 2000)
    found = [associate(ran[::2].flatten(), ran[1::2].flatten(), "two passes")]
    found += [
        associate(ran[:, a], ran[:, b], f"layers {a} and {b}") for a, b in combinations(range(0, DEPTH, 4), 2)
    ]
    found += [associate(ran[:, 0::2].flatten(), ran[:, 1::2].flatten(), "neighbouring layers")]
    return strongest(found)


def evaluation(layer: Case, settings: Settings) -> Finding:
    """Each of 40 layers adds a power of 2, and the sum after eval() has all of them."""
    x = torch.zeros((), dtype=torch.float64, device=settings.device)
    module = layer.make(p=P, plus=DEPTH).eval()
    y = float(module(x))
    return holds_if(y == 2**DEPTH - 1, "all layers" if y == 2**DEPTH - 1 else f"sum {y}")


def all_left_out(layer: Case, settings: Settings) -> Finding:
    """At p = 1 the output is the input's own tensor object."""
    x = torch.zeros(3, device=settings.device)
    same = layer.make(p=1.0, plus=5)(x) is x
    return holds_if(same, "the input" if same else "another")


def container(layer: Case, settings: Settings) -> Finding:
    """With 40 layers at p = 0.3 an iteration that leaves out some shows in all but 6e-7 of cases."""
    torch.manual_seed(settings.seed)
    module = layer.make(p=P, plus=DEPTH)
    seen = len(list(module.children())), len(list(iter(module)))
    return holds_if(seen == (DEPTH, DEPTH), f"{seen[1]} of {seen[0]}")


FAMILY = "layers"
_law = partial(Law, FAMILY)

ENTRIES = [
    Entry(
        LayerDrop,
        mask="(layers,)",
        source="Fan et al. 2020, section 3; fairseq",
        peer=Implementation(
            "formula", partial(_make, LayerDropFormula), "the loop over LayerDropModuleList of fairseq"
        ),
        example=Example(
            normal(6, 5),
            {"p": 0.5, "bent": 5},
            identity_in_evaluation=False,
            saved_bytes=2 * 5 * 4,  # what five layers keep themselves
        ),
        # At such a p both run the same layers, so that only the deciding differs.
        workload=Workload(ones(64, 128), {"p": 1e-6, "plus": 64}),
        special=[
            _law(
                "rate",
                f"the number of layers left out is binomial with p = {P}; nothing is scaled",
                rate,
                why="The network is shallower or deeper in training than p says.",
            ),
            _law(
                "independence",
                "layers and passes are independent of each other",
                independence,
                why="Some depths are never trained, so that pruned networks fail.",
            ),
            _law(
                "evaluation",
                "all layers run",
                evaluation,
                why="Predictions are random, or leave trained layers out.",
            ),
            _law(
                "p = 1",
                "the input itself comes back",
                all_left_out,
                why="The end of a schedule or search over p gives something other than no layers.",
            ),
            _law(
                "iteration",
                "as a ModuleList, iteration sees all layers",
                container,
                level=Level.UNLIKE_TORCH,
                why="Code that walks the layers, such as initialisation or pruning, misses some at random.",
            ),
        ],
        make=partial(_make, LayerDrop),
        functional="keep_mask",
    )
]
