"""thinned.convert(fuse=True) makes one layer of an activation and its dropout, and changes nothing else."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned
from thinned.models.sites import rates_of
from thinned.montecarlo.moments import moments

FUSED = (thinned.ReLUDropout, thinned.GELUDropout, thinned.SiLUDropout)


class Block(nn.Sequential):
    """As torchvision's MLP."""


class Twice(nn.Sequential):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(super().forward(input))


class Leaky(nn.ReLU):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.leaky_relu(input)


def mlp(
    activation: Callable[[], nn.Module] = nn.ReLU, dropout: Callable[[], nn.Module] = nn.Dropout
) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), activation(), dropout(), Block(nn.Linear(8, 6), nn.ReLU()))


def addressed(model: nn.Module, x: Tensor | None = None) -> list[Tensor]:
    """The output under an address, what became of the input, and the gradients of input and parameters."""
    leaf = (torch.linspace(-1, 1, 30).reshape(5, 6) if x is None else x).requires_grad_()
    x = leaf.clone()
    with thinned.address(model, seed=1, step=2):
        y = model(x)
    grads = torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])
    return [y.detach(), x.detach(), *grads]


def fused_in(model: nn.Module) -> list[str]:
    return [path for path, each in model.named_modules(remove_duplicate=False) if isinstance(each, FUSED)]


def assert_fused(model: nn.Module, *paths: str, **options: Any) -> nn.Module:
    """Nothing but these places is fused, nothing else than that changes, and revert undoes it."""
    expected = addressed(thinned.convert(copy.deepcopy(model)))
    evaluated = copy.deepcopy(model).eval()(torch.ones(5, 6))
    modules, keys = dict(model.named_modules(remove_duplicate=False)), list(model.state_dict())
    assert thinned.convert(model, fuse=True, **options) is model
    assert fused_in(model) == list(paths)
    assert list(dict(model.named_modules(remove_duplicate=False))) == list(modules)
    assert list(model.state_dict()) == keys
    torch.testing.assert_close(addressed(model), expected)
    torch.testing.assert_close(model.eval()(torch.ones(5, 6)), evaluated)
    assert thinned.revert(copy.deepcopy(model).train())
    assert dict(thinned.revert(model.train()).named_modules(remove_duplicate=False)) == modules
    return thinned.convert(model, fuse=True, **options)


@pytest.mark.parametrize(
    ("activation", "layer"),
    [
        (nn.ReLU, "ReLUDropout(p=0.5)"),
        (lambda: nn.ReLU(inplace=True), "ReLUDropout(p=0.5)"),
        (nn.GELU, "GELUDropout(p=0.5, approximate='none')"),
        (lambda: nn.GELU("tanh"), "GELUDropout(p=0.5, approximate='tanh')"),
        (lambda: nn.SiLU(inplace=True), "SiLUDropout(p=0.5)"),
    ],
)
def test_each_activation(activation: Callable[[], nn.Module], layer: str) -> None:
    model: Any = assert_fused(mlp(activation), "2")
    assert [repr(model[1]), repr(model[2])] == ["Identity()", f"thinned.{layer}"]


@pytest.mark.parametrize(
    "dropout", [thinned.Dropout, lambda: nn.Dropout(inplace=True), lambda: thinned.Dropout(inplace=True)]
)
def test_each_dropout(dropout: Callable[[], nn.Module]) -> None:
    model: Any = assert_fused(mlp(nn.SiLU, dropout), "2")
    assert not hasattr(model[2], "inplace")  # it writes over nothing


def hooked(place: int, register: str) -> nn.Module:
    model = mlp()
    getattr(model[place], register)(lambda *_: None)
    return model


def with_more(place: int, change: Callable[[Any], Any]) -> nn.Module:
    model = mlp()
    change(model[place])
    return model


def shared_with_the_outside() -> nn.Module:
    model = mlp()
    model[3].append(model[2])
    model[3].insert(1, nn.Tanh())
    model[3].insert(2, model[2])
    return model


def behind_two_activations() -> nn.Module:
    dropout = nn.Dropout()
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), dropout, nn.Linear(6, 6), nn.SiLU(), dropout)


def one_activation_used_alone() -> nn.Module:
    relu = nn.ReLU()
    return nn.Sequential(nn.Linear(6, 6), relu, nn.Dropout(), nn.Linear(6, 6), relu)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(nn.Tanh),
        lambda: mlp(Leaky),
        lambda: mlp(dropout=lambda: thinned.Dropout(broadcast_dims=(1,))),
        lambda: mlp(dropout=nn.AlphaDropout),
        lambda: mlp(dropout=lambda: nn.Sequential(nn.Dropout())),
        lambda: nn.Sequential(nn.Linear(6, 6), nn.Dropout(), nn.ReLU()),
        lambda: Twice(nn.Linear(6, 6), nn.ReLU(), nn.Dropout()),
        # The caller sees what these write over.
        lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Dropout()),
        lambda: nn.Sequential(nn.Unflatten(1, (2, 3)), nn.ReLU(inplace=True), nn.Dropout()),
        lambda: hooked(1, "register_forward_hook"),
        lambda: hooked(2, "register_forward_pre_hook"),
        lambda: hooked(1, "register_full_backward_hook"),
        lambda: with_more(1, lambda each: each.register_buffer("more", torch.ones(()))),
        lambda: with_more(2, lambda each: setattr(each, "forward", nn.Identity().forward)),
        shared_with_the_outside,
        behind_two_activations,
        one_activation_used_alone,
    ],
)
def test_what_is_left(make: Callable[[], nn.Module]) -> None:
    assert_fused(make())


def test_a_pair_with_several_places() -> None:
    relu, dropout = nn.ReLU(), nn.Dropout()
    inner = Block(nn.Linear(6, 6), relu, dropout)
    model: Any = assert_fused(nn.Sequential(inner, nn.Linear(6, 6), relu, dropout, inner), "0.2", "3", "4.2")
    assert model[0][2] is model[3]
    assert model[0][1] is model[2]


def test_hooks_of_an_address_stay() -> None:
    model = mlp()
    expected = addressed(thinned.convert(model))
    torch.testing.assert_close(addressed(thinned.convert(model, fuse=True)), expected)


def test_choice() -> None:
    def pair() -> nn.Sequential:
        return nn.Sequential(mlp(), mlp(dropout=thinned.Dropout))

    for options, paths in (
        ({"include": "1"}, ["1.2"]),
        ({"exclude": thinned.Dropout}, ["0.2"]),
        ({"include": lambda _, module: module.p == 0.5}, ["0.2", "1.2"]),
    ):
        assert fused_in(thinned.convert(pair(), fuse=True, **options)) == paths  # type: ignore[arg-type]


def test_p(caplog: pytest.LogCaptureFixture) -> None:
    """It is set, scheduled and found at the dropout's path; revert restores that of a dropout of thinned."""
    caplog.set_level(logging.INFO, "thinned")
    model: Any = nn.Sequential(mlp(), mlp(dropout=thinned.Dropout))
    thinned.convert(model, p=0.2, fuse=True)
    assert {rate.key: rate.value for rate in rates_of(model)} == {"0.2": 0.2, "1.2": 0.2}
    assert [site.type for site in thinned.inspect(model)] == ["thinned.ReLUDropout"] * 2
    assert [site.was for site in thinned.inspect(model)] == ["torch.nn.Dropout", "thinned.Dropout"]
    thinned.revert(model)
    assert [model[0][2].p, model[1][2].p] == [0.2, 0.5]
    assert caplog.messages[-1] == "thinned.revert(Sequential): 4 modules and 1 number came back"
    schedule = thinned.DropoutSchedule(model, thinned.schedules.linear(0.0, 1.0, steps=2))
    thinned.convert(model, fuse=True)
    schedule.step()
    assert model[0][2].p == schedule.last_p["0.2"]
    thinned.revert(model)
    assert model[0][2].p == schedule.last_p["0.2"]


def test_copies() -> None:
    model = mlp()
    before = repr(model)
    new = thinned.convert(model, fuse=True, inplace=False)
    assert repr(model) == before
    for twin in (new, copy.deepcopy(new), pickle.loads(pickle.dumps(new))):
        again = thinned.convert(thinned.convert(twin), fuse=True)
        torch.testing.assert_close(addressed(again), addressed(thinned.convert(model, inplace=False)))
        assert repr(thinned.revert(again)) == before


def test_mode_and_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "thinned")
    model = mlp()
    model[2].eval()
    thinned.convert(model, fuse=True)
    assert model[1].training
    assert not model[2].training
    said = (
        "thinned.convert(Sequential): 1 dropout module became thinned's, 1 fused with the activation before"
    )
    assert caplog.messages == [said]


def test_monte_carlo() -> None:
    """The fused layers have the moments of their parts."""
    model, x = mlp(), torch.ones(3, 6)
    expected = moments(model, x)
    torch.testing.assert_close(moments(thinned.convert(model, fuse=True), x), expected)
