"""Tables of plain text, and the words in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby, zip_longest
from textwrap import TextWrapper

__all__ = ["WIDTH", "count", "format_p", "format_paths", "merge_paths", "to_text"]

Row = tuple[str, ...]
WIDTH, NARROWEST = 100, 8  # of a table, and of a column that is wrapped
SHOWN = 2  # places of one module
_PARTS = re.compile(r"(?<=[./_(])(?=\w)")


class _Wrapper(TextWrapper):
    """Breaks a path or a name that has no line's width behind its separators."""

    def _split(self, text: str) -> list[str]:
        room = self.width - len(self.subsequent_indent)
        words = super()._split(text)
        return [part for word in words for part in (_PARTS.split(word) if len(word) > room else [word])]


def to_text(headings: Sequence[str], rows: Sequence[Sequence[str]], width: int = WIDTH) -> str:
    """Columns as wide as they have to be, without those that are empty in all rows.

    The widest columns are wrapped if a line would exceed ``width``.

    >>> print(to_text(["path", "p", "note"], [["layers.0", "0.1", ""], ["encoder.dropout", "0.25", ""]], 16))
    path        p
    layers.0    0.1
    encoder.    0.25
      dropout
    """
    columns = [column for column in zip(headings, *rows, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > NARROWEST:
        widths[widths.index(max(widths))] -= 1
    wrappers = [_Wrapper(each, subsequent_indent="  ", break_on_hyphens=False) for each in widths]
    lines = [
        map(str.ljust, line, widths)
        for row in zip(*columns, strict=True)
        for line in zip_longest(*(w.wrap(cell) for w, cell in zip(wrappers, row, strict=True)), fillvalue="")
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def merge_paths(rows: Sequence[Sequence[str]]) -> list[Row]:
    """Rows that differ in one number of the path, which comes first, as one row with a range.

    >>> merge_paths([("layers.0.drop", "0.1"), ("layers.1.drop", "0.1"), ("layers.2.drop", "0.5")])
    [('layers.0-1.drop', '0.1'), ('layers.2.drop', '0.5')]
    """
    merged = [(tuple(path.split(".")), tuple(rest)) for path, *rest in rows]
    for place in reversed(range(max((len(parts) for parts, _ in merged), default=0))):
        groups: dict[object, tuple[Row, Row, list[int]]] = {}
        for i, (parts, rest) in enumerate(merged):
            numbered = place < len(parts) and parts[place].isdecimal()
            key = (parts[:place], parts[place + 1 :], rest) if numbered else i
            numbers = groups.setdefault(key, (parts, rest, []))[2]
            numbers += [int(parts[place])] if numbered else []
        merged = [
            ((*parts[:place], run, *parts[place + 1 :]) if run else parts, rest)
            for parts, rest, numbers in groups.values()
            for run in _runs(numbers) or [""]
        ]
    return [(".".join(parts), *rest) for parts, rest in merged]


def _runs(numbers: list[int]) -> list[str]:
    """Neighbours among rising numbers as ``first-last``."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def count(number: int, noun: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def format_p(p: float | None) -> str:
    """Six digits of a probability; empty if it is unknown."""
    return "" if p is None else f"{p:g}"


def format_paths(paths: Sequence[str]) -> str:
    """The places of a module, the first ones if there are many; ``(model)`` for the model itself."""
    more = f" and {len(paths) - SHOWN} more" * (len(paths) > SHOWN + 1)
    return ", ".join(path or "(model)" for path in (paths[:SHOWN] if more else paths)) + more
