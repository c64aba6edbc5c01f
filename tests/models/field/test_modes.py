"""Field issues about evaluation, infinite numbers, writing in place, and cost."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import thinned
from backend_under_test import BackendUnderTest
from benchmarks.case import MULTIPLY, Bound
from benchmarks.cases import cases
from models.field.halves import Operations, in_torch
from thinned import Key
from thinned.models.intercept import intercept

INF = float("inf")


class Attention(nn.Module):
    """The issues' program: attention that hands on its dropout whether it is in training or not."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, 8, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query, x, x, dropout_p=0.5)


X = torch.randn(1, 2, 8, 4)


def without_dropout(attention: Attention) -> Tensor:
    return F.scaled_dot_product_attention(attention.query, X, X)


@in_torch("reproduces")
def test_pytorch_99293_torch() -> None:
    """A model in evaluation gives another result each time."""
    attention = Attention().eval()
    assert not attention(X).equal(attention(X))


def test_pytorch_99293_thinned() -> None:
    """Evaluation with the option is torch's attention without dropout; training drops as before."""
    attention = Attention().eval()
    with intercept(key=Key(7), sdpa_follows_training=True):
        assert attention(X).equal(without_dropout(attention))
        assert not attention.train()(X).equal(without_dropout(attention))


@in_torch("reproduces")
def test_pytorch_124464_torch() -> None:
    """A part in evaluation drops within a model in training, and no module of torch would."""
    model = nn.Sequential(nn.Dropout(0.5), Attention()).train()
    model.eval()
    assert model[0](X).equal(X)
    assert not model[1](X).equal(without_dropout(model[1]))


def test_pytorch_124464_thinned() -> None:
    """The flag that counts is that of the module that calls; without the option nothing is different."""
    model = nn.Sequential(nn.Identity(), Attention()).train()
    model[1].eval()
    with intercept(key=Key(7), sdpa_follows_training=True):
        assert model(X).equal(without_dropout(model[1]))
    with intercept(key=Key(7)):
        assert not model(X).equal(without_dropout(model[1]))


@in_torch("reproduces")
def test_pytorch_59421_torch() -> None:
    """On a CPU, what is dropped of infinity is NaN, and so is what is dropped of its gradient."""
    torch.manual_seed(3)
    x = torch.full((100,), INF)
    assert {str(number) for number in F.dropout(x, 0.5).tolist()} == {"inf", "nan"}
    leaf = torch.ones(100, requires_grad=True)
    F.dropout(leaf, 0.5).backward(x)
    assert leaf.grad is not None
    assert {str(number) for number in leaf.grad.tolist()} == {"inf", "nan"}


@pytest.mark.parametrize("number", [INF, -INF, math.nan])
def test_pytorch_59421_thinned(backend: BackendUnderTest, number: float) -> None:
    """A dropped element is +0, whatever its value was."""
    kept = thinned.keep_mask(Key(7), (100,), 0.5)
    expected = torch.where(kept, number, 0.0)
    x = torch.full((100,), number, device=backend.device)
    oracle.assert_same(thinned.functional.dropout(x, 0.5, key=Key(7)).cpu(), expected)
    leaf = torch.ones(100, device=backend.device, requires_grad=True)
    (grad,) = torch.autograd.grad(thinned.functional.dropout(leaf, 0.5, key=Key(7)), leaf, x)
    oracle.assert_same(grad.cpu(), expected)


class Exported(nn.Module):
    def __init__(self, dropout: nn.Module) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(x)
        return y


def dropouts(graph: torch.fx.Graph) -> list[str]:
    return [
        str(node.target)
        for node in graph.nodes
        if "drop" in str(node.target) or "thinned" in str(node.target)
    ]


@pytest.mark.usefixtures("fresh_compiler")
@in_torch("reproduces")
def test_pytorch_103681_torch() -> None:
    """The issue's program, whose eval() changes nothing; and torch.export, whose graph keeps its dropout."""
    x = torch.ones(64)
    module, _ = torch._dynamo.export(Exported(nn.Dropout(0.5)), aten_graph=True)(x)
    assert not module.eval()(x).equal(x)
    program = torch.export.export(Exported(nn.Dropout(0.5)), (x,))
    with pytest.raises(NotImplementedError, match=r"Calling eval\(\) is not supported"):
        program.module().eval()
    assert dropouts(torch.export.export(Exported(nn.Dropout(0.5)).eval(), (x,)).graph) == [
        "aten.dropout.default"
    ]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("strict", [False, True])
def test_pytorch_103681_thinned(strict: bool) -> None:
    """Exported in evaluation, nothing of it is left; a graph of training says that it is one."""
    x = torch.ones(64)
    program = torch.export.export(Exported(thinned.Dropout(0.5)).eval(), (x,), strict=strict)
    assert dropouts(program.graph) == []
    assert program.module()(x).equal(x)
    training = torch.export.export(Exported(thinned.Dropout(0.5)), (x,), strict=strict)
    with pytest.raises(NotImplementedError, match=r"Calling eval\(\) is not supported"):
        training.module().eval()


def drawn(function: Callable[[Tensor], Tensor]) -> dict[str, int]:
    """How many numbers each random operation draws for 1000 elements."""
    with Operations() as seen:
        function(torch.ones(1000))
    return {
        operation.name(): result.numel()
        for operation, result in seen.calls
        if torch.Tag.nondeterministic_seeded in operation.tags
    }


@in_torch("reproduces")
def test_pytorch_138199_torch() -> None:
    """Each element has a number of its own from aten::bernoulli_, which takes most of a call's time."""
    assert drawn(lambda x: F.dropout(x, 0.1)) == {"aten::bernoulli_.float": 1000}


def test_pytorch_138199_thinned() -> None:
    """One number, the key. `make bench` holds it to a bound beside torch and a multiply, in each case."""
    assert drawn(thinned.Dropout(0.1)) == {"thinned::draw_key": 1}
    rows = [case for case in cases() if "1,000,000 elements" in case.setting]
    for group, other, at_least in (
        ("forward, peers", "nn.Dropout", 20),
        ("forward + backward", "nn.Dropout", 10),
    ):
        bounds = [bound for case in rows if case.group == group for bound in case.bounds]
        assert bounds
        assert all(bound.other == other and bound.limit <= 1 / at_least for bound in bounds)
    for case in rows:
        if case.group == "forward" and case.isa != "baseline":
            (bound,) = case.bounds
            assert bound == Bound(MULTIPLY, min(bound.limit, 3))


def after(activation: nn.Module, dropout: nn.Module) -> Tensor:
    """The gradient of a small model, in which the dropout writes over what the activation gave."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 8), activation, dropout, nn.Linear(8, 4))
    model(torch.randn(3, 4)).square().sum().backward()
    gradient = model[0].weight.grad
    assert gradient is not None
    return gradient


SAVING = [nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.2, inplace=True), nn.Sigmoid()]
RULE = "modified by an inplace operation"


@pytest.mark.parametrize("activation", SAVING, ids=str)
@in_torch("reproduces")
def test_pytorch_72992_torch(activation: nn.Module) -> None:
    """The rule of torch: what the backward pass needs must not be written over."""
    with pytest.raises(RuntimeError, match=RULE):
        after(activation, nn.Dropout(0.25, inplace=True))


@pytest.mark.parametrize("activation", SAVING, ids=str)
def test_pytorch_72992_thinned(activation: nn.Module) -> None:
    """The same rule and the same words, never a wrong gradient; not in place it is right."""
    with pytest.raises(RuntimeError, match=RULE):
        after(activation, thinned.Dropout(0.25, inplace=True))
    assert after(activation, thinned.Dropout(0.25)).any()


def test_pytorch_72992_thinned_allowed() -> None:
    """An activation that keeps its input and not its output may be written over."""
    plain, inplace = (after(nn.LeakyReLU(0.2), thinned.Dropout(0.25, inplace)) for inplace in (False, True))
    assert inplace.equal(plain)
