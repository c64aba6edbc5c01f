"""Figures of predictive distributions, each a function that returns a Matplotlib figure.

A figure is made without pyplot: it needs no backend and no window, and is freed with its last reference. With
``axes=`` a function draws into those and returns their figure. Text and frames follow
``matplotlib.rcParams``. Nothing is told by colour alone: lines differ in their dashes, and areas in their
hatches.

The numbers come from :mod:`thinned.montecarlo.calibration`, which describes the arguments and the errors they
raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

try:
    from matplotlib import rcParams
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter
    from matplotlib.transforms import (
        BboxTransformTo,
        ScaledTranslation,
        blended_transform_factory,
        offset_copy,
    )
except ImportError as error:
    raise ImportError(
        "thinned.montecarlo.plots needs the extra: pip install 'thinned[uncertainty]'"
    ) from error

import torch
from torch import Tensor

from thinned.checks import check_integer, got
from thinned.colours import GREY, PALETTE
from thinned.montecarlo._checks import check_same_shape, numbers_of, variances
from thinned.montecarlo.calibration import (
    auroc,
    expected_calibration_error,
    interval_coverage,
    reliability,
    risk_coverage_curve,
)

__all__ = ["coverage", "entropy_histogram", "error_bars", "reliability_diagram", "risk_coverage"]

DASHES = ("-", "--", "-.", (0, (4, 1, 1, 1, 1, 1)))
TWO = "bars: 2 standard errors"


def reliability_diagram(
    probabilities: Tensor, labels: Tensor, *, bins: int = 15, axes: Axes | None = None
) -> Figure:
    """Accuracy against confidence, and above it the number of examples in each bin.

    A bar is two standard errors of a calibrated model: a bar that misses the diagonal is a bin that is off by
    more. Arguments, errors and source are those of :func:`~thinned.montecarlo.calibration.reliability`.

    >>> import torch
    >>> figure = reliability_diagram(torch.tensor([[0.9, 0.1], [0.3, 0.7]]), torch.tensor([0, 1]), bins=10)
    >>> [axes.get_xlabel() for axes in figure.axes]
    ['confidence']
    """
    held = reliability(probabilities, labels, bins=bins)
    error = expected_calibration_error(probabilities, labels, bins=bins)
    bar = 2 * held.standard_error
    axes = _axes(axes)
    axes.plot([0, 1], [0, 1], "--", color=GREY, label="calibrated")
    axes.errorbar(
        held.confidence.numpy(),
        held.accuracy.numpy(),
        yerr=torch.stack([bar.minimum(held.accuracy), bar.minimum(1 - held.accuracy)]).numpy(),
        fmt="o",
        markersize=4,
        capsize=3,
        color=PALETTE[0],
        label=f"ECE {error:.3f} ({TWO})",
    )
    axes.set(title="Reliability", xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    # A height in inches: constrained layout reserves no room for one that grows with the axes.
    above = axes.figure.figure.dpi_scale_trans + ScaledTranslation(0, 1, BboxTransformTo(axes.bbox))
    counts = axes.inset_axes(
        (0, 0.1 * _scale(), 1, 0.7 * _scale()),
        transform=blended_transform_factory(axes.transAxes, above),
        sharex=axes,
    )
    middle = (held.lower + held.upper).numpy() / 2
    bars = counts.bar(middle, held.examples.numpy(), 0.9 / bins, color=GREY)
    counts.bar_label(bars, fmt=EngFormatter(places=0, sep=""), fontsize="x-small")
    counts.set(ylabel="examples", yticks=[])
    counts.margins(y=0.25)
    counts.tick_params(labelbottom=False)
    counts.spines[["top", "right", "left"]].set_visible(False)
    return _finished(axes)


def risk_coverage(
    losses: Tensor, uncertainty: Tensor | Mapping[str, Tensor], *, axes: Axes | None = None
) -> Figure:
    """The mean loss of the most certain examples, against how many are kept, for one or more uncertainties.

    Two lines bound what an uncertainty can do: one that knows the losses, and one that says nothing about
    them. The legend has the area under each curve. Arguments, errors and source are those of
    :func:`~thinned.montecarlo.calibration.risk_coverage_curve`.

    >>> import torch
    >>> wrong = torch.tensor([False, True, False, False])
    >>> figure = risk_coverage(wrong, {"entropy": torch.tensor([0.1, 0.9, 0.4, 0.4])})
    >>> figure.axes[0].get_legend_handles_labels()[1][0]
    'entropy: AURC 0.062'
    """
    scores = uncertainty if isinstance(uncertainty, Mapping) else {"uncertainty": uncertainty}
    if not scores:
        raise ValueError(f"uncertainty must hold at least one tensor, {got(uncertainty)}")
    curves = {name: risk_coverage_curve(losses, score) for name, score in scores.items()}
    best = risk_coverage_curve(losses, losses)
    axes = _axes(axes)
    for i, (name, curve) in enumerate(curves.items()):
        axes.plot(
            curve.coverage.numpy(),
            curve.risk.numpy(),
            linestyle=DASHES[i % len(DASHES)],
            color=PALETTE[i % len(PALETTE)],
            label=f"{name}: AURC {curve.risk.mean():.3f}",
            zorder=3,
        )
    mean = float(best.risk[-1])
    axes.plot(
        best.coverage.numpy(),
        best.risk.numpy(),
        color=GREY,
        linewidth=1,
        label=f"best possible: {best.risk.mean():.3f}",
    )
    axes.axhline(mean, color=GREY, linewidth=1, linestyle=":", label=f"no information: {mean:.3f}")
    axes.set(title="Risk against coverage", xlabel="coverage: fraction of examples kept", xlim=(0, 1))
    axes.set_ylabel("risk: mean loss of those kept")
    return _finished(axes)


def error_bars(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    x_train: Tensor | None = None,
    y_train: Tensor | None = None,
    truth: Tensor | None = None,
    axes: Axes | None = None,
) -> Figure:
    """A regression on one input: the mean, and bands of one and two deviations.

    Args:
        x: (n,); the inputs, in any order.
        mean: (n,); of the predictive distribution.
        variance: (n,); of the predictive distribution; not negative.
        x_train: (m,); the inputs of the training examples, which are drawn as points.
        y_train: (m,); their targets.
        truth: (n,); the function that is to be found.
        axes: draw into these.

    Raises:
        ImportError: Matplotlib is not installed.
        TypeError: an argument is no tensor of real numbers, or only one of ``x_train`` and ``y_train`` is
            given.
        ValueError: the shapes differ, a variance is negative, or a value is NaN or infinite.

    >>> import torch
    >>> x = torch.linspace(-1, 1, 50)
    >>> figure = error_bars(x, x**3, 0.01 + x**2, truth=x**3)
    >>> figure.axes[0].get_legend_handles_labels()[1]
    ['1 deviation', '2 deviations', 'mean', 'truth']
    """
    curves = {"x": x, "mean": mean, "truth": truth}
    lines = {name: numbers_of(name, y, "(n,)") for name, y in curves.items() if y is not None}
    variance = variances(variance)
    check_same_shape(**lines, variance=variance)
    if (x_train is None) != (y_train is None):
        raise TypeError("x_train and y_train must be given together")
    pair = {"x_train": x_train, "y_train": y_train}
    points = {name: numbers_of(name, y, "(m,)") for name, y in pair.items() if y is not None}
    check_same_shape(**points)
    order = lines["x"].argsort()
    at, middle, deviation = (tensor[order].numpy() for tensor in (lines["x"], lines["mean"], variance.sqrt()))
    axes = _axes(axes)
    for times, alpha in ((1, 0.45), (2, 0.2)):
        axes.fill_between(
            at,
            middle - times * deviation,
            middle + times * deviation,
            color=PALETTE[0],
            alpha=alpha,
            linewidth=0,
            label=f"{times} deviation{'s'[: times - 1]}",
        )
    axes.plot(at, middle, color=PALETTE[0], label="mean")
    if "truth" in lines:
        axes.plot(at, lines["truth"][order].numpy(), "--", color=PALETTE[1], label="truth")
    if points:
        axes.plot(
            points["x_train"].numpy(),
            points["y_train"].numpy(),
            "x",
            color=PALETTE[2],
            markersize=4,
            label="training examples",
        )
    axes.set(title="Predictive distribution", xlabel="x", ylabel="y")
    return _finished(axes)


def entropy_histogram(inside: Tensor, outside: Tensor, *, bins: int = 30, axes: Axes | None = None) -> Figure:
    """Predictive entropies of inputs from the distribution and from outside it.

    The legend has the :func:`~thinned.montecarlo.calibration.auroc` of the two, which describes arguments,
    errors and source. Any other score will do; set the label of the axis then.

    >>> import torch
    >>> figure = entropy_histogram(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.6, 1.5]))
    >>> figure.axes[0].get_legend().get_title().get_text()
    'AUROC 0.917'
    """
    check_integer("bins", bins, 1)
    area = auroc(inside, outside)
    scores = {
        "in distribution": numbers_of("inside", inside),
        "out of distribution": numbers_of("outside", outside),
    }
    both = torch.cat(list(scores.values()))
    axes = _axes(axes)
    styles: tuple[dict[str, Any], ...] = (
        {"facecolor": PALETTE[0], "alpha": 0.6},
        {"fill": False, "edgecolor": PALETTE[1], "hatch": "///", "linewidth": 1.2},
    )
    for (name, values), style in zip(scores.items(), styles, strict=True):
        axes.hist(
            values.numpy(),
            bins,
            range=(float(both.min()), float(both.max())),
            weights=torch.full_like(values, 1 / len(values)).numpy(),
            histtype="stepfilled",
            label=f"{name} ({len(values):,})",
            **style,
        )
    axes.set(title="Entropy in and out of distribution", xlabel="predictive entropy, nats")
    axes.set_ylabel("fraction of inputs")
    return _finished(axes, f"AUROC {area:.3f}")


def coverage(mean: Tensor, variance: Tensor, targets: Tensor, *, axes: Axes | None = None) -> Figure:
    """The fraction of targets in central intervals, against the probability that each interval claims.

    A point below the diagonal is an interval that is too narrow. A bar is two standard errors of a calibrated
    model. Arguments, errors and source are those of
    :func:`~thinned.montecarlo.calibration.interval_coverage`.

    >>> import torch
    >>> figure = coverage(torch.zeros(4), torch.ones(4), torch.tensor([0.0, 0.5, -1.0, 3.0]))
    >>> figure.axes[0].get_ylabel()
    'fraction of targets inside'
    """
    found = interval_coverage(mean, variance, targets)
    axes = _axes(axes)
    axes.plot([0, 1], [0, 1], "--", color=GREY, label="calibrated")
    axes.errorbar(
        found.nominal.numpy(),
        found.observed.numpy(),
        yerr=2 * found.standard_error.numpy(),
        fmt="o",
        markersize=4,
        capsize=3,
        color=PALETTE[0],
        label=f"observed ({TWO})",
    )
    axes.set(
        title="Coverage of central intervals", xlabel="probability of the interval", xlim=(0, 1), ylim=(0, 1)
    )
    axes.set_ylabel("fraction of targets inside")
    return _finished(axes)


def _axes(axes: Axes | None) -> Axes:
    if axes is None:
        axes = Figure(figsize=(5.3 * _scale(), 4.6 * _scale()), layout="constrained").subplots()
    elif not isinstance(axes, Axes):
        raise TypeError(f"axes must be Matplotlib's Axes, {got(axes)}")
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _scale() -> float:
    """How large the text is; sizes in inches follow it."""
    return float(rcParams["font.size"]) / 10


def _finished(axes: Axes, legend_title: str | None = None) -> Figure:
    """Put the legend below the label of the x axis, where it hides no data."""
    figure = axes.figure.figure  # of a subfigure, the figure that it is in
    below = offset_copy(axes.transAxes, figure, y=-3.6 * rcParams["font.size"], units="points")
    axes.legend(
        title=legend_title,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=below,
        ncols=2,
        frameon=False,
        borderaxespad=0,
    )
    return figure
