"""Shows compilers the Triton kernel that an operation launches, as :func:`torch.library.triton_op` does.

The operation remains one opaque call, whose kernel launches when it runs, where this cannot be:

- on other devices, and on Triton's under its interpreter;
- where a size or stride is a symbol, since they decide how the kernel is compiled;
- in exported programs;
- for tensors whose dimensions need several launches;
- for constants whose result a fused multiply-add would change: Inductor cannot forbid it, and we do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from thinned import backends
from thinned.torch_state import on_functionalization

__all__ = ["show_kernel"]


class _Kernels:
    """The kernels whose source is part of the key of torch's cache of compiled code."""

    def __iter__(self) -> Iterator[Any]:
        device = torch.accelerator.current_accelerator()
        kernels = _compiled_by(device) if device else None
        return iter(() if kernels is None else (kernels.tile, kernels.fold))


def show_kernel(
    library: torch.library.Library,
    name: str,
    kernel: Callable[..., Tensor],
    suits: Callable[..., bool] = lambda *_: True,
) -> None:
    """Show a compiler what ``kernel`` launches for arguments that ``suits`` accepts."""

    def trace(*args: Any) -> Any:
        try:
            return kernel(*args) if _is_static(args) and suits(*args) else NotImplemented
        except NotImplementedError:  # several launches
            return NotImplemented

    on_functionalization(library, name, trace, _Kernels())


def _is_static(args: tuple[Any, ...]) -> bool:
    """Whether a compiled Triton kernel serves these arguments, with no symbol among their numbers."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or _compiled_by(devices.pop()) is None:
        return False
    lists = [arg for arg in args if isinstance(arg, (list, tuple))]
    lists += [sizes for tensor in tensors for sizes in (tensor.shape, tensor.stride())]
    return not any(isinstance(arg, torch.SymInt | torch.SymFloat) for arg in chain(args, *lists))


def _compiled_by(device: torch.device) -> ModuleType | None:
    """The kernels that Triton compiles for a device, if it serves that."""
    if backends.why_not_triton(device.type):
        return None
    import triton  # here: this import takes 0.3 s

    from thinned.backends import triton_kernels

    return None if triton.knobs.runtime.interpret else triton_kernels
