"""A check that all processes have the same seed and step, and the samples that are theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist

__all__ = ["check_agreement"]


def check_agreement(
    values: Mapping[str, Any], samples: Sequence[int] | None, replica: int | None, group: Any = None
) -> None:
    """Raise a RuntimeError in every process of ``group`` if two of them disagree, with both ranks and values.

    Args:
        values: those that are equal in all processes, by name.
        samples: equal within a replica, and disjoint from those of other replicas; None if there are none.
        replica: the number of this process's replica.
        group: by default all processes.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, (dist.get_rank(), {**values}, samples, replica), group)
    first_of: dict[int | None, int] = {}
    owner: dict[int, int] = {}
    rank, first, ids, _ = gathered[0]
    for other, theirs, their_ids, number in gathered:
        for name, value in theirs.items():
            if value != first[name]:
                _raise(name, rank, repr(first[name]), other, repr(value))
        if (ids is None) != (their_ids is None):
            _raise("samples", rank, _count(ids), other, _count(their_ids))
        leader = first_of.setdefault(number, other)
        if leader != other:
            _check_equal(leader, next(ids for r, _, ids, _ in gathered if r == leader), other, their_ids)
            continue
        for sample in their_ids or ():
            if (owned_by := owner.setdefault(sample, other)) != other:
                raise RuntimeError(
                    f"ranks {owned_by} and {other} both have the sample {sample}, so its masks would be the "
                    "same in two data-parallel replicas; give each example of all processes an id of its own"
                )


def _check_equal(rank: int, ids: Sequence[int] | None, other: int, theirs: Sequence[int] | None) -> None:
    if ids is None or theirs is None or ids == theirs:
        return
    what = "samples, though they compute one data-parallel replica"
    if len(ids) != len(theirs):
        _raise(what, rank, _count(ids), other, _count(theirs))
    row = next(row for row, (a, b) in enumerate(zip(ids, theirs, strict=True)) if a != b)
    _raise(what, rank, f"{ids[row]} in row {row}", other, f"{theirs[row]}")


def _count(ids: Sequence[int] | None) -> str:
    return "none" if ids is None else f"{len(ids)} ids"


def _raise(name: str, rank: int, value: str, other: int, theirs: str) -> None:
    raise RuntimeError(f"ranks {rank} and {other} disagree on {name}: {value} and {theirs}")
