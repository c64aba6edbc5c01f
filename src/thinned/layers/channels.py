"""Dropout of whole channels."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.functional.arguments import threshold_and_scale
from thinned.functional.channels import dropout1d, dropout2d, dropout3d
from thinned.keys import Key

__all__ = ["Dropout1d", "Dropout2d", "Dropout3d"]


class Dropout1d(torch.nn.Dropout1d):
    r""":func:`thinned.functional.dropout1d` as a module: :class:`torch.nn.Dropout1d` with a key.

    .. math:: y_{ncl} = x_{ncl} / q \text{ with probability } q = 1 - p
        \text{, one decision for each } (n, c) \text{, else } 0

    Args:
        p: the probability of dropping a channel, in [0, 1].
        inplace: write the result over the input.

    Shape:
        ``(N, C, L)`` or ``(C, L)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2.

    >>> import torch, thinned
    >>> thinned.Dropout1d(0.5)(torch.ones(4, 2), key=thinned.Key(3))
    tensor([[0., 0.],
            [0., 0.],
            [2., 2.],
            [2., 2.]])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return dropout1d(input, self.p, self.training, self.inplace, key=key)


class Dropout2d(torch.nn.Dropout2d):
    r""":func:`thinned.functional.dropout2d` as a module: :class:`torch.nn.Dropout2d` with a key.

    .. math:: y_{nchw} = x_{nchw} / q \text{ with probability } q = 1 - p
        \text{, one decision for each } (n, c) \text{, else } 0

    Args:
        p: the probability of dropping a channel, in [0, 1].
        inplace: write the result over the input.

    Shape:
        ``(N, C, H, W)``, or, with a warning as in PyTorch, ``(N, C, L)``; the output has the input's shape,
        dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2.

    >>> import torch, thinned
    >>> thinned.Dropout2d(0.5)(torch.ones(1, 4, 1, 2), key=thinned.Key(3)).flatten(2)
    tensor([[[0., 0.],
             [0., 0.],
             [2., 2.],
             [2., 2.]]])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return dropout2d(input, self.p, self.training, self.inplace, key=key)


class Dropout3d(torch.nn.Dropout3d):
    r""":func:`thinned.functional.dropout3d` as a module: :class:`torch.nn.Dropout3d` with a key.

    .. math:: y_{ncdhw} = x_{ncdhw} / q \text{ with probability } q = 1 - p
        \text{, one decision for each } (n, c) \text{, else } 0

    Args:
        p: the probability of dropping a channel, in [0, 1].
        inplace: write the result over the input.

    Shape:
        ``(N, C, D, H, W)`` or ``(C, D, H, W)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2.

    >>> import torch, thinned
    >>> thinned.Dropout3d(0.5)(torch.ones(1, 4, 1, 1, 2), key=thinned.Key(3)).flatten(2)
    tensor([[[0., 0.],
             [0., 0.],
             [2., 2.],
             [2., 2.]]])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return dropout3d(input, self.p, self.training, self.inplace, key=key)
