"""A module that somebody else wrote, by its name or its file."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

from thinned.compare.errors import one_line

__all__ = ["load"]


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
    except Exception as error:
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
