"""What the laws of one layer say of any implementation of it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from thinned.compare.laws import Verdict, examine
from thinned.compare.layers.entry import Entry, Implementation
from thinned.compare.settings import Settings


def verdict(entry: Entry, law: str, make: Callable[..., nn.Module]) -> Verdict:
    """The verdict of the law with this name on the module that ``make`` returns."""
    (found,) = (each for each in entry.laws if each.name == law)
    return examine(found, Implementation("under test", make), Settings(quick=True)).verdict
