"""The catalogue: an entry for each layer, with its source, its peer and its laws."""

from __future__ import annotations

from thinned.compare.layers import (
    alpha,
    attention,
    block,
    channels,
    concrete,
    dropout,
    embedding,
    fused,
    gaussian,
    layer_drop,
    locked,
    masksembles,
    multi_sample,
    path,
    rdrop,
    recurrent,
    schedules,
    targeted,
    tokens,
    weights,
    zoneout,
)
from thinned.compare.layers._entry import Entry

__all__ = ["ENTRIES", "Entry", "entry_of"]

FAMILIES = (
    *(
        dropout,
        fused,
        channels,
        alpha,
        path,
        tokens,
        attention,
        block,
        locked,
        embedding,
        zoneout,
        weights,
        recurrent,
    ),
    *(gaussian, concrete, targeted, layer_drop, multi_sample, masksembles, rdrop, schedules),
)
ENTRIES: list[Entry] = [entry for family in FAMILIES for entry in family.ENTRIES]


def entry_of(name: str) -> Entry:
    """The entry of the layer called ``name``, in any case.

    Raises:
        ValueError: there is none.
    """
    for entry in ENTRIES:
        if entry.name.lower() == name.lower():
            return entry
    raise ValueError(f"unknown layer {name!r}; accepted are {', '.join(entry.name for entry in ENTRIES)}")
