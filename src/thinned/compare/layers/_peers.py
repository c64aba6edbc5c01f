"""Layers of other libraries, each beside its formula in plain torch for where the library is missing."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from thinned.compare.implementation import Implementation

__all__ = ["Formula", "from_library", "from_torch", "library_class"]


class Formula(nn.Module):
    """A layer in plain torch: ``drop`` in training, the input in evaluation and at p = 0."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Any:
        return self.drop(x) if self.training and self.p else x

    def drop(self, x: Tensor) -> Any:
        raise NotImplementedError


def from_library(
    path: str,
    formula: Callable[..., nn.Module],
    adapt: Callable[[Any], Callable[..., nn.Module]] | None = None,
) -> Implementation:
    """The class at ``path``, such as ``timm.layers.drop:DropPath``, if it is installed; else the formula.

    Args:
        path: module and class.
        formula: what the library computes, in plain torch.
        adapt: from the library's class to something that takes the arguments of thinned's layer.
    """
    library, name = path.partition(".")[0], path.rpartition(":")[2]
    origin = f"{name} of {library}"
    found = library_class(path)
    if found is None:
        return Implementation("formula", formula, origin)
    return Implementation(library, adapt(found) if adapt else found, origin)


def from_torch(layer: type[nn.Module]) -> Implementation:
    """A layer of torch.nn."""
    return Implementation("torch", layer, f"torch.nn.{layer.__name__}")


@cache
def library_class(path: str) -> Any:
    """The class at ``module:name``, or None where its library is not installed.

    Its file is loaded without its packages: they import much more, and fail where their compiled parts do
    not fit the installed PyTorch.
    """
    module_name, _, name = path.partition(":")
    library = module_name.partition(".")[0]
    try:
        version(library)
    except PackageNotFoundError:
        return None
    standing_in = _stand_in_for_packages(module_name)
    try:
        layer = getattr(importlib.import_module(module_name), name)
    finally:
        for package in standing_in:
            del sys.modules[package]
    # Pickle looks for a class in its module, whose packages are gone.
    layer.__module__ = __name__
    globals()[layer.__qualname__] = layer
    return layer


def _stand_in_for_packages(module_name: str) -> list[str]:
    standing_in = []
    parts = module_name.split(".")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        if name in sys.modules:
            continue
        found = importlib.machinery.PathFinder.find_spec(
            name, sys.modules[name.rpartition(".")[0]].__path__ if depth > 1 else None
        )
        if found is None or found.submodule_search_locations is None:
            raise ImportError(f"{name} is not a package")
        package = ModuleType(name)
        package.__path__ = list(found.submodule_search_locations)
        sys.modules[name] = package
        standing_in.append(name)
    return standing_in
