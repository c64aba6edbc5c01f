"""The first moment: how often an element is dropped, what a kept one becomes, and their mean."""

from __future__ import annotations

import math
from functools import partial

import torch

from thinned.compare.laws.chance import DEVIATIONS, binomial_bounds, elements_to_show
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.laws.values import departure, ulps_off
from thinned.compare.settings import DTYPES, Settings
from thinned.compare.subjects import Subject

__all__ = ["LAWS", "PROBABILITIES"]

PROBABILITIES = (0.001, 0.1, 0.3, 0.5, 0.9)
RATE_BIAS = 0.02
MEAN_BIAS = 0.001
MEAN_P = 0.1  # 1/(1-p) has no short binary expansion there, so that a rounded scale shows
SQUARE = (1024, 1024)
QUICK_ELEMENTS = 10 * 2**20


def drop_rate(subject: Subject, settings: Settings, *, p: float) -> Finding:
    """Dropped elements are Binomial(N, p); N is such that a rate 2 % off shows (--quick: at most 10 M)."""
    n = elements_to_show(RATE_BIAS, math.sqrt((1 - p) / p))
    calls = math.ceil((min(n, QUICK_ELEMENTS) if settings.quick else n) / math.prod(SQUARE))
    layer, x = subject.make(p), settings.ones(*SQUARE)
    n = calls * x.numel()
    dropped = n - sum(int(torch.count_nonzero(layer(x))) for _ in range(calls))
    low, high = binomial_bounds(n, p)
    holds = low <= dropped <= high
    measured = f"{dropped / n:#.4g}"
    return holds_if(
        holds,
        measured if holds else f"{measured}, beyond {low / n:#.4g} to {high / n:#.4g}",
        p=p,
        elements=n,
        rate=dropped / n,
        low=low / n,
        high=high / n,
    )


def kept_values(subject: Subject, settings: Settings) -> Finding:
    """A kept x becomes x/(1-p), for every p: rounding a scale and a product costs below 2 ulp."""
    worst = 0.0
    for p in PROBABILITIES:
        x = settings.normal(100_000)
        y = subject.make(p)(x)
        if complaint := departure(y, x, scale=1 / (1 - p)):
            return holds_if(False, f"{complaint} at p = {p}")
        worst = max(worst, ulps_off(y, x, scale=1 / (1 - p)))
    return holds_if(True, f"{worst:.2f} ulp", ulp=worst)


def mean(subject: Subject, settings: Settings, *, dtype: torch.dtype) -> Finding:
    """E[y] = x, measured as sum(y)/sum(x) for x from 1 to 2 at p = 0.1.

    An element's variance is x² p/(1-p). The bound is that of the normal law, plus what rounding the exact
    x/(1-p) to the dtype shifts the mean of these inputs by (1e-4 for bfloat16's 128 mantissas, else less).
    """
    p = MEAN_P
    x = settings.uniform(*SQUARE, dtype=dtype)
    exact = x.double()
    calls = math.ceil(elements_to_show(MEAN_BIAS, math.sqrt(p / (1 - p))) / x.numel())
    layer = subject.make(p)
    ratio = sum(float(layer(x).double().sum()) for _ in range(calls)) / (calls * float(exact.sum()))
    deviation = math.sqrt(p / (1 - p) * float(exact.square().sum()) / calls) / float(exact.sum())
    rounded = (exact / (1 - p)).to(dtype).double() * (1 - p)
    bound = DEVIATIONS * deviation + abs(float(rounded.sum() / exact.sum()) - 1)
    holds = abs(ratio - 1) <= bound
    measured = f"{ratio:.4f} x"
    return holds_if(
        holds, measured if holds else f"{measured}, beyond ± {bound:.4f}", ratio=ratio, bound=bound
    )


FAMILY = "rate and mean"
LAWS = [
    *(
        Law(
            FAMILY,
            f"drop rate at p = {p}",
            f"the number of dropped elements is binomial with p = {p}",
            partial(drop_rate, p=p),
        )
        for p in PROBABILITIES
    ),
    Law(FAMILY, "kept values", "a kept x becomes x/(1-p), within 2 ulp", kept_values),
    *(
        Law(
            FAMILY,
            f"mean in {name}",
            f"E[y] = x at p = {MEAN_P}; a bias of 0.1 % shows",
            partial(mean, dtype=dtype),
        )
        for name, dtype in DTYPES.items()
    ),
]
