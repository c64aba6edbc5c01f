"""Means and variances of draws that come in chunks and in sets."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from montecarlo.common import assert_unbiased
from thinned.montecarlo.accumulate import Accumulator


def by_numpy(draws: torch.Tensor, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # type: ignore[type-arg]
    """The formulas of the docstring, on all draws at once."""
    f = draws.double().numpy()
    n, sets = len(f), len(f) // size
    mean = f.mean(0)
    with np.errstate(invalid="ignore"):
        independent = np.full(mean.shape, np.nan) if n == 1 else f.var(0, ddof=1)
    if size == 1:
        return mean, independent, np.sqrt(independent / n)
    if sets < 2:
        variance = independent if n == 1 else f.var(0)
        return mean, variance, np.sqrt(independent / n)
    whole = f[: sets * size].reshape(sets, size, *mean.shape)
    of_means = whole.mean(1).var(0, ddof=1)
    variance = whole.var(1).mean(0) + of_means
    rest = n - sets * size
    squares = (sets * size / n) ** 2 * of_means / sets + rest / n**2 * variance
    return mean, variance, np.sqrt(squares)


@given(
    size=st.integers(1, 7),
    chunks=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 1e4]),
    data=st.data(),
)
def test_it_equals_numpy_whatever_the_chunks(
    size: int, chunks: list[int], offset: float, data: st.DataObject
) -> None:
    torch.manual_seed(sum(chunks))
    draws = torch.randn(sum(chunks), 3, 2) + offset
    sums = Accumulator(size)
    for chunk in draws.split(chunks):
        sums.add(chunk)
    cut = data.draw(st.integers(0, len(draws) // size)) * size
    one, two = Accumulator(size), Accumulator(size)
    for part, its in ((one, draws[:cut]), (two, draws[cut:])):
        if len(its):
            part.add(its)
    chosen = torch.tensor([True, False, True])
    mean, variance, error = by_numpy(draws, size)
    for found, rows in (
        (sums, slice(None)),
        (one.merged(two), slice(None)),
        (sums.select(chosen), chosen.numpy()),
        (sums.to("cpu"), slice(None)),
    ):
        assert found.count == len(draws)
        np.testing.assert_allclose(found.mean.numpy(), mean[rows], rtol=1e-12)
        np.testing.assert_allclose(found.variance.numpy(), variance[rows], rtol=1e-7, atol=1e-12)
        np.testing.assert_allclose(found.standard_error.numpy(), error[rows], rtol=1e-7, atol=1e-12)


def repelling(repeats: int, draws: int, size: int) -> torch.Tensor:
    """Draws of shape (draws, repeats), uniform in [0, 1): a set has one in each of ``size`` strata."""
    generator = torch.Generator().manual_seed(0)
    sets = -(-draws // size)
    strata = torch.rand(sets, repeats, size, generator=generator).argsort(-1)
    return (
        ((strata + torch.rand(sets, repeats, size, generator=generator)) / size)
        .transpose(1, 2)
        .flatten(0, 1)[:draws]
    )


@pytest.mark.parametrize(("draws", "size"), [(12, 1), (12, 4), (40, 10), (2, 1)])
def test_variance_and_error_are_unbiased(draws: int, size: int) -> None:
    """The error is right for draws that repel within a set, too: their mean has less variance."""
    sums = Accumulator(size)
    sums.add(repelling(20_000, draws, size))
    assert_unbiased(sums.mean[:, None], 0.5)
    assert_unbiased(sums.variance[:, None], 1 / 12)
    assert_unbiased(((sums.mean - 0.5) ** 2 - sums.standard_error**2)[:, None], 0.0)


@pytest.mark.parametrize(("draws", "size"), [(10, 10), (7, 10), (13, 10)])
def test_one_set_bounds_the_error_from_above(draws: int, size: int) -> None:
    sums = Accumulator(size)
    sums.add(repelling(20_000, draws, size))
    assert 1 / 12 * (1 - 1 / draws) - 1e-3 < float(sums.variance.mean()) < 1 / 12
    assert float(((sums.mean - 0.5) ** 2).mean()) < float((sums.standard_error**2).mean())


@pytest.mark.parametrize(("draws", "size"), [(25, 10), (39, 10), (9, 4)])
def test_a_last_set_that_is_not_whole_is_not_taken_for_whole(draws: int, size: int) -> None:
    """Its mean varies more than a whole set's would as a part."""
    sums = Accumulator(size)
    sums.add(repelling(20_000, draws, size))
    assert float(((sums.mean - 0.5) ** 2).mean()) < float((sums.standard_error**2).mean())


def test_no_draw_has_no_mean() -> None:
    with pytest.raises(RuntimeError, match="no draw has been added"):
        Accumulator().mean  # noqa: B018


def test_one_draw_has_no_error() -> None:
    sums = Accumulator()
    sums.add(torch.ones(1, 2))
    assert sums.variance.isnan().all()
    assert sums.standard_error.isnan().all()
