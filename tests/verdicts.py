"""The verdict of one of a layer's laws on any implementation of the layer."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers import Entry
from thinned.compare.settings import Settings


def verdict(entry: Entry, law: str, make: Callable[..., nn.Module]) -> Verdict:
    """The verdict of the law with this name on the module that ``make`` returns."""
    (found,) = (each for each in entry.laws if each.name == law)
    return examine(found, Implementation("under test", make), Settings(quick=True)).verdict


def breaks(entry: Entry, law: str, make: Callable[..., nn.Module]) -> bool:
    """Whether the module that ``make`` returns breaks the law with this name."""
    return verdict(entry, law, make) is Verdict.BROKEN
