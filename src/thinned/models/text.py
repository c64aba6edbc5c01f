"""Rows of words as a table of plain text."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["count", "format_p", "merge_paths", "to_text"]

Row = tuple[str, ...]


def to_text(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they have to be; those that are empty in all rows are left out.

    >>> print(to_text(["path", "p", "note"], [["layers.0", "0.1", ""], ["head", "0.25", ""]]))
    path      p
    layers.0  0.1
    head      0.25
    """
    used = [i for i in range(len(headings)) if any(row[i] for row in rows)]
    lines = [[headings[i] for i in used], *([row[i] for i in used] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def merge_paths(rows: Sequence[Sequence[str]]) -> list[Row]:
    """Rows that differ in one number of the path, which comes first, as one row with a range.

    >>> merge_paths([("layers.0.drop", "0.1"), ("layers.1.drop", "0.1"), ("layers.2.drop", "0.5")])
    [('layers.0-1.drop', '0.1'), ('layers.2.drop', '0.5')]
    """
    merged = [(tuple(path.split(".")), tuple(rest)) for path, *rest in rows]
    for place in reversed(range(max((len(parts) for parts, _ in merged), default=0))):
        merged = _merge_at(place, merged)
    return [(".".join(parts), *rest) for parts, rest in merged]


def _merge_at(place: int, rows: list[tuple[Row, Row]]) -> list[tuple[Row, Row]]:
    """The first of those that a row joins says where the row stands."""
    groups: dict[tuple[object, ...], list[int]] = {}
    firsts: list[tuple[Row, Row, list[int]]] = []
    for parts, rest in rows:
        if place >= len(parts) or not parts[place].isdecimal():
            firsts.append((parts, rest, []))
            continue
        key = (parts[:place], parts[place + 1 :], rest)
        if key not in groups:
            groups[key] = []
            firsts.append((parts, rest, groups[key]))
        groups[key].append(int(parts[place]))
    return [
        ((*parts[:place], run, *parts[place + 1 :]) if run else parts, rest)
        for parts, rest, numbers in firsts
        for run in _runs(numbers) or [""]
    ]


def _runs(numbers: list[int]) -> list[str]:
    """Neighbours among rising numbers as ``first-last``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return [str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs]


def count(number: int, noun: str) -> str:
    """``1 site``, ``2 sites``."""
    return f"{number} {noun}{'s' * (number != 1)}"


def format_p(p: float | None) -> str:
    """Six digits of a probability, and nothing for one that is not known."""
    return "" if p is None else f"{p:g}"
