"""Which key a call takes that is given none: drawn from a generator, unless something around it has one."""

from __future__ import annotations

import threading
from typing import Protocol

from torch import Tensor

from thinned.keys import Key

__all__ = ["Source", "current"]


class Source(Protocol):
    """Gives the calls around which it is in place their keys.

    Attributes:
        sites: the name of those whose running it wants to know; see :mod:`thinned.models.address.hooks`.
        stack: the paths of those that are running, the innermost last.
        joined: whether it ends with the model's call.
    """

    sites: str
    stack: list[str]
    joined: bool

    def sample_dim(self, input: Tensor) -> int:
        """The dimension of the samples of a call on ``input``, of which every element has a decision."""

    def key_for(self, input: Tensor, rows: int | None) -> Key | None:
        """A key for a call on ``input``, or one for each sample along dimension ``rows``; None to draw."""


class _Current(threading.local):
    """Each thread's own. Read on every call, by compiled code too: an attribute, which both can follow."""

    def __init__(self) -> None:
        # An attribute of the class, as a default, would hide the thread's own from Dynamo.
        self.source: Source | None = None


current = _Current()
