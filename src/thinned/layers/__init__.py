"""The layers: each stores its arguments and calls its function."""

from thinned.layers.dropout import Dropout
from thinned.layers.path import DropPath, StochasticDepth

__all__ = ["DropPath", "Dropout", "StochasticDepth"]
