"""What thinned is to reach on a GPU, and whether it did."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from benchmarks.case import Bound, Case, Result

__all__ = [
    "BOTH",
    "FORWARD",
    "GRAPH",
    "LAUNCHES",
    "LAUNCHES_BOTH",
    "MASK",
    "TARGETS",
    "Target",
    "Verdict",
    "mask_saved",
    "verdict",
]

FORWARD, BOTH = "forward", "forward + backward"
GRAPH = "forward, CUDA graph"
LAUNCHES, LAUNCHES_BOTH = "forward, host clock", "forward + backward, host clock"


@dataclass(frozen=True)
class Target:
    """``bound`` holds in each case of some groups, or in those of large tensors."""

    words: str
    bound: Bound
    groups: tuple[str, ...]
    large_only: bool = False

    def concerns(self, case: Case, large: int) -> bool:
        """Whether the case is one of those, where tensors of ``large`` elements and more are large."""
        return case.group in self.groups and not (self.large_only and case.elements < large)


@dataclass(frozen=True)
class Verdict:
    """How many times as fast as the other the subject was where it did worst."""

    speed: float
    worst: Case
    is_met: bool


INDUCTOR = "compiled nn.Dropout"
TARGETS = (
    Target("0.90 of a copy's bandwidth, in a CUDA graph", Bound("copy", 1 / 0.9), (GRAPH,), large_only=True),
    Target("0.90 of a copy's bandwidth, eager", Bound("copy", 1 / 0.9), (FORWARD,), large_only=True),
    Target(
        "1.2x faster than nn.Dropout with backward", Bound("nn.Dropout", 1 / 1.2), (BOTH,), large_only=True
    ),
    Target("never behind nn.Dropout", Bound("nn.Dropout", 1), (FORWARD, BOTH, GRAPH)),
    Target("never behind nn.Dropout, launches counted", Bound("nn.Dropout", 1), (LAUNCHES, LAUNCHES_BOTH)),
    Target("never slower than Inductor's", Bound(INDUCTOR, 1), (FORWARD, BOTH)),
    Target("compiled, never slower than Inductor's", Bound(INDUCTOR, 1, "compiled thinned"), (FORWARD, BOTH)),
)
MASK = "peak memory below nn.Dropout's by its mask"


def verdict(target: Target, results: Iterable[Result], large: int) -> Verdict | None:
    """The case in which the subject did worst; None if none was measured."""
    subject, other = target.bound.subject, target.bound.other
    ratios = [
        (result.ratio(subject, other), result.case)
        for result in results
        if target.concerns(result.case, large) and {subject, other} <= result.seconds.keys()
    ]
    if not ratios:
        return None
    ratio, worst = max(ratios, key=lambda pair: pair[0])
    return Verdict(1 / ratio, worst, ratio <= target.bound.limit)


def mask_saved(peaks: Mapping[str, float]) -> tuple[float, bool]:
    """Bytes an element that ``nn.Dropout`` needs and thinned does not, and whether they are the bool mask's.

    The allocator gives pieces of 512 bytes, a few millionths of a byte an element of a large tensor.
    """
    saved = peaks["nn.Dropout"] - peaks["thinned"]
    return saved, saved > 0.999
