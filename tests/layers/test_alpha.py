"""Alpha dropout: its two values, SELU's constants, and the layers that break its laws."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import oracle
import thinned
from backend_under_test import BackendUnderTest
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers.alpha import ENTRIES, Affine
from thinned.compare.settings import Settings
from thinned.functional import alpha_dropout, feature_alpha_dropout
from thinned.geometry import shared

KEY = thinned.Key(7)
P = 0.3
SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
REAL = [dtype for dtype in oracle.DTYPES if not dtype.is_complex]


def constants(p: float) -> tuple[float, float, float]:
    """``scale, shift, fill`` for the realised probability, rounded in the docstring's order."""
    q = thinned.spec.threshold(p) / 2**32
    a = 1 / math.sqrt(q * (1 + 1.7580993408473766**2 * (1 - q)))
    return a, a * 1.7580993408473766 * (1 - q), -a * 1.7580993408473766 * q


@pytest.mark.parametrize(
    ("function", "dims"),
    [
        (alpha_dropout, ()),
        (partial(alpha_dropout, broadcast_dims=(1, -1)), (1, 3)),
        (partial(alpha_dropout, broadcast_dims=range(2, 4)), (2, 3)),
        (feature_alpha_dropout, (2, 3)),
    ],
    ids=["alpha_dropout", "broadcast_dims", "broadcast_dims of channels", "feature_alpha_dropout"],
)
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
def test_every_backend_is_the_formula(
    backend: BackendUnderTest,
    function: Callable[..., Tensor],
    dims: tuple[int, ...],
    dtype: torch.dtype,
    p: float,
) -> None:
    T = thinned.spec.threshold(p)
    x = oracle.specials((6, 10, 4, 3), dtype)
    expected = oracle.masked_affine(x, KEY.bits, shared(x.shape, dims), T, *constants(p))
    for laid_out in (x, x.contiguous(memory_format=torch.channels_last)):
        y = function(laid_out.to(backend.device), p, training=True, key=KEY)
        oracle.assert_same(y.cpu(), expected)
        assert y.stride() == laid_out.stride()
    keys = KEY.fold(torch.arange(6))
    y = function(x.to(backend.device), p, training=True, key=keys.to(backend.device))
    oracle.assert_same(
        y.cpu(), oracle.masked_affine(x, keys.bits, shared(x.shape, dims, 1), T, *constants(p))
    )


def test_the_dropped_value_is_where_selu_saturates() -> None:
    """Klambauer et al.'s a(x d + α'(1-d)) + b; their appendix gives a and b for any α'."""
    x = torch.randn(1000, dtype=torch.float64)
    saturated = nn.functional.selu(torch.tensor(-1e9, dtype=torch.float64))
    for p in (0.1, 0.5, 0.9):
        keep = thinned.keep_mask(KEY, x.shape, p)
        q = thinned.spec.threshold(p) / 2**32
        a = (q + saturated**2 * q * (1 - q)) ** -0.5
        b = -a * (1 - q) * saturated
        y = alpha_dropout(x, p, training=True, key=KEY)
        torch.testing.assert_close(y, a * torch.where(keep, x, saturated) + b, rtol=1e-13, atol=1e-14)
        assert y.sub(a * torch.where(keep, x, -SELU_ALPHA) + b).abs().max() > 0.01


def test_fourth_moment_is_that_of_the_formula() -> None:
    """Against a quadrature that is exact for polynomials of degree 5; the laws' bounds rely on it."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    a, b, fill = constants(P)
    kept = float((weights * (a * nodes + b) ** 4).sum() / math.sqrt(2 * math.pi))
    assert math.isclose((1 - P) * kept + P * fill**4, Affine(P).fourth_moment, rel_tol=1e-6)


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 5, 4, 3), (6, 5, 2, 3, 4)], ids=str)
def test_the_first_two_dimensions_are_samples_and_channels(shape: tuple[int, ...]) -> None:
    y = feature_alpha_dropout(torch.zeros(shape), 0.5, training=True, key=KEY)
    mask = thinned.keep_mask(KEY, shape, 0.5, broadcast_dims=range(2, len(shape)))
    assert y.gt(0).equal(mask)


@pytest.mark.parametrize("function", [alpha_dropout, feature_alpha_dropout])
def test_complex_numbers_pass_in_evaluation_only(function: Callable[..., Tensor]) -> None:
    x = torch.ones(2, 3, dtype=torch.complex64)
    assert function(x, 0.5) is x
    with pytest.raises(NotImplementedError, match=re.escape("torch.complex64 of shape (2, 3)")):
        function(x, 0.5, training=True)


class Mixed(nn.Module):
    """Constants and mask that can be another's."""

    def __init__(self, p: float, saturation: float = SELU_SCALE * SELU_ALPHA, affine: bool = True) -> None:
        super().__init__()
        self.p = p
        self.a = 1 / math.sqrt((1 - p) * (1 + saturation**2 * p)) if affine else 1.0
        self.b = self.a * saturation * p if affine else 0.0
        self.saturation = saturation

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(x.shape) < 1 - self.p
        return self.a * torch.where(keep, x, -self.saturation) + self.b


def biased(p: float) -> nn.Module:
    """Drops 2 % too rarely, with the constants of p."""
    layer = Mixed(p)
    layer.p = 0.98 * p
    return layer


CULPRITS: dict[tuple[int, str], Callable[..., nn.Module]] = {
    (0, "values"): lambda p: Mixed(p, saturation=SELU_ALPHA),
    (0, "mean, variance at p = 0.5"): lambda p: Mixed(p, affine=False),
    (0, "mean, variance at p = 0.8"): nn.Dropout,
    (0, "drop rate at p = 0.3"): biased,
    (0, "mask of gradient"): nn.Dropout,
    (0, "neighbours"): nn.FeatureAlphaDropout,
    (1, "sharing"): nn.AlphaDropout,
}


@pytest.mark.parametrize(("entry", "law"), CULPRITS)
def test_a_wrong_layer_is_caught(entry: int, law: str) -> None:
    (check,) = [one for one in ENTRIES[entry].laws if one.name == law]
    found = examine(check, Implementation("culprit", CULPRITS[entry, law]), Settings(quick=True))
    assert found.verdict is Verdict.BROKEN, found.measured
