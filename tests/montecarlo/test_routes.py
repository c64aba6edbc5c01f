"""The route that a model takes, and how often it runs the layers before the first dropout."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from thinned.montecarlo import predict


def outputs(output: Tensor) -> Tensor:
    return output


class Counted(nn.Module):
    """A trunk with large results; it counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.repeat(1, 500).unflatten(1, (500, -1)).mean(1)


def test_a_trunk_before_the_first_dropout_runs_once_alone_and_once_for_all_draws() -> None:
    trunk = Counted()
    model = nn.Sequential(trunk, nn.Dropout(), nn.Linear(8, 3))
    prediction = predict(model, torch.randn(4, 8), 50, task=outputs, method="independent", memory=2**17)
    assert prediction.route == "vmap"
    assert trunk.calls == 2


def test_a_model_that_drops_early_runs_in_batches() -> None:
    layers = [module for _ in range(4) for module in (nn.Dropout(0.1), nn.Linear(8, 8), nn.ReLU())]
    model, x = nn.Sequential(*layers, nn.Linear(8, 3)), torch.randn(4, 8)
    prediction = predict(model, x, 20, task=outputs, method="independent", keep_draws=True)
    assert prediction.route == "batch"
    chunks = predict(model, x, 20, task=outputs, method="independent", keep_draws=True, memory=1)
    assert prediction.outputs is not None
    assert chunks.outputs is not None
    torch.testing.assert_close(prediction.outputs, chunks.outputs)


class PlaceInBatch(nn.Module):
    """Its result for an example depends on the number of rows before it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.arange(len(x))[:, None]


@pytest.mark.parametrize("examples", [1, 4])
def test_a_model_that_counts_rows_runs_in_no_batch_of_draws(examples: int) -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3), PlaceInBatch())
    x = torch.randn(examples, 8)
    found = predict(model, x, 20, task=outputs, method="independent", keep_draws=True)
    alone = predict(model, x, 20, task=outputs, method="independent", keep_draws=True, memory=1)
    assert found.outputs is not None
    assert alone.outputs is not None
    torch.testing.assert_close(found.outputs, alone.outputs)
    assert found.route == "vmap"
    assert found.notes == ("batch: its first draw differs from that draw alone",)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_of_half_precision_is_no_difference(dtype: torch.dtype) -> None:
    hidden = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Dropout()
    model = nn.Sequential(*hidden, nn.Linear(256, 10)).to(dtype)
    assert predict(model, torch.randn(32, 64, dtype=dtype), 40).route == "vmap"
    model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert predict(model, torch.randn(32, 64), 40).route == "vmap"


def test_a_tensor_that_the_model_writes_to_stays_as_it_is() -> None:
    class Adding(nn.Module):
        def forward(self, x: Tensor, total: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5) + total.add_(1).sum()

    total = torch.zeros(3)
    predict(Adding(), (torch.randn(4, 8), total), 10, task=outputs)
    assert not total.any()
