"""What PyTorch is doing around a call, which decides its way; asked on every call, so it must be cheap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = ["compiling", "is_eager", "is_traced", "transforming", "transforms"]

compiling = torch.compiler.is_dynamo_compiling
transforming = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_PLAIN = (Tensor, Parameter)


def is_traced(x: Tensor) -> bool:
    """Whether PyTorch must see the operation itself: a compiler, a mode, or a tensor that is not plain."""
    return bool(compiling() or type(x) not in _PLAIN or x.is_meta or _modes() or _tracing())


def is_eager(x: Tensor) -> bool:
    """Whether nothing but autograd's backward mode has to know of the operation."""
    return not (is_traced(x) or transforming() or forward_ad._current_level >= 0)


def transforms() -> set[TransformType]:
    """The kinds of functorch's transforms around the call."""
    return {interpreter.key() for interpreter in retrieve_all_functorch_interpreters()}
