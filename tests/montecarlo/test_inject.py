"""Dropout that is put before modules for the time of a prediction."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned
from montecarlo.common import both_methods, mlp, ulps
from thinned.montecarlo import predict, stream

x = torch.randn(12, 8)


def plain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


class Dropping(nn.Linear):
    """A linear layer that drops its input, by torch's own function."""

    p = 0.25

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(nn.functional.dropout(x, self.p, self.training))


def with_dropouts(*places: int) -> nn.Sequential:
    model = plain()
    for place in places:
        old = model[place]
        new = Dropping(old.in_features, old.out_features)
        new.load_state_dict(old.state_dict())
        model[place] = new
    return model


def hooks(model: nn.Module) -> list[int]:
    """Forward pre-hooks of each module; those of thinned.address stay, and do nothing outside of it."""
    return [len(module._forward_pre_hooks) for module in model.modules()]


@both_methods
@pytest.mark.parametrize(
    ("inject", "places"),
    [
        ({"2": 0.25}, [2]),
        ({"[24]": 0.25}, [2, 4]),
        ({"4": 0.25, "?": 0.0, "0": 0.9}, [4]),
        ({"2": 0.25, "*": 0.0}, [2]),
    ],
    ids=["path", "pattern", "the first match holds", "0 elsewhere"],
)
def test_masks_are_those_of_a_dropout_within_the_module(method: Any, inject: Any, places: list[int]) -> None:
    options: dict[str, Any] = {"samples": 20, "keep_draws": True, "method": method}
    found = predict(plain(), x, inject=inject, **options)
    expected = predict(with_dropouts(*places), x, **options)
    assert found.outputs is not None
    assert expected.outputs is not None
    assert ulps(found.outputs, expected.outputs) <= 16


def test_head_is_the_last_weighted_module() -> None:
    model = nn.Sequential(plain(), nn.Softplus(), nn.LayerNorm(3))
    found, expected = (predict(model, x, 20, inject=inject) for inject in ("head", {"0.4": 0.1}))
    assert found.sites == ("0.4",)
    assert found.mean.equal(expected.mean)
    convolutions = nn.Sequential(nn.Conv1d(1, 3, 1), nn.Flatten(2))
    assert predict(convolutions, x[:, None], 5, inject="head").sites == ("0",)


def test_it_comes_on_top_of_the_models_own() -> None:
    model = mlp()
    assert predict(model, x, 5, inject={"0": 0.1}).sites == ("2", "5", "0")


@both_methods
def test_it_is_gone_afterwards(method: Any) -> None:
    model = plain()
    predict(model, x, 5, inject="head", method=method)
    before = hooks(model)
    with torch.no_grad():
        output = model(x)
    predict(model, x, 5, inject={"*": 0.5}, method=method)
    with pytest.raises(ValueError, match="not finite"):
        predict(model, x * torch.nan, 5, inject={"*": 0.5})
    parts = stream(model, x, 5, inject={"*": 0.5}, batch_size=2)
    next(parts)
    assert hooks(model) == before
    parts.close()  # type: ignore[attr-defined]
    assert hooks(model) == before
    assert model(x).equal(output)
    with pytest.raises(ValueError, match="drops nowhere"):
        predict(model, x, 5)


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(input=x)
        return y


@pytest.mark.parametrize(
    ("model", "inject", "error", "message"),
    [
        (plain(), {"layers.*": 0.1}, ValueError, "no module of this Sequential is at a path like 'layers"),
        (plain(), {"2": 1.5}, ValueError, "p"),
        (plain(), {"2": "x"}, TypeError, "p"),
        (plain(), {}, ValueError, "drops nowhere"),
        (plain(), {"2": 0.0}, ValueError, "drops nowhere"),
        (nn.Sequential(nn.ReLU()), "head", ValueError, "has no nn.Linear and no convolution"),
        (Keywords(), "head", TypeError, "drops the first positional input of Linear"),
        (plain(), "2", ValueError, "inject must be 'head' or a mapping of path patterns to p, got '2'"),
        (plain(), ["2"], TypeError, "inject must be 'head' or a mapping"),
        (plain(), {2: 0.1}, TypeError, "inject"),
    ],
)
def test_what_is_refused(model: nn.Module, inject: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict(model, x, 5, inject=inject)


def test_recurrent_and_integer_inputs() -> None:
    lstm = nn.LSTM(8, 4, batch_first=True)
    found = predict(lstm, x[:, None], 10, task=lambda output: output[0], inject={"": 0.2})
    assert found.variance.amax() > 0
    embedding = nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3))
    with pytest.raises(RuntimeError, match="dropout needs a floating-point or complex tensor"):
        predict(embedding, torch.randint(10, (5, 3)), 5, inject={"0": 0.1})
    assert predict(embedding, torch.randint(10, (5, 3)), 5, inject={"1": 0.1}).variance.amax() > 0


def test_a_converted_model_may_have_more() -> None:
    model = thinned.convert(mlp())
    assert predict(model, x, 5, inject="head").sites == ("2", "5", "6")
