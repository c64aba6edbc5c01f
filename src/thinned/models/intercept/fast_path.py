"""torch's fast path of transformers in evaluation, which it does not take where a function mode is active."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

import torch
import torch.overrides

from thinned.torch_state import modes_of_thread, pop_mode, push_mode

__all__ = ["FastPath", "is_innermost", "remove_mode"]

overrides: Any = torch.overrides


class FastPath:
    """While installed, modes of the given type do not count when torch asks whether it may take the path.

    ``nn.MultiheadAttention``, ``nn.TransformerEncoder`` and its layer ask ``torch.overrides``; the functions
    of PyTorch themselves ask elsewhere. What is asked is about modes of this thread.
    """

    def __init__(self, transparent: type[torch.overrides.TorchFunctionMode]) -> None:
        self._transparent = transparent
        self._lock = threading.Lock()
        self._installed = 0
        self._torchs: Any = None

    def install(self) -> None:
        """Take the place of what torch asks, unless that has been done."""
        with self._lock:
            if not self._installed:
                self._torchs = overrides.has_torch_function
                overrides.has_torch_function = self._has_torch_function
            self._installed += 1

    def remove(self) -> None:
        """Put it back with the last of those who installed it."""
        with self._lock:
            self._installed -= 1
            if not self._installed:
                overrides.has_torch_function = self._torchs

    def _has_torch_function(self, relevant_args: Iterable[Any]) -> bool:
        ask = self._torchs
        if torch.compiler.is_compiling():
            return ask(relevant_args)  # type: ignore[no-any-return]
        modes = modes_of_thread()
        others = [mode for mode in modes if not isinstance(mode, self._transparent)]
        _replace(modes, others)
        try:
            return ask(relevant_args)  # type: ignore[no-any-return]
        finally:
            _replace(others, modes)


def _replace(old: list[Any], new: list[Any]) -> None:
    for _ in old:
        pop_mode()
    for mode in new:
        push_mode(mode)


def is_innermost(mode: torch.overrides.TorchFunctionMode) -> bool:
    """Whether no other function mode of this thread was entered later, or the mode was left already."""
    modes = modes_of_thread()
    return bool(modes) and modes[-1] is mode


def remove_mode(mode: torch.overrides.TorchFunctionMode) -> None:
    """Leave a function mode of this thread that others were entered after, if it has not been left."""
    modes = modes_of_thread()
    _replace(modes, [each for each in modes if each is not mode])
