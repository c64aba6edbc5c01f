"""The permutations of stratified draws, in integer operations that PyTorch and ONNX have.

>>> import torch
>>> places(torch.tensor([0, 2**31, 2**32 - 1]), torch.tensor(3), 20)
tensor([ 3, 13, 19])
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from thinned.geometry import Geometry

__all__ = ["MOST", "name", "once", "places", "prime_for", "shifted"]

MOST = 65521  # the largest prime of 16 bits: a product plus a summand then has 32 bits
_NAME = -0x3B8A7455C7A31684


def name(key: Tensor) -> Tensor:
    """The datum that turns a set's keys into the keys of its permutations: the string ``"strata"``."""
    return torch.full((), _NAME, dtype=torch.int64, device=key.device)


def once(key: Tensor, shape: tuple[int, ...], geometry: Geometry) -> tuple[Tensor, tuple[int, ...], Geometry]:
    """The arguments for one row of dimension 0 if all its rows have the same numbers: an expanded key's."""
    if key.dim() and not key.stride(0) and not geometry.strides[0]:
        return key[:1], (1, *shape[1:]), geometry
    return key, shape, geometry


@lru_cache(maxsize=1024)
def prime_for(strata: int) -> int:
    """The smallest prime that is at least 2 and at least ``strata``.

    >>> [prime_for(strata) for strata in (1, 20, 23, 65521)]
    [2, 23, 23, 65521]
    """
    numbers = range(max(strata, 2), MOST + 1)
    return next(n for n in numbers if all(n % divisor for divisor in range(2, int(n**0.5) + 1)))


def places(v: Tensor, draw: Tensor, strata: int) -> Tensor:
    """The place of a draw among the strata, by the permutations that the 32-bit numbers ``v`` decide.

    An affine permutation of ``0 .. prime-1`` is applied until it returns below ``strata``. At most
    ``prime - strata`` places lie above, so as many further steps suffice.
    """
    prime = prime_for(strata)
    a, b = 1 + ((v >> 16) * (prime - 1) >> 16), (v & 0xFFFF) * prime >> 16
    x = (a * draw.remainder(strata) + b).remainder(prime)
    for _ in range(prime - strata):
        x = torch.where(x >= strata, (a * x + b).remainder(prime), x)
    return x


def shifted(u: Tensor, v: Tensor, draw: Tensor, strata: int) -> Tensor:
    """``u' - 2**31`` from ``u - 2**31`` and ``v - 2**31``, int32; ``draw`` has their leading dimensions."""
    draw = draw.reshape(draw.shape + (1,) * (u.dim() - draw.dim()))
    place = places(v.to(torch.int64) + 2**31, draw, strata)
    number = (u.to(torch.int64) + 2**31 + place * (2**32 // strata)) & 0xFFFFFFFF
    return (number - 2**31).to(torch.int32)
