"""Dropout of square blocks of a feature map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from thinned.functional import block as F
from thinned.keys import Key

__all__ = ["DropBlock1d", "DropBlock2d", "DropBlock3d"]


class _DropBlock(nn.Module):
    _function: ClassVar[Callable[..., Tensor]]
    _dims: ClassVar[int]

    def __init__(
        self,
        p: float,
        block_size: int | Sequence[int],
        inplace: bool = False,
        *,
        couple_channels: bool = False,
        scale: F.Scale = "expected",
    ) -> None:
        super().__init__()
        self._function(torch.empty((0,) * (self._dims + 2)), p, block_size, scale=scale)
        self.p = p
        self.block_size = block_size
        self.inplace = inplace
        self.couple_channels = couple_channels
        self.scale = scale

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return self._function(
            input,
            self.p,
            self.block_size,
            self.inplace,
            couple_channels=self.couple_channels,
            scale=self.scale,
            training=self.training,
            key=key,
        )

    def extra_repr(self) -> str:
        return (
            f"p={self.p}, block_size={self.block_size}, inplace={self.inplace}, "
            f"couple_channels={self.couple_channels}, scale={self.scale!r}"
        )


class DropBlock1d(_DropBlock):
    r"""Zero runs of a sequence, so that a share ``p`` of it is zero, and scale the rest.

    :func:`thinned.functional.drop_block1d` as a module.

    .. math:: y_i = \begin{cases} 0 & \text{a block covers } i \\ s x_i & \text{otherwise} \end{cases}

    Args:
        p: the expected share of dropped positions, in [0, 1].
        block_size: a block's size, odd or even, or a sequence of one size; cut to the size of the map.
        inplace: write the result over the input.
        couple_channels: one mask for all channels of a sample; by default each channel has its own.
        scale: ``"expected"``, divide by the expected share of kept positions, or ``"counted"``, by the share
            counted in each sample's own mask, as the paper does.

    Shape:
        ``(N, C, L)`` or ``(C, L)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, a block size below 1, or another
            ``scale``.
        TypeError: ``block_size`` is no integer.

    Source: Ghiasi, Lin & Le, "DropBlock: a regularization method for convolutional networks", NeurIPS 2018,
    sections 3 and 3.1.

    >>> import thinned
    >>> thinned.DropBlock1d(0.5, 3)(torch.ones(1, 1, 9), key=thinned.Key(6)).int()
    tensor([[[0, 0, 0, 0, 0, 0, 2, 2, 2]]], dtype=torch.int32)
    """

    _function = staticmethod(F.drop_block1d)
    _dims = 1


class DropBlock2d(_DropBlock):
    r"""Zero blocks of a feature map, so that a share ``p`` of it is zero, and scale the rest.

    :func:`thinned.functional.drop_block2d` as a module.

    .. math:: y_i = \begin{cases} 0 & \text{a block covers } i \\ s x_i & \text{otherwise} \end{cases}

    Args:
        p: the expected share of dropped positions, in [0, 1].
        block_size: a block's size, odd or even, or its height and width; cut to the size of the map.
        inplace: write the result over the input.
        couple_channels: one mask for all channels of a sample; by default each channel has its own.
        scale: ``"expected"``, divide by the expected share of kept positions, or ``"counted"``, by the share
            counted in each sample's own mask, as the paper does.

    Shape:
        ``(N, C, H, W)`` or ``(C, H, W)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, a block size below 1 or not one for each dimension, or
            another ``scale``.
        TypeError: ``block_size`` is no integer.

    Source: Ghiasi, Lin & Le, "DropBlock: a regularization method for convolutional networks", NeurIPS 2018,
    sections 3 and 3.1.

    >>> import thinned
    >>> thinned.DropBlock2d(0.5, 2)(torch.ones(1, 1, 3, 5), key=thinned.Key(6))[0, 0].int()
    tensor([[0, 0, 0, 0, 0],
            [0, 0, 0, 0, 0],
            [2, 2, 2, 2, 2]], dtype=torch.int32)
    """

    _function = staticmethod(F.drop_block2d)
    _dims = 2


class DropBlock3d(_DropBlock):
    r"""Zero boxes of a volume, so that a share ``p`` of it is zero, and scale the rest.

    :func:`thinned.functional.drop_block3d` as a module.

    .. math:: y_i = \begin{cases} 0 & \text{a block covers } i \\ s x_i & \text{otherwise} \end{cases}

    Args:
        p: the expected share of dropped positions, in [0, 1].
        block_size: a block's size, odd or even, or its depth, height and width; cut to the size of the map.
        inplace: write the result over the input.
        couple_channels: one mask for all channels of a sample; by default each channel has its own.
        scale: ``"expected"``, divide by the expected share of kept positions, or ``"counted"``, by the share
            counted in each sample's own mask, as the paper does.

    Shape:
        ``(N, C, D, H, W)`` or ``(C, D, H, W)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, a block size below 1 or not one for each dimension, or
            another ``scale``.
        TypeError: ``block_size`` is no integer.

    Source: Ghiasi, Lin & Le, "DropBlock: a regularization method for convolutional networks", NeurIPS 2018,
    sections 3 and 3.1.

    >>> import thinned
    >>> thinned.DropBlock3d(0.5, 2)(torch.ones(1, 1, 2, 3, 4), key=thinned.Key(1))[0, 0, 0].int()
    tensor([[0, 0, 2, 2],
            [0, 0, 0, 0],
            [2, 2, 0, 0]], dtype=torch.int32)
    """

    _function = staticmethod(F.drop_block3d)
    _dims = 3
