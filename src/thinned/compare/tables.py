"""A report as tables of words, which the terminal and the page both show."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from thinned.backends.verify import KINDS, Verification
from thinned.compare import timing, training
from thinned.compare.figures import count, decimal, duration, significant
from thinned.compare.laws import Finding, Law, Level, Verdict
from thinned.compare.layers import ENTRIES, Entry
from thinned.compare.report import Report, Sample
from thinned.compare.textbook import TUTORIAL
from thinned.compare.timing import MULTIPLY, Timing
from thinned.compare.training import Run

__all__ = [
    "Cell",
    "Row",
    "Table",
    "call_speed",
    "laws",
    "layers",
    "layers_page",
    "layers_record",
    "speed",
    "training_runs",
    "tutorial",
    "verification",
]

MARKS = {Verdict.HOLDS: "✓ ", Verdict.BROKEN: "✗ ", Verdict.CRASHED: "✗ crashed: "}
NOTHING = "–"
ROUGH = "~"
COLUMNS_OF_LAYERS = ("functional", "mask", "source", "peer")


@dataclass(frozen=True)
class Cell:
    """A few words; for a finding, how good the news is, and how bad a breach is."""

    text: str
    verdict: Verdict | None = None
    level: Level | None = None


@dataclass(frozen=True)
class Row:
    """One line; ``note`` explains its heading where there is room for that."""

    heading: str
    cells: list[Cell]
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows in titled sections, under one heading for each column after the first; ``note`` stands below."""

    title: str
    columns: list[str]
    sections: dict[str, list[Row]]
    note: str = ""


def tutorial(report: Report) -> Table:
    def cells(figure: str) -> list[Cell]:
        samples = [report.tutorial[name] for name in report.names]
        return [
            Cell(f"{getattr(sample, figure):.4f}" if isinstance(sample, Sample) else f"crashed: {sample}")
            for sample in samples
        ]

    rows = [Row("mean", cells("mean")), Row("standard deviation", cells("deviation"))]
    source = f"{TUTORIAL.author.split()[-1]} {TUTORIAL.year}"
    title = f"The tutorial's comparison ({source}): torch.ones(1000, 100), p = 0.5"
    return Table(title, report.names, {"": rows})


def laws(report: Report) -> Table:
    sections = {
        family: [
            Row(
                law.name,
                [_finding(law, report.findings[law.name][name]) for name in report.names],
                law.statement,
            )
            for law in members
        ]
        for family, members in groupby(report.laws, key=lambda law: law.family)
    }
    return Table(f"The law of {report.layer}", report.names, sections)


def _finding(law: Law, finding: Finding) -> Cell:
    if finding.verdict is Verdict.NOT_OFFERED:
        return Cell("– not offered", finding.verdict)
    return Cell(MARKS[finding.verdict] + finding.measured, finding.verdict, law.level)


def speed(report: Report) -> Table:
    """The time of an element and its ratio to a multiply's; then the bytes kept for backward."""
    columns = [MULTIPLY, *report.names]
    sections = {}
    for direction in timing.DIRECTIONS:
        found = {(t.elements, t.subject): t for t in report.timings if t.direction == direction}
        sections[direction] = [
            Row(
                f"{direction}, {count(elements)}",
                [_timing(report, found.get((elements, name))) for name in columns],
            )
            for elements in dict.fromkeys(elements for elements, _ in found)
        ]
    saved = [Cell(_bytes(report.bytes_saved.get(name))) for name in report.names]
    sections["memory"] = [Row("bytes saved for backward", [Cell("0"), *saved])]
    title = f"An element costs, beside {MULTIPLY} of the same tensor"
    return Table(title, columns, sections, _how_timed(report))


def call_speed(report: Report) -> Table:
    """The time of a call on the workload of a layer, and its ratio to thinned's."""
    elements = report.timings[0].elements
    cells = [_timing(report, found, elements) for found in report.timings]
    row = Row(f"{elements:,} elements", cells)
    columns = [found.subject for found in report.timings]
    title = f"A call costs, beside that of {report.timings[0].reference}"
    return Table(title, columns, {"": [row]}, _how_timed(report))


def _timing(report: Report, found: Timing | None, times: int = 1) -> Cell:
    if found is None:
        return Cell(NOTHING)
    rough = ROUGH if report.is_rough(found) else ""
    time = rough + duration(found.nanoseconds * times / 1e9)
    if found.subject == found.reference:
        return Cell(time)
    low, high = map(significant, found.ratio_quartiles)
    return Cell(f"{time}\n({significant(found.ratio)}x, {low}-{high})")


def _how_timed(report: Report) -> str:
    if not report.timings:
        return ""
    reference = report.timings[0].reference
    how = (
        f"In brackets: the ratio to {reference}, the median over rounds in which both ran by turns, and the "
        f"middle half of rounds. A time is its ratio times the median time of {reference}."
    )
    return f"{how}\n{busy}" if (busy := _busy(report)) else how


def _busy(report: Report) -> str:
    """A sentence for a machine on which something else runs; empty where nothing seems to."""
    references = [found for found in report.timings if found.subject == found.reference]
    signs = []
    if unsteady := [found for found in references if not found.is_steady]:
        worst = max(unsteady, key=lambda found: found.quartiles[1] / found.quartiles[0])
        low, high = (duration(end / 1e9) for end in worst.quartiles)
        signs.append(f"the time of {worst.subject} changed between {low} and {high} an element")
    if report.is_loaded:
        signs.append(f"{significant(report.load or 0)} programs want to run on each core")
    if not signs:
        return ""
    return (
        f"The machine is busy: {', and '.join(signs)}. Figures marked {ROUGH} are rough. Stop other "
        "programs, or set OMP_NUM_THREADS to the number of free cores, and try again."
    )


def _bytes(saved: float | None) -> str:
    return NOTHING if saved is None else decimal(saved)


def training_runs(report: Report) -> Table:
    columns = ["training error", "test error", "a step", "dropout adds"]
    title = (
        f"Training on {training.TRAINING_DIGITS:,} MNIST digits for {training.EPOCHS} epochs, "
        f"tested on {training.TEST_DIGITS:,} others"
    )
    rough = any(report.is_rough(found) for found in report.timings)
    rows = [Row(run.name, list(_run(run, rough))) for run in report.training]
    return Table(title, columns, {"": rows})


def _run(run: Run, rough: bool) -> Iterable[Cell]:
    if run.failure:
        yield Cell(MARKS[Verdict.CRASHED] + run.failure, Verdict.CRASHED)
        yield from [Cell(NOTHING)] * 3
        return
    yield from (Cell(f"{list(errors.values())[-1]:.2%}") for errors in (run.training_error, run.test_error))
    yield Cell((ROUGH if rough else "") + duration((run.step_ms or 0) / 1e3))
    if run.name == training.WITHOUT or run.added_percent is None or run.added_quartiles is None:
        yield Cell(NOTHING)
        return
    low, high = run.added_quartiles
    yield Cell(f"{run.added_percent:+.1f}% ({low:+.1f} to {high:+.1f})")


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
        "writes this page. Layers that do not compute what they drop: [faster.md](faster.md).",
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


def verification(found: Verification) -> Table:
    """The hashes of each backend; below, what raised, what cannot run here, and whether all are one."""

    def row(name: str, hashes: dict[str, str]) -> Row:
        failed = found.failed.get(name, {})
        cells = [
            Cell(hashes.get(kind, "raises"), Verdict.BROKEN if kind in failed else None) for kind in KINDS
        ]
        outcome = Cell("DIFFERS", Verdict.BROKEN) if failed else Cell("equal", Verdict.HOLDS)
        return Row(name, [*cells, Cell("") if name == "spec" else outcome])

    raised = [
        f"{name} raises for {kind}: {why}"
        for name, failed in found.failed.items()
        for kind, why in failed.items()
        if why != "differs"
    ]
    missing = [f"{name} cannot run here: {reason}" for name, reason in found.missing.items()]
    rows = [row(name, hashes) for name, hashes in found.hashes.items()]
    return Table("verify", [*KINDS, ""], {"": rows}, "\n".join([*raised, *missing, str(found)]))
