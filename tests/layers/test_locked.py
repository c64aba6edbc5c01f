"""LockedDropout: one mask for all time steps, in either layout and packed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
)

import chance
import oracle
import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers.locked import ENTRIES, LockedDropoutFormula
from thinned.functional import locked_dropout
from verdicts import verdict

KEY = thinned.Key(7)
KEYS = KEY.fold(torch.arange(4))
KEYS_OF = [KEY.fold(torch.tensor([n])) for n in range(4)]
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


LENGTHS = {"sorted": [5, 5, 3, 1], "unsorted": [2, 5, 1, 5]}
each_order = pytest.mark.parametrize("order", LENGTHS)


def sequences(order: str, *features: int) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(length, *features, dtype=torch.float64) for length in LENGTHS[order]]


def packed(order: str, *features: int) -> PackedSequence:
    return pack_sequence(sequences(order, *features), enforce_sorted=order == "sorted")


@each_order
@pytest.mark.parametrize("key", [KEY, KEYS, None], ids=["one key", "a key for each sample", "drawn"])
@pytest.mark.parametrize("features", [(6,), (2, 3)])
def test_packed(order: str, key: thinned.Key | None, features: tuple[int, ...]) -> None:
    """The padded sequences' mask; with their keys, each has the mask that it has alone."""
    alone, x = sequences(order, *features), packed(order, *features)
    x.data.requires_grad_()
    torch.manual_seed(1)
    y = locked_dropout(x, 0.3, key=key)
    torch.manual_seed(1)
    padded = locked_dropout(pad_sequence(alone), 0.3, key=key)
    for got, wanted in zip(y[1:], x[1:], strict=True):
        assert got is wanted
    separate = [each[: len(one)] for each, one in zip(padded.unbind(1), alone, strict=True)]
    assert y.data.equal(pack_sequence(separate, enforce_sorted=False).data)
    if key is KEYS:
        for n, one in enumerate(alone):
            oracle.assert_same(
                separate[n], locked_dropout(one[None], 0.3, batch_first=True, key=KEYS_OF[n])[0]
            )
    (grad,) = torch.autograd.grad(y.data.sum(), x.data)
    oracle.assert_same(grad, (y.data != 0).double() * (2**32 / round(0.7 * 2**32)))
    in_place = PackedSequence(x.data * 1, *x[1:])
    torch.manual_seed(1)
    assert locked_dropout(in_place, 0.3, inplace=True, key=key) is in_place
    assert in_place.data.equal(y.data)


@each_order
def test_packed_in_an_address(order: str) -> None:
    """The samples keep their masks in another batch."""
    layer, ids = thinned.LockedDropout(0.5), torch.tensor([11, 5, 8, 2])
    with thinned.address(layer, seed=3, step=0, samples=ids):
        whole, lengths = pad_packed_sequence(layer(packed(order, 6)))
    with thinned.address(layer, seed=3, step=0, samples=ids[1:]):
        rest = pack_sequence(sequences(order, 6)[1:], enforce_sorted=False)
        rest, _ = pad_packed_sequence(layer(rest), total_length=5)
    for n in range(1, 4):
        assert whole[: lengths[n], n].equal(rest[: lengths[n], n - 1])


def test_packed_as_it_is() -> None:
    """In evaluation and with p = 0; samples of equal length keep an order that no sort would give."""
    x = packed("unsorted", 6)
    assert thinned.LockedDropout(0.5).eval()(x) is x
    assert thinned.LockedDropout(0.0)(x) is x
    order = torch.tensor([3, 0, 2, 1])
    given = pack_padded_sequence(torch.ones(7, 4, 50), torch.tensor([7] * 4))
    y = locked_dropout(PackedSequence(given.data, given.batch_sizes, order), key=KEYS)
    for row, n in enumerate(order):
        oracle.assert_same(y.data[row], locked_dropout(torch.ones(1, 1, 50), key=KEYS_OF[n])[0, 0])


def test_packed_refused() -> None:
    with pytest.raises(RuntimeError, match=r"feature dimension, got a packed sequence .* shape \(14,\)"):
        locked_dropout(packed("sorted"))
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit a tensor of shape \(4,\)"):
        locked_dropout(packed("sorted", 6), key=KEY.fold(torch.arange(3)))
    with pytest.raises(RuntimeError, match=r"locked_dropout needs a floating-point .* torch.int64"):
        locked_dropout(pack_sequence([torch.ones(3, 2, dtype=torch.int64)]))


@each_layout
def test_refused(batch_first: bool) -> None:
    with pytest.raises(RuntimeError, match=r"got an input of shape \(3,\)"):
        locked_dropout(torch.ones(3), batch_first=batch_first)
    for shape in ((4, 4), (3, 3, 4)):  # a sample alone, and three
        with pytest.raises(RuntimeError, match=r"keys of shape \(4,\) do not fit"):
            locked_dropout(torch.ones(shape), batch_first=batch_first, key=KEYS)
