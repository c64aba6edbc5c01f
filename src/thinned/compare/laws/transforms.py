"""A layer under torch.compile, vmap, copies and state_dict."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Case, first
from thinned.compare.laws.law import Finding, Law, Level, holds_if, is_random
from thinned.compare.laws.values import same, under_seed
from thinned.compare.settings import Settings

__all__ = ["LAWS"]


def compiled(layer: Case, settings: Settings) -> Finding:
    """One graph, and what the layer gives without it, to the rounding of other kernels.

    Two seeds, so that a mask which is part of the graph shows. The gradients are those of the first input and
    of every parameter. Inductor takes seconds a layer, so that --quick stops at the graphs it would be given.
    Its own random numbers are not eager's unless it is asked for those.
    """
    torch.compiler.reset()
    module, inputs = layer.called(settings)
    in_one: Any = partial(torch.compile, module, fullgraph=True)
    if settings.quick:
        in_one = in_one(backend="aot_eager")
    else:
        in_one = in_one(backend="inductor", options={"fallback_random": True})
    results = [_run(settings, each, inputs, offset) for offset in range(2) for each in (module, in_one)]
    torch.compiler.reset()
    for (y, gradients), (other, other_gradients) in (results[:2], results[2:]):
        if y.shape != other.shape:
            return holds_if(False, "another shape")
        if not torch.allclose(y, other, rtol=1e-5, atol=1e-6):
            return holds_if(False, "another mask than eager")
        if not all(map(partial(torch.allclose, rtol=1e-4, atol=1e-5), gradients, other_gradients)):
            return holds_if(False, "another gradient than eager")
    if layer.example.is_random and same(results[1][0], results[3][0]):
        return holds_if(False, "one mask for all calls")
    return holds_if(True, "one graph")


def _run(
    settings: Settings, module: nn.Module, inputs: tuple[Tensor, ...], offset: int
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """A call's output, and the gradients of what has one."""
    x = inputs[0].clone()
    leaves = [x.requires_grad_()] if x.is_floating_point() else []
    leaves += module.parameters()
    y = under_seed(settings, module, x, *inputs[1:], offset=offset)
    gradients = tuple(torch.zeros_like(leaf) for leaf in leaves)
    if leaves and y.requires_grad:
        gradients = torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)
    return y.detach(), gradients


def vmapped(layer: Case, settings: Settings) -> Finding:
    """The same inputs for 8 examples: under "same" they stay the same, under "different" they do not."""
    module, inputs = layer.called(settings)
    inputs = tuple(x.expand(8, *x.shape) for x in inputs)

    def run(randomness: str) -> Tensor:
        return first(torch.func.vmap(lambda *each: first(module(*each)), randomness=randomness)(*inputs))

    shared, own = run("same"), run("different")
    if not all(same(each, shared[0]) for each in shared):
        return holds_if(False, 'masks differ under "same"')
    if all(same(each, own[0]) for each in own):
        return holds_if(False, 'one mask under "different"')
    return holds_if(True, "same, different")


def copied(layer: Case, settings: Settings, *, make: Callable[[nn.Module], nn.Module]) -> Finding:
    """Under one seed original and copy give equal values; eval() of the copy leaves the original alone."""
    module, inputs = layer.called(settings)
    twin = make(module)
    if not same(*(under_seed(settings, each, *inputs) for each in (module, twin))):
        return holds_if(False, "another mask for the same seed")
    twin.eval()
    return holds_if(module.training, "alike" if module.training else "shares the original's mode")


def _pickled(module: nn.Module) -> nn.Module:
    twin: nn.Module = pickle.loads(pickle.dumps(module))
    return twin


def state(layer: Case, settings: Settings) -> Finding:
    """A model's checkpoint loads whether or not it had dropout in that place."""
    names = list(layer.called(settings)[0].state_dict())
    return holds_if(not names, f"holds {', '.join(names)}" if names else "empty")


def has_no_parameters(case: Case) -> bool:
    return not list(case.make(**case.example.arguments).parameters())


FAMILY = "transforms"
law = partial(Law, FAMILY, level=Level.UNLIKE_TORCH)
LAWS = [
    law(
        "torch.compile",
        "compiles without a graph break, to what eager code gives",
        compiled,
        why="torch.compile fails or falls back at this layer, or trains with another mask.",
    ),
    law(
        "vmap",
        "one mask for all examples or one for each, as asked",
        vmapped,
        is_random,
        why="Per-sample gradients and ensembles fail, or share a mask that they should not.",
    ),
    law(
        "deepcopy",
        "a copy has the original's masks and mode",
        partial(copied, make=copy.deepcopy),
        why="A copied model, such as an average of weights, behaves differently.",
    ),
    law(
        "pickle",
        "a layer survives pickling with its masks and mode",
        partial(copied, make=_pickled),
        why="Models cannot be saved whole or sent to another process.",
    ),
    law(
        "state_dict",
        "there is nothing in it",
        state,
        has_no_parameters,
        why="Checkpoints of the model without this layer do not load.",
    ),
]
