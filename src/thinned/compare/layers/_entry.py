"""An entry of the catalogue of layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, Masked
from thinned.compare.laws import LAWS, Finding, Law
from thinned.compare.settings import Settings

__all__ = ["Entry", "Workload", "for_mask"]


@dataclass(frozen=True)
class Workload:
    """A call that `make bench` times, of about a million elements."""

    inputs: Callable[[], tuple[Tensor, ...]]
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"p": 0.2})

    @property
    def elements(self) -> int:
        return sum(x.numel() for x in self.inputs())


@dataclass(frozen=True)
class Entry:
    """One layer: its origin, calls of it, its mask, and the laws that are its own.

    Attributes:
        layer: the class; ``make`` builds one from arguments by name, where the class itself does not.
        mask: the shape of the mask, for inputs of the shape that users of the layer have.
        source: the paper, with the section of its formula, and the library that users know it from.
        peer: the implementation beside which it is examined, with the same arguments.
        masked: its mask, for the laws of masks; None for a layer of another kind.
        special: laws of this layer alone.
        exempt: shared laws that this layer does not obey, each with the reason.
        functional: its functions, where they are not the one of the same name.
    """

    layer: type[Any]
    mask: str
    source: str
    peer: Implementation
    example: Example
    workload: Workload
    masked: Masked | None = None
    special: Sequence[Law] = ()
    exempt: Mapping[str, str] = field(default_factory=dict)
    make: Callable[..., nn.Module] | None = None
    functional: str = ""

    def __post_init__(self) -> None:
        if not self.functional:
            name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", self.name).lower()
            object.__setattr__(self, "functional", name)

    @property
    def name(self) -> str:
        return self.layer.__name__

    @property
    def own(self) -> Implementation:
        return Implementation("thinned", self.make or self.layer, f"thinned.{self.name}")

    @property
    def known(self) -> dict[str, Implementation]:
        """Its implementations that the command line knows by name."""
        return {each.name: each for each in (self.own, self.peer)}

    @property
    def case(self) -> Case:
        return Case(self.own, self.example, self.masked)

    @cached_property
    def laws(self) -> list[Law]:
        """Those of every layer that apply to this one, and its own."""
        case = self.case
        shared = [law for law in LAWS if law.name not in self.exempt and law.applies(case)]
        return [replace(law, case=case) for law in (*shared, *self.special)]

    @property
    def broadcast(self) -> tuple[int, ...] | None:
        """The shape of the mask of the workload, where a plain multiply by one does the same work."""
        x = self.workload.inputs()[0]
        if self.masked is None or not self.masked.shared or not x.is_floating_point():
            return None
        return tuple(1 if dim in self.masked.shared else size for dim, size in enumerate(x.shape))


def for_mask(
    masked: Masked, words: str, names: Sequence[str] = ("mean, variance", "sharing", "neighbours")
) -> list[Law]:
    """Some of the shared laws for another mask of the same layer, in a family called ``words``."""

    def check(layer: Case, settings: Settings, law: Law) -> Finding:
        layer = replace(layer, masked=masked)
        return law.check(layer, layer.settled(settings))

    laws = {law.name: law for law in LAWS}
    return [
        replace(laws[name], family=words, name=f"{name} ({words})", check=partial(check, law=laws[name]))
        for name in names
    ]
