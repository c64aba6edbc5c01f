"""Dropout of square blocks of a feature map."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import index
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from thinned import op
from thinned.geometry import Geometry, shared
from thinned.keys import Key
from thinned.layers._arguments import check_input, key_for, threshold_and_scale
from thinned.nested import shape_of
from thinned.op.from_key import apply_linear
from thinned.torch_state import constant_when_compiled, is_legacy_batched, transforming

__all__ = [
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "Scale",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
]

Scale = Literal["expected", "counted"]


def drop_block1d(
    input: Tensor,
    p: float,
    block_size: int | Sequence[int],
    inplace: bool = False,
    *,
    couple_channels: bool = False,
    scale: Scale = "expected",
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Zero runs of ``block_size`` elements, so that a share ``p`` of all elements is zero.

    :func:`drop_block2d` in one dimension: with ``L`` elements there are ``L - b + 1`` places for a block of
    ``b``; each holds one with probability ``γ``, and

    .. math:: y_i = \begin{cases} 0 & \text{a block covers } i \\ s x_i & \text{otherwise} \end{cases}

    Args:
        input: a floating-point or complex tensor of shape ``(N, C, L)`` or ``(C, L)``.
        p: the expected share of dropped positions, in [0, 1].
        block_size: a block's size; cut to the size of the sequence.
        inplace: write the result over ``input``.
        couple_channels: one mask for all channels of a sample; by default each channel has its own.
        scale: ``"expected"`` or ``"counted"``, as for :func:`drop_block2d`.
        training: False returns ``input`` itself, and so do ``p = 0`` and an ``input`` without elements.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys needs a batch of samples.

    Returns:
        As :func:`drop_block2d`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`drop_block2d`.

    Source: Ghiasi, Lin & Le, "DropBlock: a regularization method for convolutional networks", NeurIPS 2018,
    section 3.

    >>> import torch, thinned
    >>> thinned.functional.drop_block1d(torch.ones(2, 1, 9), 0.5, 3, key=thinned.Key(6)).int()
    tensor([[[0, 0, 0, 0, 0, 0, 2, 2, 2]],
    <BLANKLINE>
            [[2, 0, 0, 0, 0, 0, 0, 0, 2]]], dtype=torch.int32)
    """
    return _drop_block(1, input, p, block_size, inplace, couple_channels, scale, training, key)


def drop_block2d(
    input: Tensor,
    p: float,
    block_size: int | Sequence[int],
    inplace: bool = False,
    *,
    couple_channels: bool = False,
    scale: Scale = "expected",
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Zero blocks of a feature map, so that a share ``p`` of it is zero, and scale the rest.

    A block of ``b_h × b_w`` fits into an ``H × W`` map at ``(H - b_h + 1)(W - b_w + 1)`` places. Each place
    holds one with probability ``γ``, independently, and a position is dropped if any block covers it:

    .. math:: y_i = \begin{cases} 0 & \text{a block covers } i \\ s x_i & \text{otherwise} \end{cases}
        \qquad \gamma \text{ solves } \frac{1}{HW} \sum_i (1-\gamma)^{n(i)} = 1 - p

    ``n(i)`` is at how many places a block covers ``i``. So ``p`` is the expected share of dropped positions,
    as closely as a ``γ`` of 32 bits can; the paper's ``γ = p HW / (b² (H-b+1)(W-b+1))`` takes no account of
    blocks that overlap, and drops less. Positions near a border lie under fewer places and are dropped less
    often than others.

    With ``scale="expected"``, ``s = 1/q`` for the expected share ``q`` of kept positions: one number for all
    masks, so that the mean of a map keeps its expectation if ``x`` has one for all positions, and no sample
    depends on another. With ``scale="counted"``, ``s`` is the paper's ``count(M) / count_ones(M)``, counted
    in each sample's own mask over all its channels. With neither is ``E[y_i] = x_i`` at each position,
    because all positions have one scale.

    Args:
        input: a floating-point or complex tensor of shape ``(N, C, H, W)`` or ``(C, H, W)``.
        p: the expected share of dropped positions, in [0, 1].
        block_size: a block's size, odd or even, or its height and width; cut to the size of the map.
        inplace: write the result over ``input``.
        couple_channels: one mask for all channels of a sample; by default each channel has its own.
        scale: ``"expected"`` or ``"counted"``.
        training: False returns ``input`` itself, and so do ``p = 0`` and an ``input`` without elements.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys needs a batch of samples.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is ``+0``, NaN and infinity included, and so is its gradient.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, a block size below 1, not a size for each dimension, another
            ``scale``, or ``input`` of another number of dimensions.
        TypeError: ``block_size`` is no integer, or as :func:`~thinned.functional.dropout`.
        RuntimeError: as :func:`~thinned.functional.dropout`, or a batch of keys without a batch of samples.

    Source: Ghiasi, Lin & Le, "DropBlock: a regularization method for convolutional networks", NeurIPS 2018,
    sections 3 and 3.1; the order of the arguments is torchvision's.

    >>> import torch, thinned
    >>> thinned.functional.drop_block2d(torch.ones(1, 1, 5, 7), 0.3, (2, 3), key=thinned.Key(4))
    tensor([[[[1.4286, 1.4286, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
              [1.4286, 1.4286, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
              [1.4286, 1.4286, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
              [1.4286, 1.4286, 1.4286, 1.4286, 1.4286, 1.4286, 1.4286],
              [1.4286, 1.4286, 1.4286, 1.4286, 1.4286, 1.4286, 1.4286]]]])
    """
    return _drop_block(2, input, p, block_size, inplace, couple_channels, scale, training, key)


def drop_block3d(
    input: Tensor,
    p: float,
    block_size: int | Sequence[int],
    inplace: bool = False,
    *,
    couple_channels: bool = False,
    scale: Scale = "expected",
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Zero boxes of a volume, so that a share ``p`` of it is zero, and scale the rest.

    :func:`drop_block2d` in three dimensions: a box fits at ``(D - b_d + 1)(H - b_h + 1)(W - b_w + 1)``
    places; each holds one with probability ``γ``, and

    .. math:: y_i = \begin{cases} 0 & \text{a box covers } i \\ s x_i & \text{otherwise} \end{cases}

    Args:
        input: a floating-point or complex tensor of shape ``(N, C, D, H, W)`` or ``(C, D, H, W)``.
        p: the expected share of dropped positions, in [0, 1].
        block_size: a block's size, or its depth, height and width; cut to the size of the volume.
        inplace: write the result over ``input``.
        couple_channels: one mask for all channels of a sample; by default each channel has its own.
        scale: ``"expected"`` or ``"counted"``, as for :func:`drop_block2d`.
        training: False returns ``input`` itself, and so do ``p = 0`` and an ``input`` without elements.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys needs a batch of samples.

    Returns:
        As :func:`drop_block2d`.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`drop_block2d`.

    Source: Ghiasi, Lin & Le, "DropBlock: a regularization method for convolutional networks", NeurIPS 2018,
    section 3; the order of the arguments is torchvision's.

    >>> import torch, thinned
    >>> thinned.functional.drop_block3d(torch.ones(1, 1, 2, 3, 4), 0.5, 2, key=thinned.Key(1))[0, 0, 0].int()
    tensor([[0, 0, 2, 2],
            [0, 0, 0, 0],
            [2, 2, 0, 0]], dtype=torch.int32)
    """
    return _drop_block(3, input, p, block_size, inplace, couple_channels, scale, training, key)


def _drop_block(
    dims: int,
    input: Tensor,
    p: float,
    block_size: int | Sequence[int],
    inplace: bool,
    couple_channels: bool,
    scale: Scale,
    training: bool,
    key: Key | None,
) -> Tensor:
    name = f"drop_block{dims}d"
    T, _ = threshold_and_scale(p)
    blocks = _blocks(dims, block_size)
    if scale not in ("expected", "counted"):
        raise ValueError(f"scale has to be 'expected' or 'counted', but got {scale!r}")
    check_input(name, input, key, dense=training and p != 0)
    channel = input.dim() - dims - 1
    if channel not in (0, 1):
        raise ValueError(
            f"{name} needs an input of {dims + 2} dimensions, or of {dims + 1} for one sample, "
            f"got one of shape {shape_of(input)}"
        )
    if key is not None and key.bits.dim() and not channel:
        raise RuntimeError(
            f"keys of shape {tuple(key.shape)} do not fit one sample of shape {tuple(input.shape)}; "
            f"accepted: one key of shape (), or an input of {dims + 2} dimensions"
        )
    if not training or p == 0 or not input.numel():
        return input

    sizes = tuple(index(size) for size in input.shape[-dims:])
    blocks = tuple(min(block, size) for block, size in zip(blocks, sizes, strict=True))
    seedless, share = _solve(index(T), *sizes, *blocks)
    masks = (*input.shape[:channel], 1 if couple_channels else input.shape[channel])
    own = tuple(range(channel, input.dim()))
    layout = torch.empty_like(input, device="meta").stride()
    channels_last = layout[channel] == 1 and not input.is_contiguous()

    def linear(x: Tensor, key: Key) -> Tensor:
        keep = _keep(key, masks, sizes, blocks, seedless, channels_last)
        if scale == "expected":
            y = _masked(x, keep, 1 / share if share else 0.0)
        else:
            dtype = torch.float64 if x.dtype in (torch.float64, torch.complex128) else torch.float32
            kept = keep.sum(own, keepdim=True).neg().clamp(min=1).to(dtype)
            y = _masked(x, keep, math.prod(keep.shape[channel:]) / kept)
        if y.stride() != layout:  # a gradient takes the input's memory format too
            y = y.new_empty_strided(y.shape, layout).copy_(y)
        return y

    y = apply_linear(linear, input, key_for(input, key))
    return input.copy_(y) if inplace else y


def _blocks(dims: int, block_size: int | Sequence[int]) -> tuple[int, ...]:
    try:
        blocks = tuple(block_size) if isinstance(block_size, Sequence) else (index(block_size),) * dims
        blocks = tuple(index(block) for block in blocks)
    except TypeError:
        raise TypeError(f"block_size must be an integer or {dims} of them, got {block_size!r}") from None
    if len(blocks) != dims or min(blocks) < 1:
        raise ValueError(
            f"block_size has to be an integer of at least 1, or {dims} of them, but got {block_size!r}"
        )
    return blocks


def _keep(
    key: Key,
    masks: tuple[int, ...],
    sizes: tuple[int, ...],
    blocks: tuple[int, ...],
    seedless: int,
    channels_last: bool,
) -> Tensor:
    """-1, all bits set, where no block lies and 0 elsewhere, in an int8 tensor of shape ``(*masks, *sizes)``.

    A block's seed is its first corner. In each line, the ``b - 1`` places after the last seed's hold none,
    and so does a margin before the first line: shifts of the flat tensor bring a block into no other line
    and no other map. A block grows in about log2(b) shifts, each of which uses up its part of the margin.
    """
    shape, blocks = (*masks, *sizes), (1,) * len(masks) + blocks
    places = tuple(size - block + 1 for size, block in zip(shape, blocks, strict=True))
    strides, base = shared(places, (), key.bits.dim())
    channel = len(masks) - 1
    if channels_last:
        places, strides, shape, blocks = (
            (*each[:channel], *each[channel + 1 :], each[channel])
            for each in (places, strides, shape, blocks)
        )
    shifts, line = [], 1
    for size, block in zip(reversed(shape), reversed(blocks), strict=True):
        width = 1
        while width < block:
            more = min(width, block - width)
            shifts.append(more * line)
            width += more
        line *= size
    seedless_places = op.keep_mask(key.bits, places, Geometry(strides, base), seedless).to(torch.int8)
    flat = seedless_places.new_full((sum(shifts) + line,), -1)
    flat[sum(shifts) :].view(shape)[tuple(slice(n) for n in places)].copy_(seedless_places.neg())
    for shift in shifts:
        flat = flat[shift:] & flat[:-shift]
    keep = flat.view(shape)
    return keep.movedim(-1, channel) if channels_last else keep


def _masked(x: Tensor, keep: Tensor, factor: float | Tensor) -> Tensor:
    """``x * factor``, rounded once, where ``keep`` is -1, and +0 where it is 0."""
    if x.is_complex():  # two parts, so that an infinite one leaves the other as it is
        if isinstance(factor, Tensor):
            factor = factor.unsqueeze(-1)
        parts = torch.view_as_real(x.resolve_conj())
        return torch.view_as_complex(_masked(parts, keep.unsqueeze(-1), factor))
    if transforming() or is_legacy_batched(x):
        return torch.where(keep != 0, (x * factor).to(x.dtype), 0)
    # Faster, and what is made here is written over.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = keep.to(integer)
    bits = bits.bitwise_and_(x.view(integer)) if bits.shape == x.shape else bits & x.view(integer)
    return bits.view(x.dtype).mul_(factor)


@constant_when_compiled
def _solve(T: int, *extents: int) -> tuple[int, float]:
    """The threshold of the seeds for the threshold ``T`` of the positions, and the share that it keeps.

    Args:
        T: ``(1 - p) * 2**32``.
        extents: the sizes of the map, then those of the block. They and ``T`` are integers one by one because
            that is what Dynamo can tell to be constant.
    """
    return _solve_cached(T, *extents)


@lru_cache(maxsize=1024)
def _solve_cached(T: int, *extents: int) -> tuple[int, float]:
    half = len(extents) // 2
    positions = Counter({1: 1})  # of each number of places that a block can cover them from
    for size, block in zip(extents[:half], extents[half:], strict=True):
        along = Counter(min(i + 1, size - i, block, size - block + 1) for i in range(size))
        product: Counter[int] = Counter()
        for n, count in positions.items():
            for m, times in along.items():
                product[n * m] += count * times
        positions = product
    total = positions.total()

    def kept(seedless: int) -> float:
        return math.fsum(count * (seedless / 2**32) ** n for n, count in positions.items()) / total

    low, high = 0, 2**32  # kept(low) <= T / 2**32 <= kept(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept(middle) >= T / 2**32 else (middle, high)
    nearest = min(low, high, key=lambda seedless: abs(kept(seedless) - T / 2**32))
    return nearest, kept(nearest)


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
        scale: Scale = "expected",
    ) -> None:
        super().__init__()
        self._function(torch.empty((0,) * (self._dims + 2)), p, block_size, scale=scale)
        self.p = p
        self.block_size = block_size
        self.inplace = inplace
        self.couple_channels = couple_channels
        self.scale = scale

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
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

    _function = staticmethod(drop_block1d)
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

    _function = staticmethod(drop_block2d)
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

    _function = staticmethod(drop_block3d)
    _dims = 3
