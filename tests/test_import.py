"""Imports that `import thinned` adds to those of torch, and the names that tab completion finds."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest

import thinned
from process import output

ADDED = """
    import sys, torch
    before = set(sys.modules)
    import thinned, thinned.models.callbacks
    print(*sorted(set(sys.modules) - before))
    print("torch._dynamo" in sys.modules)
"""


def test_import_brings_no_other_package_and_not_the_compiler() -> None:
    """Nor either framework of the callbacks. `make bench` measures the seconds that are left."""
    modules, compiler = output(ADDED).splitlines()
    added = {name.partition(".")[0] for name in modules.split()}
    assert "thinned" in added
    assert added <= {"thinned", "numpy", *sys.stdlib_module_names}
    assert compiler == "False"


@pytest.mark.parametrize(
    "module",
    [thinned, thinned.functional, thinned.schedules, thinned.spec, thinned.backends],
    ids=lambda module: module.__name__,
)
def test_dir_is_what_is_public(module: ModuleType) -> None:
    assert set(dir(module)) - {"__version__"} == set(module.__all__)
    assert all(hasattr(module, name) for name in dir(module))


def test_dir_finds_the_public_modules() -> None:
    assert {"functional", "schedules", "backends", "spec", "Dropout", "__version__"} <= set(dir(thinned))
