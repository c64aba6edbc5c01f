"""The draws of random numbers that are known to decide what is dropped, by the function that draws them."""

from __future__ import annotations

import ast
import linecache
import re
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

__all__ = ["DRAWS", "SINGLE", "Purpose", "purpose_of"]

Purpose = Literal["", "dropout", "layerdrop"]

DRAWS = {
    torch.rand: "torch.rand",
    torch.rand_like: "torch.rand_like",
    torch.bernoulli: "torch.bernoulli",
    Tensor.bernoulli: "Tensor.bernoulli",
    Tensor.bernoulli_: "Tensor.bernoulli_",
    Tensor.uniform_: "Tensor.uniform_",
}
SINGLE = ((), (1,))  # the shapes in which models draw one number for a layer

_DROPS = re.compile(r"drop|stochastic_?depth", re.IGNORECASE)
_SKIPS_LAYERS = re.compile(r"layer_?drop|drop_?layer|skip_?(the_?)?layer", re.IGNORECASE)
_RESUMED = re.compile(r"torch_dynamo_resume_in_(\w+)_at_\d+")
_DEFINITIONS = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@lru_cache(maxsize=4096)
def purpose_of(file: str, line: int, function: str, single: bool) -> Purpose:
    """The purpose of the random numbers that a line draws; empty if it is not known.

    They are for a dropout if the function or class around the line is named so: ``dropout_edge``,
    ``drop_path``, ``stochastic_depth``, ``DropNode``. A ``single`` number is for layerdrop if its function
    mentions that: ``torch.rand([]) < self.layerdrop``. Without the source, only ``function``'s name counts.
    """
    resumed = _RESUMED.fullmatch(function)
    around = _around(file, line)
    if single and around and any(_SKIPS_LAYERS.search(name) for name in _names(around[0])):
        return "layerdrop"
    names = [resumed[1] if resumed else function, *(each.name for each in around)]
    return "dropout" if any(_DROPS.search(name) for name in names) else ""


@lru_cache(maxsize=64)
def _definitions(file: str) -> list[_DEFINITIONS]:
    """The functions and classes of a file, innermost first."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return []
    return [node for node in ast.walk(tree) if isinstance(node, _DEFINITIONS)][::-1]  # walk goes outside in


def _around(file: str, line: int) -> list[_DEFINITIONS]:
    """The functions around a line, and the classes that these are methods of, innermost first."""
    found = [each for each in _definitions(file) if each.lineno <= line <= (each.end_lineno or each.lineno)]
    return found if found and not isinstance(found[0], ast.ClassDef) else []


def _names(function: ast.AST) -> set[str]:
    """The names, attributes, arguments and strings in a function."""
    parts = ("id", "attr", "arg", "value")
    values = (getattr(node, part, None) for node in ast.walk(function) for part in parts)
    return {value for value in values if isinstance(value, str) and value.isidentifier()}
