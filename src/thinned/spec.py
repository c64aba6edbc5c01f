"""The mask, version 1, in NumPy: the executable specification that every backend equals bit for bit.

Nothing here is fast and no backend imports it. Read it top to bottom: the generator, a key's children, the
random number of a position, the decision, the value.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["dropout", "fold", "keep_mask", "philox4x32", "scale", "threshold"]


def __dir__() -> list[str]:
    return __all__


Element = TypeVar("Element", bound=np.inexact[Any])

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_32 = np.uint64(32)


def philox4x32(counter: Sequence[Any], key: Sequence[Any], rounds: int = 7) -> NDArray[np.uint32]:
    """Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3).

    Args:
        counter: four 32-bit words, each an integer or an array; they broadcast against each other.
        key: two 32-bit words.
        rounds: 7 for masks (the fewest that pass BigCrush), 10 for key derivation.

    Returns:
        uint32 array of shape ``(4, *broadcast shape)``: the four words of the block.

    >>> [hex(word) for word in philox4x32((0, 0, 0, 0), (0, 0))]
    ['0x5f6fb709', '0xd893f64', '0x4f121f81', '0x4f730a48']
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(word, np.uint32) for word in counter))
    k0, k1 = (int(word) for word in key)
    for _ in range(rounds):
        product0, product1 = _M0 * c0.astype(np.uint64), _M1 * c2.astype(np.uint64)
        c0, c1, c2, c3 = (
            (product1 >> _32).astype(np.uint32) ^ c1 ^ np.uint32(k0),
            product1.astype(np.uint32),
            (product0 >> _32).astype(np.uint32) ^ c3 ^ np.uint32(k1),
            product0.astype(np.uint32),
        )
        k0, k1 = (k0 + _W0) % 2**32, (k1 + _W1) % 2**32
    return np.stack([c0, c1, c2, c3])


def _words(value: int) -> tuple[int, int]:
    return value & 0xFFFFFFFF, value >> 32


def fold(key: int, data: int | str) -> int:
    """The child of a key: words 0 and 1 of ``philox10((lo32(data), hi32(data), 0, 1), key)``.

    Args:
        key: 0 .. 2**64-1.
        data: an integer, taken modulo 2**64, or a string, which counts as the first 8 bytes, little-endian,
            of its BLAKE2b-512 digest (UTF-8).

    >>> hex(fold(0, 0)), hex(fold(0, "encoder.dropout"))
    ('0x1348e23f2dce73e5', '0x817a8ad0d979fcfd')
    """
    if isinstance(data, str):
        data = int.from_bytes(blake2b(data.encode()).digest()[:8], "little")
    low, high = _words(data % 2**64)
    words = philox4x32((low, high, 0, 1), _words(key), rounds=10)
    return int(words[0]) | int(words[1]) << 32


def uniform(key: int, index: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """``u(i)``, the 32-bit number of each position: one bit of it from each of 32 bit planes."""
    block, bit = index // np.uint64(128), (index % np.uint64(128)).astype(np.uint32)
    number = np.zeros(index.shape, np.uint32)
    for plane in range(32):
        words = philox4x32((block & np.uint64(0xFFFFFFFF), block >> _32, plane, 0), _words(key))
        word = np.take_along_axis(words, (bit // 32)[None].astype(np.intp), axis=0)[0]
        number = (number << np.uint32(1)) | (word >> (bit % 32) & np.uint32(1))
    return number


def threshold(p: float) -> int:
    """``T = round_half_even((1-p) * 2**32)``: an element is kept when its number is below it.

    >>> threshold(0.5) == 2**31, threshold(0.0) == 2**32, threshold(1.0)
    (True, True, 0)
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    return round((1 - p) * 2**32)


def scale(T: int) -> float:
    """``1/q`` for the realised keep probability ``q = T / 2**32``; 0 for ``T = 0``, which keeps nothing."""
    return 2**32 / T if T else 0.0


def keep_mask(key: int, shape: int | Sequence[int], p: float, *, start: int = 0) -> NDArray[np.bool_]:
    """True where ``u(i) < T``; ``i`` is the row-major position plus ``start``.

    >>> keep_mask(7, (2, 6), p=0.5).astype(int)
    array([[0, 0, 0, 1, 1, 1],
           [0, 0, 0, 1, 0, 0]])
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(start)
    keep: NDArray[np.bool_] = uniform(key, index).astype(np.uint64) < np.uint64(threshold(p))
    return keep.reshape(shape)


def dropout(x: NDArray[Element], key: int, p: float) -> NDArray[Element]:
    """``keep ? round(opmath(x) * opmath(1/q)) : +0`` for float16, float32, float64 and complex arrays.

    opmath is float32 for float16, and the element's own precision otherwise; a complex number counts as its
    two parts.

    >>> dropout(np.ones(6, np.float32), 7, 0.5)
    array([0., 0., 0., 2., 2., 2.], dtype=float32)
    """
    y = np.array(x)
    if np.iscomplexobj(x):
        y.real, y.imag = dropout(x.real, key, p), dropout(x.imag, key, p)
        return y
    T = threshold(p)
    if T == 2**32:
        return y
    opmath = np.float64 if x.dtype == np.float64 else np.float32
    with np.errstate(all="ignore"):
        y[...] = x.astype(opmath) * opmath(scale(T))
    y[~keep_mask(key, x.shape, p)] = 0
    return y
