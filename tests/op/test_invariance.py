"""A result depends on key and position alone: not on threads, on chunks or on the instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import oracle
import thinned
from backend_under_test import BackendUnderTest
from thinned import backends, spec
from thinned.functional import dropout
from thinned.geometry import Geometry, shared

T = spec.threshold(0.1)
KEY = torch.tensor(7)

# Large enough for four threads (the kernel gives each at least 16384 elements).
LARGE = {
    "one row": torch.randn(100_003),
    "rows": torch.randn(257, 513),
    "column-major": torch.randn(513, 257).T,
    "short rows": torch.randn(40_000, 3),
    "channels_last": torch.randn(8, 16, 30, 31).contiguous(memory_format=torch.channels_last),
    "half of the columns": torch.randn(300, 600)[:, ::2],
    "complex": torch.randn(300, 301, dtype=torch.complex64),
}


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("name", LARGE)
def test_threads(backend: BackendUnderTest, name: str) -> None:
    if backend.slow:
        pytest.skip("Triton's interpreter has no threads")
    x = LARGE[name]
    results = []
    for threads in (1, 2, 3, 4):
        torch.set_num_threads(threads)
        results.append(backend.masked_affine(x, KEY, shared(x.shape, ()), T, spec.scale(T)))
    for other in results[1:]:
        oracle.assert_same(other, results[0])


@pytest.mark.usefixtures("restore_threads")
def test_threads_of_torch_are_the_kernels() -> None:
    if "native" in backends.missing():
        pytest.skip(backends.missing()["native"])
    from thinned.backends import _native

    for threads in (1, 3, 2):
        torch.set_num_threads(threads)
        assert _native.threads() == threads


@pytest.mark.parametrize("name", LARGE)
def test_instruction_sets(name: str) -> None:
    if "native" in backends.missing():
        pytest.skip(backends.missing()["native"])
    from thinned.backends import _native, native

    x, results = LARGE[name], []
    for isa in _native.supported_isas():
        with native.instruction_set(isa):
            results.append(dropout(x, 0.1, key=thinned.Key(7)))
    for other in results[1:]:
        oracle.assert_same(other, results[0])


@pytest.mark.parametrize("base", [0, 2**39 - 500])
@pytest.mark.parametrize("cut", [(5, 37), (1, 128), (13, 64), (24, 11)])
def test_chunks_are_parts_of_the_whole(backend: BackendUnderTest, cut: tuple[int, int], base: int) -> None:
    """The two-dimensional pieces of a tensor, each computed alone under the geometry of its place."""
    x = torch.randn(24, 300)
    geometry = Geometry((300, 1), base)
    whole = backend.masked_affine(x, KEY, geometry, T, spec.scale(T))
    pieces = torch.full_like(x, float("nan"))
    for row in range(0, 24, cut[0]):
        for column in range(0, 300, cut[1]):
            place = slice(row, row + cut[0]), slice(column, column + cut[1])
            part = geometry.shard((row, column))
            pieces[place] = backend.masked_affine(x[place], KEY, part, T, spec.scale(T))
    oracle.assert_same(pieces, whole)


def test_row_by_row_under_a_batch_of_keys(backend: BackendUnderTest) -> None:
    x, key = torch.randn(30, 77), thinned.Key(7).fold(torch.arange(30))
    whole = backend.masked_affine(x, key.bits, shared(x.shape, (), key_dims=1), T, spec.scale(T))

    def row(i: int) -> Tensor:
        return backend.masked_affine(x[i], thinned.Key(7).fold(i).bits, Geometry((1,)), T, spec.scale(T))

    oracle.assert_same(torch.stack([row(i) for i in range(30)]), whole)


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 1, 0), (2, 0, 1)])
def test_memory_layout_does_not_matter(backend: BackendUnderTest, order: tuple[int, int, int]) -> None:
    x = torch.randn(12, 35, 20)
    permuted = x.permute(order).contiguous().permute([order.index(d) for d in range(3)])
    assert permuted.stride() != x.stride()
    geometry = shared(x.shape, ())
    y = backend.masked_affine(permuted, KEY, geometry, T, spec.scale(T))
    oracle.assert_same(y, backend.masked_affine(x, KEY, geometry, T, spec.scale(T)))
