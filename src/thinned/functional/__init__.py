"""The layers as functions: each validates, turns ``p`` into a threshold and calls the operation."""

from thinned.functional.elementwise import dropout, keep_mask
from thinned.functional.path import drop_path, drop_path_rates, stochastic_depth

__all__ = ["drop_path", "drop_path_rates", "dropout", "keep_mask", "stochastic_depth"]
