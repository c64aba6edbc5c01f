"""The base class of every module of thinned: it prints with the package's name."""

from __future__ import annotations

from torch import nn

__all__ = ["Named"]


class Named(nn.Module):
    """A module that prints as ``thinned.Dropout(p=0.5, inplace=False)``; torch.nn has a ``Dropout`` too.

    A subclass from another package prints as its own name alone.
    """

    def __repr__(self) -> str:
        prefix = "thinned." if type(self).__module__.startswith("thinned.") else ""
        return prefix + super().__repr__()
