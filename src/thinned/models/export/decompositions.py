"""thinned's operations in plain integer operations of PyTorch, for those who translate exported graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thinned.backends.portable import fold_many
from thinned.philox import high32, low32, philox4x32

__all__ = ["decompositions"]


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """A table for :meth:`torch.export.ExportedProgram.run_decompositions`, after which no node is thinned's.

    In exported graphs a mask is one node, ``thinned::masked_affine``, which only PyTorch can run. With this
    table it becomes integer operations (multiply, add, shift, and, or, exclusive or) whose masks are bit for
    bit the same, and which ONNX has too, so that ``torch.onnx.export`` can take the program. Shapes may be
    dynamic. A mask becomes some 170 nodes, and the key that :class:`thinned.Keyed` makes for it has about as
    many; give ``torch.onnx.export`` ``optimize=False`` if it takes long. While a mask is made it
    takes up to 32 bytes an element.

    Masks without a key are not in it, since they are drawn by ``thinned::draw_key`` from PyTorch's generator,
    which no other runtime has: give keys by :class:`thinned.Keyed`. ONNX lacks the inverse error function
    that the normal numbers of ``GaussianDropout`` and its like are made by.

    Returns:
        Functions for ``thinned::masked_affine``, ``thinned::keep_mask``, ``thinned::uniform`` and
        ``thinned::fold``. As the table has nothing of PyTorch's, it leaves all other operations as they are;
        to lower them too, pass ``{**torch.export.default_decompositions(), **thinned.decompositions()}``.

    >>> import torch, thinned
    >>> table = thinned.decompositions()
    >>> [operation.name() for operation in table]
    ['thinned::masked_affine', 'thinned::keep_mask', 'thinned::uniform', 'thinned::fold']
    >>> x, key, T = torch.ones(6), torch.tensor(7), 2**31
    >>> table[torch.ops.thinned.masked_affine.default](x, key, [1], 0, T, 2.0, 0.0, 0.0)
    tensor([0., 0., 0., 2., 2., 2.])
    """
    return {
        torch.ops.thinned.masked_affine.default: _masked_affine,
        torch.ops.thinned.keep_mask.default: _keep_mask,
        torch.ops.thinned.uniform.default: _uniform,
        torch.ops.thinned.fold.default: fold_many,
    }


def _masked_affine(
    x: Tensor,
    key: Tensor,
    strides: Sequence[int],
    base: int,
    T: int,
    scale: float,
    shift: float,
    fill: float,
) -> Tensor:
    keep = _keep_mask(key, x.shape, strides, base, T)
    if x.is_complex():
        parts = _select(keep.unsqueeze(-1), torch.view_as_real(x.resolve_conj()), scale, shift, fill)
        return torch.view_as_complex(parts)
    return _select(keep, x, scale, shift, fill)


def _select(keep: Tensor, x: Tensor, scale: float, shift: float, fill: float) -> Tensor:
    value = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32) * scale
    if shift:
        value = value + shift
    y = torch.where(keep, value.to(x.dtype), torch.full((), fill, dtype=x.dtype, device=x.device))
    like = torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)


def _keep_mask(key: Tensor, shape: Sequence[int], strides: Sequence[int], base: int, T: int) -> Tensor:
    if T == 0 or T == 2**32:
        return torch.full(shape, T != 0, dtype=torch.bool, device=key.device)

    def below(blocks: Tensor, keys: Tensor) -> Tensor:
        # A power of two of planes; those after the last bit of T that is set decide nothing.
        count = 1 << (31 - (T & -T).bit_length() + 1).bit_length()
        shifts = 31 - torch.arange(count, device=blocks.device).reshape(-1, 1, 1, 1)
        limit = (torch.bitwise_right_shift(torch.full_like(shifts, T), shifts) & 1) * _ONES
        zeros = _planes(blocks, keys, count) ^ _ONES
        less, same = zeros & limit, zeros ^ limit
        while count > 1:  # of two neighbours, the second decides where the first is the same as T
            less, same = less[::2] | same[::2] & less[1::2], same[::2] & same[1::2]
            count //= 2
        return _bits(less.unsqueeze(-1)).flatten()

    return _at_positions(below, key, shape, strides, base).to(torch.bool)


def _uniform(key: Tensor, shape: Sequence[int], strides: Sequence[int], base: int) -> Tensor:
    def numbers(blocks: Tensor, keys: Tensor) -> Tensor:
        planes = _planes(blocks, keys, 32).unsqueeze(-1)
        number = planes.new_zeros(())
        for words in planes.unbind():  # one after the other, for the sake of memory
            number = number * 2 + _bits(words)
        return number.flatten()

    return (_at_positions(numbers, key, shape, strides, base) - 2**31).to(torch.int32)


_ONES = 0xFFFFFFFF


def _planes(blocks: Tensor, keys: Tensor, count: int) -> Tensor:
    """The first bit planes of blocks, as words in ``[count, keys, blocks, 4]``."""
    planes = torch.arange(count, device=blocks.device).reshape(-1, 1, 1)
    words = philox4x32((low32(blocks), high32(blocks), planes, 0), keys.reshape(-1, 1), rounds=7)
    return torch.stack(words, dim=-1)


def _bits(words: Tensor) -> Tensor:
    """The bits of ``[..., 1]`` words, each as 0 or 1, in ``[..., 32]``."""
    # Not words >> lanes, an operation of another name, which torch.onnx does not know.
    return torch.bitwise_right_shift(words, torch.arange(32, device=words.device)) & 1


def _at_positions(
    of_blocks: Callable[[Tensor, Tensor], Tensor],
    key: Tensor,
    shape: Sequence[int],
    strides: Sequence[int],
    base: int,
) -> Tensor:
    """What a function gives for all blocks of the geometry, at the mask index of each element.

    ``of_blocks(blocks, keys)`` gives ``[len(keys) * len(blocks) * 128]`` numbers.
    """
    if any(type(size) is int and size == 0 for size in shape):
        return torch.zeros(shape, dtype=torch.int64, device=key.device)
    start = base % 128
    count = (start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) // 128 + 1
    values = of_blocks(torch.arange(count, device=key.device) + base // 128, key.flatten())
    # Key after key, so that a step along a dimension of the keys is a step over all blocks of one.
    steps, step = list(strides), count * 128
    for dim in range(key.dim() - 1, -1, -1):
        steps[dim] = strides[dim] + step
        step = step * shape[dim]
    index = torch.full((), start, dtype=torch.int64, device=key.device)
    for n, s in zip(shape, steps, strict=True):
        index = index.unsqueeze(-1) + torch.arange(n, device=key.device) * s
    return values[index]
