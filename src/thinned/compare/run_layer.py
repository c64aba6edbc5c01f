"""One layer of the catalogue beside its peer: its laws, and what a call costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from thinned.compare import tables
from thinned.compare.layers import Entry, Implementation, first
from thinned.compare.report import Report
from thinned.compare.run import examine_all
from thinned.compare.settings import Settings
from thinned.compare.tables import Cell, Row, Table
from thinned.compare.terminal import Terminal
from thinned.compare.timing import by_turns

__all__ = ["BROADCAST", "calls", "run_layer"]

BROADCAST = "x * mask"
ROUNDS = 15


def run_layer(
    entry: Entry, others: Sequence[Implementation], settings: Settings, terminal: Terminal
) -> Report:
    """Hold thinned's layer, its peer and whatever else takes the same arguments to the layer's laws."""
    start = time.perf_counter()
    implementations = [entry.own, entry.peer, *others]
    names = [each.name for each in implementations]
    report = Report(names, settings, entry.laws, f"{entry.name}, mask {entry.mask}; {entry.source}")
    examine_all(report, implementations, terminal)
    terminal.show(tables.laws(report), with_notes=True)
    terminal.show(_speed(entry, implementations, settings))
    report.seconds = time.perf_counter() - start
    terminal.show_verdicts(report)
    return report


def calls(
    entry: Entry, implementations: Sequence[Implementation], *, broadcast: bool = False
) -> dict[str, Callable[[], object]]:
    """A call of each on the entry's workload, and the multiply that a mask of its shape costs at least."""
    inputs = entry.workload.inputs()
    work: dict[str, Callable[[], object]] = {}
    if broadcast and entry.workload.broadcast is not None:
        x, mask = inputs[0], torch.ones(entry.workload.broadcast, dtype=inputs[0].dtype)
        work[BROADCAST] = lambda: x * mask
    for each in implementations:
        work[each.name] = _call(each.make(**entry.workload.arguments), inputs)
    return work


def _call(layer: Callable[..., object], inputs: Sequence[torch.Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(*inputs)

    return call


def _speed(entry: Entry, implementations: Sequence[Implementation], settings: Settings) -> Table:
    work = calls(entry, [each for each in implementations if _runs(entry, each)], broadcast=True)
    seconds = by_turns(work, ROUNDS, settings.device)
    own = seconds[entry.own.name]
    cells = {
        name: f"{median(each) * 1e6:.3g} μs"
        + (
            ""
            if name == entry.own.name
            else f" ({median(a / b for a, b in zip(each, own, strict=True)):.3g}x)"
        )
        for name, each in seconds.items()
    }
    elements = sum(x.numel() for x in entry.workload.inputs())
    row = Row(f"{elements:,} elements", [Cell(text) for text in cells.values()])
    return Table("A call, and in brackets how many times thinned's", list(cells), {"": [row]})


def _runs(entry: Entry, implementation: Implementation) -> bool:
    try:
        first(_call(implementation.make(**entry.workload.arguments), entry.workload.inputs())())
    except Exception:  # the table of laws says what a layer cannot do
        return False
    return True
