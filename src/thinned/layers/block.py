"""Dropout of blocks of a feature map: DropBlock1d, DropBlock2d, DropBlock3d."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from operator import index
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary

from thinned import op
from thinned.checks import check_real
from thinned.distributed.shards import is_dtensor
from thinned.geometry import Geometry, shared
from thinned.keys import Key, as_key
from thinned.layers._arguments import drops, key_for, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.nested import shape_of
from thinned.op.from_key import apply_linear
from thinned.op.noise import normal, opmath
from thinned.torch_state import compiling, constant_when_compiled, is_eager

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


class _Options(NamedTuple):
    couple_channels: bool
    scale: Scale
    batchwise: bool
    scale_by_keep: bool
    with_noise: bool
    gamma_scale: float


class _DropBlock(Layer):
    _dims: ClassVar[int]
    # On the class, so that layers pickled without them still run.
    batchwise: bool = False
    scale_by_keep: bool = True
    with_noise: bool = False
    gamma_scale: float = 1.0

    def __init__(
        self,
        p: float = 0.1,
        block_size: int | Sequence[int] = 7,
        inplace: bool = False,
        *,
        couple_channels: bool = False,
        scale: Scale = "expected",
        batchwise: bool = False,
        scale_by_keep: bool = True,
        with_noise: bool = False,
        gamma_scale: float = 1.0,
        drop_prob: float | None = None,
        fast: bool = True,  # noqa: ARG002
    ) -> None:
        if drop_prob is not None and p != 0.1:
            name = type(self).__name__
            raise TypeError(f"{name}() got p={p} and drop_prob={drop_prob}, two names for one argument")
        super().__init__(p if drop_prob is None else drop_prob)
        self.block_size = block_size
        self.inplace = inplace
        self.couple_channels = couple_channels
        self.scale: Scale = scale
        self.batchwise = batchwise
        self.scale_by_keep = scale_by_keep
        self.with_noise = with_noise
        self.gamma_scale = gamma_scale
        _check_blocks(self._dims, block_size)
        _check_options(inplace, scale, gamma_scale)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        function = (drop_block1d, drop_block2d, drop_block3d)[self._dims - 1]
        return function(
            input,
            self.p,
            self.block_size,
            self.inplace,
            couple_channels=self.couple_channels,
            scale=self.scale,
            batchwise=self.batchwise,
            scale_by_keep=self.scale_by_keep,
            with_noise=self.with_noise,
            gamma_scale=self.gamma_scale,
            training=self.training,
            key=key,
        )


def drop_block2d(
    input: Tensor,
    p: float = 0.1,
    block_size: int | Sequence[int] = 7,
    inplace: bool = False,
    *,
    couple_channels: bool = False,
    scale: Scale = "expected",
    batchwise: bool = False,
    scale_by_keep: bool = True,
    with_noise: bool = False,
    gamma_scale: float = 1.0,
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Zero blocks of a feature map, so that a share ``p`` of the map is zero, and scale the rest.

    A block of ``b_h × b_w`` fits into an ``H × W`` map at ``(H - b_h + 1)(W - b_w + 1)`` places. Each place
    holds a block with probability ``γ``, independently, and a position is dropped if any block covers it:

    .. math:: y_i = \begin{cases} 0 & \text{a block covers } i \\ s x_i & \text{otherwise} \end{cases}
        \qquad \gamma \text{ solves } \frac{1}{HW} \sum_i (1-\gamma)^{n(i)} = 1 - p

    A block covers ``i`` from ``n(i)`` places. So ``p`` is the expected share of dropped positions, to the 32
    bits of ``γ``; the paper's ``γ = p HW / (b² (H-b+1)(W-b+1))`` drops less, because it neglects that blocks
    overlap. Positions near a border have a smaller ``n(i)`` and are dropped less often than others.

    With ``scale="expected"``, ``s = 1/q`` for the expected share ``q`` of kept positions: one number for all
    masks, so that no sample depends on another, and the mean of a map keeps its expectation if all positions
    of ``x`` have the same. With ``scale="counted"``, ``s`` is the paper's ``count(M) / count_ones(M)``,
    counted in each sample's own mask over all its channels. Neither gives ``E[y_i] = x_i`` at each position,
    because all positions have one scale.

    Args:
        input: a floating-point or complex tensor of shape ``(N, C, H, W)`` or ``(C, H, W)``.
        p: the expected share of dropped positions, in [0, 1].
        block_size: a block's size, odd or even, or its height and width; cut to the size of the map.
        inplace: write the result over ``input``.
        couple_channels: one mask for all channels of a sample; by default each channel has its own.
        scale: ``"expected"`` or ``"counted"``.
        batchwise: one mask for all samples, unless ``key`` is a batch of keys.
        scale_by_keep: False leaves what is kept unscaled, ``s = 1``.
        with_noise: fill blocks with standard normal noise instead of zeros, and leave the rest unscaled. The
            noise is a function of ``key.fold("noise")`` and of a position in the mask: what shares a mask
            shares the noise.
        gamma_scale: a factor of ``p``, such as 0.25 for an earlier stage of a network whose ``p`` is
            scheduled as one number. The expected share of dropped positions is ``min(1, p * gamma_scale)``.
        training: False returns ``input`` itself. So do ``p = 0``, ``gamma_scale = 0`` and an ``input``
            without elements.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys needs a batch of samples.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is ``+0`` or noise, NaN and infinity included, and its gradient is ``+0``.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, a block size below 1, not a size for each dimension, another
            ``scale``, a ``gamma_scale`` below 0, infinite or NaN, or ``input`` of another number of
            dimensions.
        TypeError: ``block_size`` is no integer, ``inplace`` is a float, or as
            :func:`~thinned.functional.dropout`.
        RuntimeError: as :func:`~thinned.functional.dropout`, or a batch of keys without a batch of samples.
        NotImplementedError: ``with_noise`` for a complex ``input``.

    Source: Ghiasi, Lin & Le, "DropBlock: a regularization method for convolutional networks", NeurIPS 2018,
    sections 3 and 3.1, and ``p`` and ``block_size`` of section 4.1; the order of the arguments is
    torchvision's, and the last four options are timm's.

    >>> import torch, thinned
    >>> thinned.functional.drop_block2d(torch.ones(1, 1, 5, 7), 0.3, (2, 3), key=thinned.Key(4))
    tensor([[[[1.4286, 1.4286, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
              [1.4286, 1.4286, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
              [1.4286, 1.4286, 0.0000, 0.0000, 0.0000, 0.0000, 0.0000],
              [1.4286, 1.4286, 1.4286, 1.4286, 1.4286, 1.4286, 1.4286],
              [1.4286, 1.4286, 1.4286, 1.4286, 1.4286, 1.4286, 1.4286]]]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(drop_block2d, locals())
    options = _Options(couple_channels, scale, batchwise, scale_by_keep, with_noise, gamma_scale)
    return _drop_block(2, input, p, block_size, inplace, options, training, key)


class DropBlock2d(_DropBlock):
    """Drop square blocks of a feature map, for ``(N, C, H, W)`` or ``(C, H, W)``.

    Use this layer after convolutions, where the neighbours of a single dropped pixel tell its value. The
    paper has it in the last two stages of ResNet-50 with ``block_size=7``, and raises p from 0 to 0.1 over
    training: :func:`thinned.schedules.linear`. :class:`Dropout2d` drops whole channels instead.

    :func:`thinned.functional.drop_block2d` has the formula.

    Args:
        drop_prob: timm's name for ``p``; TypeError if both are given.
        fast: accepted for timm, whose two algorithms are the same law here.

    Source: Ghiasi et al., NeurIPS 2018, sections 3 and 3.1.

    >>> import thinned
    >>> y = thinned.DropBlock2d(0.3, 3)(torch.ones(8, 8, 16, 16), key=thinned.Key(6))
    >>> y.eq(0).float().mean()
    tensor(0.3025)
    """

    _dims = 2


def drop_block1d(
    input: Tensor,
    p: float = 0.1,
    block_size: int | Sequence[int] = 7,
    inplace: bool = False,
    *,
    couple_channels: bool = False,
    scale: Scale = "expected",
    batchwise: bool = False,
    scale_by_keep: bool = True,
    with_noise: bool = False,
    gamma_scale: float = 1.0,
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    """Zero runs of ``block_size`` elements: :func:`drop_block2d` in one dimension.

    ``input`` has shape ``(N, C, L)`` or ``(C, L)``. ``block_size`` is the length of a run, or a sequence of
    that one number; it is cut to ``L``. All else is as for :func:`drop_block2d`.

    Source: Ghiasi et al., NeurIPS 2018, section 3.

    >>> import torch, thinned
    >>> thinned.functional.drop_block1d(torch.ones(1, 1, 9), 0.5, 3, key=thinned.Key(6))
    tensor([[[0., 0., 0., 0., 0., 0., 2., 2., 2.]]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(drop_block1d, locals())
    options = _Options(couple_channels, scale, batchwise, scale_by_keep, with_noise, gamma_scale)
    return _drop_block(1, input, p, block_size, inplace, options, training, key)


class DropBlock1d(_DropBlock):
    """Drop runs of a signal, for ``(N, C, L)`` or ``(C, L)``.

    Use this layer after convolutions of a signal such as audio, where neighbouring places are alike.
    :class:`Dropout1d` drops whole channels instead. In recurrent networks use :class:`LockedDropout`.

    :func:`thinned.functional.drop_block1d` has the formula.

    Source: Ghiasi et al., NeurIPS 2018, sections 3 and 3.1.

    >>> import thinned
    >>> y = thinned.DropBlock1d(0.3, 3)(torch.ones(8, 8, 16), key=thinned.Key(6))
    >>> y.eq(0).float().mean()
    tensor(0.3008)
    """

    _dims = 1


def drop_block3d(
    input: Tensor,
    p: float = 0.1,
    block_size: int | Sequence[int] = 7,
    inplace: bool = False,
    *,
    couple_channels: bool = False,
    scale: Scale = "expected",
    batchwise: bool = False,
    scale_by_keep: bool = True,
    with_noise: bool = False,
    gamma_scale: float = 1.0,
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    """Zero boxes of a volume: :func:`drop_block2d` in three dimensions.

    ``input`` has shape ``(N, C, D, H, W)`` or ``(C, D, H, W)``. ``block_size`` is a box's size, or its depth,
    height and width; it is cut to the size of the volume. All else is as for :func:`drop_block2d`.

    Source: Ghiasi et al., NeurIPS 2018, section 3.

    >>> import torch, thinned
    >>> thinned.functional.drop_block3d(torch.ones(1, 1, 2, 3, 4), 0.5, 2, key=thinned.Key(1))[0, 0, 0].int()
    tensor([[0, 0, 2, 2],
            [0, 0, 0, 0],
            [2, 2, 0, 0]], dtype=torch.int32)
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(drop_block3d, locals())
    options = _Options(couple_channels, scale, batchwise, scale_by_keep, with_noise, gamma_scale)
    return _drop_block(3, input, p, block_size, inplace, options, training, key)


class DropBlock3d(_DropBlock):
    """Drop cubes of a volume, for ``(N, C, D, H, W)`` or ``(C, D, H, W)``.

    Use this layer after convolutions of a volume or a video, where neighbouring voxels are alike.
    :class:`Dropout3d` drops whole channels instead.

    :func:`thinned.functional.drop_block3d` has the formula.

    Source: Ghiasi et al., NeurIPS 2018, sections 3 and 3.1.

    >>> import thinned
    >>> y = thinned.DropBlock3d(0.3, 3)(torch.ones(8, 8, 16, 16, 16), key=thinned.Key(6))
    >>> y.eq(0).float().mean()
    tensor(0.3007)
    """

    _dims = 3


def _drop_block(
    dims: int,
    input: Tensor,
    p: float,
    block_size: int | Sequence[int],
    inplace: bool,
    options: _Options,
    training: bool,
    key: Key | None,
) -> Tensor:
    name = f"drop_block{dims}d"
    T, _ = threshold_and_scale(p)
    blocks = _check_blocks(dims, block_size)
    _check_options(inplace, options.scale, options.gamma_scale)
    if options.gamma_scale != 1:
        p = min(1.0, p * options.gamma_scale)
        T, _ = threshold_and_scale(p)
    if not drops(name, input, p, training, key, dense=True):
        return input
    channel = input.dim() - dims - 1
    if channel not in (0, 1):
        raise ValueError(
            f"{name} needs an input of {dims + 2} dimensions, or of {dims + 1} for one sample, "
            f"got one of shape {shape_of(input)}"
        )
    if key is not None and as_key(key).bits.dim() and not channel:
        raise RuntimeError(
            f"keys of shape {tuple(key.shape)} do not fit one sample of shape {tuple(input.shape)}; "
            f"accepted: one key of shape (), or an input of {dims + 2} dimensions"
        )
    if not input.numel():
        return input
    if options.with_noise and input.is_complex():
        raise NotImplementedError(
            f"{name} with_noise=True is not implemented for complex tensors, got {input.dtype} of shape "
            f"{tuple(input.shape)}"
        )

    key = key_for(input, key, sample_dim=None if options.batchwise else 0)
    sizes = tuple(index(size) for size in input.shape[-dims:])
    blocks = tuple(min(block, size) for block, size in zip(blocks, sizes, strict=True))
    no_seed_T, kept_share = _seed_threshold(index(T), *sizes, *blocks)
    samples = 1 if options.batchwise and not key.bits.dim() else input.shape[0]
    masks = (*(samples,) * channel, 1 if options.couple_channels else input.shape[channel])
    sample_dims = tuple(range(channel, input.dim()))
    layout = torch.empty_like(input, device="meta").stride()
    channels_last = layout[channel] == 1 and not input.is_contiguous()

    def laid_out(y: Tensor) -> Tensor:  # a gradient takes the input's memory format too
        return y if y.stride() == layout or is_dtensor(y) else y.new_empty_strided(y.shape, layout).copy_(y)

    def linear(x: Tensor, key: Key) -> Tensor:
        keep = _keep(key, masks, sizes, blocks, no_seed_T, channels_last)
        factor: float | Tensor = 1.0
        if options.scale_by_keep and not options.with_noise:
            factor = 1 / kept_share if kept_share else 0.0
            if options.scale == "counted":
                kept = keep.sum(sample_dims, keepdim=True).neg().clamp(min=1).to(opmath(x.dtype))
                factor = op.shard_like(math.prod(keep.shape[channel:]) / kept, x)
        return laid_out(_masked(x, op.shard_like(keep, x), factor))

    def noisy(x: Tensor, key: Key) -> Tensor:
        keep = _keep(key, masks, sizes, blocks, no_seed_T, channels_last)
        noise = normal(key.fold("noise"), keep.shape, dtype=opmath(x.dtype)).to(x.dtype)
        return laid_out(torch.where(op.shard_like(keep, x) != 0, x, op.shard_like(noise, x)))

    y = apply_linear(linear, input, key, noisy if options.with_noise else None)
    return input.copy_(y) if inplace else y


def _check_blocks(dims: int, block_size: int | Sequence[int]) -> tuple[int, ...]:
    """A block's size in each dimension; raise for what is no size."""
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


def _check_options(inplace: bool, scale: str, gamma_scale: float) -> None:
    if isinstance(inplace, float):
        raise TypeError(
            f"inplace must be bool, got {inplace} of type float; timm's third argument, gamma_scale, is "
            f"passed by name here: gamma_scale={inplace}"
        )
    if scale not in ("expected", "counted"):
        raise ValueError(f"scale has to be 'expected' or 'counted', but got {scale!r}")
    check_real("gamma_scale", gamma_scale)
    if not 0 <= gamma_scale < math.inf:
        raise ValueError(f"gamma_scale has to be at least 0 and finite, but got {gamma_scale}")


def _keep(
    key: Key,
    masks: tuple[int, ...],
    sizes: tuple[int, ...],
    blocks: tuple[int, ...],
    no_seed_T: int,
    channels_last: bool,
) -> Tensor:
    """-1, all bits set, where no block lies and 0 elsewhere, in an int8 tensor of shape ``(*masks, *sizes)``.

    A block grows from its first corner, the seed, in about log2(b) shifts of the flat mask. It never grows
    into the next line, because the last ``b - 1`` places of a line hold no seed. Each shift shortens the flat
    mask, which therefore starts with a margin.
    """
    shape, blocks = (*masks, *sizes), (1,) * len(masks) + blocks
    places = tuple(size - block + 1 for size, block in zip(shape, blocks, strict=True))
    strides, base = shared(places, (), key.bits.dim())
    channel = len(masks) - 1
    if channels_last:
        places, strides, shape, blocks = (
            (*by_dim[:channel], *by_dim[channel + 1 :], by_dim[channel])
            for by_dim in (places, strides, shape, blocks)
        )
    shifts, line = [], 1
    for size, block in zip(reversed(shape), reversed(blocks), strict=True):
        width = 1
        while width < block:
            more = min(width, block - width)
            shifts.append(more * line)
            width += more
        line *= size
    no_seed = op.keep_mask(key.bits, places, Geometry(strides, base), no_seed_T).to(torch.int8)
    flat = no_seed.new_full((sum(shifts) + line,), -1)
    flat[sum(shifts) :].view(shape)[tuple(slice(n) for n in places)].copy_(no_seed.neg())
    for shift in shifts:
        flat = flat[shift:] & flat[:-shift]
    keep = flat.view(shape)
    return keep.movedim(-1, channel) if channels_last else keep


def _masked(x: Tensor, keep: Tensor, factor: float | Tensor) -> Tensor:
    """``x * factor``, rounded once, where ``keep`` is -1, and +0 where it is 0."""
    if x.is_complex():  # part by part: a complex product would make NaN beside an infinite part
        if isinstance(factor, Tensor):
            factor = factor.unsqueeze(-1)
        parts = torch.view_as_real(x.resolve_conj())
        return torch.view_as_complex(_masked(parts, keep.unsqueeze(-1), factor))
    # A traced or exported graph may be differentiated, as bits are not.
    eager = is_eager(x)
    if torch.compiler.is_exporting() or not (eager or compiling()):
        return torch.where(keep != 0, (x * factor).to(x.dtype), 0)
    # On the bits: 0.2 ms against 4.4 for torch.where, for a million float32 elements on one thread.
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    bits = keep.to(integer)
    in_place = eager and bits.shape == x.shape  # compiled code may have a subclass of Tensor for x
    bits = bits.bitwise_and_(x.view(integer)) if in_place else bits & x.view(integer)
    return bits.view(x.dtype).mul_(factor)


@constant_when_compiled
def _seed_threshold(T: int, *extents: int) -> tuple[int, float]:
    """``no_seed_T``, the threshold of the places that hold no seed, and the share of positions it keeps.

    Args:
        T: ``(1 - p) * 2**32``.
        extents: the sizes of the map, then those of the block, each an argument of its own: Dynamo knows
            integers to be constant, but no tuples.
    """
    return _seed_threshold_cached(T, *extents)


@lru_cache(maxsize=1024)
def _seed_threshold_cached(T: int, *extents: int) -> tuple[int, float]:
    half = len(extents) // 2
    positions = Counter({1: 1})  # how many positions blocks can cover from n places, for each n
    for size, block in zip(extents[:half], extents[half:], strict=True):
        along = Counter(min(i + 1, size - i, block, size - block + 1) for i in range(size))
        product: Counter[int] = Counter()
        for n, count in positions.items():
            for m, times in along.items():
                product[n * m] += count * times
        positions = product
    total = positions.total()

    def kept_share(no_seed_T: int) -> float:
        return math.fsum(count * (no_seed_T / 2**32) ** n for n, count in positions.items()) / total

    low, high = 0, 2**32  # kept_share(low) <= T / 2**32 <= kept_share(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if kept_share(middle) >= T / 2**32 else (middle, high)
    nearest = min(low, high, key=lambda no_seed_T: abs(kept_share(no_seed_T) - T / 2**32))
    return nearest, kept_share(nearest)
