"""Lets torch take its fast path for transformers in evaluation while thinned's function mode is active."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.overrides

from thinned.torch_state import modes_of_thread, pop_mode, push_mode, script_as

__all__ = ["FastPath", "is_innermost", "remove_mode"]

overrides: Any = torch.overrides


class FastPath:
    """While installed, torch's check for its fast path ignores function modes of the type ``transparent``.

    ``nn.MultiheadAttention``, ``nn.TransformerEncoder`` and its layer make this check, by
    ``torch.overrides.has_torch_function``. The functions of torch use another one.
    """

    def __init__(self, transparent: type[torch.overrides.TorchFunctionMode]) -> None:
        self._transparent = transparent
        self._lock = threading.Lock()
        self._installed = 0
        self._original: Any = None
        self._check = self._has_torch_function  # one object, which TorchScript knows by its identity
        script_as(self._check, "aten::has_torch_function")

    def install(self) -> None:
        """Replace torch's check, unless that has been done."""
        with self._lock:
            if not self._installed:
                self._original = overrides.has_torch_function
                overrides.has_torch_function = self._check
            self._installed += 1

    def remove(self) -> None:
        """Restore torch's check when the last of those who installed it remove it."""
        with self._lock:
            self._installed -= 1
            if not self._installed:
                overrides.has_torch_function = self._original

    def _has_torch_function(self, relevant_args: Iterable[Any]) -> bool:
        original: Callable[[Iterable[Any]], bool] = self._original
        if torch.compiler.is_compiling():
            return original(relevant_args)
        modes = modes_of_thread()
        others = [mode for mode in modes if not isinstance(mode, self._transparent)]
        _replace(modes, others)
        try:
            return original(relevant_args)
        finally:
            _replace(others, modes)


def _replace(old: list[Any], new: list[Any]) -> None:
    for _ in old:
        pop_mode()
    for mode in new:
        push_mode(mode)


def is_innermost(mode: torch.overrides.TorchFunctionMode) -> bool:
    """Whether ``mode`` is the last function mode that this thread entered and has not left."""
    modes = modes_of_thread()
    return bool(modes) and modes[-1] is mode


def remove_mode(mode: torch.overrides.TorchFunctionMode) -> None:
    """Leave a function mode of this thread, also if later ones are active or the mode was left already."""
    modes = modes_of_thread()
    _replace(modes, [other for other in modes if other is not mode])
