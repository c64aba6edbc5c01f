"""The mask index of each element of a tensor: a stride for each dimension and a base."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from torch import SymInt

__all__ = ["Geometry", "dims_of", "shared", "shared_cached", "span", "split_rows"]


class Geometry(NamedTuple):
    """``m(i) = base + sum(i[d] * strides[d])``, the mask index of the element at position ``i``.

    A stride of 0 shares the mask along a dimension. A shard of a larger tensor has that tensor's strides, and
    as base the mask index of the shard's first element.
    """

    strides: tuple[int, ...]
    base: int = 0

    def shard(self, offsets: Sequence[int]) -> Geometry:
        """The geometry of a shard that begins at ``offsets``.

        >>> shared((8, 100)).shard((2, 50))
        Geometry(strides=(100, 1), base=250)
        """
        return Geometry(
            self.strides,
            self.base + sum(o * s for o, s in zip(offsets, self.strides, strict=True)),
        )


def dims_of(shape: Sequence[Any], broadcast_dims: Sequence[int]) -> set[int]:
    """``broadcast_dims`` counted from the front; IndexError for a dimension that ``shape`` does not have."""
    ndim = len(shape)
    for dim in broadcast_dims:
        # Dynamo cannot ask a symbolic size for an attribute.
        if not (isinstance(dim, int | SymInt) or hasattr(dim, "__index__")):
            raise TypeError(f"broadcast_dims must be integers, got {tuple(broadcast_dims)}")
        if not -ndim <= dim < ndim:
            accepted = f"in {-ndim} .. {ndim - 1}" if ndim else "absent for a 0-d tensor"
            raise IndexError(
                f"broadcast_dims {tuple(broadcast_dims)} names dimension {dim}, but for shape "
                f"{tuple(shape)} dimensions are {accepted}"
            )
    return {dim % ndim for dim in broadcast_dims}


def shared(shape: Sequence[int], broadcast_dims: Sequence[int] = (), key_dims: int = 0) -> Geometry:
    """Row-major positions in a mask of ``shape`` whose ``broadcast_dims`` have size 1.

    Args:
        shape: the tensor's.
        broadcast_dims: dimensions along which the mask is shared, counted from either end.
        key_dims: how many leading dimensions have a key of their own. Each key's mask starts at index 0, so
            that a row's mask depends on its key and not on its place in the batch.

    Raises:
        IndexError: a dimension that ``shape`` does not have.

    >>> shared((2, 3, 4, 5), (2, 3))
    Geometry(strides=(3, 1, 0, 0), base=0)
    >>> shared((2, 3, 4, 5), (), key_dims=1)
    Geometry(strides=(0, 20, 5, 1), base=0)
    """
    ndim = len(shape)
    shared_dims = dims_of(shape, broadcast_dims).union(range(key_dims))
    strides = [0] * ndim
    step = 1
    for dim in range(ndim - 1, -1, -1):
        if dim not in shared_dims:
            strides[dim] = step
            step *= shape[dim]
    return Geometry(tuple(strides))


shared_cached = lru_cache(maxsize=4096)(shared)


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """The number of mask indices from the first to the last of a non-empty tensor."""
    return 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))


def split_rows(shape: Sequence[int], strides: Sequence[int], at_least: int) -> int:
    """How many leading dimensions to go through row by row: until a row uses 1 of 4 of its mask indices."""
    for rows in range(at_least, len(shape)):
        if span(shape[rows:], strides[rows:]) <= 4 * math.prod(shape[rows:]):
            return rows
    return len(shape)
