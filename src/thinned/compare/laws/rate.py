"""How often elements are dropped, which of them together, what a kept one becomes, mean and variance."""

from __future__ import annotations

import math
from functools import partial

import torch

from thinned.compare.implementation import Case, P
from thinned.compare.laws.chance import DEVIATIONS, elements_to_show, within_binomial
from thinned.compare.laws.law import Finding, Law, Level, has_mask, holds_if, takes_any_shape
from thinned.compare.laws.values import P_ERROR, departure, ulps_off
from thinned.compare.settings import DTYPES, Settings

__all__ = ["LAWS", "PROBABILITIES", "RATE_BIAS"]

PROBABILITIES = (0.001, 0.1, P, 0.5, 0.9)
RATE_BIAS = 0.02
MEAN_BIAS = 0.001
BFLOAT16_EPS = torch.finfo(torch.bfloat16).eps  # rounds 1/(1-p) and 1-p by up to a half of it each
MEAN_P = 0.1  # 1/(1-p) has no short binary expansion there, so that a rounded scale shows
SQUARE = (1024, 1024)
QUICK_ELEMENTS = 10 * 2**20


def drop_rate(layer: Case, settings: Settings, *, p: float) -> Finding:
    """Dropped decisions are Binomial(N, p); N is such that a rate 2 % off shows (--quick: at most 10 M)."""
    n = elements_to_show(RATE_BIAS, math.sqrt((1 - p) / p))
    module, x = layer.module(p), settings.ones(*layer.sized(*SQUARE))
    decisions = layer.once(x).numel()
    calls = math.ceil((min(n, QUICK_ELEMENTS) if settings.quick else n) / decisions)
    kept = sum(int(torch.count_nonzero(layer.once(module(x)))) for _ in range(calls))
    return within_binomial(calls * decisions - kept, calls * decisions, p)


def kept_values(layer: Case, settings: Settings) -> Finding:
    """For every p: rounding a scale and a product costs below 2 ulp, and a p in float32 what it is off by."""
    worst = 0.0
    for p in PROBABILITIES:
        x = settings.normal(*layer.sized(100_000))
        y = layer.module(p)(x)
        scale = layer.mask.scale(p)
        if complaint := departure(y, x, scale=scale, p_error=P_ERROR):
            return holds_if(False, f"{complaint} at p = {p}")
        worst = max(worst, ulps_off(y, x, scale=scale))
    return holds_if(True, f"{worst:.2f} ulp", ulp=worst)


def mean(layer: Case, settings: Settings, *, dtype: torch.dtype, slack: float = 0.0) -> Finding:
    """E[y] = x, measured as sum(y)/sum(x) for x from 1 to 2 at p = 0.1.

    An element's variance is x² p/(1-p). The bound is that of the normal law, plus what rounding the exact
    x/(1-p) to the dtype shifts the mean of these inputs by (1e-4 for bfloat16's 128 mantissas, else less).
    ``slack`` widens the bound.
    """
    p = MEAN_P
    x = settings.uniform(*SQUARE, dtype=dtype)
    exact = x.double()
    calls = math.ceil(elements_to_show(MEAN_BIAS, math.sqrt(p / (1 - p))) / x.numel())
    module = layer.module(p)
    ratio = sum(float(module(x).double().sum()) for _ in range(calls)) / (calls * float(exact.sum()))
    deviation = math.sqrt(p / (1 - p) * float(exact.square().sum()) / calls) / float(exact.sum())
    rounded = (exact / (1 - p)).to(dtype).double() * (1 - p)
    bound = DEVIATIONS * deviation + abs(float(rounded.sum() / exact.sum()) - 1) + slack
    holds = abs(ratio - 1) <= bound
    measured = f"{ratio:.4f} x"
    return holds_if(
        holds, measured if holds else f"{measured}, beyond ± {bound:.4f}", ratio=ratio, bound=bound
    )


def moments(layer: Case, settings: Settings) -> Finding:
    """Within the bounds of the normal law, of so many decisions that a rate 2 % off shows in the mean."""
    p, q, scale = P, 1 - P, layer.mask.scale(P)
    module, x = layer.module(p), settings.ones(*layer.sized(*SQUARE), dtype=torch.float32)
    calls = math.ceil(elements_to_show(RATE_BIAS, math.sqrt(q / p)) / layer.once(x).numel())
    y = torch.cat([layer.once(module(x)).double().flatten() for _ in range(calls)])
    mean, variance = float(y.mean()), float(y.var())
    # The variance of a sample variance, from the fourth central moment of a Bernoulli variable.
    fourth = scale**4 * p * q * (p**3 + q**3)
    spread = math.sqrt((fourth - (scale**2 * p * q) ** 2) / y.numel())
    holds = (
        abs(mean - scale * q) <= DEVIATIONS * scale * math.sqrt(p * q / y.numel())
        and abs(variance - scale**2 * p * q) <= DEVIATIONS * spread + 4 * scale**2 / y.numel()
    )
    measured = f"{mean:.4f}, {variance:.4f}"
    wanted = f"{scale * q:.4f}, {scale**2 * p * q:.4f}"
    return holds_if(holds, measured if holds else f"{measured}, not {wanted}", mean=mean, variance=variance)


def sharing(layer: Case, settings: Settings) -> Finding:
    """All elements of a group are kept or all dropped."""
    y = layer.module(settings.p)(settings.ones())
    kept = layer.once(y) != 0
    for dim in sorted(layer.mask.shared):
        kept = kept.unsqueeze(dim)
    same = bool(((y != 0) == kept).all())
    return holds_if(same, "one decision" if same else "decisions differ")


def shares(case: Case) -> bool:
    return case.masked is not None and bool(case.masked.shared)


FAMILY = "rate and mean"
law = partial(Law, FAMILY)
LAWS = [
    *(
        law(
            f"drop rate at p = {p}",
            f"the number of dropped decisions is binomial with p = {p}",
            partial(drop_rate, p=p),
            has_mask if p == P else takes_any_shape,
            why="A p from a paper or a search means another amount of noise.",
        )
        for p in PROBABILITIES
    ),
    law(
        "kept values",
        "a kept x becomes x times the scale, within 2 ulp and what p is off by in float32",
        kept_values,
        has_mask,
        why="Activations in training and in evaluation differ by a factor.",
    ),
    *(
        law(
            f"mean in {name}",
            f"E[y] = x at p = {MEAN_P}; a bias of {bias} shows",
            partial(mean, dtype=dtype, slack=slack),
            takes_any_shape,
            why="The next layer sees another mean in training than in evaluation.",
        )
        for name, dtype in DTYPES.items()
        for bias, slack in [("1 %", BFLOAT16_EPS) if dtype == torch.bfloat16 else ("0.1 %", 0.0)]
    ),
    law(
        "exact mean in bfloat16",
        f"E[y] = x at p = {MEAN_P}; a bias of 0.1 % shows",
        partial(mean, dtype=torch.bfloat16),
        takes_any_shape,
        level=Level.NICETY,
        why="A rounded scale shifts every mean by up to 0.4 %, again in each layer.",
    ),
    law(
        "mean, variance",
        "of ones: s(1-p) and s² p(1-p) for the scale s",
        moments,
        has_mask,
        why="The noise that regularises is larger or smaller than p says.",
    ),
    law(
        "sharing",
        "along shared dimensions all are kept or all dropped",
        sharing,
        shares,
        why="What is meant to be dropped as a whole, such as a channel, survives in part.",
    ),
]
