"""The specification on tensors: ``spec.py`` under any geometry, in the four functions of a backend.

It serves no device. The tests and :mod:`thinned.backends.verify` compare every backend with it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinned import spec
from thinned.geometry import Geometry, shared
from thinned.philox import signed64

__all__ = ["choose", "fold", "keep_mask", "masked_affine", "uniform"]


def masked_affine(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float = 0.0,
    fill: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """``keep ? round(opmath(x) * scale + shift) : fill``; a shift of 0 is not added."""
    y = _masked(x, keep_mask(key, tuple(x.shape), geometry or shared(x.shape), T), scale, shift, fill)
    return y if out is None else out.copy_(y)


def choose(x: Tensor, numbers: Tensor, T: int, scale: float, shift: float, fill: float) -> Tensor:
    """``number + 2**31 < T ? round(opmath(x) * scale + shift) : fill``; a shift of 0 is not added."""
    return _masked(x, numbers.expand(x.shape).long() + 2**31 < T, scale, shift, fill)


def _masked(x: Tensor, keep: Tensor, scale: float, shift: float, fill: float) -> Tensor:
    kept = keep.numpy().ravel()
    if x.is_complex():
        parts = (_affine(part, kept, scale, shift, fill) for part in (x.real, x.imag))
        return torch.complex(*parts).reshape(x.shape)
    return _affine(x, kept, scale, shift, fill).reshape(x.shape)


def keep_mask(key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
    """``u(m(i)) < T``, each leading index of ``key`` under its own key."""
    key = key if isinstance(key, Tensor) else torch.tensor(key)
    return torch.from_numpy(np.asarray(_numbers(key, shape, geometry).astype(np.uint64) < np.uint64(T)))


def uniform(
    key: Tensor, shape: tuple[int, ...], geometry: Geometry, draw: Tensor | None = None, strata: int = 1
) -> Tensor:
    """``u(m(i)) - 2**31``, each leading index of ``key`` under its own key, in its own draw."""
    number = _numbers(key, shape, geometry, draw, strata).astype(np.int64) - 2**31
    return torch.from_numpy(np.asarray(number, np.int32))


def fold(keys: Tensor, data: int | Tensor) -> Tensor:
    """The children of keys, which broadcast against ``data``."""
    keys, ids = torch.broadcast_tensors(keys, torch.as_tensor(data))
    pairs = zip(keys.flatten().tolist(), ids.flatten().tolist(), strict=True)
    children = [signed64(spec.fold(key % 2**64, number)) for key, number in pairs]
    return torch.tensor(children, dtype=torch.int64).reshape(keys.shape)


def _numbers(
    key: Tensor, shape: tuple[int, ...], geometry: Geometry, draw: Tensor | None = None, strata: int = 1
) -> NDArray[np.uint32]:
    number = np.empty(shape, np.uint32)
    index = _positions(shape, geometry)
    draw = torch.zeros_like(key) if draw is None else draw.expand(key.shape)
    for one, s in torch.stack([key, draw], -1).reshape(-1, 2).unique(dim=0).tolist():
        under = ((key == one) & (draw == s)).numpy()
        distinct, inverse = np.unique(index[under], return_inverse=True)
        values = _uniform(one % 2**64, distinct.tobytes(), s, strata)
        number[under] = values[inverse].reshape(index[under].shape)
    return number


def _positions(shape: tuple[int, ...], geometry: Geometry) -> NDArray[np.uint64]:
    """``m(i)`` of each element."""
    index = np.full(shape, geometry.base, np.uint64)
    for dim, (size, stride) in enumerate(zip(shape, geometry.strides, strict=True)):
        steps = np.arange(size, dtype=np.uint64) * np.uint64(stride)
        index += steps.reshape((-1,) + (1,) * (len(shape) - dim - 1))
    return index


@lru_cache(maxsize=1024)
def _uniform(key: int, index: bytes, draw: int, strata: int) -> NDArray[np.uint32]:
    positions = np.frombuffer(index, np.uint64)
    return spec.stratified(key, positions, draw, strata) if strata > 1 else spec.uniform(key, positions)


def _affine(x: Tensor, kept: NDArray[np.bool_], scale: float, shift: float, fill: float) -> Tensor:
    opmath = np.float64 if x.dtype == torch.float64 else np.float32
    value = _to_numpy(x).astype(opmath)
    with np.errstate(all="ignore"):
        value = value * opmath(scale)
        if shift:
            value = value + opmath(shift)
        return _to_torch(np.where(kept, value, opmath(fill)), x.dtype)


def _to_numpy(x: Tensor) -> NDArray[Any]:
    x = x.detach().reshape(-1).resolve_neg()
    if x.dtype == torch.bfloat16:
        return (x.contiguous().view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)
    return x.numpy()


def _to_torch(value: NDArray[Any], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        # To nearest, ties to even: half of the last place is added, a little less if it is even.
        bits = value.view(np.uint32).astype(np.uint64)
        rounded = np.where(np.isnan(value), bits, bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    to = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype]
    return torch.from_numpy(value.astype(to))
