"""The specification, read a second time: one position after the other, in Python's integers."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from thinned import spec
from thinned.philox import philox4x32


def number(key: int, i: int) -> int:
    """``u(i)``: bit ``l`` from the top is bit ``i % 128`` of plane ``l``'s block ``i // 128``."""
    u = 0
    for plane in range(32):
        block, b = divmod(i, 128)
        words = philox4x32((block % 2**32, block // 2**32, plane, 0), key, rounds=7)
        u = 2 * u + (words[b // 32] >> b % 32) % 2
    return u


def stratified(key: int, i: int, draw: int, strata: int) -> int:
    """``u'(i, s)`` of docs/mask.md."""
    prime = max(strata, 2)
    while any(prime % divisor == 0 for divisor in range(2, math.isqrt(prime) + 1)):
        prime += 1
    v = number(spec.fold(key, "strata"), i)
    a, b = 1 + ((v >> 16) * (prime - 1) >> 16), (v & 0xFFFF) * prime >> 16
    place = (a * draw + b) % prime
    while place >= strata:
        place = (a * place + b) % prime
    return (number(key, i) + place * (2**32 // strata)) % 2**32


STRATIFIED = [
    (int(key, 16), int(i, 16), int(draw), int(strata), int(answer, 16))
    for key, i, draw, strata, answer in (
        line.split()
        for line in (Path(__file__).parent / "data" / "stratified.kat").read_text().splitlines()
        if not line.startswith("#")
    )
]


def test_known_answers_of_stratified_draws() -> None:
    assert len(STRATIFIED) == 189
    for key, i, draw, strata, answer in STRATIFIED:
        assert int(spec.stratified(key, np.array([i], np.uint64), draw, strata)[0]) == answer
    for key, i, draw, strata, answer in STRATIFIED[::20]:
        assert stratified(key, i, draw, strata) == answer


@pytest.mark.parametrize("strata", [1, 2, 3, 20, 64, 97, 1000])
def test_draws_are_permuted_by_each_position(strata: int) -> None:
    """The distances from the first draw's number are all multiples of the stratum's width, each once."""
    index = np.arange(50, dtype=np.uint64)
    drawn = np.stack([spec.stratified(7, index, draw, strata) for draw in range(strata)])
    width = 2**32 // strata
    places = (drawn - spec.uniform(7, index)) // np.uint32(min(width, 2**32 - 1))
    assert (np.sort(places, axis=0) == np.arange(strata)[:, None]).all()
    assert (spec.stratified(7, index, strata + 1, strata) == spec.stratified(7, index, 1, strata)).all()


@pytest.mark.parametrize("start", [0, 2**32 - 3, 2**39 - 64, 2**63])
@pytest.mark.parametrize("key", [0, 7, 2**32, 2**64 - 1])
def test_number_of_a_position(key: int, start: int) -> None:
    index = np.arange(160, dtype=np.uint64) + np.uint64(start)
    assert spec.uniform(key, index).tolist() == [number(key, start + i) for i in range(160)]


@pytest.mark.parametrize(
    "p", [0.0, 1e-12, 2.0**-33, 3 * 2.0**-33, 0.1, 0.25, 0.3, 0.5, 0.9, 1 - 2.0**-32, 1.0]
)
def test_threshold_rounds_to_nearest_ties_to_even(p: float) -> None:
    assert spec.threshold(p) == round(Fraction(1 - p) * 2**32)


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan, math.inf])
def test_threshold_refuses(p: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        spec.threshold(p)


def test_mask_is_the_numbers_below_the_threshold() -> None:
    u = spec.uniform(7, np.arange(300, dtype=np.uint64)).astype(np.uint64)
    for T in (1, 2**31, 2**32 - 1, int(u[17]), int(u[17]) + 1):
        p = 1 - T / 2**32
        assert (spec.keep_mask(7, 300, p) == (u < T)).all()


def test_mask_from_a_position_on_is_part_of_the_whole() -> None:
    whole = spec.keep_mask(7, 1000, 0.3)
    assert (spec.keep_mask(7, (5, 20), 0.3, start=300) == whole[300:400].reshape(5, 20)).all()


def test_scale_makes_the_expectation_exact() -> None:
    for p in (0.1, 0.3, 0.5, 0.9):
        T = spec.threshold(p)
        assert math.isclose(spec.scale(T) * T, 2**32, rel_tol=2**-52)
    assert spec.scale(0) == 0
    assert spec.scale(2**32) == 1


def test_fold_is_ten_rounds_under_the_key() -> None:
    data, key = 0x0123456789ABCDEF, 0xFEDCBA9876543210
    w0, w1, _, _ = philox4x32((data % 2**32, data >> 32, 0, 1), key, rounds=10)
    assert spec.fold(key, data) == w0 + (w1 << 32)
    assert spec.fold(key, data - 2**64) == spec.fold(key, data)


def test_fold_of_a_string_is_of_its_digest() -> None:
    # b2sum of "abc" begins with ba80a53f981c4d0d (RFC 7693, appendix A).
    assert spec.fold(3, "abc") == spec.fold(3, 0x0D4D1C983FA580BA)


def test_dropped_is_plus_zero_whatever_it_was() -> None:
    x = np.array([np.nan, np.inf, -np.inf, -1.0] * 32, np.float32)
    dropped = spec.dropout(x, 7, 0.5)[~spec.keep_mask(7, 128, 0.5)]
    assert (dropped.view(np.uint32) == 0).all()


def test_complex_numbers_are_kept_whole() -> None:
    y = spec.dropout(np.full(200, 1 + 1j, np.complex64), 7, 0.5)
    assert set(y.tolist()) == {0, 2 + 2j}
    assert ((y != 0) == spec.keep_mask(7, 200, 0.5)).all()
