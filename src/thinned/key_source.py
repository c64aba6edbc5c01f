"""Where a call without ``key=`` gets its key: this thread's active key source, else torch's generator."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from thinned.distributed.ranks import has_peers
from thinned.keys import Key

__all__ = ["KeySource", "Rows", "Seeing", "active", "ranks_draw", "refuse_rows"]


@dataclass(frozen=True)
class Rows:
    """The rows of a batch that a residual branch sees.

    Attributes:
        index: their places in the batch, ascending: an int64 tensor of one dimension.
        size: the number of rows of the batch.
        outer: the rows that this batch is, where one branch is within another.
    """

    index: Tensor
    size: int
    outer: Rows | None = None

    def of(self, seen: int) -> Rows:
        """The rows for an input of ``seen`` rows: several for each of the branch, such as its windows."""
        count = self.index.shape[0]
        each = seen // count
        if each * count != seen:
            raise RuntimeError(
                f"a residual branch computes {count} kept rows of a batch of {self.size}, and a dropout in "
                f"it was given {seen} rows, which is no multiple; compute this branch for all rows"
            )
        index, size = self.index, self.size * each
        if each > 1:
            index = (index.unsqueeze(1) * each + torch.arange(each, device=index.device)).flatten()
        if self.outer is None:
            return Rows(index, size)
        outer = self.outer.of(size)
        return Rows(outer.index[index], outer.size)


class KeySource(Protocol):
    """Gives keys to the calls that are not given one, while it is active.

    Attributes:
        hooks_id: id of the module hooks that report to this source; see :mod:`thinned.models.address.hooks`.
        stack: paths of the modules that are running, innermost last.
        joined: whether the source is to end when the outermost module that is running returns.
    """

    hooks_id: str
    stack: list[str]
    joined: bool

    def called(self, hooks_id: str) -> KeySource:
        """The key source of a call of a whole model, which has these hooks: this, or one that it begins."""

    def end(self) -> None:
        """Deactivate this source."""

    def sample_dim(self, input: Tensor) -> int:
        """The dimension of ``input`` that holds the samples, for a layer that decides element by element."""

    def key_for(self, input: Tensor, sample_dim: int | None) -> Key | None:
        """The key of this call: one, or one for each sample along ``sample_dim``.

        ``sample_dim`` is None for an input that all samples share, such as a weight. The caller draws from
        torch's generator if the result is None.
        """


class _Active(threading.local):
    """The active key source of each thread. Every call reads it, in compiled code too.

    Attributes:
        rows: the rows of the batch that the running code sees, in a residual branch that is computed for the
            kept rows alone; None for all.
    """

    def __init__(self) -> None:
        # Not a class attribute: Dynamo would read the class's default instead of the thread's own value.
        self.key_source: KeySource | None = None
        self.rows: Rows | None = None


active = _Active()


class Seeing:
    """A context whose code sees these rows of the batch, or all rows if None."""

    def __init__(self, rows: Rows | None) -> None:
        self.rows = rows

    def __enter__(self) -> None:
        self._outer = active.rows
        active.rows = self.rows

    def __exit__(self, *_: object) -> None:
        active.rows = self._outer


def refuse_rows(what: str) -> None:
    """Raise where the active key source has a mask for all rows, and the running code sees only some."""
    if active.rows is not None and active.key_source is not None:
        raise RuntimeError(
            f"{what} within a residual branch that is computed for the kept rows alone cannot have the mask "
            "that these rows have in the whole batch; compute this branch for all rows"
        )


def ranks_draw() -> bool:
    """Whether the processes of torch.distributed each draw the key of a call without ``key=``.

    Such keys differ, unless all processes have one seed and have drawn equally often.
    """
    return active.key_source is None and has_peers()
