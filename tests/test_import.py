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
    print("thinned.montecarlo" in sys.modules, thinned.montecarlo.predict.__name__)
"""


def test_import_brings_no_other_package_and_not_the_compiler() -> None:
    """Nor either framework of the callbacks. `make bench` measures the seconds that are left."""
    modules, compiler, montecarlo = output(ADDED).splitlines()
    added = {name.partition(".")[0] for name in modules.split()}
    assert "thinned" in added
    assert added <= {"thinned", "numpy", *sys.stdlib_module_names}
    assert compiler == "False"
    assert montecarlo == "False predict"  # imported at its first use


PATCHED = """
    import sys, torch, torch.nn.utils.parametrize, torch.overrides, torch.utils.checkpoint
    modules = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "torch"}
    owners = modules | {str(kind): kind for module in modules.values() for kind in vars(module).values()
                        if isinstance(kind, type) and kind.__module__.partition(".")[0] == "torch"}
    before = {(owner, name): value for owner in owners for name, value in vars(owners[owner]).items()}
    import thinned
    print(*(".".join(place) for place in before if vars(owners[place[0]])[place[1]] is not before[place]))
"""


def test_import_patches_nothing_of_torch() -> None:
    """But the set of types that torch.load takes, to which it adds a key."""
    assert [name for name in output(PATCHED).split() if "safe_globals" not in name] == []


ON_THE_CPU = """
    import sys, torch, thinned
    layer = torch.compile(thinned.Dropout(0.5), backend="aot_eager")
    layer(torch.ones(8, requires_grad=True)).sum().backward()
    print("thinned.backends.triton" in sys.modules)
"""


def test_the_cpu_needs_no_triton() -> None:
    assert output(ON_THE_CPU).split() == ["False"]


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
