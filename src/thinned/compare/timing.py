"""Nanoseconds an element of dropout, beside a plain multiply of the same tensor."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from thinned.compare.implementation import Implementation
from thinned.compare.settings import Settings

__all__ = ["MULTIPLY", "Timing", "by_turns", "planned", "time_all"]

MULTIPLY = "x * 2"
DIRECTIONS = ("forward", "forward + backward")
SIZES = (4_000, 100_000, 1_000_000, 32_000_000)
QUICK_SIZES = SIZES[:3]
SAMPLE_SECONDS = 2e-3  # a sample repeats a short call for as long, so that the clock's own cost vanishes
ROUNDS = {4_000: 25, 100_000: 15, 1_000_000: 9, 32_000_000: 3}


@dataclass(frozen=True)
class Timing:
    """One implementation, size and direction.

    ``ratio`` is the median, over rounds, of its time over that of the multiply in the same round: a machine
    that slows down for a while slows both.
    """

    subject: str
    elements: int
    direction: str
    nanoseconds: float
    ratio: float


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
    seconds = by_turns(work, ROUNDS[elements], settings.device)
    return [
        Timing(
            name,
            elements,
            direction,
            nanoseconds=median(samples) / elements * 1e9,
            ratio=median(own / base for own, base in zip(samples, seconds[MULTIPLY], strict=True)),
        )
        for name, samples in seconds.items()
    ]


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


def by_turns(work: Mapping[str, Callable[[], object]], rounds: int, device: str) -> dict[str, list[float]]:
    """Seconds a call of each piece of work, one sample a round, all by turns within a round."""
    repeats = {name: _repeats(call, device) for name, call in work.items()}
    samples: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, call in work.items():
            samples[name].append(_seconds(call, repeats[name], device))
    return samples


def _repeats(call: Callable[[], object], device: str) -> int:
    first = _seconds(call, 1, device)
    warm = _seconds(call, max(1, int(SAMPLE_SECONDS / 4 / first)), device)
    return max(1, math.ceil(SAMPLE_SECONDS / warm))


def _seconds(call: Callable[[], object], repeats: int, device: str) -> float:
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
