"""Dropout of a sample's whole residual branch."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from thinned.keys import Key
from thinned.layers._arguments import apply, check_input, threshold_and_scale

__all__ = ["DropPath", "StochasticDepth", "drop_path", "drop_path_rates", "stochastic_depth"]


def drop_path(
    input: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Zero a sample's whole branch with probability ``drop_prob``: one decision for each row of dimension 0.

    .. math:: y_n = \begin{cases} x_n / q & u(n) < T \\ 0 & \text{otherwise} \end{cases}

    Args:
        input: a floating-point or complex tensor of shape ``(N, *)``.
        drop_prob: the probability of dropping a row, in [0, 1].
        training: False returns ``input`` itself, and so does ``drop_prob = 0``.
        scale_by_keep: divide what is kept by the keep probability ``q``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Raises:
        ValueError: ``drop_prob`` outside [0, 1] or NaN.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``input`` has no dimension.

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016, section 3; the signature is
    timm's.

    >>> import torch, thinned
    >>> thinned.functional.drop_path(torch.ones(4, 3), 0.5, training=True, key=thinned.Key(3))
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [2., 2., 2.],
            [2., 2., 2.]])
    """
    T, scale = threshold_and_scale(drop_prob)
    check_input("drop_path", input, key)
    if not input.dim():
        raise RuntimeError("drop_path needs a batch dimension, got a tensor of shape ()")
    if not training or drop_prob == 0:
        return input
    return apply(input, key, range(1, input.dim()), False, T, scale if scale_by_keep else 1.0)


def stochastic_depth(
    input: Tensor,
    p: float,
    mode: Literal["batch", "row"],
    training: bool = True,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Zero a branch with probability ``p``: for each row of dimension 0, or for the whole batch at once.

    .. math:: y_n = \begin{cases} x_n / q & u(n) < T \\ 0 & \text{otherwise} \end{cases}
        \qquad\text{("row"; "batch" has } u(0) \text{ for all } n)

    Args:
        input: a floating-point or complex tensor of shape ``(N, *)``.
        p: the probability of dropping, in [0, 1].
        mode: ``"row"``, a decision for each row, or ``"batch"``, one for all.
        training: False returns ``input`` itself, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or another ``mode``.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``input`` has no dimension.

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016, section 3; the signature is
    torchvision's.

    >>> import torch, thinned
    >>> thinned.functional.stochastic_depth(torch.ones(4, 2), 0.5, "batch", key=thinned.Key(3)).flatten()
    tensor([0., 0., 0., 0., 0., 0., 0., 0.])
    """
    T, scale = threshold_and_scale(p)
    if mode not in ("batch", "row"):
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode!r}")
    check_input("stochastic_depth", input, key)
    if not input.dim():
        raise RuntimeError("stochastic_depth needs a batch dimension, got a tensor of shape ()")
    if not training or p == 0:
        return input
    return apply(input, key, range(mode == "row", input.dim()), False, T, scale)


def drop_path_rates(depth: int, max_rate: float) -> list[float]:
    """A ``drop_prob`` for each of ``depth`` blocks, rising linearly from 0 to ``max_rate``.

    Raises:
        ValueError: ``depth`` below 1, or ``max_rate`` outside [0, 1].

    Source: Huang et al. 2016, section 3, "the linear decay rule"; from 0 at the first block as in timm.

    >>> drop_path_rates(5, 0.5)
    [0.0, 0.125, 0.25, 0.375, 0.5]
    """
    threshold_and_scale(max_rate)
    if depth < 1:
        raise ValueError(f"depth has to be at least 1, but got {depth}")
    return [max_rate * block / max(1, depth - 1) for block in range(depth)]


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

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        return drop_path(input, self.drop_prob, self.training, self.scale_by_keep, key=key)

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
        stochastic_depth(torch.empty(0, 0), p, mode)
        self.p = p
        self.mode = mode

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        return stochastic_depth(input, self.p, self.mode, self.training, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}, mode={self.mode!r}"
