"""Zoneout: each unit takes its candidate or keeps its previous value."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
import thinned
from thinned.compare.laws import examine
from thinned.compare.layers import Implementation
from thinned.compare.layers.recurrent import ENTRIES, ZoneoutFormula
from thinned.compare.settings import Settings
from thinned.functional import zoneout

KEY = thinned.Key(7)
LAWS = {law.name: law for law in ENTRIES[2].laws}


@pytest.mark.usefixtures("subject")
def test_formula() -> None:
    candidate, previous = torch.randn(2, 40, 30).unbind()
    mask = oracle.keep_mask(KEY.bits, (40, 30), thinned.geometry.shared((40, 30)), round(0.7 * 2**32))
    y = zoneout(candidate, previous, 0.3, key=KEY)
    oracle.assert_same(y, torch.where(torch.from_numpy(mask), candidate, previous))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_values_are_exact(dtype: torch.dtype) -> None:
    candidate = oracle.specials((30, 20), dtype)
    previous = candidate.flip(0)
    mask = thinned.keep_mask(KEY, (30, 20), 0.4)
    oracle.assert_same(zoneout(candidate, previous, 0.4, key=KEY), torch.where(mask, candidate, previous))
    assert zoneout(candidate, previous, 0.0) is candidate
    assert zoneout(candidate, previous, 0.0, training=False) is candidate
    for training in (True, False):
        oracle.assert_same(zoneout(candidate, previous, 1.0, training=training), previous)


def test_a_key_for_each_sample() -> None:
    candidate, previous = torch.randn(2, 4, 30).unbind()
    order = torch.tensor([2, 0, 3, 1])
    y = zoneout(candidate, previous, key=KEY.fold(torch.arange(4)))
    oracle.assert_same(y[1], zoneout(candidate[1], previous[1], key=KEY.fold(1)))
    oracle.assert_same(zoneout(candidate[order], previous[order], key=KEY.fold(order)), y[order])


def test_chance() -> None:
    ones, zeros = torch.ones(300, 300), torch.zeros(300, 300)
    mask, other = (zoneout(ones, zeros, 0.3, key=KEY.fold(i)).bool().numpy() for i in range(2))
    assert chance.rate(mask, 0.3) > chance.FALSE_ALARM
    for pair in [(mask, other), (mask[::2], mask[1::2]), (mask[:, ::2], mask[:, 1::2])]:
        assert chance.independence(*pair, p=0.3) > chance.FALSE_ALARM


def test_evaluation_is_the_mean_of_training() -> None:
    candidate, previous = torch.full((200_000,), 2.0), torch.full((200_000,), -1.0)
    expected = zoneout(candidate[0], previous[0], 0.3, training=False).item()
    assert expected == pytest.approx(0.7 * 2 - 0.3)
    y = zoneout(candidate, previous, 0.3, key=KEY).double().numpy()
    assert chance.mean(y, expected, 9 * 0.3 * 0.7) > chance.FALSE_ALARM


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


def test_as_the_formula_in_distribution() -> None:
    torch.manual_seed(0)
    counts = []
    for layer in (thinned.Zoneout(0.3), ZoneoutFormula(0.3)):
        taken = layer(torch.ones(50_000, 5), torch.zeros(50_000, 5)).sum(1).long()
        counts.append(np.bincount(taken.numpy(), minlength=6))
    assert stats.chi2_contingency(np.array(counts)).pvalue > chance.FALSE_ALARM


class TooOften(ZoneoutFormula):
    def __init__(self, p: float) -> None:
        super().__init__(p * 1.02)


class WholeUnits(ZoneoutFormula):
    """One decision for all samples."""

    def forward(self, candidate: Tensor, previous: Tensor) -> Tensor:
        return torch.where(torch.rand_like(candidate[:1]) < self.p, previous, candidate)


class Dropped(ZoneoutFormula):
    """Zero, and not the previous value."""

    def forward(self, candidate: Tensor, _: Tensor) -> Tensor:
        return nn.functional.dropout(candidate, self.p, self.training)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("rate", TooOften),
        ("independence", WholeUnits),
        ("kept values", Dropped),
        ("values", Dropped),
        ("values", ZoneoutFormula),
        ("expectation", TooOften),
        ("gradient of both", Dropped),
    ],
)
def test_wrong_laws_are_seen(law: str, wrong: type[nn.Module]) -> None:
    assert examine(LAWS[law], Implementation("wrong", wrong), Settings(quick=True)).verdict.is_breach


def test_gradient_goes_to_what_was_taken() -> None:
    candidate, previous = (torch.randn(40, 30, requires_grad=True) for _ in range(2))
    upstream = torch.randn(40, 30)
    y = zoneout(candidate, previous, 0.3, key=KEY)
    mask = thinned.keep_mask(KEY, (40, 30), 0.3)
    to_candidate, to_previous = torch.autograd.grad(y, (candidate, previous), upstream)
    oracle.assert_same(to_candidate, torch.where(mask, upstream, 0))
    oracle.assert_same(to_previous, torch.where(mask, 0, upstream))
    torch.autograd.gradcheck(
        lambda *states: zoneout(*states, 0.4, key=KEY),
        [torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)],
    )
    for training in (True, False):  # of p = 1, which has a gradient for both
        y = zoneout(candidate, previous, 1.0, training=training)
        assert not torch.autograd.grad(y.sum(), candidate)[0].any()


def test_strides() -> None:
    candidate, previous = torch.randn(30, 40).t(), torch.randn(40, 30)
    y = zoneout(candidate, previous, key=KEY)
    oracle.assert_same(y, zoneout(candidate.contiguous(), previous, key=KEY))


def test_module() -> None:
    layer = thinned.Zoneout(0.3)
    assert repr(layer) == "Zoneout(p=0.3)"
    candidate, previous = torch.randn(2, 40, 30).unbind()
    expected = zoneout(candidate, previous, 0.3, key=KEY)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        oracle.assert_same(each(candidate, previous, key=KEY), expected)
    oracle.assert_same(layer.eval()(candidate, previous), zoneout(candidate, previous, 0.3, training=False))


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_outside_0_to_1(p: float) -> None:
    message = re.escape(f"between 0 and 1, but got {p}")
    with pytest.raises(ValueError, match=message):
        thinned.Zoneout(p)
    with pytest.raises(ValueError, match=message):
        zoneout(torch.ones(3), torch.ones(3), p)


@pytest.mark.parametrize("training", [True, False])
def test_refused(training: bool) -> None:
    x = torch.ones(3, 4)
    with pytest.raises(RuntimeError, match=r"shape \(3, 4\) and torch.float32; got shape \(4,\)"):
        zoneout(x, x[0], 0.5, training=training)
    with pytest.raises(RuntimeError, match=r"got shape \(3, 4\) and torch.float64"):
        zoneout(x, x.double(), 0.5, training=training)
    with pytest.raises(TypeError, match="'previous' must be Tensor, not float"):
        zoneout(x, 0.0, 0.5, training=training)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"got torch\.int64 of shape \(3, 4\)"):
        zoneout(x.long(), x.long(), 0.5, training=training)
    with pytest.raises(RuntimeError, match=r"keys of shape \(5,\) do not fit"):
        zoneout(x, x, 0.5, training=training, key=KEY.fold(torch.arange(5)))
