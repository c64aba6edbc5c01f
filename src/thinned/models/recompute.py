"""Checkpointed regions are computed twice: the second time with the dropouts counted as in the first."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import SimpleNamespace
from typing import Any, Protocol

import torch.utils.checkpoint as torch_checkpoint

__all__ = ["forget", "remember"]

_DYNAMO, _ALLOWED = "torch._dynamo", "skip_fwd_side_effects_in_bwd_under_checkpoint"
_REENTRANT, _OTHER = "CheckpointFunction", "_checkpoint_without_reentrant_generator"


class Counting(Protocol):
    """Something that counts dropouts in its thread."""

    def again(self) -> Callable[[], AbstractContextManager[Any]]:
        """What makes contexts, for any thread, that count on from where it stands now."""


class _Here(threading.local):
    def __init__(self) -> None:
        self.counting: list[Counting] = []


def remember(counting: Counting) -> None:
    """Let regions that this thread gives to torch's checkpoint be recomputed as ``counting`` counts."""
    _here.counting.append(counting)
    _torchs.replace()


def forget() -> None:
    """Undo the last :func:`remember` of this thread."""
    _here.counting.pop()
    _torchs.give_back()


class _Torchs:
    """torch's two ways of checkpointing, replaced while any thread wants it.

    ``checkpoint`` itself cannot be replaced, as models hold it; these two are what it looks up on each call.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._wanted = 0
        self._originals: tuple[Any, Any, bool | None] = None, None, None

    def replace(self) -> None:
        with self._lock:
            if not self._wanted:
                reentrant, other = getattr(torch_checkpoint, _REENTRANT), getattr(torch_checkpoint, _OTHER)
                self._originals = reentrant, other, _allow_in_compiled()

                def apply(region: Callable[..., Any], *args: Any) -> Any:
                    return reentrant.apply(_region(region, computed=False), *args)

                def without_reentrant(region: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
                    return other(_region(region, computed=True), *args, **kwargs)

                setattr(torch_checkpoint, _REENTRANT, SimpleNamespace(apply=apply))
                setattr(torch_checkpoint, _OTHER, without_reentrant)
            self._wanted += 1

    def give_back(self) -> None:
        with self._lock:
            self._wanted -= 1
            if not self._wanted:
                reentrant, other, allowed = self._originals
                setattr(torch_checkpoint, _REENTRANT, reentrant)
                setattr(torch_checkpoint, _OTHER, other)
                if allowed is not None:
                    setattr(sys.modules[_DYNAMO].config, _ALLOWED, allowed)


_here, _torchs = _Here(), _Torchs()


def _allow_in_compiled() -> bool | None:
    """Let compiled regions count sites: their backward takes keys from the graph and counts nothing."""
    dynamo = sys.modules.get(_DYNAMO)
    if dynamo is None or not hasattr(dynamo.config, _ALLOWED):
        return None
    before: bool = getattr(dynamo.config, _ALLOWED)
    setattr(dynamo.config, _ALLOWED, True)
    return before


def _region(region: Callable[..., Any], computed: bool) -> Callable[..., Any]:
    """The region, whose first computation is a call of it too, or is somebody else's (``computed``)."""
    contexts = [counting.again() for counting in _here.counting]

    def remembered(*args: Any, **kwargs: Any) -> Any:
        nonlocal computed
        if not computed:
            computed = True
            return region(*args, **kwargs)
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return region(*args, **kwargs)

    return remembered
