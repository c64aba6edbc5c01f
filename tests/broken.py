"""A law is worth something only if a wrong layer breaks it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from thinned.compare.laws import Verdict, examine
from thinned.compare.layers.entry import Entry, Implementation
from thinned.compare.settings import Settings


def breaks(entry: Entry, law: str, make: Callable[..., nn.Module]) -> bool:
    """Whether what ``make`` returns breaks the entry's law of that name."""
    (checked,) = (each for each in entry.laws if each.name == law)
    return examine(checked, Implementation("wrong", make), Settings(quick=True)).verdict is Verdict.BROKEN
