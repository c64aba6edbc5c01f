"""Imports that `import thinned` adds to those of torch."""

from __future__ import annotations

import sys

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
