"""Every backend makes the masks of the specification."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import oracle
import strategies
import thinned
from backend_under_test import BackendUnderTest
from thinned import spec
from thinned.geometry import Geometry, shared

PROBABILITIES = (0.001, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0, 2.0**-32, 1e-9, 1e-12)


def assert_mask(
    backend: BackendUnderTest, key: torch.Tensor, shape: tuple[int, ...], geometry: Geometry, T: int
) -> None:
    expected = oracle.keep_mask(key, shape, geometry, T)
    oracle.assert_same(backend.keep_mask(key, shape, geometry, T), expected)


@pytest.mark.parametrize("p", PROBABILITIES)
def test_probabilities(backend: BackendUnderTest, p: float) -> None:
    assert_mask(backend, oracle.key_bits(2**64 - 7), (3, 700), Geometry((700, 1)), spec.threshold(p))


@pytest.mark.usefixtures("backend")
def test_public_function_is_the_specification() -> None:
    mask = thinned.keep_mask(thinned.Key(2**63 + 9), (5, 77), 0.3)
    assert (mask.numpy() == spec.keep_mask(2**63 + 9, (5, 77), 0.3)).all()


@pytest.mark.parametrize("base", [2**32 - 100, 2**39 - 100, 2**40, 2**46 - 100, 2**63 - 700])
def test_far_positions(backend: BackendUnderTest, base: int) -> None:
    """2**39 is where a block's number reaches its high half, 2**63 where an int64 index ends."""
    for key in (torch.tensor(7), torch.arange(2)):
        geometry = Geometry((300, 1), base)
        assert_mask(backend, key, (2, 300), geometry, spec.threshold(0.3))


@pytest.mark.parametrize(
    ("shape", "geometry"),
    [
        pytest.param((70000,), Geometry((1,)), id="more blocks than are made at once"),
        pytest.param((9000,), Geometry((0,), 55), id="one decision for all"),
        pytest.param((3000, 3), Geometry((3, 1)), id="short rows"),
        pytest.param((3000, 1), Geometry((1, 0)), id="rows of one"),
        pytest.param((3, 3000), Geometry((1, 3)), id="column-major"),
        pytest.param((70, 90), Geometry((1, 70)), id="tiles"),
        pytest.param((520, 9), Geometry((1, 1000), 2**39 - 500), id="wide tiles"),
        pytest.param((40, 3, 50), Geometry((150, 0, 1)), id="shared in the middle"),
        pytest.param((40, 50, 3), Geometry((50, 1, 0)), id="shared inside"),
        pytest.param((2000,), Geometry((129,)), id="one position a block"),
        pytest.param((64, 65), Geometry((2**33, 2**20), 2**50), id="scattered"),
        pytest.param((50, 60), Geometry((1, 1)), id="overlapping rows"),
    ],
)  # fmt: skip
def test_geometries(backend: BackendUnderTest, shape: tuple[int, ...], geometry: Geometry) -> None:
    assert_mask(backend, torch.tensor(7), shape, geometry, spec.threshold(0.1))
    if len(shape) > 1:
        assert_mask(backend, torch.arange(shape[0]) % 7 * 2**40, shape, geometry, spec.threshold(0.1))


def test_key_for_each_row(backend: BackendUnderTest) -> None:
    """A row's mask depends on its key alone."""
    batch = thinned.Key(7).fold(torch.arange(33))
    mask = backend.keep_mask(batch.bits, (33, 200), shared((33, 200), (), key_dims=1), spec.threshold(0.3))
    for row in (0, 1, 32):
        assert (mask[row].numpy() == spec.keep_mask(spec.fold(7, row), 200, 0.3)).all()


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3), ()])
def test_zero_size_and_zero_dimensions(backend: BackendUnderTest, shape: tuple[int, ...]) -> None:
    for T in (0, 1, 2**31, 2**32):
        assert_mask(backend, torch.tensor(7), shape, shared(shape, ()), T)
    if shape:
        assert_mask(backend, torch.arange(shape[0]), shape, shared(shape, (), 1), 2**31)


@given(st.data(), strategies.shapes(), strategies.thresholds)
def test_any_mask(backend: BackendUnderTest, data: st.DataObject, shape: tuple[int, ...], T: int) -> None:
    key = data.draw(strategies.batches(shape))
    geometry = data.draw(strategies.geometries(shape, key.dim()))
    if not backend.enough():
        assert_mask(backend, key, shape, geometry, T)


@pytest.mark.parametrize("p", [(0.1, 0.3), (0.25, 0.5), (0.5, 0.9), (0.999, 1 - 2**-32)])
def test_masks_are_nested(backend: BackendUnderTest, p: tuple[float, float]) -> None:
    """Under one key, what a larger p keeps, a smaller p keeps too."""
    smaller, larger = (
        backend.keep_mask(torch.tensor(7), (20000,), Geometry((1,)), spec.threshold(probability))
        for probability in p
    )
    assert not (larger & ~smaller).any()
    assert (smaller & ~larger).any()
