"""A progress bar on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["progress_bar"]


@contextmanager
def progress_bar(
    part: str, steps: int | None, console: Console | None = None
) -> Iterator[Callable[[str], None]]:
    """A bar for one part, which vanishes at its end; call what it yields with a few words for each step.

    It shows on a terminal and in a notebook, and is silent elsewhere. ``steps`` is None if their number is
    unknown.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError as error:
        raise ImportError("a progress bar needs rich: pip install 'thinned[uncertainty]'") from error
    console = console or Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    step_column, silent = TextColumn("{task.fields[step]}"), not (console.is_terminal or console.is_jupyter)
    with Progress(*columns, step_column, console=console, transient=True, disable=silent) as bar:
        task = bar.add_task(part, total=steps, step="")
        yield lambda step: bar.update(task, advance=1, step=step)
