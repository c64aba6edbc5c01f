"""torch.fx on converted models: quantization, feature extraction, passes, and traces within contexts."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor, fx, nn
from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping
from torch.ao.quantization.fx.custom_config import PrepareCustomConfig
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx, prepare_qat_fx
from torch.fx.experimental.optimization import fuse
from torch.fx.passes.shape_prop import ShapeProp
from torch.fx.passes.split_module import split_module

import oracle
import thinned
from thinned import functional as F

KEY = thinned.Key(7)
x = torch.randn(4, 3, 8, 8)


class Net(nn.Module):
    """Dropout modules that are swapped, a container, and functional dropouts."""

    def __init__(self, functional: bool = True) -> None:
        super().__init__()
        self.functional = functional
        self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.maps, self.units = nn.Dropout2d(0.2), nn.Dropout(0.3)
        self.first, self.last = nn.Linear(288, 10), nn.Linear(10, 4)
        self.stack = thinned.LayerDrop([nn.Linear(4, 4) for _ in range(2)], p=0.5)
        self.head = thinned.MultiSampleDropout(nn.Linear(4, 4))
        self.connect = thinned.WeightDrop(nn.Linear(4, 4), ["weight"])

    def forward(self, x):  # type: ignore[no-untyped-def]  # a graph with string annotations has no pickle
        x = self.maps(torch_functional.relu(self.bn(self.conv(x))))
        if self.functional:  # whose training is a constant of the graph, as always in torch.fx
            x = torch_functional.dropout(x, 0.1, self.training)
            x = F.dropout(x, 0.1, self.training)
        x = self.first(x.flatten(1))
        return self.connect(self.head(self.stack(self.last(self.units(x)))))


def converted(training: bool = True, functional: bool = True) -> nn.Module:
    torch.manual_seed(1)
    return thinned.convert(Net(functional)).train(training)


def under_seed(call: Callable[..., Tensor], *args: Any) -> Tensor:
    torch.manual_seed(3)
    return call(*args).detach()


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
@pytest.mark.parametrize("aware", [True, False], ids=["prepare_qat_fx", "prepare_fx"])
def test_quantization(aware: bool) -> None:
    model = converted(training=aware, functional=False)
    if aware:
        # As every module that torch.fx does not trace into, these have to be excepted.
        containers = [thinned.LayerDrop, thinned.MultiSampleDropout, thinned.WeightDrop]
        apart = PrepareCustomConfig().set_non_traceable_module_classes(containers)
        qconfig = get_default_qat_qconfig_mapping("x86")
        prepared = prepare_qat_fx(model, qconfig, (x,), prepare_custom_config=apart)
        before = prepared.last.weight.detach().clone()
        assert not prepared(x).equal(prepared(x))
        prepared(x).square().mean().backward()
        torch.optim.SGD(prepared.parameters(), 1e-3).step()
        assert not prepared.last.weight.equal(before)
    else:
        prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (x,))
        prepared(x)
    expected = prepared.eval()(x)
    quantized = convert_fx(prepared)
    state = torch.get_rng_state()
    assert isinstance(quantized.get_submodule("units"), thinned.Dropout)
    y = quantized(x)
    assert (y - expected).abs().max() < 0.1 * expected.abs().max()
    assert torch.get_rng_state().equal(state)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel")
def test_layers_pass_quantized_tensors_in_evaluation() -> None:
    quantized = torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    for layer in (thinned.Dropout(0.5), thinned.Dropout2d(0.5), thinned.DropPath(0.5)):
        assert layer.eval()(quantized) is quantized
        with pytest.raises(RuntimeError, match=r"got torch\.quint8 of shape"):
            layer.train()(quantized)


class Leaves(fx.Tracer):
    """Torchvision's NodePathTracer, in short: it names each node by the path of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.names = "", {}  # type: ignore[var-annotated]

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        before = self.path
        try:
            self.path = self.path_of_module(m)
            if not self.is_leaf_module(m, self.path):
                return forward(*args, **kwargs)
            return self.create_proxy("call_module", self.path, args, kwargs)
        finally:
            self.path = before

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any) -> Any:
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        self.names[proxy.node] = self.path if kind == "call_module" else f"{self.path}.{proxy.node}"
        return proxy


@pytest.mark.parametrize("training", [True, False])
def test_feature_extraction(training: bool) -> None:
    model, tracer = converted(training), Leaves()
    graph = tracer.trace(model)
    names = list(tracer.names.values())
    assert [name for name in names if name in ("maps", "units")] == ["maps", "units"]
    assert [name for name in names if name.startswith("stack")] == (
        ["stack"] if training else ["stack.0", "stack.1"]
    )
    oracle.assert_same(under_seed(fx.GraphModule(model, graph), x), under_seed(model, x))


def retraced(graph: fx.GraphModule) -> nn.Module:
    return fx.symbolic_trace(graph)


def propagated(graph: fx.GraphModule) -> nn.Module:
    state = torch.get_rng_state()
    ShapeProp(graph).propagate(x)
    torch.set_rng_state(state)
    (node,) = (node for node in graph.graph.nodes if node.target == "units")
    assert node.meta["tensor_meta"].shape == (4, 10)
    return graph


def interpreted(graph: fx.GraphModule) -> nn.Module:
    class Interpreted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return fx.Interpreter(graph).run(x)  # type: ignore[no-any-return]

    return Interpreted()


def split(graph: fx.GraphModule) -> nn.Module:
    nodes = {node: i for i, node in enumerate(graph.graph.nodes)}
    return split_module(graph, graph, lambda node: nodes[node] // 4)


PASSES: dict[str, Callable[[fx.GraphModule], nn.Module]] = {
    "again": retraced,
    "ShapeProp": propagated,
    "Interpreter": interpreted,
    "Transformer": lambda graph: fx.Transformer(graph).transform(),
    "split_module": split,
    "deepcopy": copy.deepcopy,
    "pickle": lambda graph: pickle.loads(pickle.dumps(graph)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", PASSES)
def test_passes(name: str, training: bool) -> None:
    model = converted(training)
    passed = PASSES[name](fx.symbolic_trace(copy.deepcopy(model)))
    oracle.assert_same(under_seed(passed, x), under_seed(model, x))


def test_fused_in_evaluation() -> None:
    model = converted(training=False)
    torch.testing.assert_close(fuse(model)(x), model(x))


def test_arguments_that_are_constant() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = thinned.Dropout(0.5)

        def forward(self, x: Tensor, dropped: bool = True, p: float = 0.25) -> Tensor:
            return F.dropout(self.drop(x) if dropped else x, p)

    for dropped, count in ((True, 1), (False, 0)):
        graph = fx.symbolic_trace(Gated(), concrete_args={"dropped": dropped})
        assert len([node for node in graph.graph.nodes if node.op == "call_module"]) == count
        oracle.assert_same(under_seed(graph, x, dropped, 0.1), under_seed(Gated(), x, dropped, 0.1))


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Any:
        q = x.flatten(2)
        return (
            torch_functional.dropout(x, 0.5),
            torch.dropout(x, 0.5, True),
            torch_functional.dropout2d(input=x),
            torch_functional.scaled_dot_product_attention(q, q, q, dropout_p=0.5),
            torch_functional.dropout(x, 0.5, False),
        )


def test_a_trace_within_intercept_draws_no_key() -> None:
    model, state = Functional(), torch.get_rng_state()
    with thinned.intercept(key=KEY) as context:
        graph = fx.symbolic_trace(model)
        assert context.count == 0
    assert torch.get_rng_state().equal(state)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets == [
        node.target for node in fx.symbolic_trace(model).graph.nodes if node.op == "call_function"
    ]
    with thinned.intercept(key=KEY):
        expected = model(x)
    for _ in range(2):
        with thinned.intercept(key=KEY) as context:
            for y, wanted in zip(graph(x), expected, strict=True):
                oracle.assert_same(y, wanted)
            assert context.count == 4


def test_an_intercepted_module_is_one_node() -> None:
    model = nn.Sequential(thinned.Intercepted(Functional(), key=KEY))
    graph = fx.symbolic_trace(model)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0"]
    for y, wanted in zip(graph(x), model(x), strict=True):
        oracle.assert_same(y, wanted)


def test_a_graph_has_the_masks_of_its_model_under_an_address() -> None:
    """Its modules are at the same paths. A trace within an address counts no call."""
    model = converted()
    masks: list[Tensor] = []
    for trace in (False, True, False):
        with thinned.address(model, seed=1, step=0), thinned.intercept():
            graph = fx.symbolic_trace(model) if trace else None
            masks.append(model(x).detach())
    graph = fx.symbolic_trace(model)
    with thinned.address(graph, seed=1, step=0), thinned.intercept():
        masks.append(graph(x).detach())
    for y in masks[1:]:
        oracle.assert_same(y, masks[0])
