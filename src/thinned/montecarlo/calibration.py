r"""How good predictive distributions are: proper scores, calibration, and how well uncertainty ranks errors.

Every function takes tensors of any real dtype on any device, computes in float64 on the CPU, and returns
Python numbers or float64 tensors without gradient. NaN and infinity are refused: no score is an average over
them.

Classification takes ``probabilities`` of shape (n, classes) and ``labels`` of shape (n,); regression takes
the ``mean`` and the ``variance`` of the predictive distribution and the ``targets``, all three of one shape.
This variance is that of a target: the spread of the draws plus the variance of the noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import nll_loss, one_hot

from thinned.checks import check_integer
from thinned.montecarlo._checks import (
    check_same_shape,
    classification,
    first_wrong,
    numbers_of,
    regression,
    variances,
)

__all__ = [
    "IntervalCoverage",
    "Reliability",
    "RiskCoverage",
    "aurc",
    "auroc",
    "brier_score",
    "expected_calibration_error",
    "gaussian_negative_log_likelihood",
    "interval_coverage",
    "negative_log_likelihood",
    "reliability",
    "risk_coverage_curve",
    "root_mean_squared_error",
    "sharpness",
]


class Reliability(NamedTuple):
    """The bins of confidence that hold an example, in ascending order: tensors of shape (bins that do,)."""

    lower: Tensor
    """The lower end of the bin, which is not in it."""
    upper: Tensor
    """The upper end of the bin, which is in it."""
    examples: Tensor
    """How many there are."""
    confidence: Tensor
    """The mean confidence."""
    accuracy: Tensor
    """The fraction of examples that are classified correctly."""
    standard_error: Tensor
    """The standard deviation that ``accuracy`` has for a calibrated model, by the binomial law."""


class RiskCoverage(NamedTuple):
    """Tensors of shape (n,)."""

    coverage: Tensor
    """The fraction of examples kept: 1/n, 2/n, .. 1."""
    risk: Tensor
    """The mean loss of those kept."""


class IntervalCoverage(NamedTuple):
    """Tensors of shape (levels,)."""

    nominal: Tensor
    """The probability that an interval claims to hold."""
    observed: Tensor
    """The fraction of targets inside it."""
    standard_error: Tensor
    """The standard deviation that ``observed`` has for a calibrated model, by the binomial law."""


def reliability(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> Reliability:
    r"""Accuracy against confidence, in bins of confidence of equal width.

    The confidence :math:`c` of an example is its largest probability. Bin :math:`m` of :math:`M` is
    :math:`((m-1)/M, m/M]`. The standard error of the accuracy of bin :math:`B` is
    :math:`\sqrt{\sum_{i \in B} c_i (1 - c_i)} / |B|`.

    Args:
        probabilities: (n, classes); each row sums to 1.
        labels: (n,); integers from 0 to classes - 1.
        bins: the number of bins, empty ones included.

    Returns:
        The bins that hold an example, as a named tuple.

    Raises:
        TypeError: an argument is no tensor of real numbers, or the labels are not integers.
        ValueError: a shape, a label, a probability or a sum of probabilities is not as above, or NaN.

    Source: Guo, Pleiss, Sun & Weinberger (2017), On calibration of modern neural networks, section 2.

    >>> import torch
    >>> probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.7, 0.3], [0.2, 0.8]])
    >>> bins = reliability(probabilities, torch.tensor([0, 1, 1, 1]), bins=4)
    >>> [[round(x, 3) for x in column.tolist()] for column in bins]
    [[0.5, 0.75], [0.75, 1.0], [2, 2], [0.7, 0.85], [0.5, 1.0], [0.324, 0.25]]
    """
    probabilities, labels = classification(probabilities, labels)
    check_integer("bins", bins, 1)
    confidence, predicted = probabilities.clamp(max=1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    place = torch.bucketize(confidence, edges[1:-1])
    count = place.bincount(minlength=bins)
    held = count > 0
    correct, claimed, spread = (
        place.bincount(values, bins)[held]
        for values in ((predicted == labels).double(), confidence, confidence * (1 - confidence))
    )
    count = count[held]
    return Reliability(
        edges[:-1][held], edges[1:][held], count, claimed / count, correct / count, spread.sqrt() / count
    )


def expected_calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    r"""The mean distance between accuracy and confidence (ECE).

    .. math:: ECE = \sum_m \frac{|B_m|}{n} \, |accuracy(B_m) - confidence(B_m)|

    with the bins of :func:`reliability`, which describes arguments and errors. The ECE of a calibrated model
    is not 0 but about :math:`\sqrt{2/\pi}` times the mean standard error of a bin's accuracy: 0.0076 for 1000
    examples that all have a confidence of 0.9.

    Source: Guo, Pleiss, Sun & Weinberger (2017), On calibration of modern neural networks, section 2.

    >>> import torch
    >>> probabilities = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.7, 0.3], [0.2, 0.8]])
    >>> round(expected_calibration_error(probabilities, torch.tensor([0, 1, 1, 1]), bins=4), 6)
    0.175
    """
    held = reliability(probabilities, labels, bins=bins)
    return float((held.examples * (held.accuracy - held.confidence).abs()).sum() / held.examples.sum())


def negative_log_likelihood(probabilities: Tensor, labels: Tensor) -> float:
    r"""The mean of the negative logarithm, in nats, of the probability of the right class (NLL).

    .. math:: NLL = -\frac{1}{n} \sum_i \log p_{i, y_i}

    It is infinite if one right class has probability 0. Arguments and errors are those of
    :func:`reliability`.

    Source: Guo, Pleiss, Sun & Weinberger (2017), On calibration of modern neural networks, section 2.

    >>> import torch
    >>> round(negative_log_likelihood(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0])), 4)
    1.0397
    """
    probabilities, labels = classification(probabilities, labels)
    return float(nll_loss(probabilities.log(), labels))


def brier_score(probabilities: Tensor, labels: Tensor) -> float:
    r"""The mean squared distance between the probabilities and the right class: from 0, which is best, to 2.

    .. math:: Brier = \frac{1}{n} \sum_i \sum_k (p_{ik} - [k = y_i])^2

    For two classes it is twice the score of those who count the second class alone. Arguments and errors are
    those of :func:`reliability`.

    Source: Brier (1950), Verification of forecasts expressed in terms of probability, equation 2.

    >>> import torch
    >>> brier_score(torch.tensor([[0.5, 0.5], [0.25, 0.75]]), torch.tensor([0, 0]))
    0.8125
    """
    probabilities, labels = classification(probabilities, labels)
    return float((probabilities - one_hot(labels, probabilities.size(1))).square().sum(1).mean())


def auroc(inside: Tensor, outside: Tensor) -> float:
    r"""The probability that an input from outside the distribution scores higher; a tie counts one half.

    .. math:: AUROC = P(s_{outside} > s_{inside}) + P(s_{outside} = s_{inside}) / 2

    Args:
        inside: (n,); scores of inputs from the distribution, such as predictive entropies.
        outside: (m,); scores of inputs from another one.

    Raises:
        ImportError: scikit-learn is not installed.
        TypeError: an argument is no tensor of real numbers.
        ValueError: an argument has another shape or is empty, or a score is NaN or infinite.

    Source: Hendrycks & Gimpel (2017), A baseline for detecting misclassified and out-of-distribution
    examples, section 2.

    >>> import torch
    >>> auroc(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.6, 1.5]))
    0.9166666666666667
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError("auroc needs the extra: pip install 'thinned[uncertainty]'") from error
    inside, outside = numbers_of("inside", inside, "(n,)"), numbers_of("outside", outside, "(m,)")
    is_outside = torch.cat([torch.zeros_like(inside), torch.ones_like(outside)])
    return float(roc_auc_score(is_outside.numpy(), torch.cat([inside, outside]).numpy()))


def risk_coverage_curve(losses: Tensor, uncertainty: Tensor) -> RiskCoverage:
    r"""The mean loss of the k most certain examples, for k from 1 to n.

    .. math:: coverage(k) = k / n, \qquad risk(k) = \frac{1}{k} \sum_{i \le k} loss_{(i)}

    in which :math:`(i)` sorts by uncertainty. Examples of equal uncertainty have no order: the risk is its
    mean over all their orders.

    Args:
        losses: (n,); for classification ``predicted != labels``, for regression the squared errors.
        uncertainty: (n,); the largest is given up first.

    Raises:
        TypeError: an argument is no tensor of real numbers.
        ValueError: the shapes differ, or a value is NaN or infinite.

    Source: Geifman & El-Yaniv (2017), Selective classification for deep neural networks, section 2.

    >>> import torch
    >>> wrong = torch.tensor([False, True, False, False])
    >>> [x.tolist() for x in risk_coverage_curve(wrong, torch.tensor([0.1, 0.9, 0.4, 0.4]))]
    [[0.25, 0.5, 0.75, 1.0], [0.0, 0.0, 0.0, 0.25]]
    """
    losses, uncertainty = numbers_of("losses", losses, "(n,)"), numbers_of("uncertainty", uncertainty, "(n,)")
    check_same_shape(losses=losses, uncertainty=uncertainty)
    _, tie, ties = uncertainty.unique(return_inverse=True, return_counts=True)
    expected = (tie.bincount(losses) / ties)[tie.sort().values]
    kept = torch.arange(1, len(losses) + 1, dtype=torch.float64)
    return RiskCoverage(kept / len(losses), expected.cumsum(0) / kept)


def aurc(losses: Tensor, uncertainty: Tensor) -> float:
    r"""The area under :func:`risk_coverage_curve`, which describes arguments and errors: smaller is better.

    .. math:: AURC = \frac{1}{n} \sum_{k=1}^{n} risk(k)

    An uncertainty that says nothing about the loss has the mean loss.

    Source: Geifman, Uziel & El-Yaniv (2019), Bias-reduced uncertainty estimation for deep neural classifiers,
    of the curve by Geifman & El-Yaniv (2017), Selective classification for deep neural networks, section 2.

    >>> import torch
    >>> aurc(torch.tensor([False, True, False, False]), torch.tensor([0.1, 0.9, 0.4, 0.4]))
    0.0625
    """
    return float(risk_coverage_curve(losses, uncertainty).risk.mean())


def gaussian_negative_log_likelihood(mean: Tensor, variance: Tensor, targets: Tensor) -> float:
    r"""The mean negative logarithm, in nats, of the targets' density: minus the test log-likelihood.

    .. math:: NLL = \frac{1}{2n} \sum_i \log 2 \pi \sigma_i^2 + (y_i - \mu_i)^2 / \sigma_i^2

    Args:
        mean: of the predictive distribution; any shape.
        variance: of the predictive distribution, with that of the noise; positive.
        targets: of the same shape.

    Raises:
        TypeError: an argument is no tensor of real numbers.
        ValueError: the shapes differ, a variance is not positive, or a value is NaN or infinite.

    Source: Lakshminarayanan, Pritzel & Blundell (2017), Simple and scalable predictive uncertainty estimation
    using deep ensembles, equation 1.

    >>> import torch
    >>> round(gaussian_negative_log_likelihood(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 2.0])), 4)
    1.9189
    """
    mean, variance, targets = regression(mean, variance, targets)
    if not variance.all():
        raise ValueError(
            "variance must be positive for a density, and has to hold that of the noise, but "
            f"got {first_wrong(variance, variance == 0)}"
        )
    return -float(torch.distributions.Normal(mean, variance.sqrt()).log_prob(targets).mean())


def root_mean_squared_error(mean: Tensor, targets: Tensor) -> float:
    r"""The root of the mean squared error (RMSE).

    .. math:: RMSE = \sqrt{\frac{1}{n} \sum_i (y_i - \mu_i)^2}

    Args:
        mean: of the predictive distribution; any shape.
        targets: of the same shape.

    Raises:
        TypeError: an argument is no tensor of real numbers.
        ValueError: the shapes differ, or a value is NaN or infinite.

    Source: Gal & Ghahramani (2016), Dropout as a Bayesian approximation, section 5.2.

    >>> import torch
    >>> root_mean_squared_error(torch.zeros(4), torch.tensor([1.0, -1.0, 5.0, 3.0]))
    3.0
    """
    mean, targets = numbers_of("mean", mean), numbers_of("targets", targets)
    check_same_shape(mean=mean, targets=targets)
    return float((mean - targets).square().mean().sqrt())


def sharpness(variance: Tensor) -> float:
    r"""The mean predicted deviation: among calibrated models the smallest is best.

    .. math:: sharpness = \frac{1}{n} \sum_i \sigma_i

    It is proportional to the mean width of any central interval of a normal distribution.

    Args:
        variance: of the predictive distribution, with that of the noise; any shape, not negative.

    Raises:
        TypeError: ``variance`` is no tensor of real numbers.
        ValueError: a variance is negative, NaN or infinite.

    Source: Gneiting, Balabdaoui & Raftery (2007), Probabilistic forecasts, calibration and sharpness, section
    3.3.

    >>> import torch
    >>> sharpness(torch.tensor([1.0, 9.0]))
    2.0
    """
    return float(variances(variance).sqrt().mean())


def interval_coverage(
    mean: Tensor, variance: Tensor, targets: Tensor, *, levels: Sequence[float] | None = None
) -> IntervalCoverage:
    r"""The fraction of targets in the central intervals of the predictive normal distribution.

    .. math:: observed(c) = \frac{1}{n} \, \#\{i: |y_i - \mu_i| \le \Phi^{-1}((1 + c) / 2) \, \sigma_i\}

    Its standard error is :math:`\sqrt{c (1 - c) / n}`.

    Args:
        mean: of the predictive distribution; any shape.
        variance: of the predictive distribution, with that of the noise; not negative.
        targets: of the same shape.
        levels: the probabilities c, each between 0 and 1. Default: 0.05, 0.1, .. 0.95.

    Raises:
        TypeError: an argument is no tensor of real numbers.
        ValueError: the shapes differ, a variance is negative, a level is not between 0 and 1, or a value is
            NaN or infinite.

    Source: Kuleshov, Fenner & Ermon (2018), Accurate uncertainties for deep learning using calibrated
    regression.

    >>> import torch
    >>> targets = torch.tensor([0.0, 0.5, -1.0, 3.0])
    >>> interval_coverage(torch.zeros(4), torch.ones(4), targets, levels=[0.5, 0.9]).observed.tolist()
    [0.5, 0.75]
    """
    mean, variance, targets = regression(mean, variance, targets)
    nominal = torch.tensor(LEVELS if levels is None else levels, dtype=torch.float64)
    if nominal.dim() != 1 or not nominal.numel() or not ((nominal > 0) & (nominal < 1)).all():
        raise ValueError(f"levels must be numbers between 0 and 1, but got {levels}")
    width = torch.special.ndtri((1 + nominal) / 2).unsqueeze(1) * variance.sqrt().flatten()
    observed = ((targets - mean).abs().flatten() <= width).double().mean(1)
    return IntervalCoverage(nominal, observed, (nominal * (1 - nominal) / mean.numel()).sqrt())


LEVELS = [step / 20 for step in range(1, 20)]
