"""The operations in plain PyTorch integer arithmetic: any device, and the fallback for all."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from thinned.backends.arguments import check_dtype, check_key, check_mask, check_out
from thinned.backends.rows import by_rows
from thinned.geometry import Geometry, shared
from thinned.philox import high32, join, low32, philox4x32

__all__ = ["fold_many", "keep_mask", "masked_affine", "uniform"]


def keep_mask(key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
    """Which elements are kept, as a bool tensor; see :func:`thinned.op.keep_mask`."""
    if isinstance(key, int):
        key = torch.tensor(key, dtype=torch.int64)
    check_key(key, shape)
    check_mask(shape, geometry, T)
    if T == 0 or T == 2**32 or not math.prod(shape):
        return torch.full(shape, T != 0, dtype=torch.bool, device=key.device)
    return by_rows(key, shape, geometry, _of_rows(lambda block, key: _unpack(_below(block, key, T))))


def uniform(key: Tensor, shape: tuple[int, ...], geometry: Geometry) -> Tensor:
    """The numbers behind the masks, less ``2**31``, as int32; see :func:`thinned.op.uniform`."""
    check_key(key, shape)
    check_mask(shape, geometry)
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.int32, device=key.device)
    return by_rows(key, shape, geometry, _of_rows(_numbers))


def _of_rows(of_blocks: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor, int], Tensor]:
    """From what a function gives for the 128 positions of each block to rows that begin anywhere."""

    def of_rows(first: Tensor, key: Tensor, count: int) -> Tensor:
        first, key = first.unsqueeze(-1), key.unsqueeze(-1)
        values = of_blocks((first >> 7) + torch.arange((count + 126) // 128 + 1, device=key.device), key)
        return values.gather(-1, (first & 127) + torch.arange(count, device=key.device))

    return of_rows


def masked_affine(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    out: Tensor | None = None,
) -> Tensor:
    """``keep ? x * scale + shift : fill``, into ``out`` if given; see :func:`thinned.op.masked_affine`."""
    check_dtype(x.dtype)
    if isinstance(key, Tensor):
        check_key(key, x.shape, x.device)
    if out is None:
        out = torch.empty_like(x)
    else:
        check_out(x, out)
    keep = keep_mask(key, tuple(x.shape), geometry or shared(x.shape), T)
    if x.is_complex():
        x, target, keep = torch.view_as_real(x.resolve_conj()), torch.view_as_real(out), keep.unsqueeze(-1)
    else:
        target = out
    value = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32) * scale
    if shift:
        value = value + shift
    target.copy_(torch.where(keep, value.to(x.dtype), torch.tensor(fill, dtype=x.dtype, device=x.device)))
    return out


def fold_many(keys: Tensor, data: Tensor) -> Tensor:
    """The children of int64 keys, which broadcast against int64 data; see :meth:`thinned.Key.fold`."""
    low, high, _, _ = philox4x32((low32(data), high32(data), 0, 1), keys, rounds=10)
    return join(low, high)


def _below(block: Tensor, key: Tensor, T: int) -> Tensor:
    """``u < T`` for the 128 positions of each block, as four 32-bit words in the last dimension."""
    below, undecided = torch.zeros_like(block), torch.full_like(block, 0xFFFFFFFF)
    below, undecided = below.unsqueeze(-1), undecided.unsqueeze(-1)
    last = 32 - (T & -T).bit_length() + 1
    for plane in range(last):
        words = _plane(block, key, plane)
        if T >> (31 - plane) & 1:
            below = below | undecided & ~words
            undecided = undecided & words
        else:
            undecided = undecided & ~words
    return below


def _numbers(block: Tensor, key: Tensor) -> Tensor:
    """``u - 2**31`` for the 128 positions of each block."""
    number = torch.zeros((*block.shape[:-1], 128 * block.shape[-1]), dtype=torch.int32, device=block.device)
    for plane in range(32):
        number = (number << 1) | _unpack(_plane(block, key, plane)).to(torch.int32)
    return number ^ -(2**31)


def _plane(block: Tensor, key: Tensor, plane: int) -> Tensor:
    """One bit plane of each block, as four 32-bit words in the last dimension."""
    counter = low32(block), high32(block), plane, 0
    return torch.stack(philox4x32(counter, key, rounds=7), dim=-1)


def _unpack(words: Tensor) -> Tensor:
    """The bits of ``[..., blocks, 4]`` words as bools ``[..., blocks * 128]``."""
    bits = words.unsqueeze(-1) >> torch.arange(32, device=words.device) & 1
    return bits.to(torch.bool).flatten(-3)
