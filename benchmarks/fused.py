"""A dropout and the activation or sum beside it as one function: beside that alone, and one after the other.

And a training step of the network that `thinned compare` trains, without dropout and with each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

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
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "relu": (F.relu, functional.relu_dropout),
    "gelu": (F.gelu, functional.gelu_dropout),
    "silu": (F.silu, functional.silu_dropout),
}


def fused_cases(threads: int) -> Iterator[Case]:
    """Each function, size, probability and direction; then the training steps."""
    for name, elements, p, with_backward in product((*FUNCTIONS, "add"), SIZES, (0.1, 0.5), (False, True)):
        case = partial(
            Case,
            "fused, forward + backward" if with_backward else "fused",
            threads=threads,
            rounds=ROUNDS[elements],
            elements=elements,
        )
        setting = f"{name}, float32, {elements:,} elements, p = {p}"
        make = partial(_work, name, elements, p, with_backward)
        alone, composed = Bound(name, 1.05), Bound(COMPOSED, 1 / 1.5)
        promised = name == "relu"
        # Apart, because what peers allocate changes what the allocator costs both.
        yield case(f"{setting}, alone", partial(make, peers=False), (alone,) * promised)
        yield case(f"{setting}, peers", partial(make, peers=True), (composed,) * promised)
    yield Case(
        "training step",
        "the MLP of thinned compare",
        _steps,
        (Bound(WITHOUT, 1.02),),
        threads=threads,
        rounds=STEP_ROUNDS,
    )


def _work(name: str, elements: int, p: float, with_backward: bool, peers: bool) -> Work:
    def composed(dropout: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        if name == "add":
            return lambda x: residual + dropout(x, p)
        return lambda x: dropout(other(x), p)

    residual = torch.randn(elements if name == "add" else 0)
    add = partial(torch.add, residual), partial(functional.dropout_add, residual=residual)
    other, fused = FUNCTIONS.get(name, add)
    functions: dict[str, Callable[[Tensor], Tensor]] = {"thinned": partial(fused, p=p)}
    if peers:
        functions[COMPOSED] = composed(functional.dropout)
        functions["torch, composed"] = composed(F.dropout)
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
