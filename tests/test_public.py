"""The public names and their signatures are those of a committed list.

A change of one is a change for every user: `python tests/test_public.py` writes the list again, and its diff
belongs in the message of the commit.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from torch import nn

import thinned
from thinned.montecarlo import calibration, plots

LIST = Path(__file__).parent / "data" / "public.txt"
MODULES = {
    "thinned": thinned,
    "thinned.distributed": thinned.distributed,
    "thinned.functional": thinned.functional,
    "thinned.montecarlo": thinned.montecarlo,
    "thinned.montecarlo.calibration": calibration,
    "thinned.montecarlo.plots": plots,
    "thinned.schedules": thinned.schedules,
    "thinned.spec": thinned.spec,
}


def signatures() -> list[str]:
    return [line for path, module in MODULES.items() for line in _of_module(path, module)]


def _of_module(path: str, module: ModuleType) -> Iterator[str]:
    for name in sorted(module.__all__):
        value = getattr(module, name)
        yield from _of_value(f"{path}.{name}", value)
        if inspect.isclass(value):
            bases = (vars(base) for base in value.__mro__ if base.__module__.startswith("thinned."))
            for method in sorted({"forward"}.union(*bases)):
                inherited = method != "forward" and hasattr(nn.Module, method)
                if not method.startswith("_") and hasattr(value, method) and not inherited:
                    yield from _of_value(f"{path}.{name}.{method}", getattr(value, method))


def _of_value(path: str, value: object) -> Iterator[str]:
    if not (inspect.isclass(value) or inspect.isroutine(value)):
        yield path
        return
    parameters = inspect.signature(value).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    yield path + re.sub(r" at 0x\w+", "", str(inspect.Signature(plain)))


def test_signatures() -> None:
    listed = LIST.read_text(encoding="utf-8").splitlines()
    assert signatures() == listed, "`python tests/test_public.py` writes the list anew"


if __name__ == "__main__":
    LIST.write_text("\n".join(signatures()) + "\n", encoding="utf-8")
