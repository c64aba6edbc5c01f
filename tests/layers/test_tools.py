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
SAMPLE_DIM = {"LockedDropout": 1, "VariationalLSTM": 1, "VariationalGRU": 1}
# The samples share a key.
OF_WEIGHTS = ("WeightDrop", "VariationalLSTM", "VariationalGRU", "TargetedDropout", "LayerDrop")
LAYERS = [entry for entry in ENTRIES if entry.name != "DropoutSchedule"]  # it is no layer


class Call(NamedTuple):
    """A layer's example: a model whose only child is the layer, and its inputs."""

    model: Any
    inputs: tuple[Tensor, ...]

    def results(self, model: Callable[..., Any] | None = None, seed: int = 1) -> list[Tensor]:
        """Output, random state and the inputs' gradients, of a call that draws its key under ``seed``."""
        torch.manual_seed(seed)
        inputs = [x.clone().requires_grad_(x.is_floating_point()) for x in self.inputs]
        y = first((model or self.model)(*inputs))
        state = torch.get_rng_state()
        leaves = [x for x in inputs if x.requires_grad]
        grads = (
            torch.autograd.grad(y.sum(), leaves, materialize_grads=True) if leaves and y.requires_grad else ()
        )
        return [y.detach(), state, *grads]

    def larger(self) -> Call:
        """The same layer with inputs of another shape."""
        return Call(self.model, tuple(torch.cat([x, x, x]) for x in self.inputs))

    def check(self, model: Any) -> None:
        """``model`` has the layer's masks and gradients, and leaves the generator as the layer does."""
        for seed in (1, 2, 3):
            for mine, expected in zip(self.results(model, seed), self.results(seed=seed), strict=True):
                torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-6)


# Without annotations: a graph of torch.fx whose annotations are strings has no pickle.
class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x):  # type: ignore[no-untyped-def]
        return self.layer(x)


class Two(One):
    def forward(self, x, y):  # type: ignore[no-untyped-def]
        return self.layer(x, y)


class Three(One):
    def forward(self, x, y, z):  # type: ignore[no-untyped-def]
        return self.layer(x, y, z)


def call(entry: Entry) -> Call:
    torch.manual_seed(0)
    layer = entry.own.make(**entry.example.arguments)
    inputs = entry.example.inputs(torch.float32)
    return Call((One, Two, Three)[len(inputs) - 1](layer), inputs)


def symbolically_traced(entry: Entry) -> None:
    """One node, whose module still follows the mode and ``p``, also in copies of the graph."""
    example = call(entry)
    traced = fx.symbolic_trace(example.model)
    assert [node.op for node in traced.graph.nodes] == [
        *["placeholder"] * len(example.inputs),
        "call_module",
        "output",
    ]
    for graph in (traced, copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        for mode in (True, False):
            example.model.train(mode)
            example.check(graph.train(mode))
    if entry.example.p_name and hasattr(traced.layer, entry.example.p_name):
        setattr(traced.train().layer, entry.example.p_name, 0.0)
        example.model.train()
        example.check(traced)


@contextmanager
def torchscript() -> Iterator[None]:
    """It is deprecated, and a trace warns of each branch, also of those that only raise errors."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):  # the latter from PyTorch 2.15 on
            warnings.filterwarnings("ignore", ".*torch.jit.*", category)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        yield


def saved(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.jit.save(model, buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)


def scripted(entry: Entry) -> None:
    example = call(entry)
    with torchscript():
        model = saved(torch.jit.script(example.model))
    for mode in (True, False, True):
        example.model.train(mode)
        example.check(model.train(mode))
    example.larger().check(model)


def traced(entry: Entry) -> None:
    example = call(entry)
    with torchscript():
        for mode in (True, False):
            example.model.train(mode)
            model = saved(torch.jit.trace(example.model, example.inputs, check_trace=False))
            example.check(model)
            example.larger().check(model)


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
    # Modules inside are left out: their fresh weights are drawn in another order.
    own, expected = (dict(each.layer.named_parameters(recurse=False)) for each in (model, example.model))
    assert own.keys() == expected.keys()
    for name, value in own.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    model.load_state_dict(example.model.state_dict())
    example.check(model)


def differentiated_by_sample(entry: Entry) -> None:
    """As in training with differential privacy: each sample's gradient of parameters and inputs, in one call.

    It is that of a loop over the samples and their keys, and of the batch under these keys.
    """
    torch.manual_seed(0)
    layer, inputs = entry.own.make(**entry.example.arguments).double(), entry.example.inputs(torch.float64)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    dim = SAMPLE_DIM.get(entry.name, 0)
    # A sample is a batch of one.
    samples = [torch.stack([x.narrow(dim, n, 1) for n in range(3)]) for x in inputs]

    def loss(
        values: tuple[dict[str, Tensor], list[Tensor]], inputs: list[Tensor], bits: Tensor | None
    ) -> Tensor:
        numbers = iter(values[1])
        arguments = tuple(next(numbers) if x.is_floating_point() else x for x in inputs)
        keyed = {} if bits is None else {"key": thinned.Key.from_bits(bits)}
        return first(functional_call(layer, values[0], arguments, keyed)).square().sum()

    def together(randomness: str, keys: thinned.Key | None) -> Any:
        in_dims = ((None, 0), 0, None if keys is None else 0)
        numbers = [x for x in samples if x.is_floating_point()]
        call = vmap(grad(loss), in_dims=in_dims, randomness=randomness)
        return call((parameters, numbers), samples, None if keys is None else keys.bits)

    def loop(keys: list[thinned.Key | None]) -> Any:
        each = []
        for n, key in enumerate(keys):
            own = [x[n] for x in samples]
            numbers = [x for x in own if x.is_floating_point()]
            each.append(grad(loss)((parameters, numbers), own, None if key is None else key.bits))
        return torch.utils._pytree.tree_map(lambda *gradients: torch.stack(gradients), *each)

    if not entry.example.is_random:
        torch.testing.assert_close(together("error", None), loop([None] * 3))
        return
    keys = KEY.fold(torch.arange(3))
    actual = together("error", keys)
    torch.testing.assert_close(actual, loop([KEY.fold(n) for n in range(3)]))
    torch.manual_seed(1)
    drawn = thinned.Key.from_bits(thinned.keys.draw(torch.device("cpu")))
    for randomness, expected in (("same", [drawn] * 3), ("different", [drawn.fold(n) for n in range(3)])):
        torch.manual_seed(1)
        torch.testing.assert_close(together(randomness, None), loop(expected))
    with pytest.raises(RuntimeError, match="random operation while in randomness error mode"):
        together("error", None)
    if entry.name in OF_WEIGHTS:
        return
    batch = [x.narrow(dim, 0, 3) for x in inputs]
    wrt = [*layer.parameters(), *(x.requires_grad_() for x in batch if x.is_floating_point())]
    y = first(layer(*batch, key=keys))
    for n in range(3):
        of_batch = list(torch.autograd.grad(y.select(dim, n).square().sum(), wrt, retain_graph=True))
        of_batch[len(parameters) :] = [x.narrow(dim, n, 1) for x in of_batch[len(parameters) :]]
        torch.testing.assert_close([each[n] for each in (*actual[0].values(), *actual[1])], of_batch)


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


class Hole(NamedTuple):
    """Why a tool cannot take a layer, and the error that its user gets."""

    reason: str
    error: str


_LSTM, _GRU = (
    Hole(f"Its loop over time steps is Python; load its state into `nn.{name}`", "load its state_dict into")
    for name in ("LSTM", "GRU")
)
_UNROLLED = Hole(
    "A trace would unroll the loop over time steps for one length", "would make the shape of this mask"
)
HOLES = {
    ("WeightDrop", "jit.script"): Hole(
        "TorchScript cannot swap the weight of a module; script its `module`", "script its .module"
    ),
    ("WeightDrop", "jit.trace"): Hole(
        "A trace cannot swap the weight of a module; trace its `module`", "can't be used with Jitted modules"
    ),
    ("VariationalLSTM", "jit.script"): _LSTM,
    ("VariationalLSTM", "jit.trace"): _UNROLLED,
    ("VariationalGRU", "jit.script"): _GRU,
    ("VariationalGRU", "jit.trace"): _UNROLLED,
    ("RDrop", "jit.script"): Hole(
        "It is a loss, not a part of the model; it can be traced", "use torch.export or torch.compile"
    ),
}

each_pair = pytest.mark.parametrize(
    ("entry", "tool"),
    [pytest.param(entry, tool, id=f"{entry.name}-{tool}") for entry in LAYERS for tool in TOOLS],
)


@each_pair
def test_tool(entry: Entry, tool: str) -> None:
    if (hole := HOLES.get((entry.name, tool))) is None:
        TOOLS[tool](entry)
        return
    with pytest.raises((NotImplementedError, RuntimeError), match=hole.error):
        TOOLS[tool](entry)


def table() -> str:
    """The table of ``docs/tools.md``."""
    reasons = list(dict.fromkeys(hole.reason for hole in HOLES.values()))
    rows = [["layer", *TOOLS], ["---"] * (1 + len(TOOLS))]
    for entry in LAYERS:
        cells = [(entry.name, tool) for tool in TOOLS]
        rows.append(
            [
                f"`{entry.name}`",
                *(
                    f"no ({reasons.index(HOLES[cell].reason) + 1})" if cell in HOLES else "yes"
                    for cell in cells
                ),
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
