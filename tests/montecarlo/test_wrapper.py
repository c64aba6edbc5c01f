"""MonteCarlo predicts distributions in evaluation, and is the model itself in training."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from thinned.montecarlo import MonteCarlo, Prediction, predict


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 3))


OPTIONS = {"seed": 5, "method": "independent"}


def test_evaluation_is_predict() -> None:
    model, x = network(), torch.randn(4, 6)
    prediction = MonteCarlo(model, 30, **OPTIONS).eval()(x)
    assert isinstance(prediction, Prediction)
    expected = predict(model, x, 30, **OPTIONS)  # type: ignore[arg-type]
    assert prediction.mean.equal(expected.mean)
    assert prediction.ids.equal(expected.ids)


def test_training_is_the_model() -> None:
    model, x = network(), torch.randn(4, 6)
    wrapped = MonteCarlo(model, 30, **OPTIONS).train()
    torch.manual_seed(1)
    y = wrapped(x)
    torch.manual_seed(1)
    assert y.equal(model(x))
    y.sum().backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters())


def test_flags_and_copies() -> None:
    wrapped, x = MonteCarlo(network(), 30, **OPTIONS).eval(), torch.randn(4, 6)
    mean = wrapped(x).mean
    assert not any(module.training for module in wrapped.modules())
    assert deepcopy(wrapped)(x).mean.equal(mean)
    assert {name.partition(".")[0] for name in wrapped.state_dict()} == {"module"}


def test_positional_and_named_arguments_together_in_batches() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = network()

        def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:
            return self.layers(x) * scale

    x, scale = torch.randn(5, 6), torch.rand(5, 1)
    one = MonteCarlo(Scaled(), 30, **OPTIONS).eval()(x, scale=scale)
    other = MonteCarlo(Scaled(), 30, batch_size=2, **OPTIONS).eval()(x, scale=scale)
    assert len(one) == len(other) == 5
    torch.testing.assert_close(one.mean, other.mean)


def test_repr_shows_the_options() -> None:
    assert repr(MonteCarlo(network(), 30, **OPTIONS)).startswith(
        "thinned.MonteCarlo(\n  samples=30, seed=5, method='independent'\n  (module): Sequential("
    )


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"samples": 0}, ValueError),
        ({"method": "x"}, ValueError),
        ({"strata": 0}, ValueError),
        ({"task": "x"}, ValueError),
        ({"until": {"mode": 0.1}}, ValueError),
        ({"ids": [1]}, TypeError),
        ({"sample": 3}, TypeError),
    ],
    ids=str,
)
def test_bad_options(bad: dict[str, object], error: type[Exception]) -> None:
    with pytest.raises(error, match=next(iter(bad))):
        MonteCarlo(network(), **bad)  # type: ignore[arg-type]


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module"):
        MonteCarlo(torch.nn.functional.relu)  # type: ignore[arg-type]
