"""The mask, version 1, and stratified draws of it, in NumPy: what every backend equals bit for bit.

Nothing here is fast and no backend imports it. Read it top to bottom: the generator, a key's children, the
random number of a position, the same in a draw of a stratified set, the decision, the value.
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


def stratified(key: int, index: NDArray[np.uint64], draw: int, strata: int) -> NDArray[np.uint32]:
    """``u'(i, s)``: each position's number in draw ``s`` of a set of ``S`` draws, whose key this is.

    ``u'(i, s) = (u(i) + pi(s) * floor(2**32 / S)) mod 2**32``, in which ``pi`` is the position's own
    permutation of ``0 .. S-1``: an affine one modulo a prime, repeated until it returns below ``S``.

    Args:
        key: of the set.
        index: the positions.
        draw: ``s``, taken modulo ``S``.
        strata: ``S``, in 1 .. 65521.

    >>> position = np.zeros(1, np.uint64)
    >>> [int(stratified(7, position, draw, strata=4)[0]) >> 30 for draw in range(4)]
    [3, 2, 0, 1]
    """
    return shifted(uniform(key, index), uniform(fold(key, "strata"), index), draw, strata)


def shifted(u: NDArray[np.uint32], v: NDArray[np.uint32], draw: int, strata: int) -> NDArray[np.uint32]:
    """``u'`` from the numbers ``u`` of the set's key and ``v``, which decide the permutations."""
    prime = next(n for n in range(max(strata, 2), 2**16) if all(n % d for d in range(2, math.isqrt(n) + 1)))
    v = v.astype(np.uint64)
    a, b = 1 + ((v >> 16) * (prime - 1) >> 16), (v & 0xFFFF) * prime >> 16
    place = (a * (draw % strata) + b) % prime
    while (place >= strata).any():
        place = np.where(place >= strata, (a * place + b) % prime, place)
    number: NDArray[np.uint64] = u + place * (2**32 // strata)
    return number.astype(np.uint32)


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


def keep_mask(
    key: int, shape: int | Sequence[int], p: float, *, start: int = 0, draw: int = 0, strata: int = 1
) -> NDArray[np.bool_]:
    """True where ``u(i) < T``; ``i`` is the row-major position plus ``start``.

    With ``strata`` it is the mask of one draw of a stratified set, True where ``u'(i, draw) < T``.

    >>> keep_mask(7, (2, 6), p=0.5).astype(int)
    array([[0, 0, 0, 1, 1, 1],
           [0, 0, 0, 1, 0, 0]])
    >>> sum(keep_mask(7, 6, p=0.5, draw=draw, strata=4).astype(int) for draw in range(4))
    array([2, 2, 2, 2, 2, 2])
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    index = np.arange(math.prod(shape), dtype=np.uint64) + np.uint64(start)
    u = stratified(key, index, draw, strata) if strata > 1 else uniform(key, index)
    keep: NDArray[np.bool_] = u.astype(np.uint64) < np.uint64(threshold(p))
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
