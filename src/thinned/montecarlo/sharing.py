"""Work that the processes of a group share out: each computes a part, and all get all parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist

__all__ = ["Ranks", "Shard"]

Shard: TypeAlias = Literal["examples", "draws"]
Part = TypeVar("Part")


class Ranks:
    """The processes of torch.distributed's default group; without ``shard`` this process alone.

    Args:
        shard: what the processes share out.

    Attributes:
        rank, size: the number of this process, and how many there are.
        device: of tensors that :meth:`gather` takes; None for any.

    Raises:
        RuntimeError: ``shard`` is given, and torch.distributed is not initialised.
    """

    def __init__(self, shard: Shard | None) -> None:
        self.rank, self.size, self.device = 0, 1, None if shard is None else torch.device("cpu")
        if shard is not None:
            if not (dist.is_available() and dist.is_initialized()):
                raise RuntimeError(
                    f"shard={shard!r} shares out work among the processes of torch.distributed; call "
                    "torch.distributed.init_process_group first, or leave out shard"
                )
            self.rank, self.size = dist.get_rank(), dist.get_world_size()

    def gather(self, compute: Callable[[], Part]) -> list[Part]:
        """The results of ``compute`` on each process, in the order of ranks. All have to call this.

        Raises:
            RuntimeError: it raised in another process; this names the process and its error.
        """
        if self.size == 1:
            return [compute()]
        parts: list[Any] = [None] * self.size
        try:
            mine = compute()
        except Exception as error:
            dist.all_gather_object(parts, (f"{type(error).__name__}: {error}", None))
            raise
        dist.all_gather_object(parts, (None, mine))
        for rank, (message, _) in enumerate(parts):
            if message is not None:
                raise RuntimeError(f"process {rank} of {self.size} raised {message}")
        return [part for _, part in parts]

    def part(self, count: int) -> range:
        """The numbers, out of ``count``, that are this process's share."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)
