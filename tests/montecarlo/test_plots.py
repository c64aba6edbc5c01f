"""Figures hold the data they were given, refuse what is no data, and leave nothing behind."""

from __future__ import annotations

import gc
import importlib
import io
import sys
import weakref
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from process import output
from thinned.montecarlo import calibration, plots

Floats = NDArray[np.float64]
P = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.25, 0.75], [0.22, 0.78], [0.1, 0.9]])
Y = torch.tensor([0, 1, 1, 1, 0])
WRONG = torch.tensor([False, True, False, False])
SCORE = torch.tensor([0.1, 0.9, 0.4, 0.4])
X = torch.tensor([2.0, 0.0, 1.0])
MEAN, VARIANCE = torch.tensor([4.0, 0.0, 1.0]), torch.tensor([0.25, 0.01, 1.0])
INSIDE, OUTSIDE = torch.tensor([0.0, 0.0, 0.5, 1.0]), torch.tensor([1.0, 2.0])
ZERO, ONE, TARGETS = torch.zeros(4), torch.ones(4), torch.tensor([0.0, 0.5, -1.0, 3.0])

FIGURES: dict[str, Callable[..., Figure]] = {
    "reliability_diagram": lambda **more: plots.reliability_diagram(P, Y, **more),
    "risk_coverage": lambda **more: plots.risk_coverage(WRONG, SCORE, **more),
    "error_bars": lambda **more: plots.error_bars(X, MEAN, VARIANCE, **more),
    "entropy_histogram": lambda **more: plots.entropy_histogram(INSIDE, OUTSIDE, **more),
    "coverage": lambda **more: plots.coverage(ZERO, ONE, TARGETS, **more),
}
every_figure = pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES)


def legend(figure: Figure) -> dict[str, Any]:
    """The artists by their labels."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    return dict(zip(labels, handles, strict=True))


def points(line: Any) -> list[list[float]]:
    return [pytest.approx(values) for values in np.transpose(line.get_xydata())]


def bars(container: Any) -> tuple[Any, Any]:
    """The points of error bars, and the ends of the bars."""
    line, _, (collection,) = container
    return line.get_xydata(), np.array([segment[:, 1] for segment in collection.get_segments()])


def test_reliability_diagram() -> None:
    figure = plots.reliability_diagram(P, Y, bins=5)
    held = calibration.reliability(P, Y, bins=5)
    error = calibration.expected_calibration_error(P, Y, bins=5)
    artists = legend(figure)
    assert list(artists) == ["calibrated", f"ECE {error:.3f} (bars: 2 standard errors)"]
    drawn, ends = bars(artists[f"ECE {error:.3f} (bars: 2 standard errors)"])
    np.testing.assert_allclose(drawn, torch.stack([held.confidence, held.accuracy], 1))
    off = 2 * held.standard_error
    np.testing.assert_allclose(
        ends, torch.stack([held.accuracy - off, held.accuracy + off], 1).clamp(0, 1), atol=1e-12
    )
    (counts,) = figure.axes[0].child_axes
    rectangles = counts.containers[0]
    assert [bar.get_height() for bar in rectangles] == held.examples.tolist() == [3, 2]
    middle = [bar.get_x() + bar.get_width() / 2 for bar in rectangles]
    assert middle == pytest.approx(((held.lower + held.upper) / 2).tolist())
    assert [text.get_text() for text in counts.texts] == ["3", "2"]


def test_bars_of_a_reliability_diagram_are_two_deviations() -> None:
    """Half of 400 examples at a confidence of 0.8 are right: 0.5 +- 2 * sqrt(0.8 * 0.2 / 400)."""
    figure = plots.reliability_diagram(
        torch.tensor([[0.8, 0.2]]).double().repeat(400, 1), torch.arange(400) % 2
    )
    drawn, ends = bars(legend(figure)["ECE 0.300 (bars: 2 standard errors)"])
    np.testing.assert_allclose(drawn, [[0.8, 0.5]])
    np.testing.assert_allclose(ends, [[0.46, 0.54]])


def test_risk_coverage_of_several_scores() -> None:
    scores = {"entropy": SCORE, "variance": -SCORE}
    artists = legend(plots.risk_coverage(WRONG, scores))
    assert list(artists) == [
        "entropy: AURC 0.062",
        "variance: AURC 0.521",
        "best possible: 0.062",
        "no information: 0.250",
    ]
    for line, score in zip(artists.values(), [SCORE, -SCORE, WRONG.float()], strict=False):
        assert points(line) == [x.tolist() for x in calibration.risk_coverage_curve(WRONG, score)]
    assert set(artists["no information: 0.250"].get_ydata()) == {0.25}
    assert len({line.get_linestyle() for line in artists.values()}) > 2


def test_risk_coverage_of_one_score() -> None:
    assert next(iter(legend(plots.risk_coverage(WRONG, SCORE)))) == "uncertainty: AURC 0.062"


def test_risk_coverage_of_more_scores_than_dashes_or_colours() -> None:
    lines = legend(plots.risk_coverage(WRONG, {f"score {i}": SCORE for i in range(9)})).values()
    assert len(lines) == 11
    looks = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(looks) == 8 + 2


def band(collection: Any) -> tuple[Floats, Floats]:
    """The lower and the upper edge of an area between two curves at 0, 1 and 2."""
    vertices = collection.get_paths()[0].vertices
    edges = [np.array([vertices[vertices[:, 0] == x, 1] for x in (0, 1, 2)][i]) for i in range(3)]
    return np.array([edge.min() for edge in edges]), np.array([edge.max() for edge in edges])


def test_error_bars() -> None:
    """Inputs come in any order."""
    truth, x_train, y_train = X**2 + 1, torch.tensor([0.5, 1.5]), torch.tensor([0.3, 2.2])
    artists = legend(plots.error_bars(X, MEAN, VARIANCE, x_train=x_train, y_train=y_train, truth=truth))
    assert list(artists) == ["1 deviation", "2 deviations", "mean", "truth", "training examples"]
    mean, deviation = np.array([0.0, 1.0, 4.0]), np.array([0.1, 1.0, 0.5])
    for times, name in ((1, "1 deviation"), (2, "2 deviations")):
        lower, upper = band(artists[name])
        np.testing.assert_allclose(lower, mean - times * deviation)
        np.testing.assert_allclose(upper, mean + times * deviation)
    assert points(artists["mean"]) == [[0, 1, 2], [0, 1, 4]]
    assert points(artists["truth"]) == [[0, 1, 2], [1, 2, 5]]
    assert points(artists["training examples"]) == [x_train.tolist(), y_train.tolist()]
    assert artists["training examples"].get_linestyle() == "None"


def test_error_bars_alone() -> None:
    assert list(legend(plots.error_bars(X, MEAN, VARIANCE))) == ["1 deviation", "2 deviations", "mean"]


def heights(polygon: Any) -> dict[float, float]:
    """The height of a histogram right of each place where it steps."""
    (patch,) = polygon
    steps = patch.get_xy()
    return {float(x): float(y) for (x, y), (after, _) in pairwise(steps[1:]) if after > x}


def test_entropy_histogram() -> None:
    """Fractions of each set, in bins that both share."""
    figure = plots.entropy_histogram(INSIDE, OUTSIDE, bins=4)
    title = figure.axes[0].get_legend()
    assert title is not None
    assert title.get_title().get_text() == "AUROC 0.938"
    artists = legend(figure)
    assert list(artists) == ["in distribution (4)", "out of distribution (2)"]
    assert heights([artists["in distribution (4)"]]) == {0: 0.5, 0.5: 0.25, 1: 0.25, 1.5: 0}
    assert heights([artists["out of distribution (2)"]]) == {0: 0, 0.5: 0, 1: 0.5, 1.5: 0.5}
    hatches = {patch.get_hatch() for patch in artists.values()}
    assert len(hatches) == 2


def test_entropy_histogram_of_a_constant() -> None:
    assert list(legend(plots.entropy_histogram(ZERO, ZERO))) == [
        "in distribution (4)",
        "out of distribution (4)",
    ]


def test_coverage() -> None:
    figure = plots.coverage(ZERO, ONE, TARGETS)
    found = calibration.interval_coverage(ZERO, ONE, TARGETS)
    drawn, ends = bars(legend(figure)["observed (bars: 2 standard errors)"])
    np.testing.assert_allclose(drawn, torch.stack([found.nominal, found.observed], 1))
    off = 2 * found.standard_error
    np.testing.assert_allclose(ends, torch.stack([found.observed - off, found.observed + off], 1), atol=1e-12)


@every_figure
def test_every_figure_has_title_labels_and_legend(draw: Callable[..., Figure]) -> None:
    figure = draw()
    (axes,) = figure.axes
    assert axes.get_title()
    assert axes.get_xlabel()
    assert axes.get_ylabel()
    assert axes.get_legend()


@every_figure
@pytest.mark.parametrize("size", [10, 16])
def test_nothing_lies_outside_or_over_another(draw: Callable[..., Figure], size: float) -> None:
    """Title, labels and legend are inside the page, and the legend is below the label of the axis."""
    with matplotlib.rc_context({"font.size": size}):
        figure = draw()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    found = axes.get_legend()
    assert found is not None
    texts = [axes.title, axes.xaxis.label, axes.yaxis.label, found]
    boxes = [artist.get_window_extent() for artist in texts]
    page = figure.bbox
    for box in boxes:
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1
    _, below, _, box = boxes
    assert box.y1 <= below.y0
    for child in axes.child_axes:
        assert boxes[0].y0 >= child.get_window_extent().y1


@every_figure
def test_axes_that_are_given(draw: Callable[..., Figure]) -> None:
    """They are drawn into, in a subfigure too, and nothing else is."""
    figure = Figure()
    left, right = figure.subfigures(1, 2)
    mine, other = left.subplots(), right.subplots()
    assert draw(axes=mine) is figure
    assert mine.get_title()
    assert not other.has_data()
    assert figure.axes == [mine, other]


@every_figure
def test_axes_must_be_axes(draw: Callable[..., Figure]) -> None:
    with pytest.raises(TypeError, match="axes must be Matplotlib's Axes, got <Figure"):
        draw(axes=Figure())


@every_figure
def test_a_figure_is_freed_and_saved_without_a_backend(draw: Callable[..., Figure]) -> None:
    figure = draw()
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    assert picture.getvalue().startswith(b"\x89PNG")
    gone = weakref.ref(figure)
    del figure
    gc.collect()
    assert gone() is None


def test_no_figure_needs_pyplot() -> None:
    code = """
        import sys, torch
        from thinned.montecarlo import plots
        plots.coverage(torch.zeros(4), torch.ones(4), torch.ones(4))
        print("matplotlib.pyplot" in sys.modules)
    """
    assert output(code).split() == ["False"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_tensors_of_any_dtype_with_gradient(dtype: torch.dtype) -> None:
    x = torch.rand(5).to(dtype).requires_grad_()
    plots.error_bars(x, x, x, x_train=x, y_train=x, truth=x)
    plots.entropy_histogram(x, x)
    plots.coverage(x, x, x)
    plots.risk_coverage(x, x)
    plots.reliability_diagram(torch.stack([x, 1 - x], 1), torch.zeros(5, dtype=torch.uint8))


NAN = torch.tensor([float("nan")] * 3)


def refused() -> Iterator[
    tuple[Callable[..., Figure], tuple[Any, ...], dict[str, Any], type[Exception], str]
]:
    def error_bars(message: str, *arguments: Tensor, **more: Tensor) -> Any:
        return plots.error_bars, arguments, more, ValueError, message

    yield error_bars(r"x must have shape \(n,\)", X[:, None], MEAN, VARIANCE)
    yield error_bars(r"got x \(3,\), mean \(2,\), variance \(3,\)", X, MEAN[:2], VARIANCE)
    yield error_bars(r"variance \(3, 1\)", X, MEAN, VARIANCE[:, None])
    yield error_bars("variance must not be negative, but got -0.25", X, MEAN, -VARIANCE)
    yield error_bars("x must hold no NaN", NAN, MEAN, VARIANCE)
    yield error_bars("mean must hold no NaN", X, NAN, VARIANCE)
    yield error_bars("truth must hold no NaN", X, MEAN, VARIANCE, truth=NAN)
    yield error_bars(r"truth \(2,\)", X, MEAN, VARIANCE, truth=X[:2])
    yield error_bars(r"got x_train \(3,\), y_train \(2,\)", X, MEAN, VARIANCE, x_train=X, y_train=X[:2])
    yield error_bars("y_train must hold no NaN", X, MEAN, VARIANCE, x_train=X, y_train=NAN)
    together = "x_train and y_train must be given together"
    for name in ("x_train", "y_train"):
        yield plots.error_bars, (X, MEAN, VARIANCE), {name: X}, TypeError, together
    yield plots.reliability_diagram, (P, Y + 1), {}, ValueError, "labels must be in 0..1"
    yield plots.reliability_diagram, (P, Y), {"bins": 0}, ValueError, "bins has to be at least 1, but got 0"
    yield plots.risk_coverage, (WRONG, SCORE[:3]), {}, ValueError, r"losses \(4,\), uncertainty \(3,\)"
    yield plots.risk_coverage, (WRONG, {}), {}, ValueError, "at least one tensor, got {}"
    yield plots.risk_coverage, (WRONG, {"a": SCORE.tolist()}), {}, TypeError, "must be a tensor, got "
    yield plots.entropy_histogram, (INSIDE, OUTSIDE), {"bins": 1.5}, TypeError, "bins must be an integer"
    yield plots.entropy_histogram, (NAN, OUTSIDE), {}, ValueError, "inside must hold no NaN"
    yield plots.coverage, (ZERO, -ONE, TARGETS), {}, ValueError, "variance must not be negative"


@pytest.mark.parametrize(("draw", "arguments", "more", "error", "message"), list(refused()))
def test_errors_repeat_what_was_given(
    draw: Callable[..., Figure],
    arguments: tuple[Any, ...],
    more: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    """Before anything is drawn into the axes."""
    axes = Figure().subplots()
    with pytest.raises(error, match=message):
        draw(*arguments, **more, axes=axes)
    assert not axes.has_data()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "thinned.montecarlo.plots")
    with pytest.raises(ImportError, match=r"pip install 'thinned\[uncertainty\]'"):
        importlib.import_module("thinned.montecarlo.plots")


def test_text_follows_matplotlib() -> None:
    """A page that shows a figure chooses the colour of its text."""
    with matplotlib.rc_context({"axes.labelcolor": "red", "text.color": "blue"}):
        axes: Axes = plots.coverage(ZERO, ONE, TARGETS).axes[0]
    assert axes.xaxis.label.get_color() == "red"
    assert axes.title.get_color() == "blue"
