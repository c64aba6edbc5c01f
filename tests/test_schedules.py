"""DropoutSchedule: the papers' formulas, the modules that take part, and resuming."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thinned
from thinned import schedules
from thinned.compare.laws import Verdict
from thinned.compare.layers._peers import library_class
from thinned.compare.layers.schedules import ENTRIES, Scheduled
from thinned.schedules import DropoutSchedule
from verdicts import verdict

TORCH = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
    """Early, late: Liu et al.; curriculum: Morerio et al. for a keep probability; v: Zhou et al."""
    p, at, gamma = 0.3, np.arange(STEPS), 10 / STEPS
    keep = p * np.exp(-gamma * at) + (1 - p)
    for name, expected in {
        "early": np.where(at < 50, p, 0),
        "late": np.where(at < 50, 0, p),
        "early, linear": np.interp(at, [0, 50], [p, 0]),
        "curriculum": 1 - keep,
        "linear": np.interp(at, [0, 100], [0.2 * p, 0.9 * p]),
        "v": np.interp(at, [0, 40, 150], [p, 0, p]),
    }.items():
        values = [p * ALL[name](step) for step in range(STEPS)]
        np.testing.assert_allclose(values, expected, atol=1e-12, err_msg=name)


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


def test_which_modules_take_part() -> None:
    def named(name: str, p: float) -> nn.Module:
        module: nn.Module = type(name, (nn.Module,), {})()
        module.p = p  # type: ignore[assignment]
        return module

    drops = [each() for each in TORCH]
    network = nn.ModuleDict(
        {
            "torch": nn.ModuleList(drops),
            "again": drops[0],
            "integer": nn.Dropout(1),
            "path": thinned.StochasticDepth(0.2, "row"),
            "stack": thinned.LayerDrop([nn.Dropout(0.1)], 0.2),
            "own": named("MyDropConnect", 0.3),
            "vision": named("StochasticDepth", 0.25),
            "pooling": named("Pooling", 2.0),
            "linear": nn.Linear(2, 2),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
            "lstm": nn.LSTM(2, 2, 2, dropout=0.6),
            "one layer": nn.GRU(2, 2),
            "ours": thinned.VariationalLSTM(2, 2, input_p=0.4),
        }
    )
    of_torch = {f"torch.{i}" for i in range(len(TORCH))}
    found = set(DropoutSchedule(network, lambda _: 1.0).last_p)
    numbers = {"attention.dropout", "lstm.dropout", "ours.input_p"}
    assert found == of_torch | numbers | {"integer", "path", "stack", "stack.0", "own", "vision"}
    chosen = DropoutSchedule(network, lambda _: 0.5, include=lambda path, _: path.startswith("torch"))
    assert chosen.last_p == dict.fromkeys(of_torch, 0.25)
    assert network["path"].p == 0.2
    pooling = DropoutSchedule(network, lambda _: 0.1, include=lambda path, _: path in ("pooling", "lstm"))
    assert pooling.last_p == pytest.approx({"pooling": 0.2, "lstm.dropout": 0.06})
    assert network["lstm"].dropout == pytest.approx(0.06)
    everywhere = DropoutSchedule(network, lambda _: 1.0, attributes=("dropout",)).last_p
    assert everywhere == pytest.approx({"attention": 0.1, "lstm": 0.06, "ours": 0.0})
    attention = DropoutSchedule(
        network, lambda _: 0.5, include=lambda path, _: path == "attention", attributes=("dropout",)
    )
    assert attention.last_p == {"attention": 0.05}
    assert network["attention"].dropout == 0.05
    assert DropoutSchedule(nn.Dropout(0.4), lambda _: 0.5).last_p == {"": 0.2}


def test_timms_drop_path() -> None:
    drop_path = library_class("timm.layers.drop:DropPath")
    if drop_path is None:
        pytest.skip("timm is not installed")
    network = nn.Sequential(drop_path(0.2))
    assert DropoutSchedule(network, schedules.late(1)).last_p == {"0": 0.0}


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
    trained = model()
    schedule = DropoutSchedule(trained, ALL[name])
    for _ in range(37):
        schedule.step()
    state = pickle.loads(pickle.dumps(schedule.state_dict()))
    # A checkpoint may hold the model with the probabilities of that step.
    for network in (model(), copy.deepcopy(trained)):
        resumed = DropoutSchedule(network, pickle.loads(pickle.dumps(ALL[name])))
        resumed.load_state_dict(state)
        assert resumed.last_p == schedule.last_p
    state["initial_p"].clear()
    for _ in range(100):
        schedule.step()
        resumed.step()
        assert resumed.last_p == schedule.last_p
    assert resumed.last_step == 137


def test_pickled_before() -> None:
    """What a checkpoint of an earlier version holds: the private function's and its arguments' names."""
    pickled = b"cfunctools\npartial\np0\n(cthinned.schedules\n_linear\np1\ntp2\nRp3\n(g1\n(t(dp4\n"
    pickled += b"Vstart\np5\nF1.0\nsVend\np6\nF0.0\nsVsteps\np7\nI4\nsNtp8\nb."
    assert pickle.loads(pickled)(1) == 0.75


class Configured(nn.Module):
    """Two layers that read one config at each call, and a dropout."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Reads(config), Reads(config)])
        self.drop = nn.Dropout(0.1)


class Reads(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config, self.rate = config, 0.4

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, self.config.dropout, self.training)
        return nn.functional.dropout(x, self.rate, self.training)


def test_numbers_that_are_no_modules() -> None:
    """One config of two layers counts once; so does what only the source tells."""
    config = SimpleNamespace(dropout=0.2, drop_in_constructor=0.3)
    network = Configured(config)
    schedule = DropoutSchedule(network, schedules.linear(1.0, 0.0, 2))
    full = {"layers.0.config.dropout": 0.2, "layers.0.rate": 0.4, "layers.1.rate": 0.4, "drop": 0.1}
    assert schedule.last_p == full
    schedule.step()
    assert (config.dropout, config.drop_in_constructor) == (0.1, 0.3)
    assert [layer.rate for layer in network.layers] == [0.2, 0.2]  # type: ignore[union-attr]
    # A state as versions saved it that scheduled modules alone.
    old = DropoutSchedule(Configured(SimpleNamespace(dropout=0.5)), schedules.linear(1.0, 0.0, 2))
    old.load_state_dict({"last_step": 1, "initial_p": {"drop": 0.6}})
    assert old.last_p == {**dict.fromkeys(full, 0.2), "layers.0.config.dropout": 0.25, "drop": 0.3}
    state = schedule.state_dict()
    old.load_state_dict(state)
    assert old.last_p == schedule.last_p
    del state["initial_p"]["layers.0.rate"]
    with pytest.raises(RuntimeError, match=re.escape("only one of them has ['layers.0.rate']")):
        old.load_state_dict(state)


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
    schedule.state_dict()["initial_p"].clear()  # a copy
    assert failing.initial_p == schedule.initial_p == {"1": 0.2, "2.0": 0.4, "2.1": 0.1, "3": 0.5}


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


@pytest.mark.parametrize("law", [law.name for law in ENTRIES[0].laws if law.family == "schedule"])
def test_each_law_catches_what_breaks_it(law: str) -> None:
    culprit = ForgetsItsStep if law == "resumed" else OneStepLate
    assert verdict(ENTRIES[0], law, culprit) is Verdict.BROKEN
