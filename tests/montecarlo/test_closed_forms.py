"""Statistics of Monte-Carlo dropout against their exact values, and against torch's own draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

from chance import FALSE_ALARM
from montecarlo.common import assert_unbiased, both_methods, enumerated, mlp
from thinned import spec
from thinned.montecarlo import predict

REPEATS = 3000  # examples with one input: their draws are independent of each other
SAMPLES, STRATA = 21, 7


def realised(p: float) -> float:
    return spec.threshold(p) / 2**32


@both_methods
@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_linear_network(method: str, p: float) -> None:
    """The output W (m * x / q) + b has mean W x + b and variance (1 - q) / q * (W * W) (x * x)."""
    torch.manual_seed(1)
    layer, x, q = nn.Linear(6, 3), torch.randn(6), realised(p)
    model = nn.Sequential(nn.Dropout(p), layer)
    found = predict(
        model, x.expand(REPEATS, 6), SAMPLES, task="regression", method=method, strata=STRATA, memory=2**30
    )
    with torch.no_grad():
        mean, variance = layer(x), (1 - q) / q * layer.weight**2 @ x**2
    assert_unbiased(found.mean, mean)
    assert_unbiased(found.variance, variance)
    assert_unbiased((found.mean - mean) ** 2 - found.standard_error**2, 0.0)
    if method == "stratified":
        # The terms of the sum are independent, and each has a stratified mean, so the error is smaller.
        assert float((found.standard_error**2).mean()) < 0.5 * float(variance.mean()) / SAMPLES


@both_methods
def test_hidden_layer_by_all_its_masks(method: str) -> None:
    torch.manual_seed(2)
    before, after, q = nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Linear(6, 3), realised(0.4)
    x = torch.randn(4)
    head = nn.Sequential(after, nn.Softmax(-1))
    chances, probabilities = enumerated(head, before(x), q)
    p = probabilities.numpy()
    mean = chances @ p
    variance = chances @ (p - mean) ** 2
    entropies = -(p * np.log(p)).sum(1)
    model = nn.Sequential(before, nn.Dropout(0.4), after)
    found = predict(model, x.expand(REPEATS, 4), SAMPLES, method=method, strata=STRATA, seed=5)
    assert found.expected_entropy is not None
    assert found.expected_entropy_error is not None
    assert found.votes is not None
    assert_unbiased(found.mean, torch.tensor(mean))
    assert_unbiased(found.variance, torch.tensor(variance))
    assert_unbiased(found.expected_entropy[:, None], float(chances @ entropies))
    error = (found.expected_entropy - float(chances @ entropies)) ** 2 - found.expected_entropy_error**2
    assert_unbiased(error[:, None], 0.0)
    assert_unbiased((found.mean - torch.tensor(mean)) ** 2 - found.standard_error**2, 0.0)
    votes = np.bincount(p.argmax(1), weights=chances, minlength=3)
    shares = found.votes.double() / SAMPLES
    assert_unbiased(shares[:, votes > 0], torch.tensor(votes[votes > 0]))


@both_methods
def test_statistics_of_the_kept_draws(method: str) -> None:
    found = predict(
        mlp(), torch.randn(5, 8), 40, method=method, keep_draws=True, quantiles=[0.1, 0.5], strata=10
    )
    draws = found.outputs
    assert draws is not None
    assert draws.shape == (5, 40, 3)
    f = draws.double().numpy()
    np.testing.assert_allclose(found.mean, f.mean(1), rtol=1e-12)
    for q, value in found.quantiles.items():
        np.testing.assert_allclose(value, np.quantile(f, q, axis=1), rtol=1e-6)
    assert found.variation_ratio.equal(
        1 - torch.nn.functional.one_hot(draws.argmax(2), 3).double().mean(1).amax(1).float()
    )
    of_mean = -(found.mean * found.mean.log()).sum(1)
    of_each = -(draws.double() * draws.double().log()).sum(2).mean(1)
    torch.testing.assert_close(found.predictive_entropy, of_mean)
    torch.testing.assert_close(found.mutual_information, of_mean - of_each, rtol=1e-5, atol=1e-6)
    assert found.label.equal(found.mean.argmax(1))
    assert found.max_probability.equal(found.mean.amax(1))
    assert found.std.equal(found.variance.sqrt())


def test_a_model_of_mean_and_variance() -> None:
    """The variance of an observation is the mean of the variances plus the variance of the means."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.drop(x)
            return h.sum(1), h.square().sum(1)

    x = torch.tensor([[1.0, 2.0, 3.0]]).expand(REPEATS, 3)
    found = predict(Both(), x, 20, task="regression", method="independent")
    assert found.aleatoric is not None
    assert found.mean.shape == found.aleatoric.shape == (REPEATS,)
    assert_unbiased(found.mean[:, None], 6.0)
    assert_unbiased(found.epistemic[:, None], 14.0)  # sum x^2 (1 - q) / q
    assert_unbiased(found.aleatoric[:, None], 28.0)  # sum x^2 / q
    assert found.total_variance.equal(found.aleatoric + found.variance)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.dropout(self.first(x).tanh(), 0.3, self.training)
        y: Tensor = self.last(h)
        return y


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(8, 2, 0.4, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, 1)) * torch.linspace(-1, 1, 8)
        y, _ = self.attention(x, x, x, need_weights=False)
        z: Tensor = self.last(y[:, -1])
        return z


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(1, 6, 2, dropout=0.5, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.lstm(x[:, :, None])[0][:, -1])
        return y


@both_methods
@pytest.mark.parametrize("kind", [mlp, Functional, Attention, Recurrent])
def test_one_draw_has_the_distribution_of_torchs_own(kind: type[nn.Module], method: str) -> None:
    torch.manual_seed(3)
    model, x = kind().train(), torch.randn(8).expand(4000, 8)
    with torch.no_grad():
        theirs = model(x).softmax(1).numpy()
    found = predict(model, x, 8, method=method, keep_draws=True, strata=8)
    assert found.outputs is not None
    ours = found.outputs[:, 5].numpy()  # a draw of each example: independent, where those of one are not
    chances = [stats.ks_2samp(ours[:, k], theirs[:, k]).pvalue for k in range(3)]
    assert min(chances) * len(chances) > FALSE_ALARM, chances
    # A mean of the same draws, too: normal, with both samples' variance.
    error = np.sqrt(ours.var(0) / len(ours) + theirs.var(0) / len(theirs))
    z = np.abs(ours.mean(0) - theirs.mean(0)) / error
    assert 2 * stats.norm.sf(z.max()) * 3 > FALSE_ALARM, z
    assert math.isclose(float(found.mean.sum(1).mean()), 1.0, rel_tol=1e-6)
