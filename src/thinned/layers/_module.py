"""The base classes of the layers: they refuse a wrong ``p`` and show their arguments."""

from __future__ import annotations

import inspect
from collections.abc import Sequence

from thinned.checks import check_integer, integers
from thinned.layers._arguments import check_p, number
from thinned.layers._torchscript import Scriptable

__all__ = ["Layer", "SharingLayer", "TorchLayer", "checked_dims"]


def checked_dims(broadcast_dims: Sequence[int]) -> tuple[int, ...]:
    """The dimensions in a tuple; TypeError for what are no integers."""
    dims = integers("broadcast_dims", broadcast_dims)
    for dim in dims:
        check_integer("each of broadcast_dims", dim)
    return dims


class Layer(Scriptable):
    """A layer with a probability ``p`` of dropping; its repr shows the arguments that it stores."""

    def __init__(self, p: float, name: str = "p") -> None:
        super().__init__()
        check_p(p, name)
        self.p = p

    def extra_repr(self) -> str:
        # A subclass from elsewhere may have a constructor of its own.
        ours = next(kind for kind in type(self).__mro__ if kind.__module__.startswith("thinned."))
        parameters = inspect.signature(ours).parameters
        stored = {name: vars(self)[name] for name in parameters if name in vars(self)}
        return ", ".join(f"{k}={v!r}" if isinstance(v, str) else f"{k}={v}" for k, v in stored.items())


class TorchLayer(Scriptable):
    """The base before a dropout of torch.nn; refuses NaN, which torch's constructor accepts."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        if (value := number(p)) != value:
            check_p(p)
        super().__init__(p, inplace)


class SharingLayer(TorchLayer):
    """A :class:`TorchLayer` whose decisions can be shared along ``broadcast_dims``."""

    broadcast_dims: Sequence[int] = ()  # on the class, so that layers pickled without it still run

    def __init__(self, p: float = 0.5, inplace: bool = False, *, broadcast_dims: Sequence[int] = ()) -> None:
        super().__init__(p, inplace)
        if dims := checked_dims(broadcast_dims):
            self.broadcast_dims = dims

    def extra_repr(self) -> str:
        dims = f", broadcast_dims={self.broadcast_dims}" if self.broadcast_dims else ""
        return super().extra_repr() + dims
