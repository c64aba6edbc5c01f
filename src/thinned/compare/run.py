"""The parts of a comparison in turn, each shown as soon as it is there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from thinned.compare import tables, timing, training
from thinned.compare.errors import one_line
from thinned.compare.laws import LAWS, examine
from thinned.compare.memory import bytes_saved
from thinned.compare.report import Report, Sample
from thinned.compare.settings import Settings
from thinned.compare.subjects import Subject
from thinned.compare.terminal import Terminal

__all__ = ["examine_all", "run"]

PICTURE = (64, 64)


class Named(Protocol):
    """Whatever is examined under a name."""

    @property
    def name(self) -> str: ...


def run(subjects: Sequence[Subject], settings: Settings, terminal: Terminal) -> Report:
    """Compare implementations; what one of them raises becomes part of the report."""
    start = time.perf_counter()
    report = Report([subject.name for subject in subjects], settings, LAWS)

    report.tutorial = {subject.name: _tutorial(subject, settings) for subject in subjects}
    terminal.show(tables.tutorial(report))

    examine_all(report, subjects, terminal)
    report.masks = {s.name: mask for s in subjects if (mask := _mask(s, settings)) is not None}
    terminal.show(tables.laws(report))

    plan = timing.planned(settings)
    with terminal.progress("speed", len(plan)) as tick:
        for elements, direction in plan:
            tick(f"{elements:,} elements, {direction}")
            report.timings += timing.time_all(subjects, settings, elements, direction)
    report.bytes_saved = {subject.name: bytes_saved(subject, settings) for subject in subjects}
    terminal.show(tables.speed(report))

    if not settings.quick:
        with terminal.progress("training", training.EPOCHS) as tick:
            report.training = training.train_all(subjects, settings, tick)
        terminal.show(tables.training_runs(report))

    report.seconds = time.perf_counter() - start
    terminal.show_verdicts(report)
    return report


def examine_all(report: Report, subjects: Sequence[Named], terminal: Terminal) -> None:
    """Fill the report's findings."""
    with terminal.progress("laws", len(report.laws) * len(subjects)) as tick:
        for law in report.laws:
            report.findings[law.name] = {}
            for subject in subjects:
                tick(f"{law.name}, {subject.name}")
                report.findings[law.name][subject.name] = examine(law, subject, report.settings)


def _tutorial(subject: Subject, settings: Settings) -> Sample | str:
    torch.manual_seed(settings.seed)
    try:
        y = subject.make(0.5)(torch.ones(1000, 100, device=settings.device))
        return Sample(float(y.mean()), float(y.std()))
    except Exception as error:
        return one_line(error)


def _mask(subject: Subject, settings: Settings) -> Tensor | None:
    torch.manual_seed(settings.seed)
    try:
        mask: Tensor = subject.make(settings.p)(settings.ones(*PICTURE)) != 0
    except Exception:  # the table of laws says what a layer cannot do
        return None
    return mask.cpu()
