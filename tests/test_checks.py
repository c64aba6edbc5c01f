"""What every function, constructor and method does with an argument that is wrong.

The error names that argument, nothing is written, and no random number is drawn.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thinned
from layers.test_overrides import CALLS
from thinned import functional, schedules
from thinned.checks import check_integer, check_real
from thinned.compare.layers import ENTRIES, Entry
from thinned.key_source import active

WRONG: list[Callable[[], Any]] = [
    lambda: None,
    object,
    lambda: "0.5",
    lambda: [0.5],
    lambda: ("a",),
    lambda: 0.5,
    lambda: -1.5,
    lambda: math.nan,
    lambda: -1,
    lambda: 7,
    lambda: torch.tensor([0.1, 0.2]),
    lambda: torch.ones(3, 4, dtype=torch.int32),
    lambda: torch.ones(3, 4, device="meta"),
    lambda: torch.ones((), device="meta"),
    lambda: nn.Linear(2, 2),
]


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), thinned.Dropout(0.5))


NETWORK = network()


def call_keyed(*, key: Any, samples: Any = None) -> Any:
    return thinned.Keyed(NETWORK)(torch.ones(3, 4), key=key, samples=samples)


def load(*, state_dict: Any) -> None:
    thinned.DropoutSchedule(NETWORK, schedules.early(3)).load_state_dict(state_dict)


def within_address(model: Any, *, seed: Any, step: Any, samples: Any, sample_dim: Any) -> Any:
    with thinned.address(model, seed=seed, step=step, samples=samples, sample_dim=sample_dim):
        return model(torch.ones(3, 4))


ADDRESS = thinned.address(network(), seed=7, step=3)
STATE = {"last_step": 1, "initial_p": {"1": 0.5}}
KEY, TIMES = thinned.Key(7), {"seed": 7, "step": 3, "samples": torch.arange(3), "sample_dim": 0}
OTHERS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "Key": (thinned.Key, {"seed": 7}),
    "Key.fold": (KEY.fold, {"data": 7}),
    "Key.from_bits": (thinned.Key.from_bits, {"bits": KEY.bits}),
    "Key.to": (KEY.to, {"device": "cpu"}),
    "address": (thinned.address, {"model": network(), **TIMES}),
    "a call within address": (within_address, {"model": network(), **TIMES}),
    "Address.key_of": (ADDRESS.key_of, {"path": "1", "call": 0}),
    "Address.mask_of": (ADDRESS.mask_of, {"path": "1", "shape": (3, 4), "p": 0.5, "broadcast_dims": (0,)}),
    "convert": (thinned.convert, {"model": network(), "p": 0.5, "include": "*", "exclude": "*"}),
    "revert": (thinned.revert, {"model": network()}),
    "inspect": (thinned.inspect, {"model": network()}),
    "register": (thinned.register, {"kind": "nowhere.Layer", "build": lambda old: old}),
    "intercept": (thinned.intercept, {"key": KEY}),
    "Intercepted": (thinned.Intercepted, {"module": network(), "key": KEY}),
    "Keyed": (thinned.Keyed, {"model": network()}),
    "Keyed.forward": (call_keyed, {"key": KEY.bits, "samples": torch.arange(3)}),
    "linear": (schedules.linear, {"start": 0.0, "end": 1.0, "steps": 9}),
    "cosine": (schedules.cosine, {"start": 0.0, "end": 1.0, "steps": 9}),
    "early": (schedules.early, {"until": 3, "decay": "linear"}),
    "late": (schedules.late, {"start": 3}),
    "curriculum": (schedules.curriculum, {"steps": 3}),
    "v_shape": (schedules.v_shape, {"bottom": 3, "steps": 9}),
    "DropoutSchedule": (
        thinned.DropoutSchedule,
        {"model": network(), "schedule": schedules.early(3), "include": "*", "attributes": ("p",)},
    ),
    "DropoutSchedule.load_state_dict": (load, {"state_dict": STATE}),
    "masksembles_masks": (functional.masksembles_masks, {"channels": 12, "n": 4, "scale": 2.0, "seed": 0}),
    "drop_path_rates": (functional.drop_path_rates, {"depth": 3, "max_rate": 0.5}),
    "ConcreteDropout.regularization": (
        thinned.ConcreteDropout().regularization,
        {"weights": [torch.ones(2, 3)], "num_features": 3},
    ),
    "VariationalDropout.kl": (thinned.VariationalDropout(0.5).kl, {"approximation": "sigmoid"}),
    "LayerDrop.surviving": (thinned.LayerDrop([nn.Linear(2, 2)]).surviving, {"key": KEY}),
}


def made(entry: Entry) -> nn.Module:
    return entry.own.make(**entry.example.arguments).train()


def of_layer(entry: Entry) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The constructor, with what the example's layer has stored."""
    layer = made(entry)
    stored = {name: getattr(layer, name, None) for name in inspect.signature(entry.layer).parameters}
    given = {
        **{name: value for name, value in stored.items() if value is not None},
        **entry.example.arguments,
    }
    names = inspect.signature(entry.layer).parameters
    given = {name: value for name, value in given.items() if name in names}
    if isinstance(layer, thinned.ConcreteDropout | thinned.VariationalDropout):
        given["p"] = 0.5
    if entry.name == "LayerDrop":
        given["layers"] = list(layer)  # type: ignore[call-overload]
    return entry.layer, given


def of_forward(entry: Entry) -> tuple[Callable[..., Any], dict[str, Any]]:
    layer, names = made(entry), list(inspect.signature(entry.layer.forward).parameters)[1:]
    given = dict(zip(names, entry.example.inputs(torch.float32), strict=False))

    def call(**arguments: Any) -> Any:
        inputs = [arguments.pop(name) for name in given]
        return copy.deepcopy(layer)(*inputs, **arguments)

    return call, given | ({"key": KEY} if "key" in names else {"member": 0})


def of_function(name: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    function, (args, kwargs) = getattr(functional, name), CALLS[name]
    given = inspect.signature(function).bind(*args, **kwargs)
    given.apply_defaults()
    arguments: dict[str, Any] = dict(given.arguments)
    return function, arguments | {name: True for name in ("training", "inplace") if name in arguments}


CASES: dict[str, Callable[[], tuple[Callable[..., Any], dict[str, Any]]]] = {
    **{f"functional.{name}": partial(of_function, name) for name in CALLS},
    **{each.name: partial(of_layer, each) for each in ENTRIES if each.name not in OTHERS},
    **{
        f"{each.name}.forward": partial(of_forward, each)
        for each in ENTRIES
        if hasattr(each.layer, "forward") and each.name != "RDrop"
    },
    **{name: partial(lambda case: case, case) for name, case in OTHERS.items()},
}

# torch's own words, and those of a function or a module that is the user's.
OTHERS_WORDS = (
    "^ValueError: dropout probability has to be between 0 and 1, but got",
    "needs a floating-point or complex tensor, got",
    "^RuntimeError: Expected tensor for argument #1 'indices' to have one of",
    "^RuntimeError: Expected hidden size",
    "^RuntimeError: Expected all tensors to be on the same device",
    "^RuntimeError: a and b must have same reduction dim",
    "^RuntimeError: Found no NVIDIA driver",  # 7 is the number of a GPU
    "^AssertionError: Padding_idx must be within num_embeddings",
    "^IndexError: .* names dimension [01], but for shape",  # two arguments that do not fit each other
    "^IndexError: drop_head got dim=1 and a tensor of shape",
)
HANDED_ON = {
    "LayerDrop.forward": "input",
    "WeightDrop.forward": "args",
    "functional.residual": "branch",
    "DropoutSchedule": "schedule",
    "a call within address": "model",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_an_error_names_the_argument_and_changes_nothing(name: str) -> None:
    call, given = CASES[name]()
    parameters = inspect.signature(call).parameters
    for argument in given:
        if HANDED_ON.get(name) == argument or (argument in parameters and is_flag(parameters[argument])):
            continue
        for make in WRONG:
            arguments = copy.deepcopy(given) | {argument: make()}
            state = torch.get_rng_state()
            try:
                call(**arguments)
            except Exception as error:
                message = f"{type(error).__name__}: {error}"
            else:
                is_p = argument in ("p", "drop_prob", "prob") or argument.endswith("_p")
                must = make is object or (is_p and make() in (-1.5, -1, 7))
                assert not must, f"{argument}={arguments[argument]!r}"
                continue
            shown = f"{argument}={arguments[argument]!r}: {message}"
            named = re.search(rf"\b{argument}\b", message, re.IGNORECASE)
            assert named or any(re.search(words, message) for words in OTHERS_WORDS), shown
            assert not message.startswith("AttributeError"), shown
            assert state.equal(torch.get_rng_state()), shown
            for other, value in given.items():
                if isinstance(value, Tensor) and other != argument:
                    assert value.equal(arguments[other]), shown
            with thinned.address(nn.Identity(), seed=7, step=0), contextlib.suppress(Exception):
                source: Any = active.key_source
                call(**arguments)
            assert not source.calls, shown


def is_flag(parameter: inspect.Parameter) -> bool:
    """Any object is true or false, as in Python and in torch."""
    return parameter.annotation in ("bool", bool)


def test_every_public_callable_has_a_case() -> None:
    """But for what thinned makes itself, and what takes nothing that could be wrong."""
    own = {"Address", "Intercept", "Inspection", "Site", "decompositions"}
    public = {f"functional.{name}" for name in functional.__all__} | set(schedules.__all__) - {"Schedule"}
    public |= {name for name in thinned.__all__ if callable(getattr(thinned, name))}
    names = {name.removeprefix("functional.") for name in CASES}
    without = {name for name in public if name.removeprefix("functional.") not in names}
    assert without == own, (
        "a layer has a case by its Entry in compare/layers, a function by CALLS of test_overrides.py"
    )


def test_what_no_number_may_be() -> None:
    for value in True, None, "1", [1], torch.ones(2), torch.tensor(1, device="meta"):
        with pytest.raises(TypeError, match=r"^n must be an integer, got "):
            check_integer("n", value)
    for value in 1, np.int64(1), torch.tensor(1):
        check_integer("n", value, least=1)
        with pytest.raises(ValueError, match=r"^n has to be at least 2, but got "):
            check_integer("n", value, least=2)
    for value in None, "1", [1.0], np.ones(1), torch.ones(2):
        with pytest.raises(TypeError, match=r"^x must be a number, got "):
            check_real("x", value)
    for value in 1, 0.5, np.float32(1), torch.tensor([0.5]):
        check_real("x", value)
