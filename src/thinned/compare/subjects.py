"""From a name on the command line to an implementation of dropout."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from thinned.compare.loading import load

__all__ = ["ALIASES", "NotOfferedError", "Subject", "resolve", "resolve_all"]

ALIASES = {
    "thinned": "thinned:Dropout",
    "torch": "torch.nn:Dropout",
    "textbook": "thinned.compare.textbook:TextbookDropout",
}
ACCEPTED = f"{', '.join(ALIASES)}, package.module:Class or path/to/file.py:Class"


class NotOfferedError(Exception):
    """The implementation has no such feature, which is no breach of a law."""


@dataclass(frozen=True)
class Subject:
    """One implementation: its ``name`` heads a column, ``layer`` is its class."""

    name: str
    layer: type[nn.Module]

    def make(self, p: float, inplace: bool = False) -> nn.Module:
        """A layer in training mode."""
        if self.takes_inplace:
            return self.layer(p, inplace=inplace)
        if inplace:
            raise NotOfferedError("no inplace argument")
        return self.layer(p)

    @property
    def takes_inplace(self) -> bool:
        return "inplace" in inspect.signature(self.layer).parameters


def resolve_all(texts: Iterable[str]) -> list[Subject]:
    """The implementations behind ``texts``; where two classes share a name, the whole text is the name."""
    texts = list(dict.fromkeys(texts))
    subjects = [resolve(text) for text in texts]
    names = [subject.name for subject in subjects]
    return [
        Subject(text, subject.layer) if names.count(subject.name) > 1 else subject
        for text, subject in zip(texts, subjects, strict=True)
    ]


def resolve(text: str) -> Subject:
    """The implementation behind an alias, ``package.module:Class`` or ``path/to/file.py:Class``.

    Raises:
        ValueError: with one line that says what was given and what is accepted.

    >>> resolve("torch").layer
    <class 'torch.nn.modules.dropout.Dropout'>
    """
    module_name, colon, class_name = ALIASES.get(text, text).rpartition(":")
    if not colon:
        raise ValueError(f"unknown implementation {text!r}; accepted are {ACCEPTED}")
    module = load(module_name)
    layer = getattr(module, class_name, None)
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        choices = sorted(name for name, value in vars(module).items() if _is_layer_of(module, value))
        raise ValueError(
            f"{module_name} has no nn.Module called {class_name!r}; it has {', '.join(choices) or 'none'}"
        )
    return Subject(text if text in ALIASES else class_name, layer)


def _is_layer_of(module: ModuleType, value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
