"""Time and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from compare.culprits import changed
from thinned.compare import timing
from thinned.compare.loading import resolve
from thinned.compare.memory import bytes_saved
from thinned.compare.settings import Settings
from thinned.compare.timing import MULTIPLY, planned, time_all

SETTINGS = Settings()


class StashesMask(nn.Dropout):
    """Hides its mask from autograd, in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.mask = torch.rand_like(x) >= self.p
        return x + 0 * x.sum()


class Crashes(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        raise IndexError(x.shape)


def test_bytes_saved() -> None:
    assert bytes_saved(resolve("thinned"), SETTINGS) == pytest.approx(0, abs=1e-3)  # a key, but no mask
    assert bytes_saved(resolve("torch"), SETTINGS) == 4
    assert bytes_saved(changed(StashesMask), SETTINGS) == pytest.approx(1, abs=1e-3)
    assert bytes_saved(changed(Crashes), SETTINGS) is None


@pytest.mark.parametrize("direction", ["forward", "forward + backward"])
def test_times_each_beside_a_multiply(direction: str) -> None:
    timings = {
        t.subject: t for t in time_all([resolve("torch"), changed(Crashes)], SETTINGS, 4_000, direction)
    }
    assert list(timings) == [MULTIPLY, "torch"]
    assert timings[MULTIPLY].ratio == 1


class Clock:
    """Advances by a millisecond whenever it is read."""

    now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-3
        return self.now


def test_what_a_timing_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of 4 ms beside a multiply, two calls of which fill the millisecond between readings."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)

    class Takes(nn.Dropout):
        def forward(self, x: Tensor) -> Tensor:
            clock.now += 3e-3
            return x

    (multiply, ours) = time_all([changed(Takes)], SETTINGS, 4_000, "forward")
    assert multiply.nanoseconds == pytest.approx(0.5e-3 / 4_000 * 1e9)
    assert ours.nanoseconds == pytest.approx(4e-3 / 4_000 * 1e9)
    assert ours.ratio == pytest.approx(8)


def test_quick_times_fewer_sizes() -> None:
    assert max(planned(SETTINGS))[0] == 32_000_000
    assert max(planned(Settings(quick=True)))[0] == 1_000_000
