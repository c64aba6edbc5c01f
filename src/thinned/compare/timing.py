"""Nanoseconds an element of dropout, beside a plain multiply of the same tensor."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import TypeAlias

import torch
from torch import Tensor

from thinned.compare.implementation import Implementation
from thinned.compare.settings import Settings

__all__ = [
    "MULTIPLY",
    "Clock",
    "Timing",
    "beside",
    "by_turns",
    "host_clock",
    "load",
    "middle_half",
    "planned",
    "time_all",
]

Clock: TypeAlias = Callable[[Callable[[], object], int], float]  # seconds a call of so many calls

MULTIPLY = "x * 2"
DIRECTIONS = ("forward", "forward + backward")
SIZES = (4_000, 100_000, 1_000_000, 32_000_000)
QUICK_SIZES = SIZES[:3]
SAMPLE_SECONDS = 2e-3  # a sample repeats a short call for as long, so that the clock's own cost vanishes
STEADY = 1.25  # third quartile of rounds over the first: 1.1 alone, 2 to 10 beside six programs on two cores
ROUNDS = {4_000: 25, 100_000: 15, 1_000_000: 9, 32_000_000: 3}


@dataclass(frozen=True)
class Timing:
    """One implementation, size and direction, beside a reference that ran in the same rounds.

    A machine that slows down for a while slows both, so the ratio is what a comparison is about. The time
    follows from it: whoever divides two times gets their ratio.

    Attributes:
        direction: ``forward``, or with backward.
        ratio: the median, over rounds, of the time over the reference's in the same round.
        ratio_quartiles: the middle half of these ratios.
        nanoseconds: for an element: ``ratio`` times the reference's median over rounds.
        quartiles: the middle half of rounds, in nanoseconds an element as the clock gave them.
    """

    subject: str
    reference: str
    elements: int
    direction: str
    nanoseconds: float
    ratio: float
    ratio_quartiles: tuple[float, float]
    quartiles: tuple[float, float]

    @property
    def is_steady(self) -> bool:
        """Whether nothing else seems to have run: rounds of the same work took about the same time."""
        low, high = self.quartiles
        return high <= STEADY * low


def beside(
    seconds: Mapping[str, Sequence[float]], reference: str, elements: int, direction: str
) -> list[Timing]:
    """Timings from what :func:`by_turns` gives, each as a ratio to ``reference``."""
    base = seconds[reference]
    timings = []
    for subject, samples in seconds.items():
        ratios = [own / other for own, other in zip(samples, base, strict=True)]
        timings.append(
            Timing(
                subject,
                reference,
                elements,
                direction,
                nanoseconds=median(ratios) * median(base) / elements * 1e9,
                ratio=median(ratios),
                ratio_quartiles=middle_half(ratios),
                quartiles=middle_half([sample / elements * 1e9 for sample in samples]),
            )
        )
    return timings


def middle_half(values: Sequence[float]) -> tuple[float, float]:
    """The first and third quartile.

    >>> middle_half([5.0, 1.0, 4.0, 2.0, 3.0])
    (2.0, 4.0)
    """
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def load() -> float | None:
    """How many programs want to run at once, for each core; None where the system does not say."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None


def planned(settings: Settings) -> list[tuple[int, str]]:
    """The sizes and directions that are timed, in turn."""
    sizes = QUICK_SIZES if settings.quick else SIZES
    return [(elements, direction) for elements in sizes for direction in DIRECTIONS]


def time_all(
    implementations: Sequence[Implementation], settings: Settings, elements: int, direction: str
) -> list[Timing]:
    """Time every implementation and the multiply by turns; one that raises is left out."""
    work = {MULTIPLY: _work(lambda x: x * 2, settings, elements, direction)}
    for each in implementations:
        try:
            work[each.name] = _work(each.make(p=settings.p), settings, elements, direction)
        except Exception:  # the table of laws says what a layer cannot do
            continue
    seconds = by_turns(work, ROUNDS[elements], host_clock(settings.device))
    return beside(seconds, MULTIPLY, elements, direction)


def _work(
    layer: Callable[[Tensor], Tensor], settings: Settings, elements: int, direction: str
) -> Callable[[], object]:
    """The call to time, tried once."""
    x = settings.ones(elements)
    if direction == "forward":
        layer(x)
        return lambda: layer(x)
    x.requires_grad_()
    upstream = torch.ones_like(layer(x))

    def forward_backward() -> object:
        return torch.autograd.grad(layer(x), x, upstream)

    forward_backward()
    return forward_backward


def by_turns(work: Mapping[str, Callable[[], object]], rounds: int, clock: Clock) -> dict[str, list[float]]:
    """Seconds a call of each piece of work, one sample a round, all by turns within a round."""
    repeats = {name: _repeats(call, clock) for name, call in work.items()}
    samples: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            samples[name].append(clock(call, repeats[name]))
    return samples


def _repeats(call: Callable[[], object], clock: Clock) -> int:
    first = clock(call, 1)
    warm = clock(call, max(1, int(SAMPLE_SECONDS / 4 / first)))
    return max(1, math.ceil(SAMPLE_SECONDS / warm))


def host_clock(device: str) -> Clock:
    """The host's clock, from an idle device to an idle device."""
    return partial(_seconds, device)


def _seconds(device: str, call: Callable[[], object], repeats: int) -> float:
    _finish(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _finish(device)
    return (time.perf_counter() - start) / repeats


def _finish(device: str) -> None:
    """Wait for work that a device has only queued."""
    if torch.device(device).type != "cpu":
        torch.accelerator.synchronize()
