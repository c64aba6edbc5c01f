"""The specification applied to tensors: what every backend has to equal, bit for bit."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from thinned import spec
from thinned.geometry import Geometry, shared

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)

# NaN, infinities, signed zeros, subnormals and the largest and smallest numbers of each format.
SPECIAL = (
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 1 / 3, 65504.0, -65504.0, 60000.0),
    *(6e-8, -6e-8, 6.1e-5, 3e-5, 1e-38, -1e-38, 1e-45, 3.4e38, -3.4e38, 3.38e38, 2.2e-308, 5e-324, 1.7e308),
    *(math.ldexp(1 + step / 4096, exponent) for exponent in (-15, -1, 8) for step in range(16)),
)


def specials(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The special numbers over and over, in all pairings where a number has two parts."""
    parts = torch.tensor(SPECIAL, dtype=torch.float64)
    count = math.prod(shape)
    real = parts.repeat(count // len(parts) + 1)[:count]
    if not dtype.is_complex:
        return real.to(dtype).reshape(shape)
    imaginary = parts.roll(1).repeat_interleave(3).repeat(count // len(parts) + 1)[:count]
    return torch.complex(real, imaginary).to(dtype).reshape(shape)


def key_bits(key: int) -> Tensor:
    """The int64 tensor with the bits of a key in 0 .. 2**64-1."""
    return torch.tensor(key - 2**64 if key >= 2**63 else key)


def positions(shape: tuple[int, ...], geometry: Geometry) -> NDArray[np.uint64]:
    """``m(i)`` for each element."""
    index = np.full(shape, geometry.base, np.uint64)
    for dim, (size, stride) in enumerate(zip(shape, geometry.strides, strict=True)):
        steps = np.arange(size, dtype=np.uint64) * np.uint64(stride)
        index += steps.reshape((-1,) + (1,) * (len(shape) - dim - 1))
    return index


@lru_cache(maxsize=1024)
def _uniform(key: int, index: bytes) -> NDArray[np.uint32]:
    return spec.uniform(key, np.frombuffer(index, np.uint64))


def numbers(key: Tensor, shape: tuple[int, ...], geometry: Geometry) -> NDArray[np.uint32]:
    """``u(m(i))``, each leading index of ``key`` under its own key."""
    number = np.empty(shape, np.uint32)
    index = positions(shape, geometry)
    for one in key.unique().tolist():
        under = (key == one).numpy()
        distinct, inverse = np.unique(index[under], return_inverse=True)
        number[under] = _uniform(one % 2**64, distinct.tobytes())[inverse].reshape(index[under].shape)
    return number


def keep_mask(key: Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> NDArray[np.bool_]:
    """``u(m(i)) < T``, each leading index of ``key`` under its own key."""
    return np.asarray(numbers(key, shape, geometry).astype(np.uint64) < np.uint64(T))


def masked_affine(
    x: Tensor, key: Tensor, geometry: Geometry, T: int, scale: float, shift: float = 0.0, fill: float = 0.0
) -> Tensor:
    """``keep ? round(opmath(x) * scale + shift) : fill``, contiguous; a shift of 0 is not added."""
    kept = keep_mask(key, tuple(x.shape), geometry, T).ravel()
    if x.is_complex():
        parts = (_affine(part, kept, scale, shift, fill) for part in (x.real, x.imag))
        return torch.complex(*parts).reshape(x.shape)
    return _affine(x, kept, scale, shift, fill).reshape(x.shape)


def _affine(x: Tensor, kept: NDArray[np.bool_], scale: float, shift: float, fill: float) -> Tensor:
    opmath = np.float64 if x.dtype == torch.float64 else np.float32
    value = _numbers(x).astype(opmath)
    with np.errstate(all="ignore"):
        value = value * opmath(scale)
        if shift:
            value = value + opmath(shift)
        return _tensor(np.where(kept, value, opmath(fill)), x.dtype)


def _numbers(x: Tensor) -> NDArray[np.floating]:
    x = x.detach().reshape(-1).resolve_neg()
    if x.dtype == torch.bfloat16:
        return (x.contiguous().view(torch.int16).numpy().astype(np.uint32) << 16).view(np.float32)
    return x.numpy()


def _tensor(value: NDArray[np.floating], dtype: torch.dtype) -> Tensor:
    if dtype == torch.bfloat16:
        # To nearest, ties to even: half of the last place is added, a little less if it is even.
        bits = value.view(np.uint32).astype(np.uint64)
        rounded = np.where(np.isnan(value), bits, bits + 0x7FFF + (bits >> 16 & 1)) >> 16
        return torch.from_numpy(rounded.astype(np.uint16).view(np.int16)).view(torch.bfloat16)
    to = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}[dtype]
    return torch.from_numpy(value.astype(to))


def bits(x: Tensor) -> Tensor:
    """The bits of each number, -0 and +0 apart; every NaN counts as the one that torch writes."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.is_complex():
        x = torch.view_as_real(x)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full((), float("nan"), dtype=x.dtype, device=x.device), x)
    return x.contiguous().view(integer).cpu()


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same shape, dtype and bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    differ = bits(actual) != bits(expected)
    if differ.any():
        at = tuple(differ.nonzero()[0][: actual.dim()].tolist())
        raise AssertionError(
            f"{int(differ.sum())} of {differ.numel()} numbers differ, first at {at}: "
            f"{actual[at]} and not {expected[at]}"
        )


def dropout(x: Tensor, key: Tensor, p: float, broadcast_dims: tuple[int, ...] = ()) -> Tensor:
    """The result of :func:`thinned.functional.dropout`, contiguous, for one key or one for each row."""
    T = spec.threshold(p)
    geometry = shared(x.shape, broadcast_dims, key.dim())
    return masked_affine(x, key, geometry, T, spec.scale(T))
