"""Laws of one tensor, for layers that do to a weight, or to one of several inputs, what a mask does to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from thinned.compare.laws import Finding
from thinned.compare.layers.entry import Implementation, LayerLaw
from thinned.compare.settings import Settings

__all__ = ["Adapted", "seen_through"]


class Adapted(nn.Module):
    """A layer as a module of one tensor: ``call(layer, x)``."""

    def __init__(self, layer: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def seen_through(call: Callable[[Any, Tensor], Tensor], laws: Iterable[LayerLaw]) -> tuple[LayerLaw, ...]:
    """The laws, each of which finds ``call(layer, x)`` where it calls ``layer(x)``."""

    def adapted(law: LayerLaw) -> LayerLaw:
        def check(layer: Implementation, settings: Settings) -> Finding:
            def make(**arguments: Any) -> nn.Module:
                return Adapted(layer.make(**arguments), call)

            return law.check(replace(layer, make=make), settings)

        return replace(law, check=check)

    return tuple(adapted(law) for law in laws)
