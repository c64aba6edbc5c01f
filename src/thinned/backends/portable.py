"""The operations in plain PyTorch integer arithmetic: any device, and the fallback for all.

:func:`below`, :func:`numbers` and :func:`select` also make up the exported graphs of
:func:`thinned.decompositions`, so they use only operations that ONNX has under a name that torch.onnx knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from thinned.backends.arguments import check_draw, check_key, check_mask, checked_out
from thinned.backends.rows import by_rows
from thinned.backends.strata import name, once, shifted
from thinned.geometry import Geometry, shared
from thinned.philox import high32, join, low32, philox4x32

__all__ = ["below", "choose", "fold", "keep_mask", "masked_affine", "numbers", "select", "uniform"]

_ONES = 0xFFFFFFFF


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
    """See :meth:`thinned.backends.Backend.masked_affine`."""
    if isinstance(key, int):
        key = torch.full((), key, dtype=torch.int64, device=x.device)
    out = checked_out(x, key, out)
    keep = keep_mask(key, tuple(x.shape), geometry or shared(x.shape), T)
    return _write(out, keep, x, scale, shift, fill)


def choose(x: Tensor, numbers: Tensor, T: int, scale: float, shift: float, fill: float) -> Tensor:
    """See :meth:`thinned.backends.Backend.choose`."""
    keep = numbers.to(torch.int64) < T - 2**31
    return _write(torch.empty_like(x), keep, x, scale, shift, fill)


def _write(out: Tensor, keep: Tensor, x: Tensor, *constants: float) -> Tensor:
    target = out
    if x.is_complex():
        x, target, keep = torch.view_as_real(x.resolve_conj()), torch.view_as_real(out), keep.unsqueeze(-1)
    target.copy_(select(keep, x, *constants))
    return out


def keep_mask(key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
    """See :meth:`thinned.backends.Backend.keep_mask`."""
    if isinstance(key, int):
        key = torch.full((), key, dtype=torch.int64, device="cpu")
    check_key(key, shape)
    check_mask(shape, geometry, T)
    if T == 0 or T == 2**32 or not math.prod(shape):
        return torch.full(shape, T != 0, dtype=torch.bool, device=key.device)
    return by_rows(key, shape, geometry, _rows_of(partial(below, T=T)))


def uniform(
    key: Tensor, shape: tuple[int, ...], geometry: Geometry, draw: Tensor | None = None, strata: int = 1
) -> Tensor:
    """See :meth:`thinned.backends.Backend.uniform`."""
    check_key(key, shape)
    check_mask(shape, geometry)
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.int32, device=key.device)
    if draw is None:
        return by_rows(key, shape, geometry, _rows_of(numbers))
    check_draw(draw, strata, key)
    row = once(key, shape, geometry)
    u, v = (by_rows(each, *row[1:], _rows_of(numbers)) for each in (row[0], fold(row[0], name(key))))
    return shifted(u, v, draw.expand(key.shape), strata)


def fold(keys: Tensor, data: int | Tensor) -> Tensor:
    """See :meth:`thinned.backends.Backend.fold`."""
    if isinstance(data, int):  # in Python's integers, 70 times faster
        low, high, _, _ = philox4x32((low32(data), high32(data), 0, 1), int(keys), rounds=10)
        return torch.tensor(join(low, high), device=keys.device)
    words = philox4x32((low32(data), high32(data), 0, 1), keys, rounds=10)
    return join(words[0], words[1])


def select(keep: Tensor, x: Tensor, scale: float, shift: float, fill: float) -> Tensor:
    """``keep ? x * scale + shift : fill`` for real numbers, computed in float32 or float64."""
    value = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32) * scale
    if shift:
        value = value + shift
    return torch.where(keep, value.to(x.dtype), torch.full((), fill, dtype=x.dtype, device=x.device))


def below(blocks: Tensor, keys: Tensor, T: int, at_once: int = 32) -> Tensor:
    """``u < T`` for the 128 positions of each block, in the last dimension.

    The bit planes are made ``at_once`` at a time, a power of two.
    """
    planes = 33 - (T & -T).bit_length()  # those after the last bit of T that is set decide nothing
    at_once = min(at_once, 1 << (planes - 1).bit_length())
    result: Any = None
    undecided: Any = None
    for first in range(0, planes, at_once):
        zeros = _planes(blocks, keys, first, at_once) ^ _ONES
        shifts = 31 - torch.arange(first, first + at_once, device=blocks.device)
        shifts = shifts.reshape(-1, *(1,) * (zeros.dim() - 1))
        limit = (torch.bitwise_right_shift(torch.full_like(shifts, T), shifts) & 1) * _ONES
        less, same = zeros & limit, zeros ^ limit
        while len(less) > 1:  # of two neighbours, the second decides where the first is the same as T
            less, same = less[::2] | same[::2] & less[1::2], same[::2] & same[1::2]
        if undecided is None:
            result, undecided = less, same
        else:
            result, undecided = result | undecided & less, undecided & same
    return _bits(result.squeeze(0)).to(torch.bool).flatten(-3)


def numbers(blocks: Tensor, keys: Tensor, at_once: int = 32) -> Tensor:
    """``u - 2**31`` for the 128 positions of each block, in the last dimension."""
    number: Any = None
    for first in range(0, 32, at_once):
        for words in _planes(blocks, keys, first, at_once).unbind():  # one by one, to save memory
            bits = _bits(words).to(torch.int32)
            # From -1 or 0 on, 31 doublings do not overflow.
            number = bits - 1 if number is None else torch.add(bits, number, alpha=2)
    return number.flatten(-3)  # type: ignore[no-any-return]


def _planes(blocks: Tensor, keys: Tensor, first: int, count: int) -> Tensor:
    """Bit planes from ``first`` on, as 32-bit words in ``[count, ..., blocks, 4]``."""
    planes = torch.arange(first, first + count, device=blocks.device)
    planes = planes.reshape(-1, *(1,) * max(blocks.dim(), keys.dim()))
    return torch.stack(philox4x32((low32(blocks), high32(blocks), planes, 0), keys, rounds=7), dim=-1)


def _bits(words: Tensor) -> Tensor:
    """The bits of each word as 0 or 1, in one more dimension."""
    # Not words >> lanes, an operation of another name, which torch.onnx does not know.
    return torch.bitwise_right_shift(words.unsqueeze(-1), torch.arange(32, device=words.device)) & 1


def _rows_of(of_blocks: Callable[..., Tensor]) -> Callable[[Tensor, Tensor, int], Tensor]:
    """From a function of blocks, each of 128 positions, to a function of rows that begin anywhere."""

    def of_rows(first: Tensor, key: Tensor, count: int) -> Tensor:
        first, key = first.unsqueeze(-1), key.unsqueeze(-1)
        blocks = (first >> 7) + torch.arange((count + 126) // 128 + 1, device=key.device)
        # Many planes at once save calls, 15 times the time of 256 elements; few stay in the cache.
        at_once = 1 << min(5, max(0, (2**14 // blocks.numel()).bit_length() - 1))
        values = of_blocks(blocks, key, at_once=at_once)
        return values.gather(-1, (first & 127) + torch.arange(count, device=key.device))

    return of_rows
