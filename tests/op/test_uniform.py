"""The numbers behind the masks: every backend makes those of the specification."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import chance
import oracle
import strategies
from backend_under_test import BackendUnderTest
from thinned import op, spec
from thinned.geometry import Geometry, shared

KEY = torch.tensor(7)


def assert_numbers(
    backend: BackendUnderTest, key: torch.Tensor, shape: tuple[int, ...], geometry: Geometry
) -> None:
    found = backend.uniform(key, shape, geometry)
    oracle.assert_same(found, oracle.uniform(key, shape, geometry))
    assert found.is_contiguous()


@given(data=st.data())
def test_any_geometry_and_keys(backend: BackendUnderTest, data: st.DataObject) -> None:
    shape = data.draw(strategies.shapes(most=1500))
    key = data.draw(strategies.batches(shape))
    geometry = data.draw(strategies.geometries(shape, key.dim()))
    if not backend.enough():
        assert_numbers(backend, key, shape, geometry)


@pytest.mark.parametrize("base", [127, 2**32 - 100, 2**39 - 100, 2**63 - 700])
def test_far_positions(backend: BackendUnderTest, base: int) -> None:
    for key in (KEY, torch.arange(2)):
        assert_numbers(backend, key, (2, 300), Geometry((300, 1), base))


def test_more_blocks_than_are_made_at_once(backend: BackendUnderTest) -> None:
    assert_numbers(backend, KEY, (70000,), Geometry((1,)))


def test_a_number_below_the_threshold_is_kept(backend: BackendUnderTest) -> None:
    geometry = shared((5000,))
    T = spec.threshold(0.3)
    below = backend.uniform(KEY, (5000,), geometry) < T - 2**31
    assert below.equal(backend.keep_mask(KEY, (5000,), geometry, T))


def test_distribution() -> None:
    """The highest and the lowest 8 bits, and the highest together with those of the next number."""
    found = op.uniform(KEY, (2**20,), Geometry((1,))).numpy().astype(np.int64) + 2**31
    high, low = found >> 24, found & 255
    assert chance.uniformity(high, 256) > chance.FALSE_ALARM
    assert chance.uniformity(low, 256) > chance.FALSE_ALARM
    assert chance.uniformity((high[:-1] >> 3) << 5 | high[1:] >> 3, 1024) > chance.FALSE_ALARM


def test_distribution_notices_one_bit_in_fifty() -> None:
    found = op.uniform(KEY, (2**20,), Geometry((1,))).numpy().astype(np.int64) + 2**31
    biased = found | np.where(np.arange(2**20) % 50 == 0, 2**31, 0)
    assert chance.uniformity(biased >> 24, 256) < chance.FALSE_ALARM


def test_vmap_over_keys() -> None:
    keys = torch.tensor([7, -8, 2**62])
    mapped = torch.func.vmap(lambda key: op.uniform(key, (4, 5), shared((4, 5), (0,))))(keys)
    assert mapped.equal(torch.stack([op.uniform(key, (4, 5), shared((4, 5), (0,))) for key in keys]))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_sizes_that_change() -> None:
    def call(x: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return op.uniform(key, x.shape, shared(x.shape))

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n in (3, 8, 200):
        assert compiled(torch.ones(n, 5), KEY).equal(call(torch.ones(n, 5), KEY))
