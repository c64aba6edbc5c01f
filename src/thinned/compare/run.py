"""A comparison of Dropout, or of another layer: its parts in turn, each shown as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from thinned.compare import tables, timing, training
from thinned.compare.errors import one_line
from thinned.compare.implementation import Implementation
from thinned.compare.laws import examine
from thinned.compare.layers import Entry, entry_of
from thinned.compare.memory import bytes_saved
from thinned.compare.project import Policy
from thinned.compare.report import Report, Sample
from thinned.compare.settings import Settings
from thinned.compare.terminal import Terminal
from thinned.compare.timing import Timing

__all__ = ["BROADCAST", "calls", "run", "run_layer"]

EVERYTHING = Policy()
PICTURE = (64, 64)
BROADCAST = "x * mask"
ROUNDS, QUICK_ROUNDS = 15, 5


def run(
    implementations: Sequence[Implementation],
    settings: Settings,
    terminal: Terminal,
    policy: Policy = EVERYTHING,
) -> Report:
    """Compare implementations; what one of them raises becomes part of the report.

    Where the policy names laws in ``only``, no other part runs.
    """
    start = time.perf_counter()
    laws = policy.chosen(entry_of("Dropout").laws)
    report = Report([each.name for each in implementations], settings, laws, policy=policy)

    if not policy.only:
        report.tutorial = {each.name: _tutorial(each, settings) for each in implementations}
        terminal.show(tables.tutorial(report))

    _examine_all(report, implementations, terminal)
    report.masks = {
        each.name: mask for each in implementations if (mask := _mask(each, settings)) is not None
    }
    terminal.show(tables.laws(report))
    if not policy.only:
        _time_and_train(report, implementations, terminal)

    report.seconds = time.perf_counter() - start
    terminal.show_verdicts(report)
    return report


def _time_and_train(report: Report, implementations: Sequence[Implementation], terminal: Terminal) -> None:
    settings = report.settings
    plan = timing.planned(settings)
    with terminal.progress("speed", len(plan)) as tick:
        for elements, direction in plan:
            tick(f"{elements:,} elements, {direction}")
            report.timings += timing.time_all(implementations, settings, elements, direction)
    report.bytes_saved = {each.name: bytes_saved(each, settings) for each in implementations}
    terminal.show(tables.speed(report))

    if not settings.quick:
        with terminal.progress("training", training.EPOCHS) as tick:
            report.training = training.train_all(implementations, settings, tick)
        terminal.show(tables.training_runs(report))


def run_layer(
    entry: Entry,
    others: Sequence[Implementation],
    settings: Settings,
    terminal: Terminal,
    policy: Policy = EVERYTHING,
) -> Report:
    """Hold thinned's layer, its peer and whatever else takes the same arguments to the layer's laws."""
    start = time.perf_counter()
    implementations = list(dict.fromkeys([entry.own, entry.peer, *others]))
    names = [each.name for each in implementations]
    subject = f"{entry.name}, mask {entry.mask}; {entry.source}"
    report = Report(names, settings, policy.chosen(entry.laws), subject, policy)
    _examine_all(report, implementations, terminal)
    terminal.show(tables.laws(report), with_notes=True)
    if not policy.only:
        report.timings = _speed(entry, implementations, settings)
        terminal.show(tables.call_speed(report))
    report.seconds = time.perf_counter() - start
    terminal.show_verdicts(report)
    return report


def _examine_all(report: Report, implementations: Sequence[Implementation], terminal: Terminal) -> None:
    """Fill the report's findings."""
    with terminal.progress("laws", len(report.laws) * len(implementations)) as tick:
        for law in report.laws:
            report.findings[law.name] = {}
            for each in implementations:
                tick(f"{law.name}, {each.name}")
                report.findings[law.name][each.name] = examine(law, each, report.settings)


def calls(
    entry: Entry, implementations: Sequence[Implementation], *, broadcast: bool = False, device: str = "cpu"
) -> dict[str, Callable[[], object]]:
    """A call of each on the entry's workload, and the multiply that a mask of its shape costs at least."""
    inputs = _inputs(entry, device)
    work: dict[str, Callable[[], object]] = {}
    if broadcast and entry.broadcast is not None:
        x, mask = inputs[0], inputs[0].new_ones(entry.broadcast)
        work[BROADCAST] = lambda: x * mask
    for each in implementations:
        work[each.name] = _call(each.make(**entry.workload.arguments).to(device), inputs)
    return work


def _inputs(entry: Entry, device: str) -> tuple[Tensor, ...]:
    return tuple(x.to(device) for x in entry.workload.inputs())


def _call(layer: Callable[..., object], inputs: Sequence[Tensor]) -> Callable[[], object]:
    def call() -> object:
        with torch.no_grad():
            return layer(*inputs)

    return call


def _speed(entry: Entry, implementations: Sequence[Implementation], settings: Settings) -> list[Timing]:
    run = [each for each in implementations if _runs(entry, each, settings.device)]
    work = calls(entry, run, broadcast=True, device=settings.device)
    rounds = QUICK_ROUNDS if settings.quick else ROUNDS
    seconds = timing.by_turns(work, rounds, timing.host_clock(settings.device))
    return timing.beside(seconds, entry.own.name, entry.workload.elements, "forward")


def _runs(entry: Entry, implementation: Implementation, device: str) -> bool:
    try:
        _call(implementation.make(**entry.workload.arguments).to(device), _inputs(entry, device))()
    except Exception:  # the table of laws says what a layer cannot do
        return False
    return True


def _tutorial(implementation: Implementation, settings: Settings) -> Sample | str:
    torch.manual_seed(settings.seed)
    try:
        y = implementation.make(p=0.5)(torch.ones(1000, 100, device=settings.device))
        return Sample(float(y.mean()), float(y.std()))
    except Exception as error:
        return one_line(error)


def _mask(implementation: Implementation, settings: Settings) -> Tensor | None:
    torch.manual_seed(settings.seed)
    try:
        mask: Tensor = implementation.make(p=settings.p)(settings.ones(*PICTURE)) != 0
    except Exception:  # the table of laws says what a layer cannot do
        return None
    return mask.cpu()
