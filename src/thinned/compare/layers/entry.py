"""What the catalogue says of a layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from thinned.compare.laws import Law

__all__ = ["Entry", "Example", "Implementation", "LayerLaw", "Workload", "first"]


@dataclass(frozen=True)
class Implementation:
    """One column of a layer's table: ``make`` takes the arguments that thinned's layer takes, by name.

    ``origin`` is where it comes from, whether or not that is installed here.
    """

    name: str
    make: Callable[..., nn.Module]
    origin: str = "formula in plain torch"


LayerLaw = Law[Implementation]


@dataclass(frozen=True)
class Example:
    """How to call a layer, for the laws that every layer is held to.

    Attributes:
        inputs: the arguments of a call in a dtype; gradients are asked for the first, and it is the first
            dimension of each that ``vmap`` maps over.
        arguments: the constructor's, at which the layer does something to most inputs.
        p_name: what the probability of dropping is called; empty for a layer that has none.
        identity_in_evaluation: whether evaluation returns the first input itself.
        saved_bytes: what the formula has to keep for backward, a byte an element of the first input.
    """

    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    p_name: str = "p"
    identity_in_evaluation: bool = True
    saved_bytes: float = 0.0


@dataclass(frozen=True)
class Workload:
    """What `make bench` times: about a million elements, and the mask of a plain broadcast multiply."""

    inputs: Callable[[], tuple[Tensor, ...]]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    broadcast: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """One layer: its names, where it comes from, and what holds it to its law.

    Attributes:
        layer: the class, and ``make`` what builds one from arguments by name, if not the class itself.
        functional: its twin in :mod:`thinned.functional`, or the functions it is made of.
        mask: the shape of the mask, for inputs of the shape that users of the layer have.
        source: who made it known, and where its formula is.
        peer: the implementation that it stands beside, with the same arguments.
    """

    layer: type[Any]
    functional: str
    mask: str
    source: str
    peer: Implementation
    laws: tuple[LayerLaw, ...]
    example: Example
    workload: Workload
    make: Callable[..., nn.Module] | None = None

    @property
    def name(self) -> str:
        return self.layer.__name__

    @property
    def own(self) -> Implementation:
        return Implementation("thinned", self.make or self.layer, f"thinned.{self.name}")


def first(result: Any) -> Tensor:
    """A layer's output, or the first of several."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor
