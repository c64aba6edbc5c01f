"""Runs the branch of a block for the rows that its DropPath keeps: what the compiled forwards call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from thinned.backends.arguments import DTYPES
from thinned.layers import DropPath, StochasticDepth
from thinned.layers._arguments import key_for, threshold_and_scale
from thinned.layers.residual import Branch, computes_rows
from thinned.models.address.hooks import call_as, has_only_hooks_of_address

__all__ = ["run"]


def run(
    block: nn.Module, drop: Any, branch: Callable[..., Tensor], kind: str, other: Any, rows: int, *values: Any
) -> Any:
    """``drop(branch(block, *values))``, and its sum with ``other``.

    Args:
        block: the module of the forward.
        drop: its DropPath.
        branch: the branch, a function of the block and of ``values``.
        kind: the order of the sum: ``"after"`` for ``other + dropped``, ``"before"`` for ``dropped + other``,
            ``"into"`` for ``dropped += other``; empty for no sum.
        other: the other summand, or a function that computes it.
        rows: how many of the values, from the first on, have a row for each row of the batch.
        values: what the branch takes.
    """
    part = _decide(drop, rows, values)
    if part is None:
        y = drop(branch(block, *values))
        if not kind:
            return y
        x = other() if isinstance(other, FunctionType) else other
        if kind == "into":
            y += x
            return y
        return x + y if kind == "after" else y + x
    taken, passed = part.take(values[0])
    others = (
        part.rows_of(value) if i < rows and isinstance(value, Tensor) else value
        for i, value in enumerate(values[1:], 1)
    )
    y = part.compute(
        partial(branch, block),
        taken,
        *others,
        what=f"the branch before a {type(drop).__name__} in a {type(block).__name__} overwrites",
        instead="exclude it from the conversion",
    )
    if not kind:
        return part.put(y)
    x = other() if isinstance(other, FunctionType) else other
    if x is values[0]:
        x = passed
    if not isinstance(x, Tensor) or not x.dim():
        return part.put(y) + x
    z = part.plus(x, y)
    return z.to(y.dtype) if kind == "into" else z


def _decide(drop: Any, rows: int, values: Sequence[Any]) -> Branch | None:
    """The decisions for this call, with the key that ``drop`` would draw; None if it is to see all rows."""
    if isinstance(drop, DropPath):
        p, mode, scales = drop.drop_prob, "row", drop.scale_by_keep
        is_plain = type(drop).forward is DropPath.forward
    elif isinstance(drop, StochasticDepth):
        p, mode, scales = drop.p, drop.mode, True
        is_plain = type(drop).forward is StochasticDepth.forward
    else:
        return None
    x = values[0]
    if not drop.training or p == 0 or not is_plain or not isinstance(x, Tensor) or not x.dim():
        return None
    if x.dtype not in DTYPES or x.is_nested or not computes_rows(x) or not has_only_hooks_of_address(drop):
        return None
    size = x.shape[0]
    if not all(_fits(value, size, i < rows) for i, value in enumerate(values)):
        return None
    T, scale = threshold_and_scale(p)
    key = call_as(drop, partial(key_for, x, None, sample_dim=0 if mode == "row" else None))
    return Branch.decide(size, T, scale if scales else 1.0, mode, key)


def _fits(value: Any, size: int, has_rows: bool) -> bool:
    """Whether a branch that sees some rows of a batch may have this value.

    Args:
        value: any object.
        size: the number of rows of the batch.
        has_rows: whether a tensor is known to have a row for each.
    """
    if value is None or isinstance(value, bool | float | complex | str | torch.dtype | torch.device | Enum):
        return True
    if isinstance(value, Tensor):
        if value.layout is not torch.strided or value.is_nested:
            return False
        if has_rows:
            return value.dim() > 0 and value.shape[0] == size
        if not value.dim() or value.shape[0] == 1:
            return True
        # Integers may be the numbers of rows.
        return value.dtype.is_floating_point | (value.dtype is torch.bool) and value.shape[0] % size != 0
    if isinstance(value, int | torch.SymInt):
        return value != size
    if isinstance(value, torch.Size):
        return not value or value[0] != size
    if isinstance(value, list | tuple):
        return all(isinstance(each, int) or _fits(each, size, False) for each in value)
    if isinstance(value, dict):
        return all(_fits(each, size, False) for each in value.values())
    return False
