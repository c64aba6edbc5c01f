"""Checks of plain arguments: each error names the argument, what it got, and what is accepted."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from torch import SymInt, Tensor

__all__ = ["check_integer", "check_real", "did_you_mean", "got", "integers"]


def got(value: Any) -> str:
    """The end of a message: a value and its type, or the shape and dtype of a tensor."""
    if isinstance(value, Tensor):
        return f"got a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    return f"got {' '.join(reprlib.repr(value).split())} of type {type(value).__name__}"


def did_you_mean(name: str, names: Iterable[str], otherwise: str = "") -> str:
    """The end of a message about ``name``, which is none of ``names``.

    >>> did_you_mean("MyDropuot", ["MyDropout", "Linear"])
    '; did you mean MyDropout?'
    >>> did_you_mean("menas", ["mean in float16", "rows"])
    "; did you mean 'mean in float16'?"
    """
    by_lower = {each.casefold(): each for each in names}
    text = name.casefold()
    words = get_close_matches(text, {word for each in by_lower for word in each.split()})
    close = [
        *(each for each in by_lower if len(text) > 2 and text in each),
        *get_close_matches(text, by_lower),
        *(each for each in by_lower if any(word in each.split() for word in words)),
    ]
    found = [by_lower[each] for each in dict.fromkeys(close)]
    found = [repr(each) if " " in each else each for each in found]
    return f"; did you mean {' or '.join(found[:3])}?" if found else otherwise


def check_integer(name: str, value: Any, least: int | None = None) -> None:
    """Raise TypeError for what is no integer, and ValueError for one below ``least``."""
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, {got(value)}")
    if least is not None and value < least:
        raise ValueError(f"{name} has to be at least {least}, but got {value}")


def _is_integer(value: Any) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool)
    if isinstance(value, SymInt):
        return True
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
    """``values`` in a tuple, each unchecked; TypeError for what cannot hold integers."""
    if isinstance(values, tuple):
        return values
    # isinstance(values, Iterable) costs 0.25 us, and layers pass ranges and lists.
    if type(values) not in (range, list) and (
        isinstance(values, str | Tensor) or not isinstance(values, Iterable)
    ):
        raise TypeError(f"{name} must be a tuple of integers, {got(values)}")
    return tuple(values)
