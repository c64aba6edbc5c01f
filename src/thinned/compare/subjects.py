"""From a name on the command line to an implementation of dropout."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from torch import nn

from thinned.compare.errors import one_line

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
    module = _load(module_name)
    layer = getattr(module, class_name, None)
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        choices = sorted(name for name, value in vars(module).items() if _is_layer_of(module, value))
        raise ValueError(
            f"{module_name} has no nn.Module called {class_name!r}; it has {', '.join(choices) or 'none'}"
        )
    return Subject(text if text in ALIASES else class_name, layer)


def _load(module_name: str) -> ModuleType:
    try:
        if module_name.endswith(".py"):
            return _load_file(Path(module_name))
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module beside the caller, as `python -m` would find it
        return importlib.import_module(module_name)
    except Exception as error:  # whatever a stranger's module raises while it is imported
        raise ValueError(f"cannot import {module_name}: {one_line(error)}") from error


def _load_file(path: Path) -> ModuleType:
    name = re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # as the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle and dataclasses look for the module of a class
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _is_layer_of(module: ModuleType, value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
