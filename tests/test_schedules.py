"""Drop probabilities over training: the papers' formulas, and whose p is set."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import thinned
from thinned import schedules
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Law, Verdict, examine
from thinned.compare.layers._peers import library_class
from thinned.compare.layers.schedules import ENTRIES, Scheduled
from thinned.compare.settings import Settings
from thinned.layers.layer_drop import LayerDrop
from thinned.schedules import DropoutSchedule


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 8),
        thinned.Dropout(0.2),
        nn.Sequential(nn.Dropout2d(0.4), thinned.DropPath(0.1)),
        nn.AlphaDropout(0.5),
    )


STEPS = 200
ALL: dict[str, Callable[[int], float]] = {
    "linear": schedules.linear(0.2, 0.9, 100),
    "cosine": schedules.cosine(1.0, 0.1, 100),
    "early": schedules.early(50),
    "early, linear": schedules.early(50, "linear"),
    "late": schedules.late(50),
    "curriculum": schedules.curriculum(STEPS),
    "v": schedules.v_shape(40, 150),
}


def test_values_against_the_papers() -> None:
    """Early, late: Liu et al.; curriculum: Morerio et al. for a keep probability; each at every step."""
    p, at = 0.3, np.arange(STEPS)

    def of(name: str) -> Any:
        return np.array([p * ALL[name](step) for step in range(STEPS)])

    np.testing.assert_allclose(of("early"), np.where(at < 50, p, 0))
    np.testing.assert_allclose(of("late"), np.where(at < 50, 0, p))
    np.testing.assert_allclose(of("early, linear"), np.concatenate([np.linspace(p, 0, 51), np.zeros(149)]))
    keep_end, gamma = 1 - p, 10 / STEPS
    keep = (1 - keep_end) * np.exp(-gamma * at) + keep_end
    np.testing.assert_allclose(of("curriculum"), 1 - keep, atol=1e-12)
    np.testing.assert_allclose(of("linear"), np.interp(at, [0, 100], [0.2 * p, 0.9 * p]))
    np.testing.assert_allclose(of("v"), np.interp(at, [0, 40, 150], [p, 0, p]), atol=1e-12)


def test_agrees_with_torchs_schedulers() -> None:
    """The factor of a learning rate under LinearLR and CosineAnnealingLR, which go on step by step."""
    for name, steps, make in (
        ("linear", 120, lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.2, 0.9, 100)),
        ("cosine", 101, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 100, eta_min=0.1)),
    ):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        scheduler = make(optimizer)
        for step in range(steps):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(ALL[name](step))
            optimizer.step()
            scheduler.step()


@pytest.mark.parametrize(
    ("name", "sign"),
    [("linear", 1), ("cosine", -1), ("early", -1), ("early, linear", -1), ("late", 1), ("curriculum", 1)],
)
def test_monotone_and_a_probability(name: str, sign: int) -> None:
    values = np.array([ALL[name](step) for step in range(1000)])
    assert (sign * np.diff(values) >= 0).all()
    assert values.min() >= 0
    assert values.max() <= 1
    assert values[0] != values[-1]


@pytest.mark.parametrize("name", ALL)
def test_schedules_can_be_pickled(name: str) -> None:
    schedule = pickle.loads(pickle.dumps(ALL[name]))
    assert [schedule(step) for step in range(160)] == [ALL[name](step) for step in range(160)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear(0, 1, 0), "steps has to be at least 1, but got 0"),
        (lambda: schedules.cosine(0, 1, -1), "steps has to be at least 1, but got -1"),
        (lambda: schedules.early(0), "until has to be at least 1, but got 0"),
        (lambda: schedules.early(0, "linear"), "until has to be at least 1, but got 0"),
        (lambda: schedules.early(5, "cosine"), "either 'constant' or 'linear', but got 'cosine'"),
        (lambda: schedules.late(0), "start has to be at least 1, but got 0"),
        (lambda: schedules.curriculum(0), "steps has to be at least 1, but got 0"),
        (lambda: schedules.v_shape(5, 5), "bottom has to be from 1 to below steps, but got 5 and 5"),
    ],
)
def test_wrong_arguments_of_schedules(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_multiplies_each_modules_own_p() -> None:
    network = model()
    schedule = DropoutSchedule(network, schedules.linear(1.0, 0.5, 2))
    for step, factor in enumerate([1.0, 0.75, 0.5, 0.5]):
        assert schedule.last_step == step
        expected = {"1": 0.2, "2.0": 0.4, "2.1": 0.1, "3": 0.5}
        assert schedule.last_p == pytest.approx({path: p * factor for path, p in expected.items()})
        assert network[2][1].drop_prob == pytest.approx(0.1 * factor)
        schedule.step()


def test_layers_see_the_new_p() -> None:
    network = nn.Sequential(thinned.Dropout(0.5))
    schedule = DropoutSchedule(network, schedules.early(1))
    x = torch.ones(1000)
    assert 300 < network(x).count_nonzero() < 700
    schedule.step()
    assert network(x) is x


def test_which_modules_take_part() -> None:
    class MyDropConnect(nn.Module):
        p = 0.3

    class StochasticDepth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = 0.25

    class Pooling(nn.Module):
        p = 2.0

    network = nn.ModuleDict(
        {
            **{f"torch{i}": each for i, each in enumerate([nn.Dropout(), nn.Dropout1d(), nn.Dropout2d()])},
            **{
                f"torch{i + 3}": each
                for i, each in enumerate([nn.Dropout3d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()])
            },
            "integer": nn.Dropout(1),
            "path": thinned.StochasticDepth(0.2, "row"),
            "stack": LayerDrop([nn.Dropout(0.1)], 0.2),
            "own": MyDropConnect(),
            "vision": StochasticDepth(),
            "pooling": Pooling(),
            "linear": nn.Linear(2, 2),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
        }
    )
    found = set(DropoutSchedule(network, lambda _: 1.0).last_p)
    assert found == {f"torch{i}" for i in range(6)} | {"integer", "path", "stack", "stack.0", "own", "vision"}
    chosen = DropoutSchedule(network, lambda _: 0.5, include=lambda path, _: path.startswith("torch"))
    assert set(chosen.last_p) == {f"torch{i}" for i in range(6)}
    assert network["path"].p == 0.2
    attention = DropoutSchedule(
        network,
        lambda _: 0.5,
        include=lambda _, module: isinstance(module, nn.MultiheadAttention),
        attributes=("dropout",),
    )
    assert attention.last_p == {"attention": 0.05}
    assert network["attention"].dropout == 0.05


def test_timms_drop_path() -> None:
    drop_path = library_class("timm.layers.drop:DropPath")
    if drop_path is None:
        pytest.skip("timm is not installed")
    network = nn.Sequential(drop_path(0.2))
    assert DropoutSchedule(network, schedules.late(1)).last_p == {"0": 0.0}


def test_a_module_in_two_places_counts_once() -> None:
    shared = nn.Dropout(0.4)
    schedule = DropoutSchedule(nn.Sequential(shared, nn.Linear(2, 2), shared), schedules.linear(1, 0, 4))
    schedule.step()
    assert schedule.last_p == {"0": pytest.approx(0.3)}


def test_a_dropout_by_itself() -> None:
    layer = nn.Dropout(0.4)
    DropoutSchedule(layer, lambda _: 0.5)
    assert layer.p == 0.2


def test_a_model_without_dropouts() -> None:
    with pytest.raises(
        ValueError, match=r"nothing to schedule in Linear: no module .* called p or drop_prob"
    ):
        DropoutSchedule(nn.Linear(2, 2), schedules.early(5))
    with pytest.raises(ValueError, match="nothing to schedule"):
        DropoutSchedule(model(), schedules.early(5), include=lambda *_: False)


@pytest.mark.parametrize("factor", [2.5, -0.1, math.nan])
def test_a_factor_that_leads_outside_changes_nothing(factor: float) -> None:
    network = model()
    schedule = DropoutSchedule(network, lambda step: factor if step else 0.5)
    before = schedule.last_p
    with pytest.raises(ValueError, match=re.escape(f"the factor {factor} of step 1 makes")):
        schedule.step()
    assert schedule.last_p == before
    assert schedule.last_step == 0


@pytest.mark.parametrize("name", ALL)
def test_resumed_is_as_if_never_stopped(name: str) -> None:
    schedule = DropoutSchedule(model(), ALL[name])
    for _ in range(37):
        schedule.step()
    state = pickle.loads(pickle.dumps(schedule.state_dict()))
    # A checkpoint may hold the model with the probabilities that it had then.
    for network in (model(), copy.deepcopy(nn.Sequential(*model()))):
        resumed = DropoutSchedule(network, ALL[name])
        resumed.load_state_dict(state)
        assert resumed.last_p == schedule.last_p
    for _ in range(100):
        schedule.step()
        resumed.step()
        assert resumed.last_p == schedule.last_p
    assert resumed.last_step == 137


def test_resumed_from_a_model_that_was_saved_whole() -> None:
    network = model()
    schedule = DropoutSchedule(network, schedules.early(5))
    for _ in range(5):
        schedule.step()
    saved = copy.deepcopy(network)
    resumed = DropoutSchedule(saved, schedules.linear(0.5, 1.0, 10))
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.last_p == pytest.approx({"1": 0.15, "2.0": 0.3, "2.1": 0.075, "3": 0.375})


def test_state_of_another_model() -> None:
    schedule = DropoutSchedule(model(), schedules.early(5))
    other = DropoutSchedule(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.3)), schedules.early(5))
    with pytest.raises(RuntimeError, match=re.escape("only one of them has ['2.0', '2.1', '3']")):
        schedule.load_state_dict(other.state_dict())
    assert schedule.last_p == {"1": 0.2, "2.0": 0.4, "2.1": 0.1, "3": 0.5}
    state = schedule.state_dict() | {"last_step": -3}
    failing = DropoutSchedule(model(), lambda step: 1.0 if step == 0 else 9.0)
    with pytest.raises(ValueError, match="step -3"):
        failing.load_state_dict(state)
    assert failing.initial_p == schedule.initial_p


def test_a_state_is_a_copy() -> None:
    schedule = DropoutSchedule(model(), schedules.early(5))
    state = schedule.state_dict()
    state["initial_p"]["1"] = 0.9
    assert schedule.initial_p["1"] == 0.2


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_follows() -> None:
    """Each new value is a graph of its own."""
    graphs = 0

    def backend(graph: Any, _: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return graph

    network = nn.Sequential(thinned.Dropout(0.5))
    schedule = DropoutSchedule(network, schedules.early(2))
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    x = torch.ones(100)
    for step in range(4):
        torch.manual_seed(step)
        y = compiled(x)
        torch.manual_seed(step)
        assert y.equal(network(x))
        schedule.step()
    assert graphs == 2


class OneStepLate(Scheduled):
    def __init__(self, p: float, schedule: schedules.Schedule) -> None:
        super().__init__(p, lambda step: schedule(max(0, step - 1)))


class ForgetsItsStep(Scheduled):
    def __init__(self, p: float, schedule: schedules.Schedule) -> None:
        super().__init__(p, schedule)
        self.schedule.state_dict = lambda: {"last_step": 0, "initial_p": dict(self.schedule.initial_p)}  # type: ignore[method-assign]


@pytest.mark.parametrize(
    "law", [law for law in ENTRIES[0].laws if law.family == "schedule"], ids=lambda law: law.name
)
def test_each_law_catches_what_breaks_it(law: Law) -> None:
    culprit = ForgetsItsStep if law.name == "resumed" else OneStepLate
    assert examine(law, ENTRIES[0].own, Settings(quick=True)).verdict is Verdict.HOLDS
    assert examine(law, Implementation("culprit", culprit), Settings(quick=True)).verdict is Verdict.BROKEN
