"""Pictures of a report: SVG that takes its text colour from the page, and masks as PNG."""

from __future__ import annotations

import base64
import io
import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import NullFormatter
from torch import Tensor

from thinned.colours import GREY, PALETTE
from thinned.compare.figures import count, duration
from thinned.compare.report import Report
from thinned.compare.timing import DIRECTIONS, MULTIPLY
from thinned.compare.training import WITHOUT, Run

__all__ = ["STYLE", "drop_rates", "errors", "mask_picture", "speed", "svg", "test_errors", "thinned_networks"]

INK = "#010203"  # becomes currentColor, which Matplotlib does not know

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


def thinned_networks(mask: Tensor, examples: int = 3) -> dict[str, str]:
    """A network with two hidden layers of six units, whole and as the first rows of a mask leave it."""
    whole = torch.ones(12, dtype=torch.bool)
    rows = mask.flatten(1)[:examples, :12].bool()
    kept = {"evaluation": whole, **{f"example {i + 1}": row for i, row in enumerate(rows)}}
    return {title: _network(row[:6].tolist(), row[6:].tolist()) for title, row in kept.items()}


def _network(*hidden: list[bool]) -> str:
    layers = [[True] * 4, *hidden, [True] * 3]
    units = [
        [((x, y - (len(layer) - 1) / 2), kept) for y, kept in enumerate(layer)]
        for x, layer in enumerate(layers)
    ]
    edges = [
        (start, end)
        for left, right in pairwise(units)
        for (start, has_start), (end, has_end) in product(left, right)
        if has_start and has_end
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.2, 2.2))
        axes = figure.subplots()
        axes.add_collection(LineCollection(edges, color=GREY, linewidths=0.5, zorder=1))
        for marker, colour, drawn in (("o", PALETTE[0], True), ("x", GREY, False)):
            chosen = [place for layer in units for place, kept in layer if kept is drawn]
            if chosen:
                xs, ys = zip(*chosen, strict=True)
                axes.scatter(xs, ys, s=46, color=colour, marker=marker, zorder=2)
        axes.set_axis_off()
        return svg(figure)


def errors(plain: Run, dropped: Run, names: Sequence[str]) -> str:
    """Training and test error over epochs, of one network without and with dropout."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _one_plot()
        for run, words in ((plain, WITHOUT), (dropped, "with dropout")):
            for errors, style, digits in (
                (run.test_error, "-", "test"),
                (run.training_error, "--", "training"),
            ):
                label, colour = f"{digits}, {words}", colours(names)[run.name]
                axes.plot(list(errors), _percent(errors), style, color=colour, label=label)
        axes.set(title="one network, with and without dropout")
        return _error_plot(figure, [plain, dropped])


def test_errors(runs: Sequence[Run], names: Sequence[str]) -> str:
    """Test error over epochs, of every network."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _one_plot()
        for run in runs:
            errors = run.test_error
            axes.plot(list(errors), _percent(errors), color=colours(names)[run.name], label=run.name)
        axes.set(title="test error of each network")
        return _error_plot(figure, runs)


def _error_plot(figure: Figure, runs: Sequence[Run]) -> str:
    """Cut the first epochs off, in which every network is wrong on most digits."""
    last = [max(run.test_error[max(run.test_error)], 0.01) for run in runs if run.test_error]
    figure.axes[0].set(xlabel="epoch", ylabel="digits wrong, %", ylim=(-1, min(300 * max(last), 102)))
    return _finished(figure)


def _percent(errors: dict[int, float]) -> list[float]:
    return [error * 100 for error in errors.values()]


def drop_rates(report: Report) -> str | None:
    """Measured drop rates relative to p, on the band that the binomial law allows; None if there are none."""
    points = defaultdict(list)
    for law in report.findings.values():
        for name, finding in law.items():
            if "rate" in finding.figures:
                points[name].append(finding.figures)
    if not points:
        return None
    with matplotlib.rc_context(STYLE):
        figure, axes = _one_plot()
        ps = sorted({found["p"] for founds in points.values() for found in founds})
        for offset, (name, founds) in enumerate(points.items()):
            shift = (offset - (len(points) - 1) / 2) * 0.6 / len(points)
            places = [ps.index(found["p"]) + shift for found in founds]
            off = [(found["rate"] / found["p"] - 1) * 100 for found in founds]
            axes.plot(places, off, "o", color=colours(report.names)[name], label=name, markersize=4)
        for place, p in enumerate(ps):
            band = next(f for founds in points.values() for f in founds if f["p"] == p)
            low, high = ((band[end] / p - 1) * 100 for end in ("low", "high"))
            axes.fill_between([place - 0.4, place + 0.4], low, high, color=GREY, alpha=0.25, linewidth=0)
        axes.set_xticks(range(len(ps)), [f"{p}" for p in ps])
        axes.set(title="drop rate", xlabel="p", ylabel="% off p")
        return _finished(figure)


def speed(report: Report) -> list[str]:
    """A plot for each direction: nanoseconds an element against elements, both on log axes."""
    plots = []
    with matplotlib.rc_context(STYLE):
        for direction in DIRECTIONS:
            figure, axes = _one_plot()
            for name, colour in colours(report.names).items():
                chosen = [t for t in report.timings if (t.subject, t.direction) == (name, direction)]
                if chosen:
                    sizes, costs = [t.elements for t in chosen], [t.nanoseconds for t in chosen]
                    style = "--" if name == MULTIPLY else "-"
                    axes.loglog(sizes, costs, f"o{style}", color=colour, label=name, markersize=4)
            axes.set(title=direction, xlabel="elements", ylabel="an element costs")
            axes.xaxis.set_major_formatter(lambda elements, _: count(elements))
            axes.yaxis.set_major_formatter(lambda nanoseconds, _: duration(nanoseconds / 1e9))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_minor_formatter(NullFormatter())
            plots.append(_finished(figure))
    return plots


def _one_plot() -> tuple[Figure, Axes]:
    """A plot half as wide as the page, which a phone shows at its full width with text that can be read."""
    figure = Figure(figsize=(5.3, 3.2))
    axes = figure.subplots()
    axes.grid(color=GREY, alpha=0.25, linewidth=0.6)
    return figure, axes


def _finished(figure: Figure) -> str:
    lines = figure.axes[0].lines
    figure.set_figheight(figure.get_figheight() + 0.22 * math.ceil(len(lines) / 2))
    labels = [str(line.get_label()) for line in lines]  # without them, Matplotlib leaves _Private names out
    figure.legend(lines, labels, loc="outside lower center", ncols=2)
    return svg(figure)


def svg(figure: Figure) -> str:
    """The figure, which is to be drawn and saved in :data:`STYLE`, as an element of a page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    written = text.getvalue()
    return written[written.index("<svg") :].replace(INK, "currentColor")
