"""Element-wise linear maps that are a function of a key: what autograd keeps of one is the key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from thinned.keys import Key
from thinned.torch_state import SingleLevelFunction, compiling, dense, is_eager

__all__ = ["Map", "apply_linear"]

Map = Callable[[Tensor, Key], Tensor]


def apply_linear(linear: Map, x: Tensor, key: Key, value: Map | None = None) -> Tensor:
    """``linear(x, key)``, for a map that multiplies each element by a factor that the key alone decides.

    The map is its own derivative, so that it is made again for backward from the key, and neither the factor
    nor ``x`` is saved. Differentiable in ``x`` to any order, in both modes.

    Args:
        linear: the map.
        x: what it is applied to.
        key: one key, or a batch of keys.
        value: a function whose derivative ``linear`` is, to be called in its place.
    """
    if is_eager(x) and not (x.requires_grad and torch.is_grad_enabled()):
        return (value or linear)(x, key)
    function: Any = _Compiled if compiling() else _Eager if is_eager(x) else _Transformed
    return function.apply(x, key.bits, linear, value)  # type: ignore[no-any-return]


class _Rule:
    """The map and its derivative, which is the map."""

    @staticmethod
    def forward(x: Tensor, bits: Tensor, linear: Map, value: Map | None) -> Tensor:
        return (value or linear)(x, Key.from_bits(bits))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, bits, ctx.linear, _ = inputs
        ctx.save_for_backward(bits)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return apply_linear(ctx.linear, dense(grad), Key.from_bits(ctx.saved_tensors[0])), None, None, None


class _Eager(_Rule, SingleLevelFunction):
    pass


class _Compiled(_Rule, torch.autograd.Function):
    """Without forward mode, which Dynamo refuses to trace."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bits: Tensor, linear: Map, value: Map | None) -> Tensor:
        # Without the copy, Dynamo in PyTorch 2.11 gives a zero gradient where the output is also another
        # value in here, such as what `.to(x.dtype)` was called on.
        return _Rule.forward(x, bits, linear, value).clone()


class _Transformed(_Rule, torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Rule.setup_context(ctx, inputs, output)
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return apply_linear(ctx.linear, tangent, Key.from_bits(ctx.saved_tensors[0]))
