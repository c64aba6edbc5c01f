"""Gaussian and variational dropout: the law of their noise, their gradients, and the divergence."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thinned
from backend_under_test import BackendUnderTest
from thinned.compare.layers.gaussian import ENTRIES, VariationalDropoutFormula, true_divergence
from thinned.layers.gaussian import (
    GaussianDropout,
    VariationalDropout,
    gaussian_dropout,
    variational_dropout,
    variational_kl,
)
from thinned.op.noise import normal
from verdicts import breaks

KEY = thinned.Key(7)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOG_ALPHA = torch.tensor(-0.7)

variational = partial(variational_dropout, log_alpha=LOG_ALPHA)
gaussian = partial(gaussian_dropout, p=0.3)


class Wrong(nn.Module):
    """A multiplication by noise that ``make`` makes for the input's shape."""

    def __init__(self, make: Callable[[Tensor], Tensor], p: float) -> None:  # noqa: ARG002
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return x * self.make(x)


SIGMA = math.sqrt(0.3 / 0.7)
WRONG = {
    "mean, variance": lambda x: 1 + 1.02 * SIGMA * torch.randn_like(x),
    "distribution": lambda x: 1 + SIGMA * math.sqrt(3) * (2 * torch.rand_like(x) - 1),
    "independence": lambda x: 1 + SIGMA * torch.randn(len(x), 1).expand_as(x),
    "noise of gradient": lambda x: (1 + SIGMA * torch.randn_like(x)) * x,
}


@pytest.mark.parametrize("name", WRONG)
def test_law_catches(name: str) -> None:
    assert breaks(ENTRIES[0], name, partial(Wrong, WRONG[name]))


@pytest.mark.parametrize("name", ["gradient", "divergence"])
def test_law_of_alpha_catches(name: str) -> None:
    class Half(VariationalDropoutFormula):
        """The noise's variance is ``alpha**2``, and no gradient knows."""

        def forward(self, x: Tensor) -> Tensor:
            sigma = self.log_alpha.exp().detach() + 0 * self.log_alpha
            return x * (1 + sigma * torch.randn_like(x))

        def kl(self) -> Tensor:
            return 1.05 * super().kl()

    assert breaks(ENTRIES[1], name, Half)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_factor_is_that_of_the_noise_and_rounded_once(backend: BackendUnderTest, dtype: torch.dtype) -> None:
    x = torch.randn(6, 50, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = normal(KEY, (6, 50), dtype=wide)
    for p in (0.01, 0.3, 0.5, 0.9):
        sigma = math.sqrt(p / (1 - p))
        expected = (x.to(wide) * (1 + z * sigma)).to(dtype)
        y = gaussian_dropout(x.to(backend.device), p, key=KEY)
        log_alpha = torch.tensor(p / (1 - p), dtype=torch.float64).log()
        learned = variational_dropout(x.to(backend.device), log_alpha.to(backend.device), key=KEY)
        assert y.dtype == learned.dtype == dtype
        if backend.device == "cpu":
            assert y.equal(expected)
        torch.testing.assert_close(y.cpu(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        # exp rounds this sigma to float32.
        atol = 2e-6 * max(1, sigma)
        torch.testing.assert_close(learned.cpu(), expected, rtol=4 * torch.finfo(dtype).eps, atol=atol)


def test_every_feature_has_its_variance() -> None:
    x, log_alphas = torch.randn(100, 3), torch.tensor([0.01, 0.25, 1.0]).log()
    y = variational_dropout(x, log_alphas, key=KEY)
    for feature, log_alpha in enumerate(log_alphas):
        assert y[:, feature].equal(variational_dropout(x, log_alpha, key=KEY)[:, feature])


def test_complex_numbers_have_one_factor_for_both_parts() -> None:
    factor = gaussian(torch.ones(50), key=KEY)
    z = torch.randn(50, dtype=torch.complex64)
    torch.testing.assert_close(gaussian(z, key=KEY), z * factor)
    assert gaussian(z, key=KEY).equal(torch.complex(z.real * factor, z.imag * factor))
    assert variational(z, key=KEY).dtype == torch.complex64
    z, log_alpha = z.to(torch.complex128).requires_grad_(), LOG_ALPHA.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, a: variational_dropout(z, a, key=KEY), (z, log_alpha))


def test_layers_are_their_functions() -> None:
    x = torch.randn(4, 5)
    expected = gaussian_dropout(x, 0.3, key=KEY)
    assert GaussianDropout(0.3)(x, key=KEY).equal(expected)
    for num_features in (None, 5):
        layer = VariationalDropout(0.3, num_features=num_features)
        torch.testing.assert_close(layer(x, key=KEY), expected)
        assert layer.eval()(x) is x
        with pytest.raises(TypeError):
            layer(x, KEY)


@pytest.mark.parametrize("training", [True, False])
def test_p_of_gaussian_dropout_is_below_one(training: bool) -> None:
    x = torch.ones(5)
    for p in (1, 1.0):
        for call in (lambda p=p: gaussian_dropout(x, p, training=training), lambda p=p: GaussianDropout(p)):
            with pytest.raises(ValueError, match=r"below 1, but got 1\.0: the variance .* infinite"):
                call()
    with pytest.raises(ValueError, match="between 0 and 1, but got inf"):
        gaussian_dropout(x, math.inf, training=training)
    assert gaussian_dropout(x, 1 - 2**-53, key=KEY).isfinite().all()


def test_log_alpha_is_a_tensor_that_broadcasts() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(TypeError, match="'log_alpha' must be Tensor, not float"):
        variational_dropout(x, 0.5)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"floating-point tensor, got torch\.int64"):
        variational_dropout(x, torch.tensor(1))
    for shape in ((3,), (3, 3), (1, 3, 4)):
        with pytest.raises(RuntimeError, match=re.escape(f"log_alpha of shape {shape} does not broadcast")):
            variational_dropout(x, torch.zeros(shape))


def test_arguments_of_variational_dropout() -> None:
    for p in (0.0, 1.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=re.escape(f"above 0 and below 1, but got {p}")):
            VariationalDropout(p)
    with pytest.raises(ValueError, match=r"at most max_alpha=1\.0, but p=0\.6 gives 1\.49"):
        VariationalDropout(0.6)
    assert VariationalDropout(0.6, max_alpha=2).alpha.item() == pytest.approx(1.5)
    assert VariationalDropout(0.2, num_features=7).log_alpha.shape == (7,)
    assert VariationalDropout(0.2, num_features=(3, 1, 1)).log_alpha.shape == (3, 1, 1)
    layer = VariationalDropout(0.2)
    assert list(layer.state_dict()) == ["log_alpha"]
    assert (layer.p.item(), layer.alpha.item()) == (pytest.approx(0.2), pytest.approx(0.25))
    assert repr(layer) == "thinned.VariationalDropout(max_alpha=1.0)"
    assert (
        repr(VariationalDropout(0.2, num_features=7))
        == "thinned.VariationalDropout(num_features=7, max_alpha=1.0)"
    )
    assert repr(GaussianDropout(0.2)) == "thinned.GaussianDropout(p=0.2)"


@pytest.mark.parametrize(
    ("approximation", "alphas", "bound"),
    [
        ("polynomial", [1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0], 0.04),
        ("sigmoid", [1e-4, 1e-3, 0.01, 0.05, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0], 0.01),
    ],
)
def test_divergence_is_that_of_the_integral(approximation: str, alphas: list[float], bound: float) -> None:
    log_alpha = torch.tensor(alphas, dtype=torch.float64).log().requires_grad_()
    found = variational_kl(log_alpha, approximation)  # type: ignore[arg-type]
    constant = (np.euler_gamma + math.log(2)) / 2
    exact = torch.tensor([true_divergence(alpha) + constant for alpha in alphas])
    assert (found.detach() - exact).abs().max() < bound
    assert (found > 0).all()
    assert torch.autograd.gradcheck(lambda a: variational_kl(a, approximation), (log_alpha,))  # type: ignore[arg-type]
    # More noise is always nearer to the prior.
    assert (torch.autograd.grad(found.sum(), log_alpha)[0] < 0).all()


def test_divergence_in_the_words_of_the_papers() -> None:
    """Up to the constant, at one alpha by hand; and the two at their common limit."""
    log_alpha = torch.tensor([0.5, 1.0], dtype=torch.float64).log()
    kl = variational_kl(log_alpha)
    by_hand = -0.5 * math.log(0.5) + 1.16145124 * 0.5 - 1.50204118 * 0.75 + 0.58629921 * 0.875
    assert (kl[0] - kl[1]).item() == pytest.approx(by_hand)
    sigmoid = variational_kl(log_alpha, "sigmoid")[1].item()
    assert sigmoid == pytest.approx(0.63576 * (1 - 1 / (1 + math.exp(-1.8732))) + 0.5 * math.log(2))
    assert variational_kl(torch.tensor(60.0), "sigmoid").item() == pytest.approx(0, abs=1e-6)
    small = torch.tensor(-20.0)
    assert variational_kl(small).item() == pytest.approx(variational_kl(small, "sigmoid").item(), abs=1e-3)


def test_which_divergence() -> None:
    layer = VariationalDropout(0.2, num_features=3)
    assert layer.kl().equal(variational_kl(layer.log_alpha))
    assert layer.kl("sigmoid").equal(variational_kl(layer.log_alpha, "sigmoid"))
    with pytest.raises(ValueError, match="either 'polynomial' or 'sigmoid', but got 'exact'"):
        layer.kl("exact")  # type: ignore[arg-type]
    free = VariationalDropout(0.9, max_alpha=math.inf)
    with pytest.raises(ValueError, match=r"max_alpha is inf; take kl\(\"sigmoid\"\)"):
        free.kl()
    assert free.kl("sigmoid").item() > 0
    assert free.alpha.item() == pytest.approx(9, rel=1e-5)


def test_alpha_is_held_at_its_bound_and_comes_back() -> None:
    layer = VariationalDropout(0.5, num_features=3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):  # the divergence alone asks for more noise
        optimizer.zero_grad()
        layer.kl().sum().backward()
        optimizer.step()
    assert layer.log_alpha.tolist() == [0, 0, 0]
    layer.log_alpha.data.fill_(0.2)
    assert layer.alpha.tolist() == [1, 1, 1]
    x = torch.ones(10_000, 3)
    optimizer.zero_grad()
    layer(x, key=KEY).square().mean().backward()
    optimizer.step()
    assert (layer.log_alpha < 0.2).all()
    jacobian = torch.func.jacrev(lambda a: torch.func.functional_call(layer, {"log_alpha": a}, (x[:1],)))
    assert jacobian(layer.log_alpha.detach()).shape == (1, 3, 3)


def test_noise_that_hurts_is_learned_away() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    target = x @ torch.ones(8, 1)
    drop, linear = VariationalDropout(0.4, num_features=8), nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*drop.parameters(), *linear.parameters()], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (linear(drop(x)) - target).square().mean() * 50 + drop.kl().sum() / len(x)
        loss.backward()
        optimizer.step()
    assert (drop.alpha < 0.05).all()
