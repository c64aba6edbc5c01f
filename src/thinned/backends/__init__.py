"""The table of backends: which one serves a device, and why one is missing.

>>> for_device(torch.device("cpu")) in available().values()
True
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Protocol, cast

import torch
from torch import Tensor

from thinned.backends import portable
from thinned.geometry import Geometry

try:
    from thinned.backends import native
except ImportError as error:
    _NATIVE_MISSING = f"{type(error).__name__}: {error}"
else:
    _NATIVE_MISSING = ""

ACCELERATORS = ("cuda", "xpu")  # those that Triton serves; torch calls AMD's GPUs cuda too

__all__ = ["Backend", "available", "describe", "for_device", "missing", "name_for", "why_not_triton"]


def __dir__() -> list[str]:
    return __all__


class Backend(Protocol):
    """A backend is a module with these five functions, and nothing else is asked of it.

    They take plain tensors: no subclass, no conjugate or negative bit except a conjugate ``x``, no autograd.

    - ``masked_affine``: the masked values.
    - ``keep_mask``: the mask.
    - ``uniform``: the random numbers behind the mask.
    - ``choose``: the masked values under numbers that are given.
    - ``fold``: the children of keys.
    """

    def masked_affine(
        self,
        x: Tensor,
        key: int | Tensor,
        geometry: Geometry | None,
        T: int,
        scale: float,
        shift: float,
        fill: float,
        out: Tensor | None = None,
    ) -> Tensor:
        """``keep ? x * scale + shift : fill``, in a new tensor like ``x`` or in ``out``, which may be ``x``.

        Without a geometry the mask indices are ``x``'s own positions in row-major order.
        """

    def keep_mask(self, key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
        """True where kept, in a bool tensor on the key's device; an ``int`` key stands for the CPU."""

    def uniform(
        self,
        key: Tensor,
        shape: tuple[int, ...],
        geometry: Geometry,
        draw: Tensor | None = None,
        strata: int = 1,
    ) -> Tensor:
        """``u - 2**31`` of each element, as an int32 tensor on the key's device.

        With a draw it is ``u' - 2**31``, the numbers of one of ``strata`` stratified draws. ``draw`` is an
        int64 tensor of the key's shape, or one number; it counts modulo ``strata``.
        """

    def choose(self, x: Tensor, numbers: Tensor, T: int, scale: float, shift: float, fill: float) -> Tensor:
        """``number + 2**31 < T ? x * scale + shift : fill`` in a new tensor like ``x``.

        ``numbers`` are int32, and broadcast to ``x``'s shape.
        """

    def fold(self, keys: Tensor, data: int | Tensor) -> Tensor:
        """The children of int64 keys: of one key for an ``int``; an int64 tensor broadcasts against them."""


@cache
def _triton() -> tuple[Backend | None, str]:
    """The Triton backend, or why it is missing; its import takes 0.3 s, so it waits until it is needed."""
    try:
        from thinned.backends import triton
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"
    return cast(Backend, triton), ""


def available() -> dict[str, Backend]:
    """The backends that this installation has, by name."""
    found = {"portable": cast(Backend, portable)}
    if not _NATIVE_MISSING:
        found["native"] = cast(Backend, native)
    if backend := _triton()[0]:
        found["triton"] = backend
    return found


def missing() -> dict[str, str]:
    """The backends that this installation lacks, each with the reason."""
    reasons = {"native": _NATIVE_MISSING, "triton": _triton()[1]}
    return {name: reason for name, reason in reasons.items() if reason}


def why_not_triton(device_type: str) -> str:
    """Why the Triton backend does not serve a type of device; empty if it does."""
    if device_type not in ACCELERATORS:
        return f"Triton makes kernels for {' and '.join(ACCELERATORS)}"
    if device_type == "cuda" and torch.cuda.is_available() and torch.version.hip is None:
        oldest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        if oldest < (8, 0):
            has = ".".join(map(str, oldest))
            return f"Triton needs compute capability 8.0 or higher, and this GPU has {has}"
    return _triton()[1]


@cache
def for_device_type(device_type: str) -> Backend:
    """The backend that serves a type of device, such as ``"cpu"``."""
    if device_type != "cpu":
        backend = None if why_not_triton(device_type) else _triton()[0]
        return backend or cast(Backend, portable)
    if _NATIVE_MISSING:
        warnings.warn(
            "thinned's compiled kernel is missing, so a slower backend serves the CPU "
            f"({_NATIVE_MISSING}); reinstall thinned where a C++ compiler is found",
            RuntimeWarning,
            stacklevel=2,
        )
        return cast(Backend, portable)
    return cast(Backend, native)


def for_device(device: torch.device | str) -> Backend:
    """The backend that serves a device."""
    return for_device_type(torch.device(device).type)


def name_for(device: torch.device | str) -> str:
    """The name of the backend that serves a device.

    >>> name_for("meta")
    'portable'
    """
    serving = for_device(device)
    return next(name for name, backend in available().items() if backend is serving)


from thinned.backends.describe import describe  # noqa: E402  it reads the table above
