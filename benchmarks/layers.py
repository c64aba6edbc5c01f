"""Every layer beside its peer, and beside the multiply that its mask would cost at least."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from benchmarks.case import Bound, Case
from thinned.compare.layers import ENTRIES
from thinned.compare.run import BROADCAST, calls

__all__ = ["layer_cases"]


def layer_cases(threads: int) -> Iterator[Case]:
    """Never slower than the peer, and a mask that is shared at most 1.3 times a multiply by one.

    The two are measured apart, as what peers allocate changes what the allocator costs a multiply.
    """
    for entry in ENTRIES:
        elements = sum(x.numel() for x in entry.workload.inputs())
        case = partial(Case, threads=threads, elements=elements)
        setting = f"{entry.name}, {elements:,} elements"
        yield case(
            "layer",
            f"{setting}, {entry.peer.origin}",
            partial(calls, entry, [entry.own, entry.peer]),
            (Bound(entry.peer.name, 1),),
        )
        if entry.broadcast is not None:
            yield case(
                "layer, its mask",
                setting,
                partial(calls, entry, [entry.own], broadcast=True),
                (Bound(BROADCAST, 1.3),),
            )
