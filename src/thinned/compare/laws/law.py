"""What a law is, and what examining an implementation by one finds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, TypeVar

import torch

from thinned.compare.errors import one_line
from thinned.compare.settings import Settings
from thinned.compare.subjects import NotOfferedError

__all__ = ["HALF", "Finding", "Law", "Verdict", "examine", "holds_if", "nothing_wrong"]

S = TypeVar("S")  # what is examined: an implementation of Dropout, or of another layer

HALF = 0.5  # at which two independent masks of 1,000 elements are never equal, whatever p a user chooses


class Verdict(str, Enum):
    """How an implementation stands to a law; a crash counts against it, a missing feature does not."""

    HOLDS = "holds"
    BROKEN = "broken"
    CRASHED = "crashed"
    NOT_OFFERED = "not offered"

    @property
    def is_breach(self) -> bool:
        return self in (Verdict.BROKEN, Verdict.CRASHED)


@dataclass(frozen=True)
class Finding:
    """One cell of the table: what was measured, in a few words, and the figures behind it."""

    verdict: Verdict
    measured: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Law(Generic[S]):
    """One law: ``name`` heads a row, ``statement`` says in a line what has to hold."""

    family: str
    name: str
    statement: str
    check: Callable[[S, Settings], Finding]


def holds_if(condition: bool, measured: str, **figures: float) -> Finding:
    return Finding(Verdict.HOLDS if condition else Verdict.BROKEN, measured, figures)


def nothing_wrong(complaint: str | None, measured: str) -> Finding:
    """Holds, with ``measured``, where there is no complaint; broken, with the complaint, where there is."""
    return holds_if(complaint is None, complaint or measured)


def examine(law: Law[S], subject: S, settings: Settings) -> Finding:
    """Check one law from the settings' seed; whatever the implementation raises becomes the finding."""
    torch.manual_seed(settings.seed)
    try:
        return law.check(subject, settings)
    except (NotOfferedError, NotImplementedError) as error:
        return Finding(Verdict.NOT_OFFERED, one_line(error))
    except Exception as error:
        return Finding(Verdict.CRASHED, one_line(error))
