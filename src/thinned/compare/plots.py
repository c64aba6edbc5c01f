"""Pictures of a report: SVG that takes its text colour from the page, and masks as PNG."""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from torch import Tensor

from thinned.compare.report import Report
from thinned.compare.timing import DIRECTIONS, MULTIPLY
from thinned.compare.training import WITHOUT

__all__ = ["drop_rates", "losses", "mask_picture", "speed"]

INK = "#010203"  # becomes currentColor, which Matplotlib does not know
GREY = "#8a8f98"
PALETTE = ("#0c9a74", "#e0662f", "#6f73d2", "#c2417c", "#b8922b", "#3b8fc4")


STYLE: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "legend.frameon": False,
    "svg.hashsalt": "thinned",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def colours(names: Sequence[str]) -> dict[str, str]:
    """One colour for each implementation, and grey for what has no dropout."""
    chosen = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(names)}
    return {MULTIPLY: GREY, WITHOUT: GREY, **chosen}


def mask_picture(mask: Tensor) -> str:
    """A mask as a data address of a PNG, one pixel an element, dark where dropped."""
    png = io.BytesIO()
    imsave(png, mask.flatten(1).numpy(), cmap="gray", vmin=-0.2, vmax=1.0, format="png")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()


def drop_rates(report: Report) -> str:
    """Measured drop rates relative to p, on the band that the binomial law allows."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.2))
        axes = figure.subplots()
        points = defaultdict(list)
        for law in report.findings.values():
            for name, finding in law.items():
                if "rate" in finding.figures:
                    points[name].append(finding.figures)
        ps = sorted({found["p"] for founds in points.values() for found in founds})
        for offset, (name, founds) in enumerate(points.items()):
            shift = (offset - (len(points) - 1) / 2) * 0.5 / len(points)
            places = [ps.index(found["p"]) + shift for found in founds]
            off = [(found["rate"] / found["p"] - 1) * 100 for found in founds]
            axes.plot(places, off, "o", color=colours(report.names)[name], label=name, markersize=6)
        for place, p in enumerate(ps):
            band = next(f for founds in points.values() for f in founds if f["p"] == p)
            low, high = ((band[end] / p - 1) * 100 for end in ("low", "high"))
            axes.fill_between([place - 0.4, place + 0.4], low, high, color=GREY, alpha=0.25, linewidth=0)
        axes.set_xticks(range(len(ps)), [f"p = {p}" for p in ps])
        axes.set_ylabel("drop rate, % off p")
        _legend(axes)
        return _svg(figure)


def speed(report: Report) -> str:
    """Nanoseconds an element against the number of elements, both on log axes."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6))
        for axes, direction in zip(figure.subplots(1, 2, sharey=True), DIRECTIONS, strict=True):
            for name, colour in colours(report.names).items():
                chosen = [t for t in report.timings if (t.subject, t.direction) == (name, direction)]
                if chosen:
                    sizes, costs = [t.elements for t in chosen], [t.nanoseconds for t in chosen]
                    style = "--" if name == MULTIPLY else "-"
                    axes.loglog(sizes, costs, f"o{style}", color=colour, label=name, markersize=4)
            axes.set(title=direction, xlabel="elements")
            axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        figure.axes[0].set_ylabel("ns an element")
        _legend(figure.axes[1])
        return _svg(figure)


def losses(report: Report) -> str:
    """Cross-entropy over epochs, on the digits trained on and on the others."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6))
        left, right = figure.subplots(1, 2)
        for run in report.training:
            colour, epochs = colours(report.names)[run.name], range(1, len(run.training_loss) + 1)
            left.semilogy(epochs, run.training_loss, color=colour)
            right.plot(list(run.test_loss), list(run.test_loss.values()), color=colour, label=run.name)
        left.set(title="loss while training", xlabel="epoch", ylabel="cross-entropy")
        right.set(title="loss on the test digits", xlabel="epoch")
        for axes in (left, right):
            axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
        _legend(right)
        return _svg(figure)


def _legend(axes: Axes) -> None:
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def _svg(figure: Figure) -> str:
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(INK, "currentColor")
