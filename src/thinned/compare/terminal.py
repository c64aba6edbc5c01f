"""The report for a person: tables on standard output, a progress bar on standard error."""

from __future__ import annotations

import math
import os
import re
import sys
import textwrap
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from thinned.compare.laws import Level, Verdict
from thinned.compare.report import Report
from thinned.compare.tables import Cell, Table
from thinned.progress import progress_bar

__all__ = ["Terminal"]

WIDTH_OF_A_FILE = 100  # where neither COLUMNS nor a terminal says how wide lines may be
COMFORTABLE, NOTES = 12, 40  # characters: a column with more text is never narrower; the notes need so many
INDENT = "      "
BORDERS = 3  # characters of a table for each column, and one more
UNBROKEN = re.compile(r"[✓✗–] | (?=(ns|μs|ms|s)\b)|\bp = |± |\((?:[A-Z]|1, )[^()]{,20}\)")

# Readable on light and on dark paper, which yellow, cyan and blue are not.
LEVELS = {Level.WRONG: "bold red", Level.UNLIKE_TORCH: "bold magenta", Level.NICETY: ""}
STYLES = {Verdict.HOLDS: "green", Verdict.NOT_OFFERED: "dim"}


@dataclass(frozen=True)
class Column:
    """A column on its way to paper: its texts, of which the first is the heading."""

    texts: list[str]
    style: str = ""

    @property
    def widest(self) -> int:
        return max(len(part) for text in self.texts for part in text.split("\n"))

    @property
    def narrowest(self) -> int:
        words = max(len(word) for text in self.texts for word in _words(text))
        return max(words, min(self.widest, COMFORTABLE))


class Terminal:
    """Two consoles: ``output`` for what was found, ``errors`` for how far it is."""

    def __init__(self, output: Console | None = None, errors: Console | None = None) -> None:
        self.output = output or Console(width=_width(), highlight=False)
        self.errors = errors or Console(stderr=True)

    def progress(self, part: str, steps: int) -> AbstractContextManager[Callable[[str], None]]:
        """A bar for one part; call what it yields with a few words as each step begins."""
        return progress_bar(part, steps, self.errors)

    def say(self, text: str, label: str = "", style: str = "", first: str = "", others: str = "") -> None:
        """A label in a style, and text; lines begin with ``first``, from the second on with ``others``."""
        styled = len(first + label)
        for paragraph in (first + label + text).split("\n"):
            for line in textwrap.wrap(
                paragraph,
                max(self.output.width, 20),
                subsequent_indent=others,
                break_long_words=False,
                break_on_hyphens=False,
            ):
                shown = Text(line)
                shown.stylize(style, 0, max(0, styled))
                self.output.print(shown, soft_wrap=True)
                styled -= len(line) - len(others) + 1

    def show(self, table: Table, with_notes: bool = False) -> None:
        """The table; as several, each with some of the columns, where all are wider than the terminal."""
        self.say("", table.title, "bold")
        rows = [row for rows in table.sections.values() for row in rows]
        heading = Column(["", *(row.heading for row in rows)])
        columns = [
            Column([title, *(row.cells[i].text for row in rows)]) for i, title in enumerate(table.columns)
        ]
        groups = self._groups(heading, columns)
        notes = Column(["what has to hold", *(row.note for row in rows)], "dim") if with_notes else None
        for group in groups:
            shown = [heading, *(columns[i] for i in group)]
            room = self.output.width - 1 - sum(BORDERS + column.narrowest for column in shown)
            if notes and room >= BORDERS + NOTES:
                shown.append(notes)
            self.output.print(self._rich(table, shown, group))
        if table.note:
            self.say(table.note)
        self.output.print()

    def _groups(self, heading: Column, columns: list[Column]) -> list[list[int]]:
        """The columns of each table: as few tables as there is room for, of about equally many columns."""
        tables = len(self._fitting(heading, columns, len(columns)))
        return self._fitting(heading, columns, math.ceil(len(columns) / tables))

    def _fitting(self, heading: Column, columns: list[Column], at_most: int) -> list[list[int]]:
        room = self.output.width - 1 - BORDERS - heading.narrowest
        groups: list[list[int]] = [[]]
        for i in range(len(columns)):
            together = sum(BORDERS + columns[j].narrowest for j in (*groups[-1], i))
            if groups[-1] and (together > room or len(groups[-1]) == at_most):
                groups.append([])
            groups[-1].append(i)
        return groups

    def _rich(self, table: Table, shown: list[Column], group: list[int]) -> RichTable:
        widths = self._widths(shown)
        rich_table = RichTable()
        for column, width in zip(shown, widths, strict=True):
            heading = "\n".join(_lines(column.texts[0], width))
            rich_table.add_column(heading, width=width, style=column.style, overflow="fold")
        for rows in table.sections.values():
            rich_table.add_section()
            for row in rows:
                cells = [Cell(row.heading), *(row.cells[i] for i in group), Cell(row.note)]
                rich_table.add_row(
                    *(
                        Text("\n".join(_lines(cell.text, width)), _style(cell))
                        for cell, width in zip(cells, widths, strict=False)
                    )
                )
        return rich_table

    def _widths(self, columns: list[Column]) -> list[int]:
        """As wide as the content, if that fits; else the names come first, then the most crowded column."""
        room = self.output.width - 1 - BORDERS * len(columns)
        widths = [column.narrowest for column in columns]
        widths[0] += max(0, min(columns[0].widest - widths[0], room - sum(widths)))
        while sum(widths) < room:
            crowded = max(range(len(columns)), key=lambda i: columns[i].widest / widths[i])
            if columns[crowded].widest <= widths[crowded]:
                break
            widths[crowded] += 1
        return widths

    def show_verdicts(self, report: Report) -> None:
        """A verdict for each, and under it what each broken law says and why it matters, the worst first."""
        for name in report.names:
            broken = [
                (law, report.findings[law.name][name])
                for laws in report.broken(name).values()
                for law in laws
            ]
            style = LEVELS[broken[0][0].level] if broken else STYLES[Verdict.HOLDS]
            self.say(f" {report.verdict(name)}", f"{name}:", style)
            for law, finding in broken:
                crashed = "crashed: " if finding.verdict is Verdict.CRASHED else ""
                label = f"{law.level.value}:"
                self.say(f" {law.name}: {law.statement}", label, LEVELS[law.level], "  ", INDENT)
                self.say(f"found: {crashed}{finding.measured}", first="    ", others=INDENT)
                self.say(f"why: {law.why}", first="    ", others=INDENT)
            if broken:
                self.output.print()
        if any(map(report.breaches, report.names)):
            self.say("`thinned compare --explain LAW` says how a law is measured, and what breaks it.")

    def explain(self, laws: Mapping[str, Mapping[str, str]]) -> None:
        """What :func:`thinned.compare.explain.explain` says."""
        for title, paragraphs in laws.items():
            self.say("", title, "bold")
            for heading, text in paragraphs.items():
                self.say(f"{heading}: {text}", first="  ", others=INDENT)
            self.output.print()
        self.say(
            "Where chance decides, a bound is such that a right layer breaks the law once in 10 million runs."
        )


def _width() -> int | None:
    """The console's own choice, where it has anything to go by."""
    if os.environ.get("COLUMNS", "").strip("0").isdigit():
        return None
    streams = (sys.stdin, sys.stdout, sys.stderr)
    return None if any(stream and stream.isatty() for stream in streams) else WIDTH_OF_A_FILE


def _style(cell: Cell) -> str:
    if cell.verdict and cell.verdict.is_breach:
        return LEVELS[cell.level or Level.WRONG]
    return STYLES.get(cell.verdict, "") if cell.verdict else ""


def _unbroken(text: str) -> str:
    """With a no-break space where a line must not end: behind a mark, before a unit, in brackets."""
    return UNBROKEN.sub(lambda found: found[0].replace(" ", "\xa0"), text)


def _words(text: str) -> list[str]:
    return re.split(r"[ \n]", _unbroken(text))


def _lines(text: str, width: int) -> list[str]:
    lines = (textwrap.wrap(line, width, break_on_hyphens=False) for line in _unbroken(text).split("\n"))
    return [line.replace("\xa0", " ") for wrapped in lines for line in wrapped]
