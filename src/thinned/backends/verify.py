"""Whether every backend that can run here gives the bits of the specification.

>>> list(KINDS)  # of results that verify() compares
['masks', 'values', 'numbers', 'keys']
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from typing import cast

import numpy as np
import torch
from torch import Tensor

from thinned import spec
from thinned.backends import Backend, reference
from thinned.backends.variants import variants
from thinned.geometry import Geometry, shared
from thinned.philox import signed64

__all__ = ["DTYPES", "KINDS", "Verification", "bits", "specials", "verify"]

DTYPES = (
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.complex128,
)

# NaN, infinities, signed zeros, subnormals and the largest and smallest numbers of each format.
_SPECIAL = (
    *(float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.0, -1.0, 1 / 3, 65504.0, -65504.0, 60000.0),
    *(6e-8, -6e-8, 6.1e-5, 3e-5, 1e-38, -1e-38, 1e-45, 3.4e38, -3.4e38, 3.38e38, 2.2e-308, 5e-324, 1.7e308),
    *(math.ldexp(1 + step / 4096, exponent) for exponent in (-15, -1, 8) for step in range(16)),
)

_KEY = signed64(0x9E3779B97F4A7C15)
_ONE = torch.tensor(_KEY)
_ROWS = torch.tensor([0, -1, 7, _KEY, 2**63 - 1])
_STRATA = (20, 1, 2, 64, 1000, 65521)
_LONG = 9000  # more than a GPU kernel takes in one tile
_PLACES = (
    (_ONE, (300,), Geometry((1,))),
    (_ONE, (), Geometry((), 300)),
    (_ONE, (0, 3), Geometry((3, 1))),
    (_ONE, (130,), Geometry((1,), 77)),
    (_ONE, (_LONG,), Geometry((1,), 2**40)),
    (_ONE, (3, 50), Geometry((50, 1), 2**32 - 60)),
    (_ONE, (3, 50), Geometry((50, 1), 2**39 - 60)),  # the number of a block passes 2**32
    (_ONE, (150,), Geometry((1,), 2**63 - 152)),  # up to the last mask index
    (_ONE, (2, 3, 4, 5), shared((2, 3, 4, 5), (2, 3))),  # channels
    (_ONE, (4, 5, 6), shared((4, 5, 6), (1,))),
    (_ONE, (7, 11), Geometry((1, 7))),  # transposed
    (_ONE, (5, 3), Geometry((2**33, 1000))),  # far apart
    (_ROWS, (5, 60), shared((5, 60), (), key_dims=1)),
    (_ROWS[:3].expand(2, 3), (2, 3, 20), shared((2, 3, 20), (), key_dims=2)),
)


@cache
def _thresholds() -> tuple[int, ...]:
    """The last two decide at the last bit plane whether one element is kept."""
    even = next(int(u) for u in spec.uniform(_KEY % 2**64, np.arange(300, dtype=np.uint64)) if u % 2 == 0)
    return (*map(spec.threshold, (0.1, 0.5, 0.25, 0.9, 1e-9, 1 - 1e-9, 0, 1)), even, even + 1)


def _masks(backend: Backend, device: str) -> Iterator[Tensor]:
    for number, (key, shape, geometry) in enumerate(_PLACES):
        for T in _thresholds()[: 2 if number else None]:
            yield backend.keep_mask(key.to(device), shape, geometry, T)


def _values(backend: Backend, device: str) -> Iterator[Tensor]:
    """Out of place, with a shift and a fill in a second tensor, and in place in a transposed one."""
    one, rows = _ONE.to(device), _ROWS.to(device)
    for dtype in DTYPES:
        x = specials((_LONG if dtype == torch.float32 else 500,), dtype).to(device)
        for T in map(spec.threshold, (0, 0.1, 1)):
            yield backend.masked_affine(x, _KEY, None, T, spec.scale(T), 0.0, 0.0)
        x, T, geometry = x[1:301].view(5, 60), spec.threshold(0.5), shared((5, 60), (), key_dims=1)
        out = torch.zeros_like(x)
        backend.masked_affine(x, rows, geometry, T, 0.7, 0.3, -1.7, out)
        yield out
        numbers = torch.arange(-30, 30, dtype=torch.int32) * 2**26
        for fill in (0.0, -1.7):
            yield backend.choose(x, numbers.to(device), T, 0.7, fill and 0.3, fill)
        x, T = x.reshape(15, 20).t(), spec.threshold(0.25)
        backend.masked_affine(x, one, Geometry((15, 1), 2**39 - 60), T, spec.scale(T), 0.0, 0.0, x)
        yield x


def _numbers(backend: Backend, device: str) -> Iterator[Tensor]:
    for number, (key, shape, geometry) in enumerate(_PLACES):
        yield backend.uniform(key.to(device), shape, geometry)
        if math.prod(shape) == _LONG:  # a draw of a set takes three times as long
            continue
        strata = _STRATA[number % len(_STRATA)]
        draw = torch.arange(key.numel()).reshape(key.shape) + strata // 3
        yield backend.uniform(key.to(device), shape, geometry, draw.to(device), strata)


def _keys(backend: Backend, device: str) -> Iterator[Tensor]:
    one, rows = _ONE.to(device), _ROWS.to(device)
    yield from (backend.fold(one, number) for number in _ROWS.tolist())
    yield from (backend.fold(one, rows), backend.fold(rows, one), backend.fold(rows, rows.flip(0)))
    yield backend.fold(rows[:, None], rows[:3])


KINDS: dict[str, Callable[[Backend, str], Iterator[Tensor]]] = {
    "masks": _masks,
    "values": _values,
    "numbers": _numbers,
    "keys": _keys,
}


@dataclass(frozen=True)
class Verification:
    """Hashes of results, by variant and kind of result; the specification's come first, as ``spec``.

    - ``hashes``: of those that did not raise. They are the same on every machine.
    - ``failed``: by variant and kind, ``differs`` or the error.
    - ``missing``: the variants that cannot run here, each with the reason.
    """

    hashes: dict[str, dict[str, str]]
    failed: dict[str, dict[str, str]]
    missing: dict[str, str]

    def __str__(self) -> str:
        if self.failed:
            differ = (f"{name} ({', '.join(kinds)})" for name, kinds in self.failed.items())
            return f"not the bits of the specification: {', '.join(differ)}"
        return f"all {len(self.hashes) - 1} have the bits of the specification"


def verify() -> Verification:
    """Compute the same results by the specification and by every variant of a backend that can run here."""
    expected = {kind: _hash(of(cast(Backend, reference), "cpu")) for kind, of in KINDS.items()}
    found = Verification({"spec": expected}, {}, {})
    for variant in variants():
        name = str(variant)
        if reason := variant.why_missing():
            found.missing[name] = reason
            continue
        hashes, failed = found.hashes.setdefault(name, {}), {}
        with variant.running() as backend:
            for kind, of in KINDS.items():
                try:
                    hashes[kind] = _hash(of(backend, variant.device))
                except Exception as error:
                    failed[kind] = f"{type(error).__name__}: {error}"
                else:
                    if hashes[kind] != expected[kind]:
                        failed[kind] = "differs"
        if failed:
            found.failed[name] = failed
    return found


def _hash(results: Iterable[Tensor]) -> str:
    digest = blake2b(digest_size=6)
    for result in results:
        digest.update(f"{result.dtype} {tuple(result.shape)}".encode())
        digest.update(bits(result).numpy().tobytes())
    return digest.hexdigest()


def bits(x: Tensor) -> Tensor:
    """The bits of each number, -0 and +0 apart; every NaN counts as the one that torch writes."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.is_complex():
        x = torch.view_as_real(x)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    if x.is_floating_point():
        x = torch.where(x.isnan(), torch.full((), float("nan"), dtype=x.dtype, device=x.device), x)
    return x.contiguous().view(integer).cpu()


def specials(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Special numbers over and over, in all pairings where a number has two parts."""
    parts = torch.tensor(_SPECIAL, dtype=torch.float64)
    count = math.prod(shape)
    real = parts.repeat(count // len(parts) + 1)[:count]
    if not dtype.is_complex:
        return real.to(dtype).reshape(shape)
    imaginary = parts.roll(1).repeat_interleave(3).repeat(count // len(parts) + 1)[:count]
    return torch.complex(real, imaginary).to(dtype).reshape(shape)
