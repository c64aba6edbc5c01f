"""Statistical bounds, computed from the law and the number of elements, never tuned.

A statistical cell raises a false alarm with a probability below ``FALSE_ALARM``; samples are so large that
the bias which a law promises to show is missed with a probability below ``MISS``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from scipy import stats
from torch import Tensor

from thinned.compare.laws.law import Finding, holds_if

__all__ = [
    "DEVIATIONS",
    "Association",
    "associate",
    "binomial_bounds",
    "chosen_of",
    "disjoint_pairs",
    "elements_to_show",
    "neighbouring",
    "strongest",
    "within_binomial",
]

FALSE_ALARM = 1e-7
MISS = 1e-4
DEVIATIONS = float(stats.norm.isf(FALSE_ALARM / 2))  # the two-sided bound in standard deviations


def elements_to_show(bias: float, relative_deviation: float) -> int:
    """The N at which a relative ``bias`` of a mean lies beyond the bound in all but ``MISS`` of cases.

    Args:
        bias: the relative error that has to show.
        relative_deviation: one element's standard deviation over its mean.
    """
    deviations = DEVIATIONS + float(stats.norm.isf(MISS))
    return math.ceil((deviations * relative_deviation / bias) ** 2)


def binomial_bounds(n: int, p: float) -> tuple[int, int]:
    """The smallest and largest count that Binomial(n, p) may show, each tail below ``FALSE_ALARM / 2``."""
    low, high = stats.binom.interval(1 - FALSE_ALARM, n, p)
    return int(low), int(high)


def within_binomial(count: int, n: int, p: float) -> Finding:
    """Holds if so many of ``n`` are what Binomial(n, p) may show."""
    low, high = binomial_bounds(n, p)
    measured, holds = f"{count / n:#.4g}", low <= count <= high
    return holds_if(
        holds,
        measured if holds else f"{measured}, beyond {low / n:#.4g} to {high / n:#.4g}",
        p=p,
        elements=n,
        rate=count / n,
        low=low / n,
        high=high / n,
    )


@dataclass(frozen=True)
class Association:
    """The dependence within disjoint pairs: the correlation phi and Fisher's exact p-value."""

    correlation: float
    pvalue: float
    where: str


NOTHING_TO_COMPARE = Association(correlation=0.0, pvalue=1.0, where="nowhere")


def associate(a: Tensor, b: Tensor, where: str) -> Association:
    """Fisher's exact test on the pairs ``(a[i], b[i])`` of two boolean tensors.

    Given how many of each are set, the number of pairs in which both are is hypergeometric if they are
    independent, whatever the drop rate is: a biased rate is not mistaken for dependence.
    """
    n, in_a, in_b, in_both = a.numel(), int(a.sum()), int(b.sum()), int((a & b).sum())
    table = [[in_both, in_a - in_both], [in_b - in_both, n - in_a - in_b + in_both]]
    spread = math.sqrt(in_a * (n - in_a)) * math.sqrt(in_b * (n - in_b))
    correlation = (n * in_both - in_a * in_b) / spread if spread else 0.0
    return Association(correlation, float(stats.fisher_exact(table).pvalue), where)


def chosen_of(tests: int, association: Association) -> Association:
    """The association as the least likely of ``tests``, from which it was chosen."""
    return replace(association, pvalue=min(1.0, association.pvalue * tests))


def strongest(associations: Sequence[Association]) -> Finding:
    """Holds if not even the least likely of them is beyond chance, given that so many were looked at."""
    worst = min(
        associations, key=lambda found: (found.pvalue, -abs(found.correlation)), default=NOTHING_TO_COMPARE
    )
    independent = worst.pvalue * len(associations) >= FALSE_ALARM or not associations
    measured = f"φ = {worst.correlation:+.4f}"
    return holds_if(
        independent,
        measured if independent else f"{measured}, {worst.where}",
        correlation=worst.correlation,
        pvalue=worst.pvalue,
    )


def neighbouring(values: Tensor) -> list[Association]:
    """Booleans next to each other along each axis."""
    return [
        associate(a, b, f"neighbours along axis {axis}")
        for axis in range(values.ndim)
        for a, b in disjoint_pairs(values.movedim(axis, 0), lag=1)
    ]


def disjoint_pairs(values: Tensor, lag: int) -> list[tuple[Tensor, Tensor]]:
    """Pairs ``lag`` apart along dimension 0, in two sets within which no element is used twice.

    >>> import torch
    >>> disjoint_pairs(torch.arange(6), lag=1)
    [(tensor([0, 2, 4]), tensor([1, 3, 5])), (tensor([1, 3]), tensor([2, 4]))]
    """
    sets = []
    for start in (0, lag):
        count = max(0, len(values) - start) // (2 * lag)
        if count:
            blocks = values[start : start + count * 2 * lag].reshape(count, 2, lag, -1)
            sets.append((blocks[:, 0].flatten(), blocks[:, 1].flatten()))
    return sets
