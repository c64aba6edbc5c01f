"""Masks obey the law of dropout, and each check of it would notice a mask that does not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import chance
import thinned
from chance import FALSE_ALARM
from thinned import Key, spec

Mask = NDArray[np.bool_]

KEY = Key(7)
N = 2**22


def mask(key: Key, p: float, shape: tuple[int, ...] = (N,)) -> Mask:
    return thinned.keep_mask(key, shape, p).numpy()


@pytest.mark.parametrize("p", [0.001, 0.1, 0.25, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_rate(p: float, seed: int) -> None:
    assert chance.rate(mask(Key(seed), p), p) > FALSE_ALARM


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_rate_notices_two_percent(p: float) -> None:
    assert chance.rate(mask(KEY, p * 1.02), p) < FALSE_ALARM
    assert chance.rate(mask(KEY, p * 0.98), p) < FALSE_ALARM


def test_rate_notices_eight_bits() -> None:
    """A kernel that compares 8 bits only drops with 26/256 at p = 0.1."""
    assert chance.rate(mask(KEY, 26 / 256), 0.1) < FALSE_ALARM


def test_rate_of_each_row() -> None:
    """Rows under keys of their own: the smallest of 1024 probabilities is not too small."""
    rows = mask(KEY.fold(torch.arange(1024)), 0.3, (1024, 2048))
    assert min(chance.rate(row, 0.3) for row in rows) > FALSE_ALARM / 1024


NEIGHBOURS: dict[str, Callable[[Mask], tuple[Mask, ...]]] = {
    "elements": lambda m: (m[:-1], m[1:]),
    "three elements": lambda m: (m[:-2], m[1:-1], m[2:]),
    "words": lambda m: (m[:-32], m[32:]),
    "vectors": lambda m: (m[:-64], m[64:]),
    "blocks": lambda m: (m[:-128], m[128:]),
    "first of blocks": lambda m: (m[0:-128:128], m[128::128]),
    "segments": lambda m: (m[:-4096], m[4096:]),
    "halves": lambda m: (m[: N // 2], m[N // 2 :]),
}
each_pair = pytest.mark.parametrize("neighbours", NEIGHBOURS)


@each_pair
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_independence_of_neighbours(neighbours: str, p: float) -> None:
    assert chance.independence(*NEIGHBOURS[neighbours](mask(KEY, p)), p=p) > FALSE_ALARM


@each_pair
@pytest.mark.parametrize("p", [0.3, 0.5])
def test_independence_notices_a_few_copies(neighbours: str, p: float) -> None:
    """A share s of copies among n adds about n * s**2 to chi-squared; here 100."""
    first, *_, last = NEIGHBOURS[neighbours](mask(KEY, p))
    copied = np.random.default_rng(0).random(last.shape) < 10 / np.sqrt(last.size)
    assert chance.independence(first, np.where(copied, first, last), p=p) < FALSE_ALARM


@pytest.mark.parametrize("shape", [(2048, 2048), (N // 3, 3), (64, 256, 256)], ids=str)
def test_independence_along_each_axis(shape: tuple[int, ...]) -> None:
    kept = mask(KEY, 0.3, shape)
    for axis, size in enumerate(shape):
        first, second = (kept.take(range(i, size - 1 + i), axis) for i in (0, 1))
        assert chance.independence(first, second, p=0.3) > FALSE_ALARM


KEYS = {
    "seeds in a row": [Key(0), Key(1), Key(2), Key(3)],
    "seeds by powers of two": [Key(0), Key(2**31), Key(2**32), Key(2**63)],
    "children": [KEY, KEY.fold(0), KEY.fold(1), KEY.fold("a")],
    "grandchildren": [KEY.fold(0).fold(1), KEY.fold(1).fold(0), KEY.fold(0).fold(0), KEY.fold(1).fold(1)],
}


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_independence_of_keys(keys: str, p: float) -> None:
    assert chance.independence(*(mask(key, p) for key in KEYS[keys]), p=p) > FALSE_ALARM


def test_independence_notices_a_mask_used_again() -> None:
    one, other = mask(KEY, 0.5), mask(KEY.fold(1), 0.5)
    assert chance.independence(one, one, p=0.5) < FALSE_ALARM
    assert chance.independence(one, ~one, p=0.5) < FALSE_ALARM
    assert chance.independence(one, other, one ^ other, p=0.5) < FALSE_ALARM  # in pairs they are independent


def leading_bits(key: Key, planes: int) -> NDArray[np.int64]:
    """The leading bits of each number, by the masks at all their thresholds."""
    steps = 2**planes
    numbers = np.zeros(N, np.int64)
    for step in range(1, steps):
        numbers += ~mask(key, 1 - step / steps)
    return numbers


def test_independence_of_planes() -> None:
    numbers = leading_bits(KEY, 4)
    assert chance.uniformity(numbers, 16) > FALSE_ALARM
    assert chance.uniformity(numbers[:-1] * 16 + numbers[1:], 256) > FALSE_ALARM
    assert chance.uniformity(numbers[:-128] * 16 + numbers[128:], 256) > FALSE_ALARM


def test_independence_of_planes_notices_a_plane_used_again() -> None:
    numbers = leading_bits(KEY, 2)
    plane = numbers >> 1
    assert chance.uniformity(plane * 2 + plane, 4) < FALSE_ALARM
    again = np.where(np.random.default_rng(0).random(N) < 0.02, plane, numbers & 1)
    assert chance.uniformity(plane * 2 + again, 4) < FALSE_ALARM


@pytest.mark.parametrize("p", [0.001, 0.1, 0.3, 0.5, 0.9])
def test_scale_is_of_the_realised_probability(p: float) -> None:
    """E[y] = x exactly: the value of a kept element times the share of numbers that keep it."""
    T = spec.threshold(p)
    y = thinned.functional.dropout(torch.ones(2**14, dtype=torch.float64), p, key=KEY)
    kept = set(y.tolist()) - {0.0}
    assert len(kept) == 1
    assert abs(kept.pop() * T / 2**32 - 1) <= 2**-52
