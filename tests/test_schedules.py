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
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

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
            "pooling": named("Pooling", 0.9),
            "distance": nn.TripletMarginLoss(p=2),
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
    pooling = DropoutSchedule(network, lambda _: 0.1, include=["pooling", "lstm", "distance"])
    assert pooling.last_p == pytest.approx({"pooling": 0.09, "lstm.dropout": 0.06})
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
        ValueError,
        match=r"in the model, a Linear: no module .* called p or drop_prob, .*; include= takes",
    ):
        DropoutSchedule(nn.Linear(2, 2), schedules.early(5))
    with pytest.raises(ValueError, match="nothing to schedule"):
        DropoutSchedule(model(), schedules.early(5), include=lambda *_: False)


@pytest.mark.parametrize("factor", [2.5, -0.1, math.nan])
def test_a_factor_that_leads_outside_changes_nothing(factor: float) -> None:
    network = model()
    schedule = DropoutSchedule(network, lambda step: factor if step else 0.5)
    before = schedule.last_p
    message = rf"the factor {re.escape(str(factor))} of step 1 makes .*; a schedule gives factors, not prob"
    with pytest.raises(ValueError, match=message):
        schedule.step()
    assert schedule.last_p == before
    assert schedule.last_step == 0


@pytest.mark.parametrize("half", [torch.tensor(0.5), np.float32(0.5)], ids=repr)
def test_a_factor_of_another_library_leaves_numbers(half: Any) -> None:
    network = model()
    plain = DropoutSchedule(model(), lambda _: 0.5).last_p
    schedule = DropoutSchedule(network, lambda _: half)
    assert schedule.last_p == plain
    assert {type(p) for p in schedule.last_p.values()} == {float}
    assert DropoutSchedule(network, lambda _: 1.0).last_p == plain  # which finds numbers


@pytest.mark.parametrize("factor", [None, "0.5", torch.ones(2), [0.5]], ids=repr)
def test_a_factor_that_is_no_number_changes_nothing(factor: Any) -> None:
    network = model()
    schedule = DropoutSchedule(network, lambda step: factor if step else 0.5)
    before = schedule.last_p
    with pytest.raises(TypeError, match=r"schedule\(1\) must be a number, got "):
        schedule.step()
    assert schedule.last_p == before


def test_a_second_schedule_of_probabilities_of_0_warns() -> None:
    network = model()
    for _ in range(2):
        schedule = DropoutSchedule(network, schedules.linear(0.0, 1.0, steps=10))
    with pytest.warns(UserWarning, match="each probability was 0 when the DropoutSchedule was made"):
        schedule.step()


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


class Block(nn.Module):
    def __init__(self, p: float = 0.4) -> None:
        super().__init__()
        self.drop, self.attention = nn.Dropout(p), nn.MultiheadAttention(4, 2, dropout=0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x)  # type: ignore[no-any-return]


def swapped_by_convert(network: Any) -> None:
    thinned.convert(network)


def reverted(network: Any) -> None:
    thinned.revert(thinned.convert(network))


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[Any], None]:
    def change(network: Any) -> None:
        network[0] = wrap(network[0])
        network[1].drop = wrap(network[1].drop)

    return change


class Forwards(nn.Module):
    """As peft's ModulesToSaveWrapper: a copy is in use, and attributes are those of the copy."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.original, self.used = module, copy.deepcopy(module)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("used"), name)


def forwarding(network: Any) -> None:
    network[0] = Forwards(network[0])


def new_block(network: Any) -> None:
    network[0], network[1].drop = Block(0.9), thinned.DropPath(0.9)


def parametrized(network: Any) -> None:
    for block in network:
        nn.utils.parametrize.register_parametrization(
            block.attention, "in_proj_weight", thinned.DropConnect(0.5)
        )


CHANGES: dict[str, Callable[[Any], None]] = {
    "convert": swapped_by_convert,
    "revert": reverted,
    "compile": wrapped(lambda module: torch.compile(module)),
    "DataParallel": wrapped(nn.DataParallel),
    "checkpoint": wrapped(checkpoint_wrapper),
    "two wrappers": wrapped(lambda module: nn.DataParallel(checkpoint_wrapper(module))),
    "peft": forwarding,
    "other modules": new_block,
    "parametrized": parametrized,
}


@pytest.mark.parametrize("attributes", [None, ["drop_prob", "p"]])
@pytest.mark.parametrize("change", CHANGES)
def test_goes_on_in_modules_that_replace_others(change: str, attributes: list[str] | None) -> None:
    """Also the other way: a schedule that is made of the changed model has the same keys, and goes on."""
    network = nn.Sequential(Block(), Block())
    halves = lambda step: 0.5**step  # noqa: E731
    schedule = DropoutSchedule(network, halves, attributes=attributes)
    schedule.step()
    CHANGES[change](network)
    schedule.step()

    def effective() -> set[float]:
        used = [
            module
            for path, module in network.named_modules()
            if isinstance(module, nn.Dropout | thinned.DropPath) and "original" not in path
        ]
        assert len(used) == 2
        return {module.drop_prob if isinstance(module, thinned.DropPath) else module.p for module in used}

    rates = {f"{i}.drop": 0.1 for i in range(2)}
    if attributes is None:
        rates |= {f"{i}.attention.dropout": 0.05 for i in range(2)}
    assert schedule.last_p == pytest.approx(rates)
    assert effective() == {0.1}
    if change in ("peft", "parametrized"):
        return
    again = DropoutSchedule(network, halves, attributes=attributes)
    assert again.last_p.keys() == rates.keys()
    again.load_state_dict(schedule.state_dict())
    again.step()
    assert effective() == {0.05}
    network[0], network[1] = Block(), Block()
    again.step()
    assert effective() == {0.025}


def test_a_wrapped_model_has_the_keys_of_the_model() -> None:
    """Earlier versions saved the wrappers' names."""
    expected = DropoutSchedule(model(), lambda _: 0.5).last_p
    for wrap, prefix in ((nn.DataParallel, "module."), (torch.compile, "_orig_mod.")):
        schedule = DropoutSchedule(wrap(model()), lambda _: 0.5)
        assert schedule.last_p == expected
        full = {prefix + key: p for key, p in schedule.initial_p.items()}
        schedule.load_state_dict({"last_step": 3, "initial_p": full})
        assert (schedule.last_p, schedule.last_step) == (expected, 3)


def test_the_unit_of_a_module_that_is_swapped() -> None:
    """A type may count in percent, and call its number otherwise."""

    class Percent(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.rate = rate

    thinned.register(Percent, lambda old: thinned.Dropout(old.rate / 100), unit=lambda _: 0.01)
    network = nn.Sequential(Percent(40), nn.Dropout(0.4))
    schedule = DropoutSchedule(network, lambda step: 1 - step / 4)
    assert schedule.last_p == pytest.approx({"0": 0.4, "1": 0.4})
    for change, numbers in (
        (lambda _: None, [30, 0.3]),
        (thinned.convert, [0.2, 0.2]),
        (thinned.revert, [10, 0.1]),
    ):
        change(network)
        schedule.step()
        assert [getattr(each, "rate", None) or each.p for each in network] == pytest.approx(numbers)
        assert schedule.last_p == pytest.approx(dict.fromkeys("01", numbers[1]))


def test_every_place_of_a_rate_is_looked_up() -> None:
    """A module under two paths and a config of two layers, of which one layer gets others."""
    shared = nn.Dropout(0.4)
    network: Any = nn.Sequential(Configured(SimpleNamespace(dropout=0.2)), shared, shared)
    schedule = DropoutSchedule(network, lambda _: 0.5)
    network[2], network[0].layers[1] = nn.Dropout(0.9), Reads({"dropout": 0.9})
    network[0].layers[1].config = SimpleNamespace(dropout=0.9)
    schedule.step()
    assert [network[1].p, network[2].p] == [0.2, 0.2]
    assert [layer.config.dropout for layer in network[0].layers] == [0.1, 0.1]
    assert set(schedule.last_p) == {
        "0.layers.0.config.dropout",
        "0.layers.0.rate",
        "0.layers.1.rate",
        "0.drop",
        "1",
    }


class HoldsNumbers(nn.Module):
    """Numbers in a dictionary, a list and a namespace within another."""

    def __init__(self) -> None:
        super().__init__()
        self.cfg, self.rates = {"attention": {"dropout": 0.2}}, [0.2, 0.2]
        self.args = SimpleNamespace(inner=SimpleNamespace(dropout=0.2))

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, self.cfg["attention"]["dropout"], self.training)
        x = nn.functional.dropout(x, self.rates[1], self.training)
        return nn.functional.dropout(x, self.args.inner.dropout, self.training)


def test_items_and_attributes_of_what_a_module_holds() -> None:
    network = nn.Sequential(HoldsNumbers())
    schedule = DropoutSchedule(network, lambda _: 0.5)
    old, network[0] = network[0], HoldsNumbers()
    schedule.step()
    held: Any = network[0]
    assert (held.cfg["attention"]["dropout"], held.rates, held.args.inner.dropout) == (0.1, [0.2, 0.1], 0.1)
    assert schedule.last_p == dict.fromkeys(
        ("0.cfg.attention.dropout", "0.rates.1", "0.args.inner.dropout"), 0.1
    )
    held.cfg, held.rates = {"attention": {"dropout": 0.9}}, [0.9, 0.9]
    schedule.step()
    assert (held.cfg["attention"]["dropout"], held.rates) == (0.1, [0.9, 0.1])
    del held.rates[1]
    with pytest.raises(RuntimeError, match=r"'0\.rates'.* a builtins\.list, which has no number called 1\b"):
        schedule.step()
    assert old.rates == [0.2, 0.1]


GONE, WITHOUT, NO_P = "'1.drop' any more:", "without a module 'drop'", "which has no number called 'p'"


class Frozen(nn.Module):
    p = property(lambda _: 0.3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.__setitem__(1, nn.Identity()), f"{GONE} '1' is now a torch.nn.Identity {WITHOUT}"),
        (lambda m: delattr(m[1], "drop"), f"{GONE} '1' is now a {__name__}.Block {WITHOUT}"),
        (lambda m: setattr(m[1], "drop", None), f"{GONE} '1' is now a {__name__}.Block {WITHOUT}"),
        (lambda m: m.pop(1), "'1' any more: the model is a torch.nn.Sequential without a module '1'"),
        (lambda m: setattr(m[1], "drop", nn.Identity()), f"{GONE} it is now a torch.nn.Identity, {NO_P}"),
        (
            lambda m: setattr(m[1], "drop", thinned.ConcreteDropout()),
            f"{GONE} it is now a thinned.ConcreteDropout, {NO_P}",
        ),
        (
            lambda m: setattr(m[1], "attention", nn.Linear(2, 2)),
            "'1.attention' any more: it is now a torch.nn.Linear, which has no number called 'dropout'",
        ),
        (lambda m: setattr(m[1].drop, "p", None), f"{GONE} it is now a torch.nn.Dropout, {NO_P}"),
        (
            lambda m: setattr(m[1], "drop", Frozen()),
            f"{GONE} it is now a {__name__}.Frozen, whose p cannot be set",
        ),
    ],
)
def test_a_path_without_a_number_raises(change: Callable[[Any], object], message: str) -> None:
    network = nn.Sequential(Block(), Block())
    schedule = DropoutSchedule(network, lambda step: 0.5**step)
    schedule.step()
    before, state = [network[0].drop.p, network[0].attention.dropout], schedule.state_dict()
    removed = network[1]
    change(network)
    for call in (schedule.step, lambda: schedule.last_p, lambda: schedule.load_state_dict(state)):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            call()
    assert [network[0].drop.p, network[0].attention.dropout] == before
    assert schedule.state_dict() == state
    if len(network) == 1:
        network.append(removed)
    network[1] = Block()
    schedule.step()
    assert network[1].drop.p == network[0].drop.p == 0.1


def test_a_number_that_refuses_a_value_leaves_the_others() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = 0.4

        p = property(lambda self: self.rate, lambda self, p: setattr(self, "rate", p) if p > 0.2 else 1 / 0)

    network = nn.Sequential(nn.Dropout(0.4), Refuses())
    schedule = DropoutSchedule(network, lambda step: 0.6**step, include="*")
    schedule.step()
    with pytest.raises(ZeroDivisionError):
        schedule.step()
    assert [network[0].p, network[1].p, schedule.last_step] == [0.24, 0.24, 1]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copied_or_pickled_with_the_model(how: Callable[[Any], Any]) -> None:
    network = model()
    schedule = DropoutSchedule(network, schedules.linear(1.0, 0.0, 4))
    thinned.convert(network)
    schedule.step()
    other, its_schedule = how((network, schedule))
    its_schedule.step()
    assert (other[1].p, network[1].p) == pytest.approx((0.1, 0.15))
    thinned.revert(other)
    its_schedule.step()
    assert other[1].p == pytest.approx(0.05)


def test_include_takes_the_choices_of_convert() -> None:
    kinds = nn.Dropout2d, thinned.DropPath
    for include in ("2.*", "2", ["2.0", "2.1"], nn.Sequential, kinds, lambda path, _: path.startswith("2.")):
        network = nn.ModuleList(model())
        assert set(DropoutSchedule(network, lambda _: 1.0, include=include).last_p) == {"2.0", "2.1"}
    with pytest.raises(TypeError, match="include must be"):
        DropoutSchedule(model(), lambda _: 1.0, include=3)  # type: ignore[arg-type]
    with pytest.warns(UserWarning, match="include='dropout' matches no module") as caught:
        DropoutSchedule(model(), lambda _: 1.0, include=["dropout", "2.*"])
    assert caught[0].filename == __file__


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
