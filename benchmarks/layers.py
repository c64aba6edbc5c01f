"""Every layer beside its peer, and beside the multiply that its mask would cost at least."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.case import Bound, Case
from thinned.compare.catalogue import ENTRIES
from thinned.compare.layer import BROADCAST, calls

__all__ = ["layer_cases"]


def layer_cases(threads: int) -> Iterator[Case]:
    """One case a layer: never slower than the peer, and a shared mask at most 1.3 times a multiply."""
    for entry in ENTRIES:
        elements = sum(x.numel() for x in entry.workload.inputs())
        bounds = [Bound(entry.peer.name, 1)]
        if entry.workload.broadcast is not None:
            bounds.append(Bound(BROADCAST, 1.3))
        yield Case(
            "layer",
            f"{entry.name}, {elements:,} elements, peer {entry.peer.origin}",
            partial(calls, entry, [entry.own, entry.peer]),
            tuple(bounds),
            threads=threads,
            elements=elements,
        )
