"""What PyTorch is doing around a call, which decides its way; asked on every call, so it must be cheap."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters
from torch.autograd import forward_ad
from torch.nn import Parameter

__all__ = ["compiling", "dense", "is_eager", "is_legacy_batched", "is_traced", "transforming", "transforms"]

compiling = torch.compiler.is_dynamo_compiling
transforming = torch._C._are_functorch_transforms_active
_modes = torch._C._len_torch_dispatch_stack
_is_wrapped = torch._C._dispatch_isTensorSubclassLike
_tracing = torch._C._get_tracing_state
_PLAIN = (Tensor, Parameter)


def is_traced(x: Tensor) -> bool:
    """Whether PyTorch must see the operation itself: a compiler, a mode, or a tensor that is not plain.

    A plain tensor is a ``Tensor`` or ``Parameter``, strided, with its elements in memory. A sparse, mkldnn or
    meta tensor is not, nor is a ZeroTensor, which autograd makes for gradients that are known to be zero.
    """
    return bool(
        compiling()
        or type(x) not in _PLAIN
        or x.layout is not torch.strided
        or x.is_meta
        or x._is_zerotensor()
        or _modes()
        or _tracing()
    )


def is_eager(x: Tensor) -> bool:
    """Whether nothing but autograd's backward mode has to know of the operation, and ``x`` is plain."""
    return not (
        compiling()
        or type(x) not in _PLAIN
        or transforming()
        or _is_wrapped(x)  # sparse, meta, of the legacy vmap, or within a mode
        or x.layout is not torch.strided
        or x._is_zerotensor()
        or _tracing()
        or forward_ad._current_level >= 0
    )


def dense(grad: Tensor) -> Tensor:
    """A gradient that is no COO tensor, as that of ``F.embedding(sparse=True)`` is."""
    # Compiled code has none, and Dynamo does not let a backward function ask.
    return grad.to_dense() if not compiling() and grad.is_sparse else grad


def is_legacy_batched(x: Tensor) -> bool:
    """Whether ``x`` is of the vmap behind ``torch.autograd.grad(is_grads_batched=True)``.

    ``torch.autograd.functional.jacobian(vectorize=True)`` uses it too. It has no rule for our operations.
    """
    return not compiling() and torch._C._functorch.is_legacy_batchedtensor(x)


def transforms() -> set[TransformType]:
    """The kinds of functorch's transforms around the call."""
    return {interpreter.key() for interpreter in retrieve_all_functorch_interpreters()}
