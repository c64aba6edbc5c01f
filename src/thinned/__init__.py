"""Dropout for PyTorch, with masks that are a pure function of a key and a position.

>>> import torch, thinned
>>> thinned.Dropout(p=0.5)(torch.ones(6), key=thinned.Key(7))
tensor([0., 0., 0., 2., 2., 2.])
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from thinned import backends, distributed, functional, schedules, spec
from thinned.functional import keep_mask
from thinned.keys import Key
from thinned.layers import *  # noqa: F403
from thinned.layers import __all__ as _layers
from thinned.models import *  # noqa: F403
from thinned.models import __all__ as _models
from thinned.schedules import DropoutSchedule

if TYPE_CHECKING:
    from thinned import montecarlo

try:
    __version__ = version("thinned")
except PackageNotFoundError:
    __version__ = "0+uninstalled"

__all__ = ["DropoutSchedule", "Key", "backends", "distributed", "functional", "keep_mask", "montecarlo"]
__all__ += ["schedules", "spec", *_layers, *_models]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]  # for tab completion


if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Import ``thinned.montecarlo`` at its first use; it takes a tenth as long as ``thinned``."""
        if name == "montecarlo":
            return import_module("thinned.montecarlo")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
