"""The registered operations in plain integer operations of PyTorch, for translating exported graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thinned.backends import portable
from thinned.backends.strata import name, shifted

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
        torch.ops.thinned.fold.default: portable.fold,
    }


def _masked_affine(
    x: Tensor, key: Tensor, strides: Sequence[int], base: int, T: int, scale: float, shift: float, fill: float
) -> Tensor:
    keep = _keep_mask(key, x.shape, strides, base, T)
    if x.is_complex():
        parts = torch.view_as_real(x.resolve_conj())
        return torch.view_as_complex(_select(keep.unsqueeze(-1), parts, scale, shift, fill))
    return _select(keep, x, scale, shift, fill)


def _select(keep: Tensor, x: Tensor, *constants: float) -> Tensor:
    y, like = portable.select(keep, x, *constants), torch.empty_like(x)
    return y if y.stride() == like.stride() else like.copy_(y)


def _keep_mask(key: Tensor, shape: Sequence[int], strides: Sequence[int], base: int, T: int) -> Tensor:
    if T == 0 or T == 2**32:
        return torch.full(shape, T != 0, dtype=torch.bool, device=key.device)
    return _at_positions(partial(portable.below, T=T), key, shape, strides, base, torch.bool)


def _uniform(
    key: Tensor,
    shape: Sequence[int],
    strides: Sequence[int],
    base: int,
    draw: Tensor | None = None,
    strata: int = 1,
) -> Tensor:
    u = _at_positions(portable.numbers, key, shape, strides, base, torch.int32)
    if draw is None:
        return u
    v = _at_positions(portable.numbers, portable.fold(key, name(key)), shape, strides, base, torch.int32)
    return shifted(u, v, draw, strata)


def _at_positions(
    of_blocks: Callable[[Tensor, Tensor], Tensor],
    key: Tensor,
    shape: Sequence[int],
    strides: Sequence[int],
    base: int,
    dtype: torch.dtype,
) -> Tensor:
    """The values of all blocks of the geometry, gathered at the mask index of each element.

    The rows that :mod:`thinned.backends.rows` makes need strided views, which ONNX has not.
    """
    if any(type(size) is int and size == 0 for size in shape):
        return torch.zeros(shape, dtype=dtype, device=key.device)
    start = base % 128
    count = (start + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))) // 128 + 1
    blocks = torch.arange(count, device=key.device) + base // 128
    values = of_blocks(blocks, key.reshape(-1, 1)).flatten()
    # The values of one key follow those of another: a step along a dimension of keys skips a key's blocks.
    steps, step = list(strides), count * 128
    for dim in range(key.dim() - 1, -1, -1):
        steps[dim] = strides[dim] + step
        step = step * shape[dim]
    index = torch.full((), start, dtype=torch.int64, device=key.device)
    for n, s in zip(shape, steps, strict=True):
        index = index.unsqueeze(-1) + torch.arange(n, device=key.device) * s
    return values[index]
