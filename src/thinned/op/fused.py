"""An activation or a sum beside a mask in one pass over memory, where the CPU's kernel serves.

``fuses`` says where. Everything else, and the derivative of a derivative, is composed of PyTorch's operations
and of :func:`~thinned.op.masked_affine`, with the same mask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from thinned import backends
from thinned.geometry import shared_cached
from thinned.op.affine import derivative, eager_key, masked_affine
from thinned.torch_state import SingleLevelFunction, is_eager

__all__ = ["ACTIVATIONS", "fused", "fused_add", "fuses"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}
_DTYPES = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))


def _kernel(*arguments: Any) -> Tensor:
    """:func:`thinned.backends.native.fused`."""
    backend: Any = backends.for_device_type("cpu")
    return backend.fused(*arguments)  # type: ignore[no-any-return]


def fuses(x: Tensor) -> bool:
    """Whether the kernel serves ``x``."""
    return (
        is_eager(x)
        and x.is_cpu
        and x.dtype in _DTYPES
        and x.is_contiguous()
        and not x.is_neg()
        and hasattr(backends.for_device_type("cpu"), "fused")
    )


def fused(function: str, x: Tensor, key: Tensor | None, T: int, scale: float) -> Tensor:
    """``keep(i) ? function(x_i) * scale : 0``.

    Args:
        function: ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``.
        x: a tensor that ``fuses``.
        key: the bits of one key or of one for each row; None draws one.
        T: the threshold.
        scale: the factor of what is kept.
    """
    bits = eager_key(key, x)
    if x.requires_grad and torch.is_grad_enabled():
        return _apply_activation(x, function, bits, T, scale)  # type: ignore[no-any-return]
    return _kernel(function, x, None, None, bits, T, scale)


def fused_add(
    x: Tensor, residual: Tensor, bias: Tensor | None, key: Tensor | None, T: int, scale: float
) -> Tensor:
    """``residual_i + (keep(i) ? (x_i + bias_i) * scale : 0)``, for a residual of ``x``'s shape."""
    bits = eager_key(key, x)
    needs_grad = x.requires_grad or residual.requires_grad or (bias is not None and bias.requires_grad)
    if needs_grad and torch.is_grad_enabled():
        return _apply_sum(x, residual, bias, bits, T, scale)  # type: ignore[no-any-return]
    return _kernel("add", x, residual, bias, bits, T, scale)


class _Activation(SingleLevelFunction):
    """Saves the result of relu, which is zero where its gradient is; of the others, the input and the key."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: str, key: int | Tensor, T: int, scale: float) -> Tensor:
        y = _kernel(function, x, None, None, key, T, scale)
        if function == "relu":
            ctx.save_for_backward(y)
        elif isinstance(key, Tensor):
            ctx.save_for_backward(x, key)
        else:
            ctx.save_for_backward(x)
        ctx.arguments = function, key if isinstance(key, int) else None, T, scale
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, *keys = ctx.saved_tensors
        function, key, T, scale = ctx.arguments
        key = keys[0] if keys else key
        if is_eager(grad) and not torch.is_grad_enabled():
            grad, saved = grad.contiguous(), saved.contiguous()
            # The key has no part in the derivative of relu.
            bits = 0 if key is None else key
            return _kernel(f"{function}_slope", saved, grad, None, bits, T, scale), *(None,) * 4
        if function == "relu":
            kept = masked_affine(grad, 0, None, 2**32, scale)
            return torch.ops.aten.threshold_backward(kept, saved.detach(), 0), *(None,) * 4
        geometry = shared_cached(saved.shape, (), 1) if keys else None
        kept = masked_affine(grad, key, geometry, T, scale)
        differentiable = torch.is_grad_enabled()
        with torch.enable_grad():
            y = ACTIVATIONS[function](saved)
            (slope,) = torch.autograd.grad(y, saved, kept, create_graph=differentiable)
        return slope, *(None,) * 4


class _Sum(SingleLevelFunction):
    """Saves the key."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor,
        bias: Tensor | None,
        key: int | Tensor,
        T: int,
        scale: float,
    ) -> Tensor:
        if isinstance(key, Tensor):
            ctx.save_for_backward(key)
        geometry = shared_cached(x.shape, (), 1) if isinstance(key, Tensor) else None
        ctx.derivative = key if isinstance(key, int) else None, geometry, T, scale
        return _kernel("add", x, residual, bias, key, T, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        key, geometry, T, scale = ctx.derivative
        key = ctx.saved_tensors[0] if key is None else key
        needs_x, needs_residual, needs_bias, *_ = ctx.needs_input_grad
        of_x = derivative(grad, key, geometry, T, scale, None) if needs_x or needs_bias else None
        of_bias = of_x.sum_to_size(grad.shape[-1:]) if needs_bias and of_x is not None else None
        return of_x if needs_x else None, grad if needs_residual else None, of_bias, None, None, None


# Skips the functorch checks of torch.autograd.Function.apply, 1.4 us, as in op/affine.py.
_apply_activation: Any = _Activation.apply  # type: ignore[attr-defined]
_apply_sum: Any = _Sum.apply  # type: ignore[attr-defined]
