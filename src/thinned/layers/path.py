"""Dropout of a sample's whole residual branch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from thinned import functional as F
from thinned.functional.arguments import threshold_and_scale
from thinned.keys import Key

__all__ = ["DropPath", "StochasticDepth"]


class DropPath(nn.Module):
    """:func:`thinned.functional.drop_path` as a module, with timm's arguments.

    Args:
        drop_prob: the probability of dropping a sample's branch, in [0, 1].
        scale_by_keep: divide what is kept by the keep probability.

    Shape:
        ``(N, *)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``drop_prob`` outside [0, 1] or NaN.

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016, section 3.

    >>> import thinned
    >>> thinned.DropPath(0.5)(torch.ones(4, 2), key=thinned.Key(3))
    tensor([[0., 0.],
            [0., 0.],
            [2., 2.],
            [2., 2.]])
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        threshold_and_scale(drop_prob)
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return F.drop_path(input, self.drop_prob, self.training, self.scale_by_keep, key=key)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, scale_by_keep={self.scale_by_keep}"


class StochasticDepth(nn.Module):
    """:func:`thinned.functional.stochastic_depth` as a module, with torchvision's arguments.

    Args:
        p: the probability of dropping a branch, in [0, 1].
        mode: ``"row"``, a decision for each sample, or ``"batch"``, one for all.

    Shape:
        ``(N, *)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or another ``mode``.

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016, section 3.

    >>> import thinned
    >>> thinned.StochasticDepth(0.5, "row")(torch.ones(4, 1), key=thinned.Key(3)).flatten()
    tensor([0., 0., 2., 2.])
    """

    def __init__(self, p: float, mode: Literal["batch", "row"]) -> None:
        super().__init__()
        F.stochastic_depth(torch.empty(0, 0), p, mode)
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return F.stochastic_depth(input, self.p, self.mode, self.training, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"
