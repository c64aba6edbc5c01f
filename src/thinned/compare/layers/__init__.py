"""Every layer: its names, source, peer, and the laws that it is held to."""

from __future__ import annotations

from thinned.compare.layers import (
    alpha,
    attention,
    block,
    channels,
    concrete,
    elementwise,
    gaussian,
    layer_drop,
    lstm,
    multi_sample,
    path,
    rdrop,
    recurrent,
    schedule,
    targeted,
    tokens,
    weights,
)
from thinned.compare.layers.entry import Entry, Example, Implementation, LayerLaw, Workload, first

__all__ = ["ENTRIES", "Entry", "Example", "Implementation", "LayerLaw", "Workload", "entry_of", "first"]

ENTRIES: list[Entry] = [
    *elementwise.ENTRIES,
    *channels.ENTRIES,
    *alpha.ENTRIES,
    *path.ENTRIES,
    *tokens.ENTRIES,
    *attention.ENTRIES,
    *block.ENTRIES,
    *recurrent.ENTRIES,
    *weights.ENTRIES,
    *lstm.ENTRIES,
    *gaussian.ENTRIES,
    *concrete.ENTRIES,
    *targeted.ENTRIES,
    *layer_drop.ENTRIES,
    *multi_sample.ENTRIES,
    *rdrop.ENTRIES,
    *schedule.ENTRIES,
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
