"""A dropout and the activation or sum beside it as one function: beside that alone, and one after the other.

And a training step of the network that `thinned compare` trains, without dropout and with each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinned
from benchmarks.case import Bound, Case, Work
from benchmarks.peers import backward
from thinned import functional
from thinned.compare.implementation import Implementation
from thinned.compare.layers import entry_of
from thinned.compare.training import BATCH, LEARNING_RATE, MOMENTUM, network

__all__ = ["fused_cases"]

COMPOSED, WITHOUT = "thinned, composed", "without dropout"
SIZES = (1_000_000, 4_000_000, 32_000_000)
# A step's time varies by more than dropout adds to it.
ROUNDS, STEP_ROUNDS = {1_000_000: 15, 4_000_000: 9, 32_000_000: 5}, 101


class Fused(NamedTuple):
    """A function with dropout, and the one that it has besides; ``alone`` limits the ratio to the latter."""

    other: Callable[[Tensor], Tensor]
    fused: Callable[..., Tensor]
    alone: float | None = None


def plus_itself(x: Tensor) -> Tensor:
    return x + x


def dropout_add(x: Tensor, p: float) -> Tensor:
    return functional.dropout_add(x, x, p)


FUNCTIONS = {
    "relu": Fused(F.relu, functional.relu_dropout, 1.05),
    "gelu": Fused(F.gelu, functional.gelu_dropout, 1.05),
    "silu": Fused(F.silu, functional.silu_dropout, 1.05),
    "add": Fused(plus_itself, dropout_add),
}


def fused_cases(threads: int) -> Iterator[Case]:
    """Each function, size, probability and direction; then the training steps."""
    for name, elements, p, with_backward in product(FUNCTIONS, SIZES, (0.1, 0.5), (False, True)):
        alone = FUNCTIONS[name].alone
        case = partial(
            Case,
            "fused, forward + backward" if with_backward else "fused",
            threads=threads,
            rounds=ROUNDS[elements],
            elements=elements,
        )
        setting = f"{name}, float32, {elements:,} elements, p = {p}"
        make = partial(_work, name, elements, p, with_backward)
        # Apart, because what peers allocate changes what the allocator costs both.
        yield case(f"{setting}, alone", partial(make, peers=False), (Bound(name, alone),) if alone else ())
        yield case(f"{setting}, peers", partial(make, peers=True), (Bound(COMPOSED, 1 / 1.5),))
    yield Case(
        "training step",
        "the MLP of thinned compare",
        _steps,
        (Bound(WITHOUT, 1.02),),
        threads=threads,
        rounds=STEP_ROUNDS,
    )


def _work(name: str, elements: int, p: float, with_backward: bool, peers: bool) -> Work:
    other, fused, _ = FUNCTIONS[name]
    functions: dict[str, Callable[[Tensor], Tensor]] = {"thinned": partial(fused, p=p)}
    if peers and name == "add":
        functions[COMPOSED] = lambda x: x + functional.dropout(x, p)
        functions["torch, composed"] = lambda x: x + F.dropout(x, p)
    elif peers:
        functions[COMPOSED] = lambda x: functional.dropout(other(x), p)
        functions["torch, composed"] = lambda x: F.dropout(other(x), p)
    else:
        functions[name] = other
    x = torch.randn(elements)
    if with_backward:
        x.requires_grad_()
    return {
        each: backward(function, x) if with_backward else partial(function, x)
        for each, function in functions.items()
    }


def _steps() -> Work:
    ours = entry_of("Dropout").own
    return {
        WITHOUT: _step(network(None)),
        "thinned": _step(thinned.convert(network(ours), fuse=True)),
        "thinned.Dropout": _step(network(ours)),
        "nn.Dropout": _step(network(Implementation("torch", nn.Dropout))),
    }


def _step(model: nn.Sequential) -> Callable[[], object]:
    x, labels = torch.rand(BATCH, 784), torch.randint(10, (BATCH,))
    optimizer = torch.optim.SGD(model.parameters(), LEARNING_RATE, MOMENTUM)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(x), labels))
        optimizer.step()

    return step
