"""A law, the examination of an implementation by it, and the finding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

import torch

from thinned.compare.errors import one_line
from thinned.compare.implementation import Case, Implementation, NotOfferedError
from thinned.compare.settings import Settings

__all__ = [
    "P_FOR_EQUALITY",
    "Finding",
    "Law",
    "Level",
    "Verdict",
    "examine",
    "has_mask",
    "holds_if",
    "is_random",
    "nothing_wrong",
    "takes_any_shape",
]

P_FOR_EQUALITY = 0.5  # two independent masks of 1,000 elements agree with probability 2**-1000


class Verdict(str, Enum):
    """How an implementation stands to a law; a crash counts against it, a missing feature does not."""

    HOLDS = "holds"
    BROKEN = "broken"
    CRASHED = "crashed"
    NOT_OFFERED = "not offered"

    @property
    def is_breach(self) -> bool:
        return self in (Verdict.BROKEN, Verdict.CRASHED)


class Level(str, Enum):
    """How bad a broken law is, the worst first."""

    WRONG = "wrong"
    UNLIKE_TORCH = "unlike torch"
    NICETY = "nicety"

    def includes(self, other: Level) -> bool:
        """Whether ``other`` is at least as bad.

        >>> [Level.UNLIKE_TORCH.includes(level) for level in Level]
        [True, True, False]
        """
        order = list(Level)
        return order.index(other) <= order.index(self)


@dataclass(frozen=True)
class Finding:
    """One cell of the table: what was measured, in a few words, and the figures behind it."""

    verdict: Verdict
    measured: str
    figures: dict[str, float] = field(default_factory=dict)


def has_mask(case: Case) -> bool:
    return case.masked is not None


def takes_any_shape(case: Case) -> bool:
    return case.takes_any_shape


def is_random(case: Case) -> bool:
    return case.example.is_random


@dataclass(frozen=True)
class Law:
    """One law: ``name`` heads a row, ``statement`` says in a line what has to hold.

    Attributes:
        check: measures an implementation, from the settings' seed.
        applies: whether it is a law of thinned's own layer.
        level: ``wrong``, if a layer that breaks the law is no dropout or trains another network than it
            says; ``unlike torch``, if it is one that PyTorch's users would stumble over; ``nicety``, if it
            could be better.
        why: what goes wrong for a user of a layer that breaks the law, in a line.
        case: thinned's own layer, in the place of which an implementation is examined.
    """

    family: str
    name: str
    statement: str
    check: Callable[[Case, Settings], Finding]
    applies: Callable[[Case], bool] = field(default=lambda _: True)
    level: Level = Level.WRONG
    why: str = field(kw_only=True)
    case: Case | None = None


def holds_if(condition: bool, measured: str, **figures: float) -> Finding:
    return Finding(Verdict.HOLDS if condition else Verdict.BROKEN, measured, figures)


def nothing_wrong(complaint: str | None, measured: str) -> Finding:
    """Holds, with ``measured``, where there is no complaint; broken, with the complaint, where there is."""
    return holds_if(complaint is None, complaint or measured)


def examine(law: Law, implementation: Implementation, settings: Settings) -> Finding:
    """Check one law from the settings' seed; whatever the implementation raises becomes the finding."""
    assert law.case is not None, f"{law.name} is the law of no layer: take it from an entry"
    case = replace(law.case, implementation=implementation)
    torch.manual_seed(settings.seed)
    try:
        return law.check(case, case.settled(settings))
    except (NotOfferedError, NotImplementedError) as error:
        return Finding(Verdict.NOT_OFFERED, one_line(error))
    except Exception as error:
        return Finding(Verdict.CRASHED, one_line(error))
