"""Splits any geometry into rows of consecutive mask indices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from thinned.geometry import Geometry, span, split_rows

__all__ = ["by_rows"]


def by_rows(
    key: Tensor, shape: tuple[int, ...], geometry: Geometry, of_rows: Callable[[Tensor, Tensor, int], Tensor]
) -> Tensor:
    """The values that ``of_rows(first, key, count)`` gives, one for each element of a non-empty ``shape``.

    ``of_rows`` takes the first mask index and the key of each row, and adds a dimension of size ``count``:
    the values of ``count`` mask indices from the first on.
    """
    strides = geometry.strides
    rows = split_rows(shape, strides, key.dim())
    first = torch.full((), geometry.base, dtype=torch.int64, device=key.device)
    for size, stride in zip(shape[:rows], strides[:rows], strict=True):
        first = first.unsqueeze(-1) + torch.arange(size, device=key.device) * stride
    key = key.reshape(key.shape + (1,) * (rows - key.dim())).expand(shape[:rows])
    values = of_rows(first, key, span(shape[rows:], strides[rows:])).contiguous()
    return values.as_strided(shape, (*values.stride()[:-1], *strides[rows:])).contiguous()
