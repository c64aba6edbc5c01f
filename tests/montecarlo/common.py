"""Models and helpers of the tests of Monte-Carlo dropout."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

import thinned
from chance import FALSE_ALARM
from thinned.montecarlo import draws

METHODS = ["independent", *(["stratified"] if hasattr(thinned.Key, "stratified") else [])]
both_methods = pytest.mark.parametrize("method", METHODS)


class Masks(nn.Module):
    """Its output for ones is 1 / q where two dropouts keep, else 0: no rounding hides a mask's bit."""

    def __init__(self, p: float = 0.3) -> None:
        super().__init__()
        self.first, self.p = nn.Dropout(p), p

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.first(x), nn.functional.dropout(x, self.p, self.training)], 1)


def mlp(width: int = 32, p: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, width), nn.ReLU(), nn.Dropout(p), nn.Linear(width, width), nn.ReLU(), nn.Dropout(p),
        nn.Linear(width, 3),
    )  # fmt: skip


def as_it_is(output: Any) -> Tensor:
    result: Tensor = output
    return result


def assert_unbiased(estimates: Tensor, expected: Tensor | float) -> None:
    """Independent estimates, along dimension 0, have this mean: a t-test of each."""
    deviations = (estimates.double() - torch.as_tensor(expected, dtype=torch.float64)).flatten(1).numpy()
    assert deviations.std(0).min() > 0
    chances = stats.ttest_1samp(deviations, 0.0).pvalue
    assert chances.min() * chances.size > FALSE_ALARM, chances


def ulps(one: Tensor, two: Tensor) -> float:
    """The largest difference, in units of the float32 rounding of the largest number."""
    assert one.shape == two.shape
    if one.equal(two):
        return 0.0
    room = torch.finfo(torch.float32).eps * float(torch.maximum(one.abs().amax(), two.abs().amax()))
    return float((one - two).abs().amax()) / room


def without(monkeypatch: pytest.MonkeyPatch, *routes: draws.Route) -> None:
    """Let these routes raise, so that the next is taken."""

    def refuse(*_: Any) -> Any:
        raise RuntimeError("refused")

    for route in routes:
        monkeypatch.setitem(draws.ROUTES, route, refuse)


def enumerated(network: nn.Module, hidden: Tensor, q: float) -> tuple[NDArray[np.float64], Tensor]:
    """Chances of all masks of ``hidden``, of shape (width,), and the network's result for each."""
    width = len(hidden)
    masks = (torch.arange(2**width)[:, None] >> torch.arange(width)) & 1
    kept = masks.sum(1).double().numpy()
    with torch.no_grad():
        results = network((masks * hidden / q).float()).double()
    return q**kept * (1 - q) ** (width - kept), results
