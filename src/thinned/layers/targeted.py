"""Dropout of the weights, or of the units, that are smallest in magnitude."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from thinned import op
from thinned.geometry import shared
from thinned.keys import Key
from thinned.layers._arguments import check_input, key_for, threshold_and_scale

__all__ = ["TargetedDropout", "check_targeted", "targeted_dropout"]

WEIGHT_DIMS = 2


def targeted_dropout(
    weight: Tensor,
    p: float = 0.5,
    target: float = 0.5,
    kind: Literal["weight", "unit"] = "weight",
    training: bool = True,
    *,
    dim: int = 0,
    key: Key | None = None,
) -> Tensor:
    r"""Zero weights of small magnitude with probability ``p``, so that a network learns to do without them.

    .. math:: y_i = \begin{cases} 0 & i \in S \text{ and } u(i) \ge T \\ w_i & \text{otherwise} \end{cases}

    The candidates ``S`` are, for ``"weight"``, the ``floor(target * n)`` smallest of the ``n`` weights that
    lead into each unit, each with a decision of its own, and, for ``"unit"``, that fraction of the units,
    those whose weights have the smallest Euclidean norm, each with one decision for all its weights. Among
    equals those that come first are taken. What stays is not scaled, as in the paper, since the weights are
    meant to be pruned: ``p = 1`` is that pruning. Gradients treat the choice of candidates as fixed.

    The paper keeps a unit's weights in a column; in torch they are a row, ``weight[unit]``. The authors' code
    drops the single weights of candidate units; here the whole unit goes, as in the paper's text.

    Args:
        weight: a floating-point or complex tensor of at least two dimensions, such as ``(out, in)`` of a
            Linear or ``(out, in, *)`` of a convolution.
        p: the probability of dropping a candidate, in [0, 1]; the paper's alpha.
        target: the fraction of weights or units that are candidates, in [0, 1]; the paper's gamma.
        kind: ``"weight"`` or ``"unit"``.
        training: False returns ``weight`` itself, and so does ``p = 0``.
        dim: the dimension that counts the units; 1 for a transposed convolution.
        key: as for :func:`~thinned.functional.dropout`, but one key: a weight has no samples.

    Returns:
        A tensor of ``weight``'s shape and dtype. A dropped weight is ``+0``, and so is its gradient.

    Raises:
        ValueError: ``p`` or ``target`` outside [0, 1] or NaN, or another ``kind``.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``weight`` has fewer than two
            dimensions.
        IndexError: ``weight`` has no dimension ``dim``.

    Source: Gomez et al., "Learning sparse networks using targeted dropout", 2019, section 3.

    >>> import torch, thinned
    >>> weight = torch.tensor([[5.0, 1.0, 2.0, 6.0], [1.0, 7.0, 8.0, 2.0]])
    >>> thinned.functional.targeted_dropout(weight, p=0.5, target=0.5, key=thinned.Key(1))
    tensor([[5., 0., 2., 6.],
            [0., 7., 8., 2.]])
    >>> thinned.functional.targeted_dropout(weight, p=1.0, target=0.5)
    tensor([[5., 0., 0., 6.],
            [0., 7., 8., 0.]])
    """
    T = check_targeted(p, target, kind)
    check_input("targeted_dropout", weight, key, dense=training and p != 0)
    if weight.dim() < WEIGHT_DIMS:
        raise RuntimeError(
            f"targeted_dropout needs a weight of at least two dimensions, got shape {tuple(weight.shape)}"
        )
    if not -weight.dim() <= dim < weight.dim():
        raise IndexError(f"dim has to be in {-weight.dim()} .. {weight.dim() - 1}, but got {dim}")
    if key is not None and key.shape:
        raise RuntimeError(f"a weight has one key of shape (), got keys of shape {tuple(key.shape)}")
    if not training or p == 0:
        return weight
    units = weight.detach().movedim(dim, 0)
    flat = units.flatten(1)
    if kind == "weight":
        candidates = _smallest(flat.abs(), target).view(units.shape).movedim(0, dim)
    else:
        wide = torch.promote_types(flat.abs().dtype, torch.float32)
        norms = torch.linalg.vector_norm(flat, dim=1, dtype=wide)
        candidates = _smallest(norms, target).view(-1, *(1,) * (weight.dim() - 1)).movedim(0, dim)
    bits = key_for(weight, key, sample_dim=None).bits
    keep = op.keep_mask(bits, candidates.shape, shared(candidates.shape), T)
    return weight.masked_fill(candidates & ~keep, 0)


def check_targeted(p: float, target: float, kind: str) -> int:
    """The threshold of ``p``; ValueError for arguments that :func:`targeted_dropout` does not take."""
    T, _ = threshold_and_scale(p)
    if not 0 <= target <= 1:
        raise ValueError(f"target has to be between 0 and 1, but got {target}")
    if kind not in ("weight", "unit"):
        raise ValueError(f"kind has to be either 'weight' or 'unit', but got {kind!r}")
    return T


def _smallest(size: Tensor, fraction: float) -> Tensor:
    """True for the ``floor(fraction * n)`` smallest along the last dimension, the first among equals."""
    n = size.shape[-1]
    count = math.floor(fraction * n + 1e-6)  # 0.29 * 100 is 28.999999999999996
    if count in (0, n):
        return torch.full_like(size, count > 0, dtype=torch.bool)
    size = size.to(torch.promote_types(size.dtype, torch.float32))  # in which selecting is faster
    # Selecting is faster than sorting on a CPU; on other devices it is slower, and not deterministic.
    last = size.kthvalue(count, -1, True)[0] if size.is_cpu else size.sort(-1)[0][..., count - 1 : count]
    below, equal = size < last, size == last
    room = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


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
