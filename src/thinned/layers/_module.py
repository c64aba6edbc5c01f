"""The base classes of the layers: they refuse a wrong ``p`` and show their arguments."""

from __future__ import annotations

import inspect

from torch import nn

from thinned.layers._arguments import check_p

__all__ = ["Layer", "TorchLayer"]


class Layer(nn.Module):
    """A layer with a probability of dropping, which shows the constructor's arguments that it stores.

    Args:
        p: the probability of dropping, in [0, 1].

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        check_p(p)
        self.p = p

    def extra_repr(self) -> str:
        names = [name for name in inspect.signature(type(self)).parameters if name in vars(self)]
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


class TorchLayer(nn.Module):
    """What to put before a dropout of torch.nn among the bases: torch's own constructor accepts NaN."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        check_p(p)
        super().__init__(p, inplace)
