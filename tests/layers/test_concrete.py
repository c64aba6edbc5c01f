"""Concrete dropout: the law of its mask, its gradients, its regulariser, and that it learns."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor, nn

import chance
import thinned
from backend_under_test import BackendUnderTest
from thinned import op
from thinned.compare.layers.concrete import ENTRIES, ConcreteDropoutFormula
from thinned.layers.concrete import ConcreteDropout, concrete_dropout, concrete_regularization
from thinned.op.noise import logistic
from verdicts import breaks

KEY = thinned.Key(7)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOGIT = torch.tensor(0.3).logit()
N = 300_000

concrete = partial(concrete_dropout, p_logit=LOGIT)


class Wrong(nn.Module):
    """The authors' formula with another ``p`` in the mask, or ``u`` made otherwise."""

    def __init__(self, make: Callable[[Tensor], Tensor], bias: float, p: float, temperature: float) -> None:
        super().__init__()
        self.make, self.temperature, self.bias = make, temperature, bias
        self.p_logit = nn.Parameter(torch.full((1,), math.log(p / (1 - p))))

    def forward(self, x: Tensor) -> Tensor:
        logit = (self.p_logit + self.bias + self.make(x).logit()) / self.temperature
        return x * torch.sigmoid(-logit) / (1 - self.p_logit.sigmoid().detach())


@pytest.mark.parametrize(
    ("name", "make", "bias"),
    [
        ("distribution", torch.rand_like, 0.03),  # p is 2 % more
        ("t near 0", torch.rand_like, 0.03),
        ("distribution", lambda x: torch.rand_like(x) ** 1.02, 0.0),
        ("independence", lambda x: torch.rand(len(x), 1).expand_as(x), 0.0),
        ("gradient", torch.rand_like, 0.0),
        ("extremes", torch.rand_like, 0.0),
    ],
)
def test_law_catches(name: str, make: Callable[[Tensor], Tensor], bias: float) -> None:
    assert breaks(ENTRIES[0], name, partial(Wrong, make, bias))


@pytest.mark.parametrize("p", [0.05, 0.3, 0.8])
def test_mask_of_a_low_temperature_is_that_of_the_numbers(p: float) -> None:
    """Dropped where ``u`` is above ``1 - p``."""
    logit = torch.tensor(p, dtype=torch.float64).logit()
    y = concrete_dropout(torch.ones(N, dtype=torch.float64), logit, temperature=1e-5, key=KEY)
    kept = y > 0.5 / (1 - p)
    assert ((y - kept / (1 - p)).abs() > 1e-6).double().mean() < 1e-3
    u = special.expit(logistic(KEY, (N,), dtype=torch.float64).numpy())
    assert np.array_equal(kept.numpy(), u < 1 - p)


def test_agrees_with_the_authors_formula_in_distribution() -> None:
    torch.manual_seed(3)
    ours = concrete(torch.ones(N), key=KEY)
    formula = ConcreteDropoutFormula(0.3)(torch.ones(N)).detach()
    between = [y[(y > 1e-4) & (y < 1.42)] for y in (ours, formula)]
    assert stats.ks_2samp(*between).pvalue > chance.FALSE_ALARM
    counts = [[len(part), N - len(part)] for part in between]
    assert stats.chi2_contingency(counts).pvalue > chance.FALSE_ALARM
    off = ConcreteDropoutFormula(0.31)(torch.ones(N)).detach() * 0.69 / 0.7
    counts = [[int((y < 0.7).sum()), N] for y in (ours, off)]
    assert stats.chi2_contingency(counts).pvalue < chance.FALSE_ALARM


@pytest.mark.parametrize(("p", "t"), [(0.05, 0.125), (0.3, 0.5), (0.8, 2.0)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_are_those_of_the_formula_and_rounded_once(
    backend: BackendUnderTest, dtype: torch.dtype, p: float, t: float
) -> None:
    x, logit = torch.randn(6, 50, dtype=torch.float64).to(dtype), torch.tensor(p).logit()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    noise = logistic(KEY, (6, 50), dtype=wide)
    y = concrete_dropout(x.to(backend.device), logit.to(backend.device), temperature=t, key=KEY).cpu()
    kept = 1 / (1 + ((noise + logit) / t).exp())
    if backend.device == "cpu":
        assert y.equal((x.to(wide) * (kept * (1 + logit.to(wide).exp()))).to(dtype))
    exact = x.double() * torch.sigmoid(-(noise.double() + logit) / t) * (1 + logit.double().exp())
    torch.testing.assert_close(y, exact.to(dtype), rtol=max(4, 2 / t) * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("temperature", [1e-3, 0.1, 1.0, 10.0])
def test_extreme_numbers_and_probabilities(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first and last numbers there are, and p at 0 and at 1 to rounding."""
    ends = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    monkeypatch.setattr(op, "uniform", lambda *_: ends.clone())
    for logit in (-200.0, -15.0, 0.0, 9.0):
        x = torch.ones(6, dtype=dtype, requires_grad=True)
        p_logit = torch.tensor(logit, requires_grad=True)
        y = concrete_dropout(x, p_logit, temperature=temperature, key=KEY)
        found = (y, *torch.autograd.grad(y.sum(), (x, p_logit)))
        assert all(bool(tensor.isfinite().all()) for tensor in found)
        assert (y >= 0).all()
    # 1 / (1 - p) overflows on the way; what comes out may be 0 or large, but never NaN.
    for logit in (40.0, 80.0, 1000.0):
        p_logit = torch.tensor(logit, requires_grad=True)
        y = concrete_dropout(torch.ones(6, dtype=dtype), p_logit, temperature=temperature, key=KEY)
        assert not y.isnan().any()
        assert not torch.autograd.grad(y.float()[0], p_logit)[0].isnan().any()


def test_layer_is_the_function() -> None:
    x, layer = torch.randn(4, 5), ConcreteDropout(0.3, temperature=0.5)
    torch.testing.assert_close(layer(x, key=KEY), concrete(x, temperature=0.5, key=KEY))
    with pytest.raises(TypeError):
        layer(x, KEY)
    assert concrete(x, training=False) is x
    shared = ConcreteDropout(0.3, temperature=0.5, broadcast_dims=(0,))
    expected = concrete(x, temperature=0.5, key=KEY, broadcast_dims=(0,))
    torch.testing.assert_close(shared(x, key=KEY), expected)
    # Monte Carlo estimates as the authors make them: the model in evaluation, its dropout in training.
    model = nn.Sequential(layer, nn.Identity()).eval()
    assert model(x) is x
    layer.train()
    assert not model(x).equal(model(x))


def test_wrong_arguments() -> None:
    x = torch.ones(3, 4)
    for p in (0.0, 1.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=re.escape(f"above 0 and below 1, but got {p}")):
            ConcreteDropout(p)
    for temperature in (0.0, -1.0, math.nan, math.inf):
        message = re.escape(f"temperature has to be above 0 and finite, but got {temperature}")
        with pytest.raises(ValueError, match=message):
            ConcreteDropout(0.1, temperature=temperature)
        with pytest.raises(ValueError, match=message):
            concrete(x, temperature=temperature, training=False)
    with pytest.raises(TypeError, match="'p_logit' must be Tensor, not float"):
        concrete_dropout(x, 0.5)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=re.escape("p_logit of shape (3,) does not broadcast to an input")):
        concrete_dropout(x, torch.zeros(3))


def test_what_a_layer_shows() -> None:
    layer = ConcreteDropout(0.2)
    assert layer.p.item() == pytest.approx(0.2)
    assert list(layer.state_dict()) == ["p_logit"]
    assert layer.p_logit.shape == (1,)
    shown = "temperature=0.1, weight_regularizer=1e-06, dropout_regularizer=1e-05"
    assert repr(layer) == f"thinned.ConcreteDropout({shown})"
    assert (
        repr(ConcreteDropout(broadcast_dims=[2, 3]))
        == f"thinned.ConcreteDropout({shown}, broadcast_dims=(2, 3))"
    )


def test_regulariser_is_that_of_the_authors() -> None:
    linear, layer = nn.Linear(7, 3), ConcreteDropout(0.2, weight_regularizer=0.03, dropout_regularizer=0.5)
    entropy = 0.2 * math.log(0.2) + 0.8 * math.log(0.8)
    weight, bias = (float(parameter.detach().square().sum()) for parameter in linear.parameters())
    for weights, features, squares, k in (
        (linear.weight, None, weight, 7),
        (linear.parameters(), None, weight + bias, 7),
        ([linear.weight], 20, weight, 20),
        (nn.Conv2d(5, 2, 3).weight * 0, None, 0.0, 5),
    ):
        wanted = 0.03 * squares / 0.8 + 0.5 * k * entropy
        assert layer.regularization(weights, features).item() == pytest.approx(wanted)
    with pytest.raises(ValueError, match="weights are empty"):
        layer.regularization([])
    with pytest.raises(ValueError, match=r"no dimension 1, but its shape is \(3,\)"):
        layer.regularization(linear.bias)


def test_gradients_of_the_regulariser() -> None:
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for p in (1e-6, 0.2, 0.9):
        logit = torch.tensor([p], dtype=torch.float64).logit().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda logit, weight: concrete_regularization(logit, weight, None, 0.3, 0.7), (logit, weight)
        )
    for logit in (-200.0, 200.0):
        extreme = torch.tensor([logit], requires_grad=True)
        loss = concrete_regularization(extreme, weight.float())
        assert loss.isfinite()
        assert torch.autograd.grad(loss, extreme)[0].isfinite()


def test_p_falls_where_noise_hurts_and_rises_to_a_half_where_it_does_not() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    target = x @ torch.ones(8, 1)

    def learn(weight: float) -> float:
        drop, linear = ConcreteDropout(0.3, dropout_regularizer=0.1), nn.Linear(8, 1)
        optimizer = torch.optim.Adam([*drop.parameters(), *linear.parameters()], lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            error = (linear(drop(x)) - target).square().mean()
            (weight * error + drop.regularization(linear.weight)).backward()
            optimizer.step()
        return drop.p.item()

    assert learn(weight=1.0) < 0.05
    assert learn(weight=0.0) == pytest.approx(0.5, abs=0.02)
