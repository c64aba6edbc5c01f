"""Rows of results.csv: what was measured, where and when."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from datetime import date
from pathlib import Path

from benchmarks.case import Case, Result
from thinned import backends

__all__ = ["FIELDS", "FILE", "append", "on_cpu", "timed"]

FILE = Path(__file__).with_name("results.csv")
FIELDS = (
    "date",
    "machine",
    "python",
    "torch",
    "thinned",
    "group",
    "setting",
    "threads",
    "instruction set",
    "subject",
    "ns an element",
    "thinned takes",
    "triton",
    "peak bytes an element",
)


def append(rows: Iterable[Mapping[str, object]]) -> None:
    """Add rows of some of the fields; date and versions come by themselves."""
    versions = backends.describe()["versions"]
    here = {name: versions[name] for name in ("python", "torch", "thinned")}
    with FILE.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writerows({"date": date.today().isoformat(), **here, **row} for row in rows)


def timed(result: Result, where: Mapping[str, object]) -> Iterator[dict[str, object]]:
    """A row for each subject of a result, with the fields that say where it ran."""
    for subject in result.seconds:
        yield {
            **where,
            "group": result.case.group,
            "setting": result.case.setting,
            "subject": subject,
            "ns an element": f"{result.nanoseconds(subject):.4g}",
            "thinned takes": f"{result.ratio('thinned', subject):.4g}",
        }


def on_cpu(case: Case) -> dict[str, object]:
    """The fields that say where a case ran."""
    about = backends.describe()
    return {
        "machine": f"{about['machine']['processor']}, {about['machine']['cores']} cores",
        "threads": case.threads,
        "instruction set": case.isa or about["native"]["instruction set used"],
    }
