"""Every layer: its names, source, peer, and the laws that it is held to."""

from __future__ import annotations

from thinned.compare.catalogue import path
from thinned.compare.catalogue.entry import Entry, Example, Implementation, LayerLaw, Workload, first

__all__ = ["ENTRIES", "Entry", "Example", "Implementation", "LayerLaw", "Workload", "entry_of", "first"]

ENTRIES: list[Entry] = [
    *path.ENTRIES,
]


def entry_of(name: str) -> Entry:
    """The entry of the layer called ``name``, in any case.

    Raises:
        ValueError: there is none.
    """
    for entry in ENTRIES:
        if entry.name.lower() == name.lower():
            return entry
    raise ValueError(f"unknown layer {name!r}; accepted are {', '.join(entry.name for entry in ENTRIES)}")
