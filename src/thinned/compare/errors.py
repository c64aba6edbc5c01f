"""An exception as a few words for a cell or a line."""

from __future__ import annotations

import traceback
from pathlib import Path

import torch

import thinned

__all__ = ["one_line", "one_line_with_place"]

STANDARD_LIBRARY = str(Path(traceback.__file__).parent)
INSTALLED = {"site-packages", "dist-packages"}
TORCH, OURS = (str(Path(str(package.__file__)).parent) for package in (torch, thinned))


def one_line(error: BaseException) -> str:
    r"""The exception's type and the first line of its message.

    >>> one_line(IndexError("no elements\nand a second line"))
    'IndexError: no elements'
    >>> one_line(IndexError())
    'IndexError'
    """
    return f"{type(error).__name__}: {str(error).strip()}".rstrip(": ").splitlines()[0]


def one_line_with_place(error: BaseException) -> str:
    """As :func:`one_line`, with the innermost line of the user's code, else of a library, else of a forward.

    >>> try:
    ...     torch.nn.Linear(2, 2)(torch.ones(3))
    ... except RuntimeError as error:
    ...     one_line_with_place(error).rpartition("/")[2].split(", ")[::2]
    ['linear.py', 'in forward)']
    """
    places: dict[int, str] = {}
    for frame in traceback.extract_tb(error.__traceback__):
        file = frame.filename
        if not Path(file).is_file() or file.startswith(OURS):
            continue
        if file.startswith(TORCH):
            rank = 0 if frame.name == "forward" else None
        elif INSTALLED.intersection(Path(file).parts):
            rank = 1
        else:
            rank = None if file.startswith(STANDARD_LIBRARY) else 2
        if rank is not None:
            places[rank] = f" ({file}, line {frame.lineno}, in {frame.name})"
    return one_line(error) + (places[max(places)] if places else "")
