"""Dropout of the weights, or of the units, that are smallest in magnitude."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from thinned.functional.targeted import check_targeted, targeted_dropout
from thinned.keys import Key

__all__ = ["TargetedDropout"]


class TargetedDropout(nn.Module):
    """:func:`thinned.functional.targeted_dropout` as a parametrization of a weight.

    In evaluation the weight is as it is; the pruning that the training is for comes after it, and is
    ``targeted_dropout(weight, p=1.0, target=target)``.

    Args:
        p: the probability of dropping a candidate, in [0, 1].
        target: the fraction of weights or units that are candidates, in [0, 1].
        kind: ``"weight"``, the smallest weights of each unit, or ``"unit"``, the smallest units.
        dim: the dimension that counts the units; 1 for a transposed convolution.

    Shape:
        ``(out, in, *)``; the output has the weight's shape and dtype.

    Raises:
        ValueError: ``p`` or ``target`` outside [0, 1] or NaN, or another ``kind``.

    Source: Gomez et al., "Learning sparse networks using targeted dropout", 2019, section 3.

    >>> import torch, thinned
    >>> from torch.nn.utils.parametrize import register_parametrization
    >>> linear = torch.nn.Linear(8, 2)
    >>> linear = register_parametrization(linear, "weight", thinned.TargetedDropout(p=1.0, target=0.25))
    >>> (linear.weight == 0).sum(1)
    tensor([2, 2])
    >>> (linear.eval().weight == 0).sum(1)
    tensor([0, 0])
    """

    def __init__(
        self, p: float = 0.5, target: float = 0.5, kind: Literal["weight", "unit"] = "weight", dim: int = 0
    ) -> None:
        super().__init__()
        check_targeted(p, target, kind)
        self.p = p
        self.target = target
        self.kind = kind
        self.dim = dim

    def forward(self, weight: Tensor, *, key: Key | None = None) -> Tensor:
        return targeted_dropout(weight, self.p, self.target, self.kind, self.training, dim=self.dim, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}, target={self.target}, kind={self.kind!r}, dim={self.dim}"
