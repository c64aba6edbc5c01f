"""Philox4x32 in plain integer arithmetic: the same lines serve Python integers and int64 tensors.

Words are 32-bit values held in 64 bits. A product of two of them wraps in int64, and its low and high
halves are still right because each is masked after the shift.
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch

__all__ = ["high32", "low32", "philox4x32", "signed64"]

Word = TypeVar("Word", int, torch.Tensor)

_MASK = 0xFFFFFFFF
# Less 2**32, so that a product stays in int64: Inductor's C++ compiler rules out that one overflows.
_M0, _M1 = 0xD2511F53 - 2**32, 0xCD9E8D57 - 2**32
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def low32(value: Word) -> Word:
    """The low 32 bits."""
    return value & _MASK


def high32(value: Word) -> Word:
    """The high 32 bits, of a signed or an unsigned 64-bit value."""
    return (value >> 32) & _MASK


def signed64(value: int) -> int:
    """The int64 with the same 64 bits: torch has no arithmetic on uint64."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


def philox4x32(
    counter: tuple[Word | int, Word | int, Word | int, Word | int], key: Word, rounds: int
) -> tuple[Word, Word, Word, Word]:
    """The four words of a block; ``key`` is the 64-bit key, and everything broadcasts.

    Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC'11, section 3.3.

    >>> [hex(word) for word in philox4x32((0, 0, 0, 0), 0, rounds=7)]
    ['0x5f6fb709', '0xd893f64', '0x4f121f81', '0x4f730a48']
    """
    c0, c1, c2, c3 = cast(Any, counter)
    k0, k1 = low32(key), high32(key)
    for _ in range(rounds):
        product0, product1 = c0 * _M0, c2 * _M1
        high0, high1 = low32((product0 >> 32) + c0), low32((product1 >> 32) + c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low32(product1), high0 ^ c3 ^ k1, low32(product0)
        k0, k1 = low32(k0 + _W0), low32(k1 + _W1)
    return c0, c1, c2, c3
