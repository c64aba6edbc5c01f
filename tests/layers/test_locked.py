"""LockedDropout: one mask for all time steps, in either layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chance
import oracle
import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers.locked import ENTRIES, LockedDropoutFormula
from thinned.functional import locked_dropout
from verdicts import verdict

KEY = thinned.Key(7)
KEYS = KEY.fold(torch.arange(4))
each_layout = pytest.mark.parametrize("batch_first", [False, True])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("key", [KEY, KEYS], ids=["one key", "a key for each sample"])
def test_specification(dtype: torch.dtype, key: thinned.Key) -> None:
    """Both layouts have one mask, that of (N, 1, C), as does a sequence alone of (1, C)."""
    x = oracle.specials((4, 5, 6), dtype)
    expected = oracle.dropout(x, key.bits, 0.3, (1,))
    oracle.assert_same(locked_dropout(x, 0.3, batch_first=True, key=key), expected)
    oracle.assert_same(locked_dropout(x.transpose(0, 1), 0.3, key=key).transpose(0, 1), expected)
    oracle.assert_same(locked_dropout(x[0], 0.3, key=KEY.fold(0) if key.shape else key), expected[0])


def test_images_and_longer_sequences() -> None:
    x = torch.randn(9, 4, 3, 2, 2)
    y = locked_dropout(x, key=KEY)
    oracle.assert_same(y, torch.where(thinned.keep_mask(KEY, (1, 4, 3, 2, 2), 0.5), 2 * x, 0))
    oracle.assert_same(locked_dropout(x[:5], key=KEY), y[:5])


def test_as_the_formula_in_distribution() -> None:
    """The number of steps and features that keep, of 3 and 4, is 3 times binomial in both."""
    kept = [
        (layer(torch.ones(3, 20_000, 4)) != 0).sum((0, 2)).numpy()
        for layer in (thinned.LockedDropout(0.3), LockedDropoutFormula(0.3))
    ]
    assert set(kept[0]) == set(kept[1]) == {0, 3, 6, 9, 12}
    assert chance.homogeneity(*kept) > chance.FALSE_ALARM


class LockedAcrossSamples(LockedDropoutFormula):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x[:, :1]).ne(0) * x / (1 - self.p)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("drop rate at p = 0.3", lambda p: LockedDropoutFormula(p * 1.02)),
        ("mean, variance", lambda p: LockedDropoutFormula(p * 1.02)),
        ("sharing", nn.Dropout),
        ("neighbours", LockedAcrossSamples),
    ],
)
def test_wrong_laws_are_seen(law: str, wrong: Callable[..., nn.Module]) -> None:
    assert verdict(ENTRIES[0], law, wrong) is Verdict.BROKEN


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(5, 4, 6),
        torch.randn(6, 4, 5).permute(2, 1, 0),
        torch.randn(5, 8, 12)[:, ::2, ::2],
        torch.randn(5, 4),
        torch.randn(4, 5).t(),
    ],
    ids=lambda x: f"{tuple(x.shape)} {x.stride()}",
)
@each_layout
def test_memory_format_and_in_place(x: Tensor, batch_first: bool) -> None:
    """The law has the first layout; a batch of one and the other layout add a dimension or move none."""
    leaf = x.clone().requires_grad_()
    x = leaf * 1
    y = locked_dropout(x, batch_first=batch_first, key=KEY)
    assert y.stride() == torch.empty_like(x).stride()
    oracle.assert_same(y, locked_dropout(x.contiguous(), batch_first=batch_first, key=KEY))
    assert locked_dropout(x, batch_first=batch_first, inplace=True, key=KEY) is x
    oracle.assert_same(x, y)
    (grad,) = torch.autograd.grad(x.sum() + y.sum(), leaf)
    oracle.assert_same(grad, torch.where(y != 0, 4.0, 0.0))


@each_layout
def test_refused(batch_first: bool) -> None:
    with pytest.raises(RuntimeError, match=r"got a tensor of shape \(3,\)"):
        locked_dropout(torch.ones(3), batch_first=batch_first)
    for shape in ((4, 4), (3, 3, 4)):  # a sample alone, and three
        with pytest.raises(RuntimeError, match=r"keys of shape \(4,\) do not fit"):
            locked_dropout(torch.ones(shape), batch_first=batch_first, key=KEYS)
