"""LockedDropout: one mask for all time steps, in either layout."""

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
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers import Implementation
from thinned.compare.layers.recurrent import ENTRIES, LockedDropoutFormula
from thinned.compare.settings import Settings
from thinned.functional import locked_dropout

KEY = thinned.Key(7)
LAWS = {law.name: law for law in ENTRIES[0].laws}


@pytest.mark.usefixtures("subject")
def test_formula() -> None:
    x = torch.randn(5, 40, 30)
    mask = thinned.keep_mask(KEY, (1, 40, 30), 0.3)
    q = round(0.7 * 2**32) / 2**32
    y = locked_dropout(x, 0.3, key=KEY)
    oracle.assert_same(y, torch.where(mask, x * (1 / q), 0))
    oracle.assert_same(y, oracle.dropout(x, KEY.bits, 0.3, (0,)))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_special_numbers(dtype: torch.dtype) -> None:
    """Numbers of all kinds, against the specification; what is dropped is +0."""
    x = oracle.specials((7, 6, 5), dtype)
    oracle.assert_same(locked_dropout(x, 0.3, key=KEY), oracle.dropout(x, KEY.bits, 0.3, (0,)))


def test_layouts_have_one_mask() -> None:
    x = torch.randn(5, 40, 30)
    y = locked_dropout(x, key=KEY)
    oracle.assert_same(locked_dropout(x.transpose(0, 1), batch_first=True, key=KEY).transpose(0, 1), y)
    oracle.assert_same(locked_dropout(x[:, 0], key=KEY), locked_dropout(x[:, :1], key=KEY)[:, 0])
    images = torch.randn(5, 4, 3, 2, 2)
    mask = thinned.keep_mask(KEY, (1, 4, 3, 2, 2), 0.5)
    oracle.assert_same(locked_dropout(images, key=KEY), torch.where(mask, 2 * images, 0))


def test_length_changes_no_mask() -> None:
    x = torch.randn(9, 4, 30)
    assert locked_dropout(x, key=KEY)[:5].equal(locked_dropout(x[:5], key=KEY))


@pytest.mark.usefixtures("subject")
@pytest.mark.parametrize("batch_first", [False, True])
def test_a_key_for_each_sample(batch_first: bool) -> None:
    x = torch.randn(4, 6, 30) if batch_first else torch.randn(6, 4, 30).transpose(0, 1)

    def call(x: Tensor, keys: thinned.Key) -> Tensor:
        if batch_first:
            return locked_dropout(x, batch_first=True, key=keys)
        return locked_dropout(x.transpose(0, 1), key=keys).transpose(0, 1)

    y = call(x, KEY.fold(torch.arange(4)))
    for n in range(4):
        oracle.assert_same(y[n], locked_dropout(x[n], key=KEY.fold(n)))
    order = torch.tensor([2, 0, 3, 1])
    oracle.assert_same(call(x[order], KEY.fold(order)), y[order])


def test_chance() -> None:
    mask = (locked_dropout(torch.ones(2, 300, 300), 0.3, key=KEY)[1] != 0).numpy()
    other = (locked_dropout(torch.ones(2, 300, 300), 0.3, key=KEY.fold(1))[1] != 0).numpy()
    assert chance.rate(mask, 0.3) > chance.FALSE_ALARM
    assert chance.independence(mask, other, p=0.3) > chance.FALSE_ALARM
    for pair in [(mask[::2], mask[1::2]), (mask[:, ::2], mask[:, 1::2])]:
        assert chance.independence(*pair, p=0.3) > chance.FALSE_ALARM


def test_as_the_formula_in_distribution() -> None:
    """The number of steps and features that keep, of 3 and 4, is 3 times binomial in both."""
    torch.manual_seed(0)
    counts = []
    for layer in (thinned.LockedDropout(0.3), LockedDropoutFormula(0.3)):
        kept = (layer(torch.ones(3, 20_000, 4)) != 0).sum((0, 2))
        counts.append(np.bincount(kept.numpy(), minlength=13))
    counts = np.array(counts)
    seen = counts.sum(0) > 0
    assert seen.nonzero()[0].tolist() == [0, 3, 6, 9, 12]
    assert stats.chi2_contingency(counts[:, seen]).pvalue > chance.FALSE_ALARM


class TooOften(LockedDropoutFormula):
    def __init__(self, p: float) -> None:
        super().__init__(p * 1.02)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("rate", TooOften),
        ("sharing", nn.Dropout),
        ("independence", lambda p: LockedAcrossSamples(p)),
        ("mean, variance", TooOften),
    ],
)
def test_wrong_laws_are_seen(law: str, wrong: type[nn.Module]) -> None:
    assert examine(LAWS[law], Implementation("wrong", wrong), Settings(quick=True)).verdict is Verdict.BROKEN


class LockedAcrossSamples(LockedDropoutFormula):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :1]).ne(0) * x / (1 - self.p)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 4, 6),
        torch.randn(4, 5, 6).transpose(0, 1),
        torch.randn(6, 4, 5).permute(2, 1, 0),
        torch.randn(5, 8, 12)[:, ::2, ::2],
        torch.randn(1, 4, 6).expand(5, 4, 6),
        torch.randn(5, 4),
        torch.randn(4, 5).t(),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_memory_format(x: Tensor, batch_first: bool) -> None:
    x = x.clone(memory_format=torch.preserve_format) if 0 in x.stride() else x
    x.requires_grad_()
    y = locked_dropout(x, batch_first=batch_first, key=KEY)
    assert y.stride() == torch.empty_like(x).stride()
    oracle.assert_same(y, locked_dropout(x.contiguous(), batch_first=batch_first, key=KEY))
    (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert grad.equal(torch.where(y != 0, 2.0, 0.0))


@pytest.mark.parametrize("shape", [(5, 4, 6), (5, 4)])
@pytest.mark.parametrize("batch_first", [False, True])
def test_inplace(shape: tuple[int, ...], batch_first: bool) -> None:
    leaf = torch.randn(shape, requires_grad=True)
    expected = locked_dropout(leaf, batch_first=batch_first, key=KEY)
    x = leaf * 1
    y = locked_dropout(x, batch_first=batch_first, inplace=True, key=KEY)
    assert y is x
    oracle.assert_same(y, expected)
    grads = [torch.autograd.grad(each.square().sum(), leaf)[0] for each in (y, expected)]
    oracle.assert_same(*grads)
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        locked_dropout(leaf, batch_first=batch_first, inplace=True, key=KEY)
    plain = leaf.detach().clone()
    assert locked_dropout(plain, batch_first=batch_first, inplace=True, key=KEY) is plain
    oracle.assert_same(plain, expected)


def test_nothing_to_do_returns_the_input_itself() -> None:
    x, state = torch.randn(3, 4, 5), torch.get_rng_state()
    for layer in (thinned.LockedDropout(0.0), thinned.LockedDropout(0.5).eval()):
        assert layer(x) is x
    assert torch.get_rng_state().equal(state)


def test_derivatives() -> None:
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    for batch_first in (False, True):
        torch.autograd.gradcheck(lambda x: locked_dropout(x, 0.5, batch_first=batch_first, key=KEY), x)  # noqa: B023
        torch.autograd.gradgradcheck(lambda x: locked_dropout(x, 0.5, batch_first=batch_first, key=KEY), x)  # noqa: B023


def test_module() -> None:
    layer = thinned.LockedDropout(0.3, batch_first=True)
    assert repr(layer) == "LockedDropout(p=0.3, batch_first=True, inplace=False)"
    x = torch.randn(4, 3, 50)
    expected = locked_dropout(x, 0.3, batch_first=True, key=KEY)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        oracle.assert_same(each(x, key=KEY), expected)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_outside_0_to_1(p: float) -> None:
    message = re.escape(f"between 0 and 1, but got {p}")
    with pytest.raises(ValueError, match=message):
        thinned.LockedDropout(p)
    with pytest.raises(ValueError, match=message):
        locked_dropout(torch.ones(2, 3), p)


def test_refused() -> None:
    with pytest.raises(RuntimeError, match=re.escape("got a tensor of shape (3,)")):
        locked_dropout(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"complex tensor, got torch\.int64 of shape \(3, 4\)"):
        locked_dropout(torch.ones(3, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        locked_dropout([1.0])  # type: ignore[arg-type]
    keys = KEY.fold(torch.arange(5))
    with pytest.raises(RuntimeError, match=r"keys of shape \(5,\) do not fit"):
        locked_dropout(torch.ones(5, 4, 3), key=keys)
    with pytest.raises(RuntimeError, match=r"keys of shape \(5,\) do not fit"):
        locked_dropout(torch.ones(5, 4), key=keys)
