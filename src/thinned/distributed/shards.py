"""Where this process's shard of a DTensor lies in the whole tensor, computed without communication."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import Parameter

__all__ = ["Part", "Run", "Runs", "is_dtensor", "length", "parts_of", "runs_of"]


class Run(NamedTuple):
    """Neighbours in the whole tensor. Not a ``range``, for which a symbolic size would become a number."""

    start: int
    stop: int


Runs = list[list[Run]]


def is_dtensor(x: Tensor) -> bool:
    """Whether ``x`` is a DTensor, without an import of torch.distributed.tensor, which takes 0.5 s."""
    return type(x) not in (Tensor, Parameter) and hasattr(x, "device_mesh")


def runs_of(shape: Sequence[int], mesh: Any, placements: Sequence[Any]) -> Runs:
    """For each dimension, the runs of the whole tensor's positions that this process holds, in order.

    One run a dimension, except under a ``_StridedShard``, which may take several. A dimension of which this
    process holds nothing has no run, and every dimension has none in a process outside of the mesh.
    """
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return [[] for _ in shape]
    try:
        # With the coordinate, since an equal mesh of later processes may have this one elsewhere.
        return _cached(shape, mesh, placements, tuple(coordinate))
    except TypeError:  # symbolic sizes have no hash
        return _compute(shape, mesh, placements, coordinate)


def _compute(shape: Sequence[int], mesh: Any, placements: Sequence[Any], coordinate: Sequence[int]) -> Runs:
    runs = [[Run(0, size)] if size else [] for size in shape]
    for index, count, placement in zip(coordinate, mesh.shape, placements, strict=True):
        if hasattr(placement, "dim"):  # Shard and _StridedShard
            whole = runs[placement.dim]
            pieces = getattr(placement, "split_factor", 1)
            mine = [_chunk(_chunk(whole, pieces, i), count, index) for i in range(pieces)]
            runs[placement.dim] = _joined([run for chunk in mine for run in chunk])
    return runs


_cached = lru_cache(maxsize=1024)(_compute)


def length(runs: list[Run]) -> int:
    """The number of positions in the runs."""
    return sum(stop - start for start, stop in runs)


def _chunk(runs: list[Run], count: int, index: int) -> list[Run]:
    """The chunk ``index`` of ``count`` that :func:`torch.chunk` makes of positions; empty beyond the last."""
    each = (length(runs) + count - 1) // count
    begin = each * index
    taken = []
    for start, stop in runs:
        run = Run(max(start, start + begin), min(stop, start + begin + each))
        if run.start < run.stop:
            taken.append(run)
        begin -= stop - start
    return taken


def _joined(runs: list[Run]) -> list[Run]:
    """The runs, of which adjacent ones are one."""
    joined: list[Run] = []
    for run in runs:
        # A comparison of symbolic positions would make numbers of them.
        if joined and isinstance(run.start, int) and joined[-1].stop == run.start:
            joined[-1] = Run(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return joined


class Part(NamedTuple):
    """A box of the local tensor whose elements are neighbours in the whole tensor too.

    Attributes:
        place: the box in the local tensor.
        offsets: the position of its first element in the whole tensor.
    """

    place: tuple[slice, ...]
    offsets: tuple[int, ...]


def parts_of(runs: Runs) -> Iterator[Part]:
    """The boxes of a local tensor; none if it has no elements."""
    placed = []
    for dim in runs:
        start, places = 0, []
        for run in dim:
            stop = start + run.stop - run.start
            places.append((slice(start, stop), run.start))
            start = stop
        placed.append(places)
    for each in product(*placed):
        yield Part(tuple(place for place, _ in each), tuple(offset for _, offset in each))
