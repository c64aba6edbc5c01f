"""The report for a browser: one self-contained page."""

from __future__ import annotations

import matplotlib
from matplotlib.figure import Figure

from thinned.colours import GREY, PALETTE
from thinned.compare.page import render
from thinned.compare.plots import STYLE, svg
from thinned.compare.report import machine
from thinned.montecarlo import plots
from thinned.uncertainty.report import Report

__all__ = ["to_html"]


def to_html(report: Report) -> str:
    """First the scores, then pictures, then single examples, then what dropped and how it was run."""
    with matplotlib.rc_context(STYLE):
        pictures = [svg(figure) for figure in _figures(report)]
    return render(
        "uncertainty/page.html.jinja",
        report=report,
        pictures=pictures,
        extremes={"Least certain": report.examples(False), "Most certain": report.examples(True)},
        cell=lambda value: f"{value:.3g}" if isinstance(value, float) else f"{value}",
        machine=machine(),
    )


def _figures(report: Report) -> list[Figure]:
    prediction, targets = report.prediction, report.targets
    figures = [_histogram(report)]
    if report.is_classification and targets is not None:
        wrong = prediction.label != targets
        scores = {
            "predictive entropy": prediction.predictive_entropy,
            "mutual information": prediction.mutual_information,
            "1 - max. probability": 1 - prediction.max_probability,
        }
        figures.append(plots.reliability_diagram(prediction.mean, targets))
        figures.append(plots.risk_coverage(wrong, scores))
    elif not report.is_classification:
        mean, variance = (
            each.reshape(len(prediction), -1) for each in (prediction.mean, prediction.total_variance)
        )
        if targets is not None:
            figures.append(plots.coverage(mean, variance, targets))
            figures.append(
                plots.risk_coverage((mean - targets).square().mean(1), {"deviation": report.uncertainty})
            )
        if report.x.numel() == mean.numel() == len(prediction):
            axes = Figure(figsize=(5.3, 4.6), layout="constrained").subplots()
            x = report.x.flatten()
            if targets is not None:
                axes.plot(x.numpy(), targets.numpy(), "x", color=PALETTE[2], markersize=4, label="targets")
            figures.append(plots.error_bars(x, mean[:, 0], variance[:, 0], axes=axes))
    return figures


def _histogram(report: Report) -> Figure:
    figure = Figure(figsize=(5.3, 4.6), layout="constrained")
    axes = figure.subplots()
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    axes.hist(report.uncertainty.numpy(), 30, color=PALETTE[0], alpha=0.6)
    axes.set(title="Uncertainty of the examples", xlabel=report.uncertainty_name, ylabel="examples")
    return figure
