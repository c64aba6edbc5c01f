"""Zoneout: each unit takes its candidate or keeps its previous value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chance
import oracle
import thinned
from thinned.compare.layers.zoneout import ENTRIES, ZoneoutFormula
from thinned.functional import zoneout
from thinned.geometry import shared
from verdicts import verdict

KEY = thinned.Key(7)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("key", [KEY, KEY.fold(torch.arange(30))], ids=["one key", "a key for each row"])
def test_specification(dtype: torch.dtype, key: thinned.Key) -> None:
    """One of the two, bit for bit, whatever their strides."""
    candidate = oracle.specials((30, 20), dtype)
    previous = candidate.flip(0).t().contiguous().t()
    geometry = shared((30, 20), (), key.bits.dim())
    mask = oracle.keep_mask(key.bits, (30, 20), geometry, thinned.spec.threshold(0.4))
    oracle.assert_same(zoneout(candidate, previous, 0.4, key=key), torch.where(mask, candidate, previous))
    for training in (True, False):
        assert zoneout(candidate, previous, 0.0, training=training) is candidate
        oracle.assert_same(zoneout(candidate, previous, 1.0, training=training), previous)


@pytest.mark.parametrize("training", [True, False])
def test_at_p_1_the_candidate_has_a_gradient_of_0(training: bool) -> None:
    candidate = torch.randn(4, 3, requires_grad=True)
    y = zoneout(candidate, torch.zeros(4, 3), 1.0, training=training)
    assert not torch.autograd.grad(y.sum(), candidate)[0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_evaluation_rounds_once(dtype: torch.dtype) -> None:
    candidate, previous = torch.randn(2, 1000).to(dtype).unbind()
    y = zoneout(candidate, previous, 0.3, training=False)
    assert y.dtype == dtype
    terms = 0.7 * candidate.double(), 0.3 * previous.double()
    exact = sum(terms)
    ulp = torch.ldexp(torch.full_like(exact, torch.finfo(dtype).eps), torch.frexp(exact).exponent - 1)
    # Arithmetic is in float32 at least, and q has 32 bits.
    inexact = 2 * (2**-32 if dtype == torch.float64 else 2**-23) * sum(term.abs() for term in terms)
    assert ((y.double() - exact).abs() <= ulp / 2 + inexact).all()


def test_evaluation_exports_as_two_operations() -> None:
    x = torch.ones(2, 3)
    nodes = torch.export.export(thinned.Zoneout(0.3).eval(), (x, x)).graph.nodes
    assert [str(n.target) for n in nodes if n.op == "call_function"] == ["aten.mul.Tensor", "aten.add.Tensor"]


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_evaluation_draws_nothing(p: float) -> None:
    x = torch.ones(2, 3)
    before = torch.get_rng_state()
    thinned.Zoneout(p).eval()(x, x)
    torch.vmap(thinned.Zoneout(p).eval())(x, x)  # refuses to draw
    assert before.equal(torch.get_rng_state())


def test_as_the_formula_in_distribution() -> None:
    ones, zeros = torch.ones(50_000, 5), torch.zeros(50_000, 5)
    taken = [
        layer(ones, zeros).sum(1).long().numpy() for layer in (thinned.Zoneout(0.3), ZoneoutFormula(0.3))
    ]
    assert chance.homogeneity(*taken) > chance.FALSE_ALARM


class OneDecisionForAllSamples(ZoneoutFormula):
    def forward(self, candidate: Tensor, previous: Tensor) -> Tensor:
        return torch.where(torch.rand_like(candidate[:1]) < self.p, previous, candidate)


class Zeroed(ZoneoutFormula):
    """Zero, and not the previous value."""

    def forward(self, candidate: Tensor, _: Tensor) -> Tensor:
        return nn.functional.dropout(candidate, self.p, self.training)


class ForgetsPrevious(ZoneoutFormula):
    def forward(self, candidate: Tensor, previous: Tensor) -> Tensor:
        return super().forward(candidate, previous.detach())


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("drop rate at p = 0.3", lambda p: ZoneoutFormula(p * 1.02)),
        ("expectation", lambda p: ZoneoutFormula(p * 1.02)),
        ("neighbours", OneDecisionForAllSamples),
        ("kept values", Zeroed),
        ("values", Zeroed),
        ("gradient", ForgetsPrevious),
        ("values", ZoneoutFormula),
    ],
)
def test_wrong_laws_are_seen(law: str, wrong: Callable[..., nn.Module]) -> None:
    assert verdict(ENTRIES[0], law, wrong).is_breach


@pytest.mark.parametrize("training", [True, False])
def test_refused(training: bool) -> None:
    x = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\) and torch.float32; got shape \(4,\)"):
        zoneout(x, x[0], training=training)
    with pytest.raises(RuntimeError, match=r"got shape \(3, 4\) and torch.float64"):
        zoneout(x, x.double(), training=training)
    with pytest.raises(TypeError, match="'previous' must be Tensor, not float"):
        zoneout(x, 0.0, training=training)  # type: ignore[arg-type]
