"""Imports point down only: neither files nor folders of the package import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Callable
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import thinned

PACKAGE = Path(thinned.__file__).parent
FILES = {
    ".".join(("thinned", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """The modules of the package that a file imports at its top level."""
    found = set()
    for node in ast.parse(FILES[module].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module in FILES:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & FILES.keys() if names <= FILES.keys() else {node.module, *names & FILES.keys()}
    return found


def folder(module: str) -> str:
    return ".".join(module.split(".")[:2])


@pytest.mark.parametrize("room", [str, folder], ids=["files", "folders"])
def test_no_circle(room: Callable[[str], str]) -> None:
    graph: dict[str, set[str]] = {}
    # describe reads the table of backends, which imports it last.
    for module in FILES.keys() - {"thinned", "thinned.backends.describe"}:
        above = {room(other) for other in imports(module)} - {room(module), "thinned"}
        graph.setdefault(room(module), set()).update(above)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))
