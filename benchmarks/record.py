"""Rows of results.csv: what was measured, where and when."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from datetime import date
from pathlib import Path

from benchmarks.case import Result
from thinned import backends

__all__ = ["append"]

FILE = Path(__file__).with_name("results.csv")


def append(results: Iterable[Result]) -> None:
    """Add a row for each subject of each result."""
    rows = [row for result in results for row in _rows(result)]
    new = not FILE.exists()
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _rows(result: Result) -> Iterable[dict[str, object]]:
    about = backends.describe()
    case = result.case
    for subject in result.seconds:
        yield {
            "date": date.today().isoformat(),
            "machine": f"{about['machine']['processor']}, {about['machine']['cores']} cores",
            "python": about["versions"]["python"],
            "torch": about["versions"]["torch"],
            "thinned": about["versions"]["thinned"],
            "group": case.group,
            "setting": case.setting,
            "threads": case.threads,
            "instruction set": case.isa or about["native"]["instruction set used"],
            "subject": subject,
            "ns an element": f"{result.nanoseconds(subject):.4g}",
            "thinned takes": f"{result.ratio('thinned', subject):.4g}",
        }
