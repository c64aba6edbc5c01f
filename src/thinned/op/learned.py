"""Autograd for ``y = f(noise(key), parameter) * x``: backward regenerates the noise from the key."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from thinned.keys import Key, packed, unpacked
from thinned.op.from_key import result_of
from thinned.op.noise import multiply, opmath
from thinned.torch_state import compiling, dense, forward_mode, is_eager

__all__ = ["Noisy", "apply_noisy"]


@dataclass(frozen=True)
class Noisy:
    """A factor ``f(noise, parameter)``.

    ``factor`` and ``both`` take ``(noise, parameter, inplace)`` and may overwrite the noise if ``inplace``.
    They use differentiable operations only, because second derivatives go through them.

    Attributes:
        noise: the noise for a tensor, in some dtype.
        factor: ``f``.
        both: ``f`` and its derivative in the parameter.
    """

    noise: Callable[[Key, Tensor, torch.dtype], Tensor]
    factor: Callable[[Tensor, Tensor, bool], Tensor]
    both: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def apply_noisy(noisy: Noisy, x: Tensor, parameter: Tensor, key: Key) -> Tensor:
    """``x * f(noise, parameter)``, computed in float32 or float64 and rounded once to ``x``'s dtype.

    Only ``x``, the parameter and the key are saved. Differentiable in ``x`` and the parameter to any order,
    in both modes.
    """
    if not compiling() and forward_mode():
        # A jvp of the Function would be wrong in jvp(jvp(f)): saved tensors lack the outer jvp's tangents.
        return _Product.forward(x, parameter, *packed(key), noisy)
    return _Product.apply(x, parameter, *packed(key), noisy)  # type: ignore[no-any-return,no-untyped-call]


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, parameter: Tensor, key: Tensor, strata: int, noisy: Noisy) -> Tensor:
        y = multiply(x, noisy.factor(*_noise(x, parameter, unpacked(key, strata), noisy)))
        return result_of(y.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        *tensors, ctx.strata, ctx.noisy = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, parameter, key = ctx.saved_tensors
        grad = dense(grad)
        arguments = _noise(x, parameter, unpacked(key, ctx.strata), ctx.noisy)
        if not ctx.needs_input_grad[1]:
            return multiply(grad, ctx.noisy.factor(*arguments)).to(x.dtype), None, None, None, None
        factor, slope = ctx.noisy.both(*arguments)
        summands = multiply(x.conj(), multiply(grad, slope))
        summands = summands.real if summands.is_complex() else summands
        grad_parameter = summands.sum_to_size(parameter.shape).to(parameter.dtype)
        return multiply(grad, factor).to(x.dtype), grad_parameter, None, None, None


def _noise(x: Tensor, parameter: Tensor, key: Key, noisy: Noisy) -> tuple[Tensor, Tensor, bool]:
    """The arguments of ``noisy.factor``."""
    dtype = opmath(x.dtype)
    noise, parameter = noisy.noise(key, x, dtype), parameter.to(dtype)
    # A traced graph may run with gradients enabled, where out= is an error.
    may_overwrite = is_eager(x) and not torch.is_grad_enabled()
    # The factor has the noise's shape only then: a parameter with dimensions may broadcast the noise.
    same_shape = parameter.dim() == 0 or noise.shape == x.shape
    return noise, parameter, may_overwrite and same_shape
