"""Multiplication by a factor that a key and a learned parameter decide: autograd keeps no noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from thinned.keys import Key
from thinned.nested import shape_of
from thinned.op.noise import multiply, opmath
from thinned.torch_state import compiling, dense, transforming

__all__ = ["Noisy", "apply_noisy", "check_parameter"]


class Noisy(NamedTuple):
    """A factor ``f(noise, parameter)``.

    ``factor`` and ``both`` take ``(noise, parameter, inplace)`` and may overwrite the noise if ``inplace``.
    They use differentiable operations only, because second derivatives go through them.

    Attributes:
        noise: the noise for a tensor of some shape, in some dtype.
        factor: ``f``.
        both: ``f`` and its derivative in the parameter.
    """

    noise: Callable[[Key, Sequence[int], torch.dtype], Tensor]
    factor: Callable[[Tensor, Tensor, bool], Tensor]
    both: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor]]


def apply_noisy(noisy: Noisy, x: Tensor, parameter: Tensor, key: Key) -> Tensor:
    """``x * f(noise, parameter)``, computed in float32 or float64 and rounded once to ``x``'s dtype.

    The noise is made again for backward, so that ``x``, the parameter and the key are all that is saved.
    Differentiable in ``x`` and the parameter to any order, in both modes.
    """
    function = _Compiled if compiling() else _Both
    return function.apply(x, parameter, key.bits, noisy)  # type: ignore[no-any-return,no-untyped-call]


def check_parameter(function: str, name: str, parameter: Tensor, input: Tensor) -> Tensor:
    """The parameter in a shape that broadcasts to ``input``'s; raise where it has none."""
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{function}(): argument {name!r} must be Tensor, not {type(parameter).__name__}")
    if not parameter.is_floating_point():
        raise RuntimeError(f"{name} has to be a floating-point tensor, got {parameter.dtype}")
    if parameter.dim() == 1 and parameter.shape[0] == 1:
        return parameter.reshape(())  # which fits a tensor without dimensions too
    shape = shape_of(input)
    sizes = zip(reversed(parameter.shape), reversed(shape), strict=False)
    if parameter.dim() > len(shape) or any(size not in (1, whole) for size, whole in sizes):
        raise RuntimeError(
            f"{name} of shape {tuple(parameter.shape)} does not broadcast to an input of shape {shape}"
        )
    return parameter


class _Rule:
    @staticmethod
    def forward(x: Tensor, parameter: Tensor, bits: Tensor, noisy: Noisy) -> Tensor:
        return multiply(x, noisy.factor(*_noise(x, parameter, bits, noisy))).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Noisy], output: Tensor) -> None:  # noqa: ARG004
        *tensors, ctx.noisy = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        x, parameter, bits = ctx.saved_tensors
        grad = dense(grad)
        arguments = _noise(x, parameter, bits, ctx.noisy)
        if not ctx.needs_input_grad[1]:
            return multiply(grad, ctx.noisy.factor(*arguments)).to(x.dtype), None, None, None
        factor, slope = ctx.noisy.both(*arguments)
        each = multiply(x.conj(), multiply(grad, slope))
        each = each.real if each.is_complex() else each
        grad_parameter = each.sum_to_size(parameter.shape).to(parameter.dtype)
        return multiply(grad, factor).to(x.dtype), grad_parameter, None, None


class _Compiled(_Rule, torch.autograd.Function):
    """Without forward mode, which Dynamo refuses to trace."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, parameter: Tensor, bits: Tensor, noisy: Noisy) -> Tensor:
        # For the copy see thinned.op.from_key.
        return _Rule.forward(x, parameter, bits, noisy).clone()


class _Both(_Rule, torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Noisy], output: Tensor) -> None:
        _Rule.setup_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:3])

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, parameter_tangent: Tensor | None, *_: None) -> Tensor:
        x, parameter, bits = ctx.saved_tensors
        factor, slope = ctx.noisy.both(*_noise(x, parameter, bits, ctx.noisy))
        tangent = torch.zeros_like(x) if x_tangent is None else x_tangent * factor
        if parameter_tangent is not None:
            tangent = tangent + x * (slope * parameter_tangent)
        return tangent.to(x.dtype)


def _noise(x: Tensor, parameter: Tensor, bits: Tensor, noisy: Noisy) -> tuple[Tensor, Tensor, bool]:
    """The arguments of ``noisy.factor``."""
    dtype = opmath(x.dtype)
    noise, parameter = noisy.noise(Key.from_bits(bits), x.shape, dtype), parameter.to(dtype)
    may_overwrite = not (torch.is_grad_enabled() or transforming() or compiling())
    # The factor has the noise's shape only then: a parameter with dimensions may broadcast the noise.
    same_shape = parameter.dim() == 0 or noise.shape == x.shape
    return noise, parameter, may_overwrite and same_shape
