"""torch.export, make_fx and fake tensors: the operation is one node of the graph."""

from __future__ import annotations

import io
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

import oracle
import thinned
from thinned import Key

pytestmark = pytest.mark.usefixtures("fresh_compiler")

X = torch.randn(6, 20)


class Keyed(nn.Module):
    def forward(self, x: Tensor, bits: Tensor) -> Tensor:
        return thinned.functional.dropout(x, 0.4, key=Key.from_bits(bits).fold("here"))


class Drawn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 20), thinned.Dropout(0.4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layers(x)
        return y


def calls(graph_module: GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if "thinned" in str(node.target)]


@pytest.mark.parametrize("strict", [False, True])
def test_a_key_as_an_input(strict: bool) -> None:
    program = torch.export.export(Keyed(), (X, torch.tensor(7)), strict=strict)
    assert calls(program.graph_module) == ["thinned.fold.default", "thinned.masked_affine.default"]
    for seed in (7, 8):
        oracle.assert_same(program.module()(X, torch.tensor(seed)), Keyed()(X, torch.tensor(seed)))


@pytest.mark.parametrize("strict", [False, True])
def test_a_drawn_key(strict: bool) -> None:
    model = Drawn()
    program = torch.export.export(model, (X,), strict=strict)
    assert calls(program.graph_module) == ["thinned.draw_key.default", "thinned.masked_affine.default"]
    torch.manual_seed(3)
    y = model(X)
    torch.manual_seed(3)
    oracle.assert_same(program.module()(X), y)
    assert not program.module()(X).equal(y)


@pytest.mark.parametrize("strict", [False, True])
def test_evaluation_is_no_operation(strict: bool) -> None:
    program = torch.export.export(Drawn().eval(), (X,), strict=strict)
    assert calls(program.graph_module) == []


@pytest.mark.parametrize("strict", [False, True])
def test_dynamic_shapes(strict: bool) -> None:
    batch = torch.export.Dim("batch", min=2, max=1000)
    program = torch.export.export(
        Keyed(), (X, torch.tensor(7)), dynamic_shapes={"x": {0: batch}, "bits": {}}, strict=strict
    )
    x = torch.randn(33, 20)
    oracle.assert_same(program.module()(x, torch.tensor(7)), Keyed()(x, torch.tensor(7)))


def test_saved_and_loaded() -> None:
    file = io.BytesIO()
    torch.export.save(torch.export.export(Keyed(), (X, torch.tensor(7))), file)
    file.seek(0)
    program = torch.export.load(file)
    oracle.assert_same(program.module()(X, torch.tensor(9)), Keyed()(X, torch.tensor(9)))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(mode: Literal["real", "fake", "symbolic"]) -> None:
    def f(x: Tensor, bits: Tensor) -> Tensor:
        return thinned.functional.dropout(x, 0.4, key=Key.from_bits(bits))

    traced = make_fx(f, tracing_mode=mode)(X, torch.tensor(7))
    assert calls(traced) == ["thinned.masked_affine.default"]
    oracle.assert_same(traced(X, torch.tensor(8)), f(X, torch.tensor(8)))


def test_make_fx_of_a_gradient() -> None:
    def f(x: Tensor, bits: Tensor) -> Tensor:
        y = thinned.functional.dropout(x, 0.4, key=Key.from_bits(bits)).square().sum()
        return torch.autograd.grad(y, x)[0]

    x = X.clone().requires_grad_()
    traced = make_fx(f)(x, torch.tensor(7))
    assert calls(traced) == ["thinned.masked_affine.default"] * 2
    oracle.assert_same(traced(x, torch.tensor(8)), f(x, torch.tensor(8)))


@pytest.mark.parametrize("key", [Key(7), None], ids=["key", "drawn"])
def test_fake_tensors(key: Key | None) -> None:
    state = torch.get_rng_state()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(4, 6).T.requires_grad_())
        y = thinned.functional.dropout(x, 0.5, key=key)
        assert (tuple(y.shape), y.stride(), y.dtype) == ((6, 4), (1, 6), torch.float32)
        assert type(y) is type(x)
        thinned.functional.dropout(y, 0.5, inplace=True, key=key).sum().backward()
    assert torch.get_rng_state().equal(state)
