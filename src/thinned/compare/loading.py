"""From a name on the command line to a module, a model or an implementation."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from thinned.compare.errors import one_line, one_line_with_place
from thinned.compare.implementation import Implementation

__all__ = ["ALIASES", "load", "model_of", "resolve", "resolve_all"]

ALIASES = {
    "thinned": "thinned:Dropout",
    "torch": "torch.nn:Dropout",
    "textbook": "thinned.compare.textbook:TextbookDropout",
}
ACCEPTED = f"{', '.join(ALIASES)}, package.module:Class or path/to/file.py:Class"


def load(module_name: str) -> ModuleType:
    """The module called ``package.module``, or the file ``path/to/file.py``, which may lie beside the caller.

    Raises:
        ValueError: with one line, for whatever a stranger's module raises while it is imported.

    >>> load("thinned.spec").__name__
    'thinned.spec'
    """
    try:
        if module_name.endswith(".py"):
            return _load_file(Path(module_name))
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module beside the caller, as `python -m` would find it
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise ValueError(f"cannot import {module_name}: {one_line_with_place(error)}") from error


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


def model_of(text: str) -> nn.Module:
    """The model behind ``package.module:factory`` or ``path/to/file.py:factory``.

    Args:
        text: names a function or a class to call without arguments, or a model itself.

    Raises:
        ValueError: with one line that says what was given and what is wrong.

    >>> model_of("torch.nn:Dropout")
    Dropout(p=0.5, inplace=False)
    """
    module_name, colon, name = text.rpartition(":")
    if not (colon and name and module_name):
        raise ValueError(
            f"unknown model {text!r}; accepted are package.module:factory or path/to/file.py:factory"
        )
    module = load(module_name)
    factory = getattr(module, name, None)
    if factory is None:
        raise ValueError(f"{module_name} has nothing called {name!r}")
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ValueError(f"{text} is neither a model nor a function that makes one, but {factory!r}")
    try:
        model = factory()
    except (Exception, SystemExit) as error:  # SystemExit comes from argparse, which reads our arguments
        if isinstance(error, TypeError) and not _can_be_called(factory, error):
            raise ValueError(f"{text} cannot be called without arguments: {one_line(error)}") from error
        raise ValueError(f"{text} raises {one_line_with_place(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text} gave no torch.nn.Module, but a {type(model).__name__}")
    return model


def _can_be_called(factory: Callable[..., Any], error: TypeError) -> bool:
    """Whether ``factory`` has been called without arguments, and raised ``error`` itself."""
    if error.__traceback__ is None or error.__traceback__.tb_next is None:
        return False  # the call has not entered a function of Python
    with suppress(ValueError):  # no signature
        try:
            inspect.signature(factory).bind()
        except TypeError:
            return False
    return True


def resolve_all(texts: Iterable[str]) -> list[Implementation]:
    """The implementations behind ``texts``; where two classes share a name, the full text is the name."""
    texts = list(dict.fromkeys(texts))
    found = [resolve(text) for text in texts]
    names = [each.name for each in found]
    return [
        replace(each, name=text) if names.count(each.name) > 1 else each
        for text, each in zip(texts, found, strict=True)
    ]


def resolve(text: str) -> Implementation:
    """The implementation behind an alias, ``package.module:Class`` or ``path/to/file.py:Class``.

    Raises:
        ValueError: with one line that says what was given and what is accepted.

    >>> resolve("torch").make
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
    takes_p = "p" in inspect.signature(layer).parameters
    return Implementation(
        text if text in ALIASES else class_name, layer if takes_p else _by_position(layer), module_name
    )


def _by_position(layer: type[nn.Module]) -> Callable[..., nn.Module]:
    """A class that gives its first argument another name than ``p``."""

    def make(*, p: float | None = None, **arguments: Any) -> nn.Module:
        return layer(**arguments) if p is None else layer(p, **arguments)

    make.__signature__ = inspect.signature(layer)  # type: ignore[attr-defined]
    return make


def _is_layer_of(module: ModuleType, value: object) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and value.__module__ == module.__name__
