"""The layers: each stores its arguments and calls its function."""

from thinned.layers.dropout import Dropout

__all__ = ["Dropout"]
