"""The report for a person: tables on standard output, a progress bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from thinned.compare.laws import Verdict
from thinned.compare.report import Report
from thinned.compare.tables import Table

__all__ = ["Terminal"]

WIDTH_OF_A_FILE = 100
STYLES = {
    Verdict.HOLDS: "green",
    Verdict.BROKEN: "bold red",
    Verdict.CRASHED: "bold red",
    Verdict.NOT_OFFERED: "dim",
    None: "",
}


class Terminal:
    """Two consoles: ``output`` for what was found, ``errors`` for how far it is."""

    def __init__(self, output: Console | None = None, errors: Console | None = None) -> None:
        self.output = output or Console(width=None if sys.stdout.isatty() else WIDTH_OF_A_FILE)
        self.errors = errors or Console(stderr=True)

    @contextmanager
    def progress(self, part: str, steps: int) -> Iterator[Callable[[str], None]]:
        """A bar for one part; call what it yields with a few words as each step begins."""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        step_column, silent = TextColumn("{task.fields[step]}"), not self.errors.is_terminal
        with Progress(*columns, step_column, console=self.errors, transient=True, disable=silent) as bar:
            task = bar.add_task(part, total=steps, step="")
            yield lambda step: bar.update(task, advance=1, step=step)

    def show(self, table: Table, with_notes: bool = False) -> None:
        rich_table = RichTable()
        rich_table.add_column("", no_wrap=True)
        for heading in table.columns:
            rich_table.add_column(heading, overflow="fold")
        if with_notes:
            rich_table.add_column("what has to hold", style="dim")
        for rows in table.sections.values():
            rich_table.add_section()
            for row in rows:
                cells = [Text(cell.text, STYLES[cell.verdict]) for cell in row.cells]
                rich_table.add_row(row.heading, *cells, *([row.note] if with_notes else []))
        self.output.print(Text(table.title, "bold"))
        self.output.print(rich_table)
        self.output.print()

    def show_verdicts(self, report: Report) -> None:
        for name in report.names:
            style = STYLES[Verdict.BROKEN if report.fails(name) else Verdict.HOLDS]
            self.output.print(Text(f"{name}: {report.verdict(name)}", style))
