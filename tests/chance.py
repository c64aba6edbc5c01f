"""Checks of chance. Each gives the probability of what it saw, or of worse, if the law holds."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

# A check is failed below this. Keys are fixed, so that what passes once passes always.
FALSE_ALARM = 1e-6


def rate(kept: NDArray[np.bool_], p: float) -> float:
    """The number of dropped elements is binomial: exact, on both sides."""
    return float(stats.binomtest(int(kept.size - kept.sum()), kept.size, p).pvalue)


def independence(*masks: NDArray[np.bool_], p: float) -> float:
    """Masks are independent of each other at each place: chi-squared of all their joint outcomes.

    Each outcome is expected at least 100 times, so that the law is chi-squared's far into its tail.
    """
    outcome = sum(mask.ravel().astype(np.int64) << i for i, mask in enumerate(masks))
    counts = np.bincount(outcome, minlength=2 ** len(masks))
    kept = np.array([bin(i).count("1") for i in range(2 ** len(masks))])
    expected = masks[0].size * (1 - p) ** kept * p ** (len(masks) - kept)
    return _chi_squared(counts, expected)


def uniformity(numbers: NDArray[np.int64], outcomes: int) -> float:
    """Each of 0 .. outcomes-1 comes equally often."""
    counts = np.bincount(numbers.ravel(), minlength=outcomes)
    return _chi_squared(counts, np.full(outcomes, numbers.size / outcomes))


def homogeneity(*samples: NDArray[np.int64]) -> float:
    """Samples of small integers have one distribution: chi-squared of their counts."""
    most = max(int(sample.max()) for sample in samples) + 1
    counts = np.stack([np.bincount(sample.ravel(), minlength=most) for sample in samples])
    return float(stats.chi2_contingency(counts[:, counts.sum(0) > 0]).pvalue)


def mean(values: NDArray[np.float64], expected: float, variance: float) -> float:
    """The mean of many numbers of known variance: normal, on both sides."""
    deviation = (values.mean() - expected) / math.sqrt(variance / values.size)
    return float(2 * stats.norm.sf(abs(deviation)))


def _chi_squared(counts: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    assert expected.min() >= 100
    statistic = ((counts - expected) ** 2 / expected).sum()
    return float(stats.chi2.sf(statistic, len(counts) - 1))
