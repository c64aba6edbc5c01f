"""Checkpointed regions are computed twice: the second time with the sites counted as in the first."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Protocol

import torch.utils.checkpoint as torch_checkpoint

__all__ = ["Remembering"]

_DYNAMO = "torch._dynamo"
_REENTRANT, _OTHER = "CheckpointFunction", "_checkpoint_without_reentrant_generator"


class Counting(Protocol):
    """What a region's first computation is remembered of."""

    def activate(self) -> None: ...

    def deactivate(self) -> None: ...

    def state(self) -> Any: ...

    def restore(self, state: Any) -> None: ...


class Remembering:
    """While installed, regions given to torch's checkpoint remember where their source of keys stood.

    ``checkpoint`` itself cannot be replaced, as models hold it; these two are what it looks up on each call.
    """

    def __init__(self, counting: Counting) -> None:
        self.counting = counting
        self._replaced: list[tuple[Any, Any, bool | None]] = []

    def install(self) -> None:
        """Take the place of torch's two ways of checkpointing."""
        reentrant, other = getattr(torch_checkpoint, _REENTRANT), getattr(torch_checkpoint, _OTHER)
        self._replaced.append((reentrant, other, self._allow_in_compiled()))

        def apply(region: Callable[..., Any], *args: Any) -> Any:
            return reentrant.apply(self._region(region, computed=False), *args)

        def without_reentrant(region: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            return other(self._region(region, computed=True), *args, **kwargs)

        setattr(torch_checkpoint, _REENTRANT, SimpleNamespace(apply=apply))
        setattr(torch_checkpoint, _OTHER, without_reentrant)

    def remove(self) -> None:
        """Put back what was there."""
        reentrant, other, allowed = self._replaced.pop()
        if allowed is not None:
            sys.modules[_DYNAMO].config.skip_fwd_side_effects_in_bwd_under_checkpoint = allowed
        setattr(torch_checkpoint, _REENTRANT, reentrant)
        setattr(torch_checkpoint, _OTHER, other)

    @staticmethod
    def _allow_in_compiled() -> bool | None:
        """Let compiled regions count sites: their backward takes keys from the graph and counts nothing."""
        dynamo = sys.modules.get(_DYNAMO)
        if dynamo is None or not hasattr(dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"):
            return None
        before: bool = dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint
        dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        return before

    def _region(self, region: Callable[..., Any], computed: bool) -> Callable[..., Any]:
        """The region, whose first computation is a call of it too, or is somebody else's (``computed``)."""
        counting, first = self.counting, self.counting.state()

        def remembered(*args: Any, **kwargs: Any) -> Any:
            nonlocal computed
            if not computed:
                computed = True
                return region(*args, **kwargs)
            now = counting.state()
            counting.activate()
            counting.restore(first)
            try:
                return region(*args, **kwargs)
            finally:
                counting.restore(now)
                counting.deactivate()

        return remembered
