"""Measure, print what was promised beside what was found, and append to results.csv."""

from __future__ import annotations

import os
import subprocess
import sys
from statistics import median
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks import record
from benchmarks.case import Bound, Result
from benchmarks.cases import cases
from benchmarks.residual import memory
from thinned.compare.figures import duration, significant
from thinned.compare.loading import resolve
from thinned.compare.memory import bytes_saved
from thinned.compare.settings import Settings

# As many threads as any case asks for, whatever the machine has.
os.environ.setdefault("OMP_NUM_THREADS", "2")
# Compile again what an earlier run compiled.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")


def main(
    only: Annotated[str, typer.Option(help="run only cases whose group or setting contains this")] = "",
    save: Annotated[bool, typer.Option(help="append to benchmarks/results.csv")] = True,
) -> None:
    """Time thinned against its peers by turns; print ratios and whether each promise is kept."""
    console = Console(width=None if sys.stdout.isatty() else 130)
    chosen = [case for case in cases() if only in f"{case.group} {case.setting}"]
    results = [case.run() for case in track(chosen, "measuring", console=Console(stderr=True))]
    console.print(_table(results))
    if not only:
        saved = bytes_saved(resolve("thinned"), Settings())
        console.print(f"bytes saved for backward an element: {saved} (promised: 0)")
        for p in (0.1, 0.2, 0.4):
            kept = ", ".join(f"{name} {size:.0f}" for name, size in memory(p).items())
            console.print(f"bytes that 12 blocks of ViT-T save for backward, an element, p = {p}: {kept}")
        console.print(f"import thinned adds {_import_seconds():.3f} s to import torch (promised: under 0.2)")
    if save:
        record.append(row for result in results for row in record.timed(result, record.on_cpu(result.case)))


def _table(results: list[Result]) -> Table:
    table = Table("group", "setting", "threads", "set", "an element costs", "promised", "measured", "kept")
    for result in results:
        case = result.case
        about = (case.group, case.setting, str(case.threads), case.isa)
        spent = ", ".join(f"{name} {duration(result.nanoseconds(name) / 1e9)}" for name in result.seconds)
        if not case.bounds:
            table.add_row(*about, spent)
        for bound in case.bounds:
            table.add_row(*about, spent, str(bound), *_verdict(result, bound))
            about, spent = ("", "", "", ""), ""
    return table


def _verdict(result: Result, bound: Bound) -> tuple[str, str]:
    ratio = result.ratio(bound.subject, bound.other)
    shown = f"{significant(1 / ratio)}x faster" if bound.limit < 1 else f"{significant(ratio)}x"
    return shown, "yes" if ratio <= bound.limit else "no"


def _import_seconds() -> float:
    script = (
        "import time, torch; start = time.perf_counter(); import thinned; print(time.perf_counter() - start)"
    )
    return median(
        float(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
        for _ in range(5)
    )


if __name__ == "__main__":
    torch.manual_seed(0)
    typer.run(main)
