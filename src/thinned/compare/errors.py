"""An exception as a few words for a cell or a line."""

from __future__ import annotations

__all__ = ["one_line"]


def one_line(error: Exception) -> str:
    r"""The exception's type and the first line of its message.

    >>> one_line(IndexError("no elements\nand a second line"))
    'IndexError: no elements'
    >>> one_line(IndexError())
    'IndexError'
    """
    return f"{type(error).__name__}: {str(error).strip()}".rstrip(": ").splitlines()[0]
