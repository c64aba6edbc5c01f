"""What a person reads: tables that fit, and verdicts that say what a law is."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from thinned.compare import plots, tables
from thinned.compare.laws import Finding, Level, Verdict
from thinned.compare.layers import entry_of
from thinned.compare.report import Report
from thinned.compare.settings import Settings
from thinned.compare.terminal import Terminal
from thinned.compare.timing import MULTIPLY, Timing, beside

LAWS = entry_of("Dropout").laws
NAMES = ["thinned", "torch", "DropsConsecutiveElements", "MyDropout", "Short", "examples/some.py:Other"]
MEASURED = [
    "0.1018, beyond 0.09890 to 0.1011",
    "NotImplementedError: \"bernoulli_scalar_cpu_\" not implemented for 'ComplexFloat'",
    "scaled by 1, not 1.001 at p = 0.001",
    "finite differences",
]


def report_of(names: list[str], timings: list[Timing] | None = None, load: float | None = None) -> Report:
    verdicts = list(Verdict)
    findings = {
        law.name: {
            name: Finding(verdicts[(i + j) % len(verdicts)], MEASURED[(i + 3 * j) % len(MEASURED)])
            for j, name in enumerate(names)
        }
        for i, law in enumerate(LAWS)
    }
    report = Report(names, Settings(quick=True), LAWS, findings=findings, timings=timings or [])
    report.load = load
    return report


def timings_of(names: list[str], *, unsteady: int = 0) -> list[Timing]:
    """By hand: of the sizes, the one that is unsteady has a multiply that takes twice as long in between."""
    found = []
    for elements in (4_000, 32_000_000):
        slow = 2.0 if elements == unsteady else 1.0
        base = [1e-6, slow * 1e-6, 1e-6, slow * 1e-6, slow * 1e-6]
        seconds = {name: [(i + 2) * 700 * second for second in base] for i, name in enumerate(names)}
        for direction in ("forward", "forward + backward"):
            found += beside({MULTIPLY: base, **seconds}, MULTIPLY, elements, direction)
    return found


def printed(width: int, *tables_shown: tables.Table, with_notes: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width)
    for table in tables_shown:
        Terminal(console).show(table, with_notes)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def words(text: str) -> set[str]:
    return set(re.split(r"[\s│┃]+", text))


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("with_notes", [False, True])
def test_tables_fit_and_break_no_word(width: int, count: int, with_notes: bool) -> None:
    names = NAMES[:count]
    report = report_of(names, timings_of(names))
    shown = (tables.laws(report), tables.speed(report), tables.layers())
    for table in shown:
        text = printed(width, table, with_notes=with_notes)
        assert max(map(len, text.splitlines())) <= width
        rows = [row for rows in table.sections.values() for row in rows]
        texts = [*table.columns, *(row.heading for row in rows)]
        texts += [cell.text for row in rows for cell in row.cells]
        assert words(" ".join(texts)) <= words(text)
        # A row's cells stand in one table or in several, each with all rows.
        assert text.count("┏") * len(table.sections) == text.count("├") + text.count("┏")


def test_a_narrow_terminal_loses_no_letter() -> None:
    table = tables.laws(report_of(NAMES[:1]))
    text = printed(30, table)
    assert max(map(len, text.splitlines())) <= 30
    lines = [line.split("│") for line in text.splitlines() if "│" in line]
    rows = [row for rows in table.sections.values() for row in rows]
    for column, texts in ((1, [row.heading for row in rows]), (2, [row.cells[0].text for row in rows])):
        letters = "".join(line[column].replace(" ", "") for line in lines)
        assert letters == "".join(texts).replace(" ", "")


@pytest.mark.parametrize(
    ("columns", "width"), [("73", 73), ("120", 120), (None, 100), ("0", 100), ("wide", 100), ("", 100)]
)
def test_width_of_a_file(monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int) -> None:
    for stream in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(f"sys.{stream}", io.StringIO())
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    assert Terminal().output.width == width


def verdicts(report: Report, width: int = 200, **arguments: object) -> str:
    console = Console(file=io.StringIO(), width=width, **arguments)  # type: ignore[arg-type]
    Terminal(console).show_verdicts(report)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_broken_laws_say_what_they_are_the_worst_first() -> None:
    report = report_of(["torch"])
    lines = verdicts(report).splitlines()
    broken = [law for law in LAWS if report.findings[law.name]["torch"].verdict.is_breach]
    for law in broken:
        at = next(i for i, line in enumerate(lines) if f": {law.name}: {law.statement}" in line)
        found = report.findings[law.name]["torch"]
        crashed = "crashed: " if found.verdict is Verdict.CRASHED else ""
        assert lines[at + 1].strip() == f"found: {crashed}{found.measured}"
        assert lines[at + 2].strip() == f"why: {law.why}"
    shown = [line.strip().partition(":")[0] for line in lines[1:] if line.startswith("  ") and line[2] != " "]
    levels = [level.value for level in Level]
    assert len(shown) == len(broken)
    assert shown == sorted(shown, key=levels.index)
    assert set(shown) == set(levels)
    assert "--explain LAW" in lines[-1]


def test_verdicts_fit() -> None:
    assert max(map(len, verdicts(report_of(NAMES), width=80).splitlines())) <= 80


def test_without_a_breach_nothing_is_explained() -> None:
    report = report_of(["thinned"])
    for law in LAWS:
        report.findings[law.name]["thinned"] = Finding(Verdict.HOLDS, "right")
    assert len(verdicts(report).splitlines()) == 1


def test_colours_are_readable_on_light_and_on_dark_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither yellow and cyan, which vanish on white, nor blue and black, which vanish on black."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = verdicts(report_of(["torch"]), force_terminal=True, color_system="standard")
    used = set(re.findall(r"\x1b\[([\d;]+)m", coloured))
    assert used
    colours = {int(code) for codes in used for code in codes.split(";")} - {0, 1, 2}
    assert colours <= {31, 32, 35}
    monkeypatch.setenv("NO_COLOR", "1")
    plain = verdicts(report_of(["torch"]), force_terminal=True, color_system="standard")
    assert not set(re.findall(r"\x1b\[([\d;]*3\d)m", plain))


def test_a_time_is_its_ratio_times_the_reference() -> None:
    """A machine that slows down by half between rounds, by hand: a ratio of 3 is one of times."""
    base = [1e-6, 2e-6, 4e-6, 2e-6, 1e-6]
    own = [3e-6, 6e-6, 4e-6, 6e-6, 2.5e-6]
    multiply, ours = beside({MULTIPLY: base, "ours": own}, MULTIPLY, 1000, "forward")
    assert (multiply.nanoseconds, multiply.ratio) == (pytest.approx(2.0), 1.0)
    assert ours.ratio == pytest.approx(3)
    assert ours.nanoseconds / multiply.nanoseconds == pytest.approx(ours.ratio)
    assert ours.ratio_quartiles == pytest.approx((2.5, 3))
    assert ours.quartiles == pytest.approx((3, 6))


def test_figures_have_no_exponent() -> None:
    report = report_of(["slow"], beside({MULTIPLY: [1e-4] * 3, "slow": [0.9] * 3}, MULTIPLY, 40, "forward"))
    report.bytes_saved = {"slow": 12_345_678.0}
    row, *_ = tables.speed(report).sections["forward"]
    assert [cell.text for cell in row.cells] == ["2.50 μs", "22.5 ms\n(9,000x, 9,000-9,000)"]
    assert tables.speed(report).sections["memory"][0].cells[1].text == "12,345,678"


@pytest.mark.parametrize(
    ("unsteady", "load", "marked"),
    [(0, None, []), (0, 1.4, []), (4_000, 0.1, ["4 k"]), (0, 1.7, ["4 k", "32 M"])],
)
def test_a_busy_machine_is_said_to_be_busy(unsteady: int, load: float | None, marked: list[str]) -> None:
    table = tables.speed(report_of(["ours"], timings_of(["ours"], unsteady=unsteady), load))
    for row in (*table.sections["forward"], *table.sections["forward + backward"]):
        rough = row.heading.partition(", ")[2] in marked
        assert all(cell.text.startswith("~") is rough for cell in row.cells)
    assert ("The machine is busy" in table.note) is bool(marked)
    assert ("1.70 programs want to run on each core" in table.note) is (load == 1.7)
    assert ("changed between 0.250 ns and 0.500 ns" in table.note) is bool(unsteady)


def test_a_cell_knows_how_bad_a_breach_is() -> None:
    law = replace(LAWS[0], level=Level.NICETY)
    report = report_of(["torch"])
    report.laws = [law]
    report.findings[law.name]["torch"] = Finding(Verdict.BROKEN, "0.2")
    ((cell,),) = [row.cells for rows in tables.laws(report).sections.values() for row in rows]
    assert (cell.verdict, cell.level) == (Verdict.BROKEN, Level.NICETY)


def test_axes_of_the_plots_have_no_exponent() -> None:
    for plot in plots.speed(report_of(["ours"], timings_of(["ours"]))):
        assert "<!-- 1 M -->" in plot
        assert "ns -->" in plot
        assert "10^" not in plot
