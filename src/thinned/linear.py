"""Element-wise linear maps that are a function of a key: what autograd keeps of one is the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thinned.keys import Key
from thinned.state import compiling, is_eager

__all__ = ["Map", "apply_linear"]

Map = Callable[[Tensor, Key], Tensor]


def apply_linear(linear: Map, x: Tensor, key: Key) -> Tensor:
    """``linear(x, key)``, for a map that multiplies each element by a factor that the key alone decides.

    The map is its own derivative, so that it is made again for backward from the key, and neither the factor
    nor ``x`` is saved. Differentiable in ``x`` to any order, in both modes.
    """
    if is_eager(x) and not (x.requires_grad and torch.is_grad_enabled()):
        return linear(x, key)
    if compiling():
        return _Reverse.apply(x, key.bits, linear)  # type: ignore[no-any-return,no-untyped-call]
    apply = _apply_eager if is_eager(x) else _Both.apply
    return apply(x, key.bits, linear)  # type: ignore[no-any-return,no-untyped-call]


class _Reverse(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bits: Tensor, linear: Map) -> Tensor:
        return linear(x, Key.from_bits(bits))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Map], output: Tensor) -> None:  # noqa: ARG004
        _, bits, ctx.linear = inputs
        ctx.save_for_backward(bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return apply_linear(ctx.linear, grad, Key.from_bits(ctx.saved_tensors[0])), None, None


class _Both(_Reverse):
    """With forward mode, which Dynamo refuses to trace."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Map], output: Tensor) -> None:
        _Reverse.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return apply_linear(ctx.linear, tangent, Key.from_bits(ctx.saved_tensors[0]))


# Function.apply itself only adds what functorch needs, which is not active where this is called.
_apply_eager = super(torch.autograd.Function, _Both).apply
