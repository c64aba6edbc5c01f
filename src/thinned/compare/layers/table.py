"""The table of layers, for the terminal and for the docs."""

from __future__ import annotations

from thinned.compare.layers import ENTRIES, Entry
from thinned.compare.tables import Cell, Row, Table

__all__ = ["layers_table", "to_markdown"]

COLUMNS = ("functional", "mask", "source", "peer")


def layers_table() -> Table:
    rows = [Row(entry.name, [Cell(text) for text in _cells(entry)]) for entry in ENTRIES]
    return Table(f"{len(rows)} layers", list(COLUMNS), {"": rows})


def to_markdown() -> str:
    """The page docs/layers.md.

    >>> to_markdown().splitlines()[0]
    '# Layers'
    """
    lines = [
        "# Layers",
        "",
        "Every layer of `thinned`, its function in `thinned.functional`, the shape of its mask, where it",
        "comes from, and what `thinned compare --layer NAME` shows beside it. `thinned layers --markdown`",
        "writes this page.",
        "",
        f"| layer | {' | '.join(COLUMNS)} |",
        f"| --- {'| --- ' * len(COLUMNS)}|",
    ]
    for entry in ENTRIES:
        functional, *rest = _cells(entry)
        functions = ", ".join(f"`{name}`" for name in functional.split(", "))
        cells = (f"`{entry.name}`", functions, *rest)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cells(entry: Entry) -> tuple[str, str, str, str]:
    return entry.functional, entry.mask, entry.source, entry.peer.origin
