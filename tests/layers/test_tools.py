"""Every layer in each of PyTorch's tools."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import thinned
from thinned.compare.implementation import first
from thinned.compare.layers import ENTRIES, Entry

KEY = thinned.Key(7)
LAYERS = [entry for entry in ENTRIES if entry.name != "DropoutSchedule"]  # it is no layer


class Call(NamedTuple):
    """A layer's example: a model whose only child is the layer, and its inputs."""

    model: Any
    inputs: tuple[Tensor, ...]

    def results(self, model: Callable[..., Any] | None = None, seed: int = 1) -> list[Tensor]:
        """The output and the gradients of the inputs, in a call that draws its key under ``seed``."""
        torch.manual_seed(seed)
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in self.inputs]
        y = first((model or self.model)(*inputs))
        leaves = [x for x in inputs if x.requires_grad]
        grads = torch.autograd.grad(y.sum(), leaves) if leaves and y.requires_grad else ()
        return [y.detach(), *grads]

    def check(self, model: Any) -> None:
        """``model`` has the layer's masks, seed by seed, and its gradients."""
        for seed in (1, 2, 3):
            for mine, expected in zip(self.results(model, seed), self.results(seed=seed), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)


class Two(One):
    def forward(self, x: Tensor, y: Tensor) -> Any:  # type: ignore[override]
        return self.layer(x, y)


class Three(One):
    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Any:  # type: ignore[override]
        return self.layer(x, y, z)


def call(entry: Entry) -> Call:
    torch.manual_seed(0)
    layer = entry.own.make(**entry.example.arguments)
    inputs = entry.example.inputs(torch.float32)
    return Call((One, Two, Three)[len(inputs) - 1](layer), inputs)


def exported(entry: Entry) -> None:
    example = call(entry)
    example.check(torch.export.export(example.model, example.inputs, strict=False).module())


def made_fx(entry: Entry) -> None:
    example = call(entry)
    example.check(make_fx(example.model)(*example.inputs))


def copied(entry: Entry) -> None:
    example = call(entry)
    example.check(copy.deepcopy(example.model))


def pickled(entry: Entry) -> None:
    example = call(entry)
    example.check(pickle.loads(pickle.dumps(example.model)))


def differentiated_by_sample(entry: Entry) -> None:
    """``vmap`` of ``grad``, as opacus has it, is a loop over samples with keys of their own."""
    example = call(entry)
    layer, (x, *rest) = example.model.layer, example.inputs
    samples = [each.unsqueeze(1) for each in (x, *rest)]
    bits = KEY.fold(torch.arange(len(x))).bits
    parameters = {name: each.detach() for name, each in layer.named_parameters()}

    def loss(inputs: tuple[Tensor, dict[str, Tensor]], bits: Tensor, *rest: Tensor) -> Tensor:
        x, parameters = inputs
        key = {} if isinstance(layer, thinned.RDrop) else {"key": thinned.Key.from_bits(bits)}
        y = first(functional_call(layer, parameters, (x, *rest), key))
        return (y * torch.linspace(1, 2, y.numel()).view(y.shape)).sum()

    def of_sample(x: Tensor, bits: Tensor, *rest: Tensor) -> Any:
        if x.is_floating_point():
            return grad(loss)((x, parameters), bits, *rest)
        return {}, grad(lambda parameters: loss((x, parameters), bits, *rest))(parameters)

    together = vmap(of_sample)(samples[0], bits, *samples[1:])
    for i in range(len(x)):
        alone = of_sample(samples[0][i], bits[i], *(each[i] for each in samples[1:]))
        torch.testing.assert_close(
            torch.utils._pytree.tree_map(lambda y, i=i: y[i], together), alone, rtol=1e-5, atol=1e-6
        )


TOOLS: dict[str, Callable[[Entry], None]] = {
    "torch.export": exported,
    "make_fx": made_fx,
    "deepcopy": copied,
    "pickle": pickled,
    "gradients by sample": differentiated_by_sample,
}

each_pair = pytest.mark.parametrize(
    ("entry", "tool"),
    [pytest.param(entry, tool, id=f"{entry.name}-{tool}") for entry in LAYERS for tool in TOOLS],
)


@each_pair
def test_tool(entry: Entry, tool: str) -> None:
    TOOLS[tool](entry)
