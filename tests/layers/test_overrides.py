"""Calls that torch.fx traces, and calls that ``__torch_function__`` makes."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import oracle
import thinned
from thinned import functional as F
from thinned.compare.implementation import first
from thinned.compare.layers import ENTRIES, Entry

KEY = thinned.Key(7)
# Their forward cannot be traced, nor can that of a torch.nn.LSTM.
OPAQUE = ("DropoutSchedule", "VariationalLSTM", "VariationalGRU", "WeightDrop", "LayerDrop")

x34, x234, x2345 = torch.ones(3, 4), torch.ones(2, 3, 4), torch.ones(2, 3, 4, 5)
target = torch.tensor([0, 2, 1])
edges = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])
# Each function with arguments as a user may pass them.
CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "dropout": ((x34, 0.3), {"broadcast_dims": (0,)}),
    "dropout1d": ((x234,), {"p": 0.3}),
    "dropout2d": ((x2345, 0.3), {}),
    "dropout3d": ((x2345,), {"p": 0.3, "key": None}),
    "alpha_dropout": ((x34, 0.3, True), {}),
    "feature_alpha_dropout": ((x34, 0.3), {"training": True}),
    "drop_path": ((x34, 0.3, True, False), {}),
    "stochastic_depth": ((x34, 0.3, "row"), {}),
    "residual": ((x34, torch.sin, 0.3), {}),
    "patch_dropout": ((x234, 0.3), {"return_indices": True}),
    "token_dropout": ((x234, 0.3), {"scale": False}),
    "drop_head": ((x234, 0.3), {"normalize": "expected"}),
    "drop_head_attention": ((x2345, x2345, x2345, 0.3), {"is_causal": True}),
    "drop_key": ((x234, 0.3), {"broadcast_dims": (1,)}),
    "drop_block1d": ((x234, 0.3, 2), {}),
    "drop_block2d": ((x2345, 0.3, (2, 3)), {"scale": "counted"}),
    "drop_block3d": ((x2345, 0.3, 2), {"couple_channels": True}),
    "drop_connect": ((x34, 0.3), {}),
    "locked_dropout": ((x234, 0.3), {"batch_first": True}),
    "masksembles": ((x34, torch.eye(4, dtype=torch.bool)), {"factor": 2.0}),
    "multi_sample_dropout": ((x34, 0.3), {"samples": 3}),
    "targeted_dropout": ((x34, 0.3), {"kind": "unit"}),
    "gaussian_dropout": ((x34, 0.3), {"broadcast_dims": (1,)}),
    "variational_dropout": ((x34, torch.zeros(4)), {}),
    "variational_kl": ((x34, "sigmoid"), {}),
    "concrete_dropout": ((x34, torch.zeros(1)), {"temperature": 0.5}),
    "concrete_regularization": ((torch.zeros(1), [x34, x234]), {"dropout_regularizer": 0.5}),
    "embedding_dropout": ((target, x34, 0.3), {"padding_idx": 1}),
    "zoneout": ((x34, 2 * x34, 0.3), {"training": False}),
    "relu_dropout": ((x34, 0.3), {}),
    "gelu_dropout": ((x34, 0.3), {"approximate": "tanh"}),
    "silu_dropout": ((x34,), {"p": 0.3}),
    "dropout_add": ((x34, 2 * x34, 0.3), {}),
    "bias_dropout_add": ((x34, torch.ones(4), 2 * x34), {"p": 0.3}),
    "r_drop_loss": ((x34, x34 + 1, target), {"alpha": 2.0}),
    "dropout_edge": ((edges, 0.3), {"per": "pair"}),
    "dropout_node": ((edges, 0.3), {"num_nodes": 4}),
    "keep_mask": ((KEY, (3, 4), 0.3), {}),
}
# A residual is no call of its own: `__torch_function__` sees those of the branch.
each_call = pytest.mark.parametrize("name", [name for name in CALLS if name != "residual"])


class Calls(nn.Module):
    """A module that calls a layer, which is its child, or a function."""

    def __init__(self, call: Callable[..., Any]) -> None:
        super().__init__()
        self.call = call

    def forward(self, *args: Any) -> Any:
        return self.call(*args)


def traced(call: Callable[..., Any], *args: Any) -> fx.GraphModule:
    """The graph of a module with as many inputs as ``args`` has."""
    names = ", ".join(f"x{i}" for i in range(len(args)))
    module = Calls(call)
    forward = eval(f"lambda self, {names}: self.call({names})")
    kind = type("Traced", (Calls,), {"forward": forward})
    module.__class__ = kind
    return fx.symbolic_trace(module)


def nodes(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op not in ("placeholder", "output")]


def under_seed(call: Callable[..., Any], *args: Any) -> Any:
    torch.manual_seed(3)
    return call(*args)


def assert_equal(y: Any, expected: Any) -> None:
    if isinstance(expected, tuple):
        for got, wanted in zip(y, expected, strict=True):
            assert_equal(got, wanted)
    else:
        oracle.assert_same(y.detach(), expected.detach())


@pytest.mark.parametrize(
    "entry", [each for each in ENTRIES if each.name not in OPAQUE], ids=lambda entry: entry.name
)
def test_the_root_of_a_trace_and_a_subclass_with_its_own_forward(entry: Entry) -> None:
    """A node of the layer would call itself, and the subclass's arithmetic twice."""
    layer, inputs = entry.own.make(**entry.example.arguments), entry.example.inputs(torch.float32)
    graph = fx.symbolic_trace(layer)
    for module in (graph, pickle.loads(pickle.dumps(graph))):
        assert_equal(under_seed(module, *inputs), under_seed(layer, *inputs))

    def forward(self: Any, *args: Any) -> Any:
        return entry.layer.forward(self, *args) + 1

    layer.__class__ = type("Own", (entry.layer,), {"forward": forward})
    graph = traced(layer, *inputs)
    assert all(node.op != "call_module" or node.target != "call" for node in nodes(graph))
    assert_equal(under_seed(graph, *inputs), under_seed(layer, *inputs))


def test_a_forward_that_was_replaced_is_traced() -> None:
    layer = thinned.Dropout(0.5)
    forward = layer.forward

    @functools.wraps(forward)  # as accelerate does; the module's name is thinned's
    def hooked(x: Tensor) -> Tensor:
        return forward(x) + 1

    layer.forward = hooked
    assert_equal(under_seed(traced(layer, x34), x34), under_seed(layer, x34))


@each_call
def test_a_function_is_one_node(name: str) -> None:
    args, kwargs = CALLS[name]
    function = getattr(F, name)
    first_tensor = 1 if name == "keep_mask" else 0

    def call(x: Any) -> Any:
        shape = (x.shape if name == "keep_mask" else x,)
        return function(*args[:first_tensor], *shape, *args[first_tensor + 1 :], **kwargs)

    x = x34 if name == "keep_mask" else args[0]
    graph = traced(call, x)
    (node,) = (node for node in nodes(graph) if node.target is function)
    for module in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        assert_equal(under_seed(module, x), under_seed(call, x))
    bound, given = (
        inspect.signature(function).bind(*each[0], **each[1])
        for each in ((node.args, node.kwargs), (args, kwargs))
    )
    bound.apply_defaults()
    for parameter, value in given.arguments.items():
        if isinstance(value, float | str | bool | int):
            assert bound.arguments[parameter] == value
    assert None not in node.args[-1:]
    assert None not in node.kwargs.values()


def test_every_function_is_listed() -> None:
    assert set(CALLS) == set(F.__all__) - {"drop_path_rates", "masksembles_masks"}


@pytest.mark.parametrize("shape", [(), (3,)], ids=["one", "batch"])
def test_a_key_is_a_constant_of_the_graph(shape: tuple[int, ...]) -> None:
    key = KEY.fold(torch.arange(3)) if shape else thinned.Key(2**64 - 1)
    layer = thinned.Dropout(0.5)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = layer

        def forward(self, x):  # type: ignore[no-untyped-def]  # a graph with string annotations has no pickle
            return F.dropout(self.drop(x, key=key), 0.1, key=key.fold(1))

    graph = fx.symbolic_trace(Model())
    for module in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph))):
        oracle.assert_same(module(x34), Model()(x34))
    assert fx.symbolic_trace(graph)(x34).equal(Model()(x34))


class KeyOfInputs(nn.Module):
    """Keys that are functions of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.key = thinned.Dropout(0.5), KEY
        self.keyed = thinned.Keyed(nn.Sequential(thinned.Dropout(0.5)))

    def forward(self, x, ids):  # type: ignore[no-untyped-def]  # a graph with string annotations has no pickle
        rows = self.key.fold(ids)
        x = self.drop(x, key=rows) + F.dropout(x, 0.1, key=rows.fold("other"))
        x = F.dropout(x, 0.1, key=thinned.Key.from_bits(ids)) + self.keyed(x, key=ids.sum(), samples=ids)
        return x, F.keep_mask(rows, (3, 4), 0.5)


def test_a_key_of_a_traced_tensor_is_a_node() -> None:
    ids = torch.tensor([5, -1, 2**40])
    graph = fx.symbolic_trace(KeyOfInputs())
    for module in (graph, copy.deepcopy(graph), pickle.loads(pickle.dumps(graph)), fx.symbolic_trace(graph)):
        assert_equal(module(x34, ids), KeyOfInputs()(x34, ids))
        assert_equal(module(x34, ids + 1), KeyOfInputs()(x34, ids + 1))
    with pytest.raises(TypeError, match=r"must be an integer, got Proxy\(seed\)"):
        fx.symbolic_trace(lambda seed: thinned.Key(seed).bits)


class Wrapped(Tensor):
    pass


class Duck:
    """No tensor, but one that has ``__torch_function__``."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func, types, args, kwargs or {}


class Seen(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, len(args)))
        return func(*args, **(kwargs or {}))


@each_call
def test_torch_function_makes_the_call(name: str) -> None:
    args, kwargs = CALLS[name]
    function = getattr(F, name)
    duck = Duck()
    mine = (args[0], duck, *args[2:]) if name == "keep_mask" else (duck, *args[1:])
    if name == "keep_mask":
        mine = (args[0], (3, duck), args[2])
    func, types, given, _ = function(*mine, **kwargs)
    assert func is function
    assert Duck in types
    assert given[: len(mine)] == mine
    with Seen() as mode:
        expected = under_seed(function, *args)
        again = under_seed(partial(function, **kwargs), *args)
    assert (function, len(args)) in mode.calls
    assert_equal(expected, under_seed(function, *args))
    assert_equal(again, under_seed(partial(function, **kwargs), *args))
    if name != "keep_mask":
        wrapped = args[0].as_subclass(Wrapped)
        result = under_seed(partial(function, wrapped, **kwargs), *args[1:])
        assert isinstance(first(result), Wrapped)
        assert_equal(
            tuple(each.as_subclass(Tensor) for each in result)
            if isinstance(result, tuple)
            else result.as_subclass(Tensor),
            again,
        )


def test_under_a_default_device_and_in_inference_mode() -> None:
    with torch.device("meta"):
        y = under_seed(thinned.Dropout(0.5), x34)
    assert y.device == x34.device
    oracle.assert_same(y, under_seed(thinned.Dropout(0.5), x34))


@pytest.mark.parametrize("training", [True, False])
def test_layer_drop(training: bool) -> None:
    stack = thinned.LayerDrop([nn.Linear(4, 4) for _ in range(3)], p=0.5).train(training)
    graph = traced(stack, x34)
    assert [node.target for node in nodes(graph)] == (
        ["call"] if training else ["call.0", "call.1", "call.2"]
    )
    assert_equal(under_seed(graph, x34), under_seed(stack, x34))

    def surviving(x: Any) -> Any:
        for layer in stack.surviving():
            x = layer(x)
        return x

    class Loop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = stack

        def forward(self, x: Any) -> Any:
            return surviving(x)

    state = torch.get_rng_state()
    if training:
        with pytest.raises(RuntimeError, match="skip the same layers at every call"):
            fx.symbolic_trace(Loop())
    else:
        oracle.assert_same(fx.symbolic_trace(Loop())(x34).detach(), stack(x34).detach())
    assert torch.get_rng_state().equal(state)


def test_within_vmap_and_a_mode_of_torch() -> None:
    """A mode's handler runs without the mode, as for the functions of torch.nn.functional."""
    for function in (F.dropout, torch_functional.dropout):
        with Seen() as mode:
            function(x34, 0.5)
        assert [call[0] for call in mode.calls] == [function]
