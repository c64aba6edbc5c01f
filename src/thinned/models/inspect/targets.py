"""The functions that drop, the arguments in which they take their probability, and a call of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from inspect import signature
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch.nn import functional as F

from thinned import functional
from thinned.layers.residual import residual_drops
from thinned.models.convert.rules import is_number

__all__ = [
    "ELSEWHERE",
    "HAND_WRITTEN",
    "OURS",
    "READS",
    "TARGETS",
    "Argument",
    "Call",
    "Kind",
    "Read",
    "Target",
    "as_float",
    "look_up",
    "recurrent",
    "remember",
    "remember_all",
]

Read = tuple[Any, Any]  # an object and the name of its attribute, a dictionary and a key, a list and an index
READS: ContextVar[list[Read]] = ContextVar("READS")  # all that a reading looks up

Kind = Literal["module", "argument", "call", "random", "layer"]
HAND_WRITTEN = "draws random numbers"
OURS = "thinned.functional."
ELSEWHERE = "drawn from Python's generator"


@dataclass(frozen=True)
class Call:
    """One call that drops or may drop.

    A ``p`` from :func:`remember` becomes a plain number, and ``rates`` says where it was read.

    Attributes:
        name: the function that is called.
        function, file, line, last_line: where the call stands.
        p: its probability in training; None if the source does not say it plainly.
        note: a warning, such as ``HAND_WRITTEN``.
        kind: ``"call"``, ``"random"`` or ``"layer"``, as of :class:`thinned.models.inspect.Site`.
        rates: where ``p`` was read; several places if the call is reached on several ways.
    """

    name: str
    function: str
    file: str
    line: int
    last_line: int
    p: float | None = None
    note: str = ""
    kind: Kind = "call"
    rates: tuple[Read, ...] = field(default=(), compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.p is not None and (read := getattr(self.p, "read", None)) is not None:
            object.__setattr__(self, "p", float(self.p))
            object.__setattr__(self, "rates", (*self.rates, read))


class _Float(float):
    read: Read


class _Int(int):
    read: Read


def remember(value: Any, owner: Any, name: Any) -> Any:
    """``value``; if it is a number, one that knows where it was read, also as the argument of a call."""
    if (reads := READS.get(None)) is not None:
        reads.append((owner, name))
    if not is_number(value):
        return value
    number = (_Int if isinstance(value, Integral) else _Float)(value)
    number.read = owner, name
    return number


def remember_all(values: Mapping[str, Any]) -> dict[str, Any]:
    """The items of a dictionary of arguments, as :func:`remember`."""
    return {name: remember(value, values, name) for name, value in values.items()}


def as_float(value: Any) -> float | None:
    """A number as a float that knows where it was read, if ``value`` does; None if it is no number."""
    if isinstance(value, float) or not isinstance(value, Real):
        return value if isinstance(value, float) else None
    number: float = remember(float(value), *value.read) if isinstance(value, _Int) else float(value)
    return number


def look_up(owner: Any, name: Any) -> Any:
    """The attribute of an object, or the item of a dictionary or list; None if there is none."""
    if isinstance(owner, list):
        return owner[name] if isinstance(name, int) and -len(owner) <= name < len(owner) else None
    return owner.get(name) if isinstance(owner, dict) else getattr(owner, str(name), None)


@dataclass(frozen=True)
class Argument:
    """One argument of a function: its name, its place, and its default."""

    name: str
    place: int
    default: Any

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The value of the argument in a call."""
        return kwargs.get(self.name, args[self.place] if self.place < len(args) else self.default)


@dataclass(frozen=True)
class Target:
    """A function that drops; ``training`` is None if it always drops, ``p`` if it learns its probability."""

    name: str
    p: Argument | None
    training: Argument | None

    def rate(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float | None:
        """The probability with which a call drops; 0 if it does not, None if it learns it."""
        if self.training is not None and not self.training.of(args, kwargs):
            return 0.0
        return None if self.p is None else float(self.p.of(args, kwargs) or 0.0)


TARGETS: dict[Any, Target] = {
    F.scaled_dot_product_attention: Target(
        "F.scaled_dot_product_attention", Argument("dropout_p", 4, 0.0), None
    ),
    F.multi_head_attention_forward: Target(
        "F.multi_head_attention_forward", Argument("dropout_p", 10, 0.0), Argument("training", 13, True)
    ),
}
for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
    _on = not _name.endswith("alpha_dropout")  # torch's own defaults
    TARGETS[getattr(F, _name)] = Target(f"F.{_name}", Argument("p", 1, 0.5), Argument("training", 2, _on))
_names = ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout")
for _name in (*_names, *(f"{_name}_" for _name in _names), "native_dropout"):
    _target = Target(f"torch.{_name}", Argument("p", 1, 0.0), Argument("train", 2, False))
    TARGETS[getattr(torch, _name)] = _target
    if (_packet := getattr(torch.ops.aten, _name, None)) is not None:
        TARGETS[_packet] = TARGETS[_packet.default] = _target


def _target_of(function: Any, name: str) -> Target | None:
    """The target of a function of thinned; None for one that drops nothing, such as a loss."""
    arguments = {
        each.name: Argument(each.name, place, each.default)
        for place, each in enumerate(signature(function).parameters.values())
    }
    p, training = arguments.get("p") or arguments.get("drop_prob"), arguments.get("training")
    return Target(name, p, training) if p or training else None


for _name in functional.__all__:
    _function = getattr(functional, _name)
    if (_ours := _target_of(_function, f"{OURS}{_name}")) is not None:
        TARGETS[_function] = _ours
TARGETS[residual_drops] = replace(TARGETS[functional.residual], p=Argument("p", 1, 0.0), training=None)


def recurrent(function: Any, args: Sequence[Any]) -> tuple[str, float] | None:
    """The name and the rate of a call of ``torch.lstm`` and its like; None for other functions.

    A packed input shifts the arguments. The first bool says whether there are biases; then come the number of
    layers, the dropout and whether it is on.
    """
    name = getattr(function, "__name__", "")
    if name not in ("lstm", "gru", "rnn_tanh", "rnn_relu") or function is not getattr(torch, name, None):
        return None
    first = next((i for i, value in enumerate(args) if isinstance(value, bool)), len(args))
    layers, p, train = (*args[first + 1 : first + 4], 1, 0.0, False)[:3]
    return f"torch.{name}", float(p) if train and layers > 1 else 0.0
