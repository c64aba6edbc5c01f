"""One measurement: what runs by turns in it, and what is promised of the ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from statistics import median

import torch

from thinned.backends import native
from thinned.compare.timing import Clock, by_turns, host_clock

__all__ = ["MULTIPLY", "Bound", "Case", "Result"]

MULTIPLY = "x * 2"

Work = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Bound:
    """``subject`` takes at most ``limit`` times what ``other`` takes."""

    other: str
    limit: float
    subject: str = "thinned"

    def __str__(self) -> str:
        if self.limit < 1:
            return f"{1 / self.limit:.3g}x faster than {self.other}"
        return f"at most {self.limit:.3g}x of {self.other}"


@dataclass(frozen=True)
class Case:
    """A group, a setting in words, and how to make the calls that are timed by turns."""

    group: str
    setting: str
    make: Callable[[], Work]
    bounds: tuple[Bound, ...]
    threads: int = 1
    isa: str = ""
    rounds: int = 15
    elements: int = 1
    clock: Clock = field(default_factory=lambda: host_clock("cpu"))

    def run(self) -> Result:
        with _threads(self.threads), native.instruction_set(self.isa) if self.isa else nullcontext():
            seconds = by_turns(self.make(), self.rounds, self.clock)
        return Result(self, seconds)


@dataclass(frozen=True)
class Result:
    """Seconds a call, one sample a round, for each of a case's subjects."""

    case: Case
    seconds: Mapping[str, list[float]]

    def nanoseconds(self, subject: str) -> float:
        """The median, an element."""
        return median(self.seconds[subject]) / self.case.elements * 1e9

    def ratio(self, subject: str, other: str) -> float:
        """The median over rounds: a machine that slows down for a while slows both."""
        return median(a / b for a, b in zip(self.seconds[subject], self.seconds[other], strict=True))


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
