"""Scores against closed forms, loops and other libraries; ECE against a bound for calibrated models."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics
from torch import Tensor

from chance import FALSE_ALARM
from models import zoo
from process import output
from thinned.montecarlo import calibration as c

NAN, INFINITY = float("nan"), float("inf")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def predictions(n: int, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Probabilities in float64, and labels that follow other ones."""
    logits = torch.randn(n, classes, generator=generator(), dtype=torch.float64)
    return logits.softmax(1), torch.multinomial((logits / 2).softmax(1), 1, generator=generator(1))[:, 0]


def loop_ece(probabilities: Tensor, labels: Tensor, bins: int) -> float:
    """ECE as Guo et al. write it."""
    total = 0.0
    for m in range(1, bins + 1):
        inside = [
            (max(row), row.index(max(row)) == label)
            for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True)
            if (m - 1) / bins < max(row) <= m / bins
        ]
        if inside:
            confidence, correct = (sum(values) / len(inside) for values in zip(*inside, strict=True))
            total += len(inside) / len(labels) * abs(correct - confidence)
    return total


@pytest.mark.parametrize("bins", [1, 7, 15])
def test_ece_is_a_loop_over_bins(bins: int) -> None:
    probabilities, labels = predictions(500)
    expected = loop_ece(probabilities, labels, bins)
    assert c.expected_calibration_error(probabilities, labels, bins=bins) == pytest.approx(
        expected, rel=1e-12
    )


def test_an_edge_belongs_to_the_bin_below() -> None:
    """0.75 is of (0.5, 0.75], and 1 of the last bin."""
    probabilities = torch.tensor([[0.75, 0.25], [0.25, 0.75], [1.0, 0.0], [0.9375, 0.0625]])
    bins = c.reliability(probabilities, torch.tensor([0, 0, 0, 1]), bins=4)
    assert [column.tolist() for column in bins[:5]] == [
        [0.5, 0.75],
        [0.75, 1.0],
        [2, 2],
        [0.75, 0.96875],
        [0.5, 0.5],
    ]


def test_the_standard_error_is_the_binomial_one() -> None:
    """One confidence: n examples have sqrt(c (1 - c) / n)."""
    probabilities = torch.tensor([[0.75, 0.25]]).repeat(48, 1)
    (error,) = c.reliability(probabilities, torch.zeros(48, dtype=torch.long)).standard_error.tolist()
    assert error == pytest.approx(math.sqrt(0.75 * 0.25 / 48), rel=1e-12)


def bound(confidence: Tensor, bins: int) -> float:
    """The ECE that a calibrated model exceeds with a probability of at most FALSE_ALARM.

    n ECE is the sum over bins of |sum of (correct - confidence)|. Its mean is at most the sum of the bins'
    deviations (Jensen), and one example changes it by at most 1 (McDiarmid).
    """
    n = len(confidence)
    place = (confidence * bins).ceil().long() - 1
    deviations = place.bincount(confidence * (1 - confidence), bins).sqrt()
    return (float(deviations.sum()) + math.sqrt(n * math.log(1 / FALSE_ALARM) / 2)) / n


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("off", "calibrated"), [(0.0, True), (-0.05, False), (0.05, False)])
def test_a_calibrated_model_is_within_the_bound_and_others_are_not(
    seed: int, off: float, calibrated: bool
) -> None:
    n, bins, random = 100_000, 15, generator(seed)
    confidence = 0.55 + 0.4 * torch.rand(n, generator=random, dtype=torch.float64)
    wrong = torch.rand(n, generator=random, dtype=torch.float64) >= confidence + off
    probabilities = torch.stack([confidence, 1 - confidence], 1)
    error = c.expected_calibration_error(probabilities, wrong.long(), bins=bins)
    limit = bound(confidence, bins)
    assert limit < 0.05 / 4
    assert (error < limit) is calibrated
    if not calibrated:
        assert abs(error - abs(off)) < limit


def test_a_calibrated_model_of_a_million_examples() -> None:
    """Sums in float32 would be off by 0.007."""
    n, random = 1_000_000, generator()
    confidence = 0.985 + 0.01 * torch.rand(n, generator=random)
    wrong = torch.rand(n, generator=random) >= confidence
    error = c.expected_calibration_error(torch.stack([confidence, 1 - confidence], 1), wrong.long())
    assert error < bound(confidence.double(), 15) < 0.003


def test_scores_are_those_of_scikit_learn() -> None:
    probabilities, labels = predictions(1000)
    p, y = probabilities.numpy(), labels.numpy()
    exact = {"rel": 1e-12}
    assert c.negative_log_likelihood(probabilities, labels) == pytest.approx(metrics.log_loss(y, p), **exact)
    assert c.brier_score(probabilities, labels) == pytest.approx(metrics.brier_score_loss(y, p), **exact)
    pair = torch.stack([1 - probabilities[:, 0], probabilities[:, 0]], 1)
    once = metrics.brier_score_loss(y == 0, p[:, 0])
    assert c.brier_score(pair, labels == 0) == pytest.approx(2 * once, **exact)


def test_the_ece_is_that_of_torchmetrics() -> None:
    found = zoo.import_beside_torchvision("torchmetrics.functional.classification")
    probabilities, labels = predictions(1000)
    for bins in (5, 15):
        expected = float(found.multiclass_calibration_error(probabilities, labels, 5, n_bins=bins))
        error = c.expected_calibration_error(probabilities, labels, bins=bins)
        assert error == pytest.approx(expected, rel=1e-5)


def test_likelihood_of_the_impossible() -> None:
    assert c.negative_log_likelihood(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == INFINITY


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_rounded_softmax_sums_to_one(dtype: torch.dtype) -> None:
    logits = torch.randn(200, 1000, generator=generator()) * 3
    for probabilities in (logits.to(dtype).softmax(1), logits.softmax(1).to(dtype)):
        score = c.brier_score(probabilities.requires_grad_(), torch.zeros(200, dtype=torch.int32))
        assert score == pytest.approx(c.brier_score(logits.softmax(1), torch.zeros(200).long()), rel=0.05)


def test_a_mean_of_draws_may_exceed_one_by_rounding() -> None:
    over = torch.tensor([[1.0 + 1e-6, 0.0], [0.9, 0.1]], dtype=torch.float64)
    bins = c.reliability(over, torch.tensor([0, 0]), bins=10)
    assert bins.confidence.tolist() == [0.9, 1.0]
    assert bins.standard_error[1] == 0


def loop_auroc(inside: Sequence[float], outside: Sequence[float]) -> float:
    wins = [(a < b) + (a == b) / 2 for a in inside for b in outside]
    return sum(wins) / len(wins)


@pytest.mark.parametrize("low", [0, 20, -1000])
def test_auroc_is_the_probability_of_a_larger_score(low: int) -> None:
    """With ties, and for scores that a sigmoid rounds to 0 or 1."""
    inside = torch.randint(low, low + 8, (30,), generator=generator()).float()
    outside = torch.randint(low + 3, low + 12, (20,), generator=generator(1)).float()
    expected = loop_auroc(inside.tolist(), outside.tolist())
    assert c.auroc(inside, outside) == pytest.approx(expected, rel=1e-12)
    assert 0.5 < expected < 1
    assert c.auroc(outside, inside) == pytest.approx(1 - expected, rel=1e-12)


def test_risk_coverage_is_the_mean_over_the_orders_of_ties() -> None:
    losses = [3.0, 0.0, 1.0, 5.0, 2.0]
    uncertainty = [0.2, 0.1, 0.2, 0.9, 0.2]
    orders = [
        order
        for order in itertools.permutations(range(5))
        if [uncertainty[i] for i in order] == sorted(uncertainty)
    ]
    expected = np.mean([np.cumsum([losses[i] for i in order]) / np.arange(1, 6) for order in orders], axis=0)
    curve = c.risk_coverage_curve(torch.tensor(losses), torch.tensor(uncertainty))
    assert len(orders) == 6
    assert curve.coverage.tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert curve.risk.tolist() == pytest.approx(expected.tolist(), rel=1e-12)
    area = c.aurc(torch.tensor(losses), torch.tensor(uncertainty))
    assert area == pytest.approx(float(expected.mean()), rel=1e-12)


def test_aurc_of_the_best_and_of_no_ranking() -> None:
    wrong = torch.tensor([True, False, False, True, False])
    assert c.aurc(wrong, torch.ones(5)) == pytest.approx(2 / 5)
    assert c.aurc(wrong, wrong.float()) == pytest.approx((1 / 4 + 2 / 5) / 5)
    assert c.aurc(wrong, -wrong.float()) == pytest.approx((1 + 1 + 2 / 3 + 2 / 4 + 2 / 5) / 5)


def regression(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A mean, a variance, and targets that follow them."""
    random = generator(seed)
    mean, noise = torch.randn(2, n, generator=random, dtype=torch.float64)
    variance = 0.1 + torch.rand(n, generator=random, dtype=torch.float64)
    return mean, variance, mean + variance.sqrt() * noise


def test_regression_scores_are_those_of_scipy_and_scikit_learn() -> None:
    mean, variance, targets = regression(500)
    density = stats.norm.logpdf(targets, mean, variance.sqrt())
    likelihood = c.gaussian_negative_log_likelihood(mean, variance, targets)
    assert likelihood == pytest.approx(-density.mean(), rel=1e-12)
    expected = metrics.root_mean_squared_error(targets, mean)
    assert c.root_mean_squared_error(mean, targets) == pytest.approx(expected, rel=1e-12)
    assert c.sharpness(variance) == pytest.approx(np.sqrt(variance.numpy()).mean(), rel=1e-12)


@pytest.mark.parametrize(("scale", "calibrated"), [(1.0, True), (0.9, False), (1.1, False)])
def test_coverage_of_a_calibrated_regression(scale: float, calibrated: bool) -> None:
    """Each level is a binomial test; the chance of an alarm is shared among the 19 levels."""
    n = 20_000
    mean, variance, targets = regression(n)
    found = c.interval_coverage(mean, variance * scale**2, targets)
    inside = (found.observed * n).round().long().tolist()
    tests = [
        stats.binomtest(k, n, level).pvalue for k, level in zip(inside, found.nominal.tolist(), strict=True)
    ]
    assert len(tests) == 19
    assert bool(min(tests) > FALSE_ALARM / 19) is calibrated


def test_coverage_in_closed_form() -> None:
    """The quantiles of a normal distribution: a share c of them is in the interval of probability c."""
    quantiles = torch.from_numpy(stats.norm.ppf((np.arange(1000) + 0.5) / 1000))
    found = c.interval_coverage(torch.zeros(1000), torch.ones(1000), quantiles, levels=[0.1, 0.5, 0.9])
    assert found.observed.tolist() == pytest.approx([0.1, 0.5, 0.9])
    assert found.standard_error.tolist() == pytest.approx(
        [math.sqrt(level * (1 - level) / 1000) for level in (0.1, 0.5, 0.9)]
    )


def test_coverage_of_a_point() -> None:
    """Without variance, an interval holds its mean alone; each element of a matrix counts."""
    targets = torch.tensor([[1.0, 2.0], [3.0, 5.0]])
    mean = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    found = c.interval_coverage(mean, torch.zeros(2, 2), targets, levels=[0.5])
    assert found.observed.tolist() == [0.75]


P, Y = torch.tensor([[0.75, 0.25], [0.25, 0.75]]), torch.tensor([0, 1])
M = torch.zeros(3)
V = torch.ones(3)


def classification_errors(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    return [
        (function, (P.tolist(), Y), TypeError, r"probabilities must be a tensor, got \[\[0.75"),
        (function, (P + 0j, Y), TypeError, r"probabilities must hold real .* \(2, 2\) and torch.complex64"),
        (function, (P[:, 0], Y), ValueError, r"probabilities must have shape \(n, classes\).* \(2,\)"),
        (function, (P[:0], Y[:0]), ValueError, r"probabilities .* at least 1 element, .* \(0, 2\)"),
        (
            function,
            (P * NAN, Y),
            ValueError,
            r"probabilities .* no NaN .* got nan at index \(0, 0\) \(4 such of 4\)",
        ),
        (function, (P * INFINITY, Y), ValueError, "probabilities .* no infinity, but got inf at"),
        (function, (P.log(), Y), ValueError, r"probabilities must not be negative, but got -0.2876"),
        (
            function,
            (P * 2, Y),
            ValueError,
            r"row of probabilities must sum to 1, .* got the sum 2 at index 0 \(2 such of 2\)",
        ),
        (function, (P, Y.tolist()), TypeError, r"labels must be a tensor, got \[0, 1\]"),
        (function, (P, Y.float()), TypeError, "labels must be integers, .* torch.float32"),
        (function, (P, Y[:, None]), ValueError, r"labels must have shape \(2,\), .* \(2, 1\)"),
        (
            function,
            (P, Y + 1),
            ValueError,
            r"labels must be in 0..1 .* \(2, 2\), but got 2 at index 1 \(1 such of 2\)",
        ),
        (function, (P, Y - 1), ValueError, "labels must be in 0..1 .* got -1 at index 0"),
    ]


def regression_errors(function: Callable[..., Any]) -> list[tuple[Any, ...]]:
    return [
        (function, (0.0, V, M), TypeError, "mean must be a tensor, got 0.0 of type float"),
        (
            function,
            (M, V[:, None], M),
            ValueError,
            r"same shape, but got mean \(3,\), variance \(3, 1\), targets",
        ),
        (
            function,
            (M, -V, M),
            ValueError,
            r"variance must not be negative, but got -1 at index 0 \(3 such of 3\)",
        ),
        (function, (M, V, M / 0), ValueError, "targets must hold no NaN .* got nan"),
        (function, (M, V / 0, M), ValueError, "variance must hold .* no infinity, but got inf"),
        (function, (M[:0], V[:0], M[:0]), ValueError, r"mean must have at least 1 element, .* \(0,\)"),
    ]


ERRORS = [
    *classification_errors(c.reliability),
    *classification_errors(c.expected_calibration_error),
    *classification_errors(c.negative_log_likelihood),
    *classification_errors(c.brier_score),
    *regression_errors(c.gaussian_negative_log_likelihood),
    *regression_errors(c.interval_coverage),
    (
        c.gaussian_negative_log_likelihood,
        (M, torch.tensor([1.0, 0, 0]), M),
        ValueError,
        r"got 0 at index 1 \(2 such",
    ),
    (c.root_mean_squared_error, (M, M[:, None]), ValueError, r"got mean \(3,\), targets \(3, 1\)"),
    (c.sharpness, (M - 1,), ValueError, "variance must not be negative"),
    (c.auroc, (M, M * NAN), ValueError, "outside must hold no NaN"),
    (c.auroc, (M * NAN, M), ValueError, "inside must hold no NaN"),
    (c.auroc, (M[:0], M), ValueError, r"inside must have shape \(n,\) and at least 1 element, .* \(0,\)"),
    (c.auroc, (M, M[:, None]), ValueError, r"outside must have shape \(m,\)"),
    (c.aurc, (M, M[:2]), ValueError, r"got losses \(3,\), uncertainty \(2,\)"),
    (c.risk_coverage_curve, (M * NAN, M), ValueError, "losses must hold no NaN"),
    (c.risk_coverage_curve, (M, M * NAN), ValueError, "uncertainty must hold no NaN"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ERRORS)
def test_errors_repeat_what_was_given(
    function: Callable[..., Any], arguments: tuple[Any, ...], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)


@pytest.mark.parametrize("levels", [[0.0], [1.0], [], [0.5, NAN], 0.5, [[0.5]]])
def test_levels_are_probabilities(levels: Any) -> None:
    with pytest.raises(ValueError, match="levels must be numbers between 0 and 1, but got"):
        c.interval_coverage(M, V, M, levels=levels)


@pytest.mark.parametrize(("bins", "error"), [(0, ValueError), (1.5, TypeError)])
def test_bins_are_a_positive_integer(bins: Any, error: type[Exception]) -> None:
    for function in (c.reliability, c.expected_calibration_error):
        with pytest.raises(error, match=f"bins .* {bins}"):
            function(P, Y, bins=bins)


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(ImportError, match=r"auroc needs the extra: pip install 'thinned\[uncertainty\]'"):
        c.auroc(M, M)


def test_import_brings_no_other_package() -> None:
    code = """
        import sys, thinned
        before = set(sys.modules)
        import thinned.montecarlo.calibration
        print(*{name.partition(".")[0] for name in set(sys.modules) - before})
    """
    assert set(output(code).split()) <= {"thinned", *sys.stdlib_module_names}
