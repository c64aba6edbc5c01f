"""A report as tables of words, which the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from thinned.compare import timing, training
from thinned.compare.laws import Finding, Verdict
from thinned.compare.layers import ENTRIES, Entry
from thinned.compare.report import Report, Sample
from thinned.compare.timing import MULTIPLY, Timing
from thinned.compare.training import Run

__all__ = [
    "Cell",
    "Row",
    "Table",
    "laws",
    "layers",
    "layers_page",
    "layers_record",
    "speed",
    "training_runs",
    "tutorial",
]

MARKS = {Verdict.HOLDS: "✓ ", Verdict.BROKEN: "✗ ", Verdict.CRASHED: "✗ crashed: "}
NOTHING = "–"
COLUMNS_OF_LAYERS = ("functional", "mask", "source", "peer")


@dataclass(frozen=True)
class Cell:
    """A few words, and how good the news is where it is a finding."""

    text: str
    verdict: Verdict | None = None


@dataclass(frozen=True)
class Row:
    """One line; ``note`` explains its heading where there is room for that."""

    heading: str
    cells: list[Cell]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows in titled sections, under one heading for each column after the first."""

    title: str
    columns: list[str]
    sections: dict[str, list[Row]]


def tutorial(report: Report) -> Table:
    def cells(figure: str) -> list[Cell]:
        samples = [report.tutorial[name] for name in report.names]
        return [
            Cell(f"{getattr(sample, figure):.4f}" if isinstance(sample, Sample) else f"crashed: {sample}")
            for sample in samples
        ]

    rows = [Row("mean", cells("mean")), Row("standard deviation", cells("deviation"))]
    return Table("The tutorial's comparison: torch.ones(1000, 100), p = 0.5", report.names, {"": rows})


def laws(report: Report) -> Table:
    sections = {
        family: [
            Row(law.name, [_finding(report.findings[law.name][name]) for name in report.names], law.statement)
            for law in members
        ]
        for family, members in groupby(report.laws, key=lambda law: law.family)
    }
    return Table(f"The law of {report.layer}", report.names, sections)


def _finding(finding: Finding) -> Cell:
    if finding.verdict is Verdict.NOT_OFFERED:
        return Cell("– not offered", finding.verdict)
    return Cell(MARKS[finding.verdict] + finding.measured, finding.verdict)


def speed(report: Report) -> Table:
    """Nanoseconds an element, and in brackets the ratio to a multiply; then the bytes kept for backward."""
    columns = [MULTIPLY, *report.names]
    sections = {}
    for direction in timing.DIRECTIONS:
        found = {(t.elements, t.subject): t for t in report.timings if t.direction == direction}
        sections[direction] = [
            Row(
                f"{direction}, {_short(elements)}", [_timing(found.get((elements, name))) for name in columns]
            )
            for elements in dict.fromkeys(elements for elements, _ in found)
        ]
    saved = [Cell(_bytes(report.bytes_saved.get(name))) for name in report.names]
    sections["memory"] = [Row("bytes saved for backward", [Cell("0"), *saved])]
    return Table(f"An element costs, in nanoseconds and as a ratio to {MULTIPLY}", columns, sections)


def _short(elements: int) -> str:
    return f"{elements // 1_000_000} M" if elements >= 1_000_000 else f"{elements // 1_000} k"


def _timing(found: Timing | None) -> Cell:
    if found is None:
        return Cell(NOTHING)
    nanoseconds = f"{found.nanoseconds:.3g} ns"
    return Cell(nanoseconds if found.subject == MULTIPLY else f"{nanoseconds} ({found.ratio:.3g}x)")


def _bytes(saved: float | None) -> str:
    return NOTHING if saved is None else f"{round(saved, 2):g}"


def training_runs(report: Report) -> Table:
    columns = ["test error", "training loss", "ms a step", "dropout adds"]
    title = (
        f"Training on {training.TRAINING_DIGITS:,} MNIST digits for {training.EPOCHS} epochs, "
        f"tested on {training.TEST_DIGITS:,} others"
    )
    return Table(title, columns, {"": [Row(run.name, list(_run(run))) for run in report.training]})


def _run(run: Run) -> Iterable[Cell]:
    if run.failure:
        yield Cell(MARKS[Verdict.CRASHED] + run.failure, Verdict.CRASHED)
        yield from [Cell(NOTHING)] * 3
        return
    yield Cell(f"{run.test_error:.2%}")
    yield Cell(f"{run.training_loss[-1]:.4f}")
    yield Cell(f"{run.step_ms:.2f}")
    yield Cell(NOTHING if run.name == training.WITHOUT else f"{run.added_percent:+.1f}%")


def layers() -> Table:
    rows = [Row(entry.name, [Cell(text) for text in _cells(entry)]) for entry in ENTRIES]
    return Table(f"{len(rows)} layers", list(COLUMNS_OF_LAYERS), {"": rows})


def layers_record() -> list[dict[str, str | list[str]]]:
    """The table of layers for a program.

    >>> layers_record()[0]["layer"]
    'Dropout'
    """
    return [
        {"layer": entry.name}
        | dict(zip(COLUMNS_OF_LAYERS, _cells(entry), strict=True))
        | {"functional": entry.functional.split(", ")}
        for entry in ENTRIES
    ]


def layers_page() -> str:
    """The page docs/layers.md.

    >>> layers_page().splitlines()[0]
    '# Layers'
    """
    lines = [
        "# Layers",
        "",
        "Every layer of `thinned`, its function in `thinned.functional`, the shape of its mask, where it",
        "comes from, and what `thinned compare --layer NAME` shows beside it. `thinned layers --markdown`",
        "writes this page.",
        "",
        f"| layer | {' | '.join(COLUMNS_OF_LAYERS)} |",
        f"| --- {'| --- ' * len(COLUMNS_OF_LAYERS)}|",
    ]
    for entry in ENTRIES:
        functional, *rest = _cells(entry)
        functions = ", ".join(f"`{name}`" for name in functional.split(", "))
        cells = (f"`{entry.name}`", functions, *rest)
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "Two functions have no layer, because they drop columns of an `edge_index` and not elements:",
        "`functional.dropout_edge` (DropEdge; Rong et al. 2020, section 4.1; PyG) and",
        "`functional.dropout_node` (DropNode; Do et al. 2021; PyG).",
    ]
    return "\n".join(lines) + "\n"


def _cells(entry: Entry) -> tuple[str, str, str, str]:
    return entry.functional, entry.mask, entry.source, entry.peer.origin
