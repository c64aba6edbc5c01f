"""The functions through which a forward drops without a module, and where they have their probability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["HAND_WRITTEN", "TARGETS", "Argument", "Target", "recurrent"]


@dataclass(frozen=True)
class Argument:
    """One argument of a function: its name, its place, and what it is if not given."""

    name: str
    place: int
    default: Any

    def of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Its value in a call."""
        return kwargs.get(self.name, args[self.place] if self.place < len(args) else self.default)


@dataclass(frozen=True)
class Target:
    """A function that drops; ``training`` is None if it does so whenever it is called."""

    name: str
    p: Argument
    training: Argument | None

    def rate(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> float:
        """With what probability a call drops; 0 if it does not."""
        on = self.training is None or self.training.of(args, kwargs)
        p = self.p.of(args, kwargs)
        return float(p) if on and p else 0.0


HAND_WRITTEN = "perhaps a dropout written by hand"

TARGETS: dict[Any, Target] = {
    F.scaled_dot_product_attention: Target(
        "F.scaled_dot_product_attention", Argument("dropout_p", 4, 0.0), None
    ),
    F.multi_head_attention_forward: Target(
        "F.multi_head_attention_forward", Argument("dropout_p", 10, 0.0), Argument("training", 13, True)
    ),
}
for _name in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"):
    # torch's own defaults, which differ for the two alphas.
    _on = not _name.endswith("alpha_dropout")
    TARGETS[getattr(F, _name)] = Target(f"F.{_name}", Argument("p", 1, 0.5), Argument("training", 2, _on))
for _name in ("dropout", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"):
    for _suffix in ("", "_"):
        TARGETS[getattr(torch, _name + _suffix)] = Target(
            f"torch.{_name}{_suffix}", Argument("p", 1, 0.0), Argument("train", 2, False)
        )
TARGETS[torch.native_dropout] = Target(
    "torch.native_dropout", Argument("p", 1, 0.0), Argument("train", 2, False)
)

_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu"}


def recurrent(function: Any, args: Sequence[Any]) -> tuple[str, float] | None:
    """``torch.lstm`` and its like: the name and the rate of a call; None for other functions.

    Whether the input is packed shifts the arguments: the first bool says whether there are biases, then
    come the number of layers, the dropout and whether it is on.
    """
    name = getattr(function, "__name__", "")
    if name not in _RECURRENT or function is not getattr(torch, name, None):
        return None
    first = next((i for i, value in enumerate(args) if isinstance(value, bool)), len(args))
    layers, p, train = (*args[first + 1 : first + 4], 1, 0.0, False)[:3]
    return f"torch.{name}", float(p) if train and layers > 1 else 0.0
