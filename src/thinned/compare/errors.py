"""An exception as a few words for a cell or a line."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import torch

import thinned

__all__ = ["did_you_mean", "one_line", "one_line_with_place"]

_LIBRARIES = tuple(
    str(Path(sysconfig.get_path(name))) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)
_OURS = tuple(str(Path(str(each.__file__)).parent) for each in (torch, thinned))


def one_line(error: BaseException) -> str:
    r"""The exception's type and the first line of its message.

    >>> one_line(IndexError("no elements\nand a second line"))
    'IndexError: no elements'
    >>> one_line(IndexError())
    'IndexError'
    """
    return f"{type(error).__name__}: {str(error).strip()}".rstrip(": ").splitlines()[0]


def one_line_with_place(error: BaseException) -> str:
    """As :func:`one_line`, with the innermost line of the user's code, or else of a library, torch last."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_file()]
    for others in ((*_LIBRARIES, *_OURS), _OURS, _OURS[1:]):
        mine = [frame for frame in frames if not frame.filename.startswith(others)]
        if mine:
            return f"{one_line(error)} ({mine[-1].filename}, line {mine[-1].lineno}, in {mine[-1].name})"
    return one_line(error)


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
