"""The bounds are what they say they are."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from thinned.compare.laws.chance import (
    FALSE_ALARM,
    MISS,
    associate,
    binomial_bounds,
    chosen_of,
    disjoint_pairs,
    elements_to_show,
    strongest,
)
from thinned.compare.laws.rate import PROBABILITIES, RATE_BIAS
from thinned.compare.laws.values import departure, ulps_off


@pytest.mark.parametrize("p", PROBABILITIES)
def test_binomial_bounds_show_the_bias_and_raise_no_alarm(p: float) -> None:
    n = elements_to_show(RATE_BIAS, math.sqrt((1 - p) / p))
    low, high = binomial_bounds(n, p)
    assert stats.binom.cdf(low - 1, n, p) + stats.binom.sf(high, n, p) <= FALSE_ALARM
    for biased in (0.98 * p, 1.02 * p):
        missed = stats.binom.cdf(high, n, biased) - stats.binom.cdf(low - 1, n, biased)
        assert missed < 10 * MISS  # n comes from the normal law, this from the exact one


def test_dependence_is_found_whatever_the_rate() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 100_000) < 0.1
    copied = torch.where(torch.rand(100_000) < 0.1, a, b)
    assert strongest([associate(a, b, "")]).verdict == "holds"
    assert strongest([associate(a, copied, "")]).verdict == "broken"
    assert associate(a, copied, "").correlation == pytest.approx(0.1, abs=0.02)
    assert associate(a, a, "").correlation == pytest.approx(1)


def test_looking_at_many_pairs_raises_the_bar() -> None:
    torch.manual_seed(0)
    a, b = torch.rand(2, 10_000) < 0.5
    weak = associate(a, torch.where(torch.rand(10_000) < 0.06, a, b), "here")
    assert strongest([weak]).verdict == "broken"
    assert strongest([chosen_of(10_000, weak)]).verdict == "holds"


@given(length=st.integers(0, 40), lag=st.integers(1, 12))
def test_pairs_are_disjoint_and_a_lag_apart(length: int, lag: int) -> None:
    used = []
    for a, b in disjoint_pairs(torch.arange(length), lag):
        assert torch.equal(a + lag, b)
        members = torch.cat([a, b]).tolist()
        assert len(set(members)) == len(members)
        used += a.tolist()
    assert len(set(used)) == len(used)
    if lag == 1:
        assert sorted(used) == list(range(length - 1))


def test_ulps_are_counted_in_the_input_dtype() -> None:
    x = torch.tensor([1.0, -3.0, 100.0, 1e-40])
    off = x.clone()
    for _ in range(3):
        off[1] = torch.nextafter(off[1], torch.tensor(-torch.inf))
    assert ulps_off(off, x, scale=1) == pytest.approx(3, abs=0.01)
    assert ulps_off(x, x, scale=1) == 0
    assert departure(x, x) is None
    assert departure(off, x) == "kept values 3 ulp off"
    assert departure(x, x, scale=2) == "scaled by 1.000, not 2.000"
    assert departure(x, x, kept=torch.tensor([True, True, False, True])) == "25% of the mask differs"
