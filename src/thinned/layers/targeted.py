"""Targeted dropout: drop the weights, or the units, of smallest magnitude."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary

from thinned import op
from thinned.checks import check_integer, check_real
from thinned.geometry import shared
from thinned.keys import Key, as_key
from thinned.layers._arguments import drops, key_for, refuse_activations, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.torch_state import compiling

__all__ = ["TargetedDropout", "targeted_dropout"]


def targeted_dropout(
    weight: Tensor,
    p: float = 0.5,
    *,
    target: float = 0.5,
    kind: Literal["weight", "unit"] = "weight",
    dim: int = 0,
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Zero weights of small magnitude with probability ``p``, so that a network can later be pruned.

    .. math:: y_i = \begin{cases} 0 & i \in S \text{ and } u(i) \ge T \\ w_i & \text{otherwise} \end{cases}

    ``S`` are the candidates. For ``"weight"`` they are the ``floor(target * n)`` smallest of each unit's
    ``n`` incoming weights, with one decision per weight. For ``"unit"`` they are that fraction of the units,
    those whose weights have the smallest Euclidean norm, with one decision per unit. Position orders equal
    magnitudes. As in the paper, the remaining weights are not scaled, since the goal is to prune: ``p = 1``
    is that pruning. Gradients treat the choice of candidates as constant.

    A unit is a column in the paper and a row, ``weight[unit]``, in torch. The authors' code drops single
    weights of candidate units; this function drops the entire unit, as the paper's text does.

    Args:
        weight: a floating-point or complex tensor of at least two dimensions, such as ``(out, in)`` of a
            Linear or ``(out, in, *)`` of a convolution.
        p: the probability of dropping a candidate, in [0, 1]; the paper's alpha.
        target: the fraction of weights or units that are candidates, in [0, 1]; the paper's gamma.
        kind: ``"weight"``, the smallest weights of each unit, or ``"unit"``, the smallest units.
        dim: the dimension of the units; 1 for a transposed convolution.
        training: False returns ``weight`` itself, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`, but a single key: a weight has no samples.

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
    if has_torch_function_unary(weight) and not compiling():
        return overridden(targeted_dropout, locals())
    T, _ = threshold_and_scale(p)
    _check_target(target, kind)
    check_integer("dim", dim)
    if not drops("targeted_dropout", weight, p, training, key, dense=True, argument="weight"):
        return weight
    ndim = weight.dim()
    if ndim < 2:
        raise RuntimeError(
            f"targeted_dropout needs a weight of at least two dimensions, got shape {tuple(weight.shape)}"
        )
    if not -ndim <= dim < ndim:
        raise IndexError(f"dim has to be in {-ndim} .. {ndim - 1}, but got {dim}")
    if key is not None and (key := as_key(key)).shape:
        raise RuntimeError(f"a weight has one key of shape (), got keys of shape {tuple(key.shape)}")
    units = op.whole(weight.detach()).movedim(dim, 0)
    size = units.flatten(1).abs()
    shape = tuple(units.shape)
    if kind == "unit":
        size = torch.linalg.vector_norm(size, dim=1, dtype=torch.promote_types(size.dtype, torch.float32))
        shape = (-1, *(1,) * (ndim - 1))
    candidates = _smallest(size, target).view(shape).movedim(0, dim)
    refuse_activations("targeted_dropout", weight, key)
    bits = key_for(weight, key, sample_dim=None).bits
    keep = op.keep_mask(bits, candidates.shape, shared(candidates.shape), T)
    return weight.masked_fill(op.shard_like(candidates & ~keep, weight), 0)


def _smallest(size: Tensor, fraction: float) -> Tensor:
    """True for the ``floor(fraction * n)`` smallest along the last dimension; position orders equal ones."""
    n = size.shape[-1]
    count = math.floor(fraction * n + 1e-6)  # 0.29 * 100 is 28.999999999999996
    if count == 0 or count == n:  # not `in (0, n)`, which Dynamo gets wrong for a symbolic n
        return torch.full_like(size, count > 0, dtype=torch.bool)
    # 1024 x 1024 numbers on one core: kthvalue 22 ms in float16, 15 ms after a cast to float32; sort 51 ms.
    # On other devices kthvalue is slower than sort, and not deterministic.
    size = size.to(torch.promote_types(size.dtype, torch.float32))
    last = size.kthvalue(count, -1, True)[0] if size.is_cpu else size.sort(-1)[0][..., count - 1 : count]
    below, equal = size < last, size == last
    room = count - below.sum(-1, keepdim=True)
    return below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))


class TargetedDropout(Layer):
    """A parametrization that drops the smallest weights of a module, or its smallest units.

    Use this layer to train a network that is to be pruned by magnitude: ``target`` is the share to be pruned.
    Against overfitting use :class:`DropConnect`, which drops from all weights.

    :func:`thinned.functional.targeted_dropout` has the formula. Evaluation leaves the weight as it is. After
    training, ``targeted_dropout(weight, p=1.0, target=target)`` prunes it.

    Source: Gomez et al., 2019, section 3.

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
        self, p: float = 0.5, *, target: float = 0.5, kind: Literal["weight", "unit"] = "weight", dim: int = 0
    ) -> None:
        super().__init__(p)
        _check_target(target, kind)
        check_integer("dim", dim)
        self.target = target
        self.kind = kind
        self.dim = dim

    def forward(self, weight: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(weight, Proxy) and (node := module_node(self, weight, key=key)) is not None:
            return node
        return targeted_dropout(
            weight, self.p, target=self.target, kind=self.kind, dim=self.dim, training=self.training, key=key
        )


def _check_target(target: float, kind: str) -> None:
    check_real("target", target)
    if not 0 <= target <= 1:
        raise ValueError(f"target has to be between 0 and 1, but got {target}")
    if kind not in ("weight", "unit"):
        raise ValueError(f"kind has to be either 'weight' or 'unit', but got {kind!r}")
