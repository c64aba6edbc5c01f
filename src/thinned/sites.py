"""Which key a call takes that is given none: drawn from a generator, unless something around it has one."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from thinned.keys import Key

__all__ = ["Source", "current"]


class Source(Protocol):
    """Gives the calls around which it is in place their keys."""

    def key_for(self, input: Tensor, rows: int | None) -> Key:  # noqa: A002
        """A key for a call on ``input``, or one for each sample along its dimension ``rows``."""


class _Current:
    """Read on every call, by code under a compiler too: an attribute, which both can follow."""

    source: Source | None = None


current = _Current()
