"""Every layer in each of PyTorch's tools; ``docs/tools.md`` is the table of what is tested here.

``python tests/layers/test_tools.py`` writes the page again. A hole of the table is an entry of ``HOLES``: its
test fails on the day on which the tool takes the layer.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import thinned
from thinned.compare.implementation import first
from thinned.compare.layers import ENTRIES, Entry

PAGE = Path(__file__).parents[2] / "docs" / "tools.md"
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


def symbolically_traced(entry: Entry) -> None:
    """One node, and the module in it can still be put into evaluation."""
    example = call(entry)
    traced = fx.symbolic_trace(example.model)
    assert [node.op for node in traced.graph.nodes] == [
        *["placeholder"] * len(example.inputs),
        "call_module",
        "output",
    ]
    example.check(traced)
    example.model.eval()
    example.check(traced.eval())


@contextmanager
def torchscript() -> Iterator[None]:
    """It is deprecated, and a trace warns of each branch, also of those that only raise errors."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # the latter from PyTorch 2.15 on
            warnings.filterwarnings("ignore", ".*torch.jit.*", category)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def scripted(entry: Entry) -> None:
    example = call(entry)
    with torchscript():
        model = torch.jit.script(example.model)
        buffer = io.BytesIO()
        torch.jit.save(model, buffer)
        buffer.seek(0)
        example.check(torch.jit.load(buffer))
    example.model.eval()
    example.check(model.eval())


def traced(entry: Entry) -> None:
    example = call(entry)
    with torchscript():
        example.check(torch.jit.trace(example.model, example.inputs, check_trace=False))


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


def initialised_on_meta(entry: Entry) -> None:
    """The way of FSDP and torchtitan: no memory until each module's ``reset_parameters``."""
    example = call(entry)
    with torch.device("meta"):
        model = type(example.model)(entry.own.make(**entry.example.arguments))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.constant_(tensor, float("nan"))
    torch.manual_seed(0)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert not any(value.isnan().any() for value in model.state_dict().values())
    # Not of modules inside: their fresh weights are drawn in another order.
    own, expected = (dict(each.layer.named_parameters(recurse=False)) for each in (model, example.model))
    assert own.keys() == expected.keys()
    for name, value in own.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    model.load_state_dict(example.model.state_dict())
    example.check(model)


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
    "torch.fx": symbolically_traced,
    "jit.script": scripted,
    "jit.trace": traced,
    "torch.export": exported,
    "make_fx": made_fx,
    "deepcopy": copied,
    "pickle": pickled,
    "meta device": initialised_on_meta,
    "gradients by sample": differentiated_by_sample,
}
HOLES: dict[tuple[str, str], str] = {
    ("WeightDrop", "jit.script"): "TorchScript cannot swap the weight of a module; script its `module`",
    ("WeightDrop", "jit.trace"): "a trace cannot swap the weight of a module; trace its `module`",
    ("VariationalLSTM", "jit.script"): "its loop over time steps is Python; load its state into `nn.LSTM`",
    ("VariationalLSTM", "jit.trace"): "a trace would unroll the loop over time steps for one length",
    ("VariationalGRU", "jit.script"): "its loop over time steps is Python; load its state into `nn.GRU`",
    ("VariationalGRU", "jit.trace"): "a trace would unroll the loop over time steps for one length",
    ("RDrop", "jit.script"): "it is a loss, not a part of the model; it can be traced",
}

each_pair = pytest.mark.parametrize(
    ("entry", "tool"),
    [pytest.param(entry, tool, id=f"{entry.name}-{tool}") for entry in LAYERS for tool in TOOLS],
)


@each_pair
def test_tool(entry: Entry, tool: str) -> None:
    if (entry.name, tool) not in HOLES:
        TOOLS[tool](entry)
        return
    with pytest.raises((NotImplementedError, RuntimeError)):
        TOOLS[tool](entry)


def table() -> str:
    """The table of ``docs/tools.md``."""
    reasons = list(dict.fromkeys(HOLES.values()))
    rows = [["layer", *TOOLS], ["---"] * (1 + len(TOOLS))]
    for entry in LAYERS:
        cells = [(entry.name, tool) for tool in TOOLS]
        rows.append(
            [
                f"`{entry.name}`",
                *(f"no ({reasons.index(HOLES[cell]) + 1})" if cell in HOLES else "yes" for cell in cells),
            ]
        )
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    notes = [f"{number}. {reason}." for number, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", *notes]) + "\n"


def test_page() -> None:
    assert PAGE.read_text(encoding="utf-8").endswith(f"\n{table()}")


if __name__ == "__main__":
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text[: text.index("| layer")] + table(), encoding="utf-8")
