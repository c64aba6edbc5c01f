"""Calls under a seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thinned.compare.implementation import first
from thinned.compare.settings import Settings

__all__ = ["same", "under_seed"]


def under_seed(settings: Settings, call: Callable[..., Any], *inputs: Tensor, offset: int = 0) -> Tensor:
    """The first output of a call, from the settings' seed plus ``offset``."""
    torch.manual_seed(settings.seed + offset)
    return first(call(*inputs))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal in shape and values, NaN included."""
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))
