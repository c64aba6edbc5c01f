"""The specification applied to tensors: what every backend has to equal, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned import spec
from thinned.backends.reference import keep_mask, masked_affine, uniform
from thinned.backends.verify import DTYPES, bits, specials
from thinned.geometry import shared

__all__ = [
    "DTYPES",
    "assert_same",
    "bits",
    "dropout",
    "keep_mask",
    "key_bits",
    "masked_affine",
    "specials",
    "uniform",
]


def key_bits(key: int) -> Tensor:
    """The int64 tensor with the bits of a key in 0 .. 2**64-1."""
    return torch.tensor(key - 2**64 if key >= 2**63 else key)


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
