"""Continuous random numbers: which they are, to the last place, and where they end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

import chance
import thinned
from backend_under_test import BackendUnderTest
from thinned import op, spec
from thinned.op.noise import logistic, multiply, normal, uniform

KEY = thinned.Key(7)
N = 100_000
FUNCTIONS = [uniform, normal, logistic]
INSIDE = np.float32(1 - 2**-24)

Noise = Callable[..., Tensor]


def centred(dtype: torch.dtype, n: int = N) -> NDArray[np.floating]:
    """The ``v`` of the docstrings, from the specification's numbers."""
    u = spec.uniform(int(KEY), np.arange(n, dtype=np.uint64)).astype(np.int64) - 2**31
    if dtype == torch.float64:
        return (u + 0.5) / 2**31
    return (u.astype(np.float32) + np.float32(0.5)) * (np.float32(2**-31) * INSIDE)


def ulps(values: Tensor, exact: NDArray[np.float64]) -> float:
    found = values.numpy()
    return float((np.abs(found - exact) / np.spacing(np.abs(exact).astype(found.dtype))).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normal_numbers_are_quantiles_within_3_ulp(dtype: torch.dtype) -> None:
    v = centred(dtype)
    exact = np.sqrt(2) * special.erfinv(v.astype(np.float64))
    # In float64 scipy has an error of its own.
    assert ulps(normal(KEY, (N,), dtype=dtype), exact) <= (3 if dtype == torch.float32 else 4)


def test_float32_numbers_lie_by_their_exact_probabilities() -> None:
    exact = (centred(torch.float64) + 1) / 2
    for found in (
        stats.norm.cdf(normal(KEY, (N,)).double().numpy()),
        special.expit(logistic(KEY, (N,)).double().numpy()),
        uniform(KEY, (N,)).double().numpy(),
    ):
        assert np.abs(found - exact).max() <= 2**-23


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_logistic_numbers(dtype: torch.dtype) -> None:
    v = centred(dtype).astype(np.float64)
    found = logistic(KEY, (N,), dtype=dtype).double().numpy()
    exact = np.log1p(v) - np.log1p(-v)
    assert (np.abs(found - exact) <= 4 * torch.finfo(dtype).eps * np.maximum(1, np.abs(exact))).all()


def test_uniform_numbers_in_float64_are_exact() -> None:
    u = spec.uniform(int(KEY), np.arange(N, dtype=np.uint64))
    assert np.array_equal(uniform(KEY, (N,), dtype=torch.float64).numpy(), (u + 0.5) / 2**32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_ends(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    ends = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    monkeypatch.setattr(op, "uniform", lambda *_: ends.clone())
    first, last = (2**-24, 1 - 2**-24) if dtype == torch.float32 else (2**-33, 1 - 2**-33)
    numbers = uniform(KEY, (6,), dtype=dtype)
    assert (numbers[0], numbers[-1]) == (first, last)
    end = 5.42 if dtype == torch.float32 else 6.34
    z = normal(KEY, (6,), dtype=dtype)
    assert z[-1].item() == pytest.approx(end, abs=0.005)
    assert z.equal(-z.flip(0))
    beyond = 2 * stats.norm.sf(end)
    assert beyond < 6.1e-8
    tail = 17.3 if dtype == torch.float32 else 22.9
    numbers = logistic(KEY, (6,), dtype=dtype)
    assert numbers[-1].item() == pytest.approx(tail, abs=0.05)
    assert numbers[0].item() == pytest.approx(-tail, abs=0.05)
    assert 2 * special.expit(-tail) < 6.2e-8


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_backend_gives_the_same_bits(
    backend: BackendUnderTest, function: Noise, dtype: torch.dtype
) -> None:
    """From the specification's numbers, on one device; another device has an erfinv of its own."""
    v = torch.from_numpy(centred(dtype, 1000))
    expected = {
        uniform: None,
        normal: v.erfinv() * 2**0.5,
        logistic: ((1 + v) / (1 - v)).log(),
    }[function]
    found = function(thinned.Key.from_bits(KEY.bits.to(backend.device)), (1000,), dtype=dtype).cpu()
    if expected is None:
        u = centred(torch.float64, 1000)
        shrunk = np.float32(2**-32 * (1 - 2**-23)) if dtype == torch.float32 else 2**-32
        kind = np.float32 if dtype == torch.float32 else np.float64
        numbers = (u * 2**31 - 0.5).astype(kind) + kind(0.5)
        expected = torch.from_numpy(numbers * kind(shrunk) + kind(0.5))
    if backend.device == "cpu":
        assert found.equal(expected)
    else:
        torch.testing.assert_close(found, expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_rows_numbers_depend_on_its_key_and_not_on_its_place(function: Noise) -> None:
    keys = KEY.fold(torch.arange(5))
    for size in (1, 37, 200):
        rows = function(keys, (5, size))
        for place in range(5):
            assert rows[place].equal(function(KEY.fold(place), (size,)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_elements_number_depends_on_its_position_alone(function: Noise) -> None:
    whole = function(KEY, (301,))
    for size in (1, 7, 33, 300):
        assert function(KEY, (size,)).equal(whole[:size])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_shared_dimensions_have_size_1(function: Noise) -> None:
    assert function(KEY, (3, 4, 5), broadcast_dims=(1,)).equal(function(KEY, (3, 1, 5)))
    assert function(KEY, (3, 4, 5), broadcast_dims=(0, -1)).equal(function(KEY, (1, 4, 1)))
    keys = KEY.fold(torch.arange(3))
    assert function(keys, (3, 4, 5), broadcast_dims=(0, 2)).equal(function(keys, (3, 4, 1)))
    assert function(KEY, (0, 4)).shape == (0, 4)
    assert function(KEY, ()).shape == ()
    with pytest.raises(IndexError, match="names dimension 3"):
        function(KEY, (3, 4, 5), broadcast_dims=(3,))


def test_uniform_numbers_fill_the_interval_and_follow_one_another_freely() -> None:
    numbers = uniform(KEY, (200_000,)).numpy()
    cells = (numbers * 16).astype(np.int64)
    assert chance.uniformity(cells, 16) > chance.FALSE_ALARM
    assert chance.uniformity(cells[::2] * 16 + cells[1::2], 256) > chance.FALSE_ALARM
    biased = (numbers**1.02 * 16).astype(np.int64)
    assert chance.uniformity(biased, 16) < chance.FALSE_ALARM


def test_multiply_writes_over_the_factor_only_where_nobody_looks() -> None:
    x, factor = torch.randn(3, 4), torch.randn(3, 4)
    expected = x * factor
    with torch.no_grad():
        assert multiply(x, factor.clone()).equal(expected)
    kept = factor.clone()
    assert multiply(x, kept).equal(expected)
    assert kept.equal(factor)
    half = x.half()
    assert multiply(half, factor).dtype == torch.float32
