"""Checks of plain arguments: each error names the argument, what it got, and what is accepted."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from typing import Any

from torch import SymInt, Tensor

__all__ = ["check_integer", "check_real", "got", "integers"]


def got(value: Any) -> str:
    """The end of a message: a value and its type, or the shape and dtype of a tensor."""
    if isinstance(value, Tensor):
        return f"got a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    return f"got {' '.join(reprlib.repr(value).split())} of type {type(value).__name__}"


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise TypeError for what is no integer, and ValueError for one below ``least``."""
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, {got(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} has to be at least {least}, but got {value}")


def _is_integer(value: Any) -> bool:
    if isinstance(value, bool | int | SymInt):
        return not isinstance(value, bool)
    try:
        operator.index(value)
    except (TypeError, RuntimeError):  # a meta tensor has no value
        return False
    return True


def check_real(name: str, value: Any) -> None:
    """Raise TypeError for what is no number and no tensor of one element."""
    if isinstance(value, float | int) or (
        isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta
    ):
        return
    # float() accepts strings, and arrays of one element, which have a length.
    if isinstance(value, Tensor) or not hasattr(value, "__float__") or hasattr(value, "__len__"):
        raise TypeError(f"{name} must be a number, {got(value)}")


def integers(name: str, values: Any) -> tuple[Any, ...]:
    """The integers in a tuple; TypeError for what holds none."""
    if isinstance(values, tuple):
        return values
    if isinstance(values, str | Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a tuple of integers, {got(values)}")
    return tuple(values)
