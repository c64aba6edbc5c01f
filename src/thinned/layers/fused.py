"""An activation, or a sum, and the dropout beside it as one function."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import has_torch_function, has_torch_function_unary

from thinned import op
from thinned.checks import got
from thinned.keys import Key
from thinned.layers._arguments import (
    apply,
    bits_for,
    check_device,
    check_tensor,
    drops,
    flat_key,
    threshold_and_scale,
)
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.op.fused import ACTIVATIONS
from thinned.torch_state import compiling

__all__ = [
    "DropoutAdd",
    "GELUDropout",
    "ReLUDropout",
    "SiLUDropout",
    "activation_of",
    "bias_dropout_add",
    "dropout_add",
    "gelu_dropout",
    "relu_dropout",
    "silu_dropout",
]


def relu_dropout(input: Tensor, p: float = 0.5, training: bool = True, *, key: Key | None = None) -> Tensor:
    r"""``dropout(relu(input))``: the mask of :func:`~thinned.functional.dropout`.

    .. math:: y_i = \begin{cases} \max(x_i, 0) / q & u(i) < T \\ +0 & \text{otherwise} \end{cases}

    On the CPU this is one pass over memory, forward and backward, for a contiguous float16, bfloat16, float32
    or float64 tensor. Nothing is saved for the backward pass but the result. Compiled code, other tensors and
    other devices take the two functions one after the other, with the same mask.

    Args:
        input: a floating-point tensor of any shape.
        p: the probability of dropping an element, in [0, 1].
        training: False returns ``relu(input)``, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A new tensor of ``input``'s shape and dtype; half precision is rounded once.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`~thinned.functional.dropout`.

    Source: Srivastava et al. 2014, section 4.

    >>> import torch, thinned
    >>> x = torch.tensor([-1.0, 1.0, 1.0, -1.0, 1.0, 1.0])
    >>> thinned.functional.relu_dropout(x, p=0.5, key=thinned.Key(7))
    tensor([0., 0., 0., 0., 2., 2.])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(relu_dropout, locals())
    T, scale = threshold_and_scale(p)
    if not drops("relu_dropout", input, p, training, key):
        return F.relu(input)
    return _activated("relu", input, key, T, scale)


def gelu_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    approximate: Literal["none", "tanh"] = "none",
    key: Key | None = None,
) -> Tensor:
    r"""``dropout(gelu(input))``: the mask of :func:`~thinned.functional.dropout`.

    .. math:: y_i = \begin{cases} x_i \Phi(x_i) / q & u(i) < T \\ +0 & \text{otherwise} \end{cases}

    On the CPU this is one pass over memory, as for :func:`relu_dropout`; the backward pass has ``input`` and
    the key.

    Args:
        input: a floating-point tensor of any shape.
        p: the probability of dropping an element, in [0, 1].
        training: False returns ``gelu(input)``, and so does ``p = 0``.
        approximate: ``"none"``, or ``"tanh"`` for
            :math:`\frac x 2 (1 + \tanh(\sqrt{2/\pi}\,(x + 0.044715\,x^3)))`.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A new tensor of ``input``'s shape and dtype; half precision is rounded once.

    Raises:
        ValueError: another ``approximate``.
        ValueError, TypeError, RuntimeError: as :func:`~thinned.functional.dropout`.

    Source: Hendrycks and Gimpel, "Gaussian error linear units (GELUs)", arXiv 2016, section 2.

    >>> import torch, thinned
    >>> thinned.functional.gelu_dropout(torch.ones(6), p=0.5, key=thinned.Key(7))
    tensor([0.0000, 0.0000, 0.0000, 1.6827, 1.6827, 1.6827])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(gelu_dropout, locals())
    T, scale = threshold_and_scale(p)
    _check_approximate(approximate)
    if not drops("gelu_dropout", input, p, training, key):
        return F.gelu(input, approximate=approximate)
    return _activated("gelu" if approximate == "none" else "gelu_tanh", input, key, T, scale)


def silu_dropout(input: Tensor, p: float = 0.5, training: bool = True, *, key: Key | None = None) -> Tensor:
    r"""``dropout(silu(input))``: the mask of :func:`~thinned.functional.dropout`.

    .. math:: y_i = \begin{cases} x_i / (1 + e^{-x_i}) / q & u(i) < T \\ +0 & \text{otherwise} \end{cases}

    On the CPU this is one pass over memory, as for :func:`gelu_dropout`.

    Args:
        input: a floating-point tensor of any shape.
        p: the probability of dropping an element, in [0, 1].
        training: False returns ``silu(input)``, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A new tensor of ``input``'s shape and dtype; half precision is rounded once.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`~thinned.functional.dropout`.

    Source: Hendrycks and Gimpel 2016, as :func:`gelu_dropout`, section 2.

    >>> import torch, thinned
    >>> thinned.functional.silu_dropout(torch.ones(6), p=0.5, key=thinned.Key(7))
    tensor([0.0000, 0.0000, 0.0000, 1.4621, 1.4621, 1.4621])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(silu_dropout, locals())
    T, scale = threshold_and_scale(p)
    if not drops("silu_dropout", input, p, training, key):
        return F.silu(input)
    return _activated("silu", input, key, T, scale)


def dropout_add(
    input: Tensor, residual: Tensor, p: float = 0.5, training: bool = True, *, key: Key | None = None
) -> Tensor:
    r"""``residual + dropout(input)``, as at the end of a transformer's sublayer.

    .. math:: y_i = \begin{cases} r_i + x_i / q & u(i) < T \\ r_i + 0 & \text{otherwise} \end{cases}

    On the CPU this is one pass over memory for contiguous tensors of one shape and one real dtype, and only
    the key is saved. Other tensors take the two steps one after the other, with the same mask.

    Args:
        input: a floating-point or complex tensor of any shape.
        residual: a tensor that broadcasts with ``input``.
        p: the probability of dropping an element, in [0, 1].
        training: False returns ``residual + input``, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A new tensor; half precision is rounded once.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; and RuntimeError for a
            ``residual`` that does not broadcast with ``input``.

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017, section 5.4.

    >>> import torch, thinned
    >>> thinned.functional.dropout_add(torch.ones(6), torch.ones(6), p=0.5, key=thinned.Key(7))
    tensor([1., 1., 1., 3., 3., 3.])
    """
    if has_torch_function((input, residual)) and not compiling():
        return overridden(dropout_add, locals())
    return _add("dropout_add", input, None, residual, p, training, key)


def bias_dropout_add(
    input: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""``residual + dropout(input + bias)``, after a linear map without its bias.

    .. math:: y_i = \begin{cases} r_i + (x_i + b_i) / q & u(i) < T \\ r_i + 0 & \text{otherwise} \end{cases}

    On the CPU this is one pass over memory, as for :func:`dropout_add`.

    Args:
        input: a floating-point or complex tensor of shape ``(*, C)``.
        bias: a tensor of shape ``(C,)``, or None.
        residual: a tensor that broadcasts with ``input``.
        p: the probability of dropping an element, in [0, 1].
        training: False returns ``residual + (input + bias)``, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A new tensor; half precision is rounded once.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; and RuntimeError for a
            ``bias`` of another shape or a ``residual`` that does not broadcast with ``input``.

    Source: Vaswani et al. 2017, as :func:`dropout_add`; as one function in Megatron-LM.

    >>> import torch, thinned
    >>> ones = torch.ones(6)
    >>> thinned.functional.bias_dropout_add(ones, ones, ones, p=0.5, key=thinned.Key(7))
    tensor([1., 1., 1., 5., 5., 5.])
    """
    if has_torch_function((input, bias, residual)) and not compiling():
        return overridden(bias_dropout_add, locals())
    return _add("bias_dropout_add", input, bias, residual, p, training, key)


def _activated(function: str, x: Tensor, key: Key | None, T: int, scale: float) -> Tensor:
    if op.fuses(x):
        fits, key = flat_key(x, key)
        if fits:
            return op.fused(function, x, None if key is None else bits_for(key, x), T, scale)
    return apply(ACTIVATIONS[function](x), key, (), False, T, scale, elementwise=True)


def _add(
    name: str, x: Tensor, bias: Tensor | None, residual: Tensor, p: float, training: bool, key: Key | None
) -> Tensor:
    T, scale = threshold_and_scale(p)
    active = drops(name, x, p, training, key)
    if active and _fuse(x, bias, residual):
        fits, key = flat_key(x, key)
        if fits:
            return op.fused_add(x, residual, bias, None if key is None else bits_for(key, x), T, scale)
    else:
        _check(name, x, bias, residual)
    x = x if bias is None else x + bias
    return residual + (apply(x, key, (), False, T, scale, elementwise=True) if active else x)


def _check_approximate(approximate: str) -> None:
    if approximate not in ("none", "tanh"):
        raise ValueError(f'approximate must be "none" or "tanh", {got(approximate)}')


def _fuse(x: Tensor, bias: Tensor | None, residual: Tensor) -> bool:
    if not (op.fuses(x) and op.fuses(residual) and x.dtype is residual.dtype and x.shape == residual.shape):
        return False
    return bias is None or (op.fuses(bias) and bias.dtype is x.dtype and _is_bias(bias, x))


def _is_bias(bias: Tensor, x: Tensor) -> bool:
    return bias.dim() == 1 and bias.shape == x.shape[-1:]


def _check(name: str, x: Tensor, bias: Tensor | None, residual: Tensor) -> None:
    if bias is not None:
        check_tensor(name, "bias", bias)
        check_device("bias", bias, x)
        if not _is_bias(bias, x):
            raise RuntimeError(
                f"bias must have the size of input's last dimension, got shape {tuple(bias.shape)} for an "
                f"input of shape {tuple(x.shape)}"
            )
    check_tensor(name, "residual", residual)
    check_device("residual", residual, x)
    if residual.is_nested or x.is_nested:
        return
    sizes = zip(reversed(residual.shape), reversed(x.shape), strict=False)
    if not all(one == other or 1 in (one, other) for one, other in sizes):
        raise RuntimeError(
            f"residual of shape {tuple(residual.shape)} does not broadcast with an input of shape "
            f"{tuple(x.shape)}"
        )


class ReLUDropout(Layer):
    """``nn.ReLU`` and the dropout behind it in one pass over memory.

    Use this layer in place of the two between fully connected layers, with the p and the masks of
    :class:`Dropout`; :func:`thinned.convert` with ``fuse=True`` puts it there. In evaluation it is the
    activation alone.

    :func:`thinned.functional.relu_dropout` has the formula.

    Source: Srivastava et al. 2014, as the function.

    >>> import torch, thinned
    >>> thinned.ReLUDropout(0.5)(torch.ones(6), key=thinned.Key(7))
    tensor([0., 0., 0., 2., 2., 2.])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        return torch.ops.thinned.relu_dropout(input, float(self.p), self.training)  # type: ignore[no-any-return]

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return relu_dropout(input, self.p, self.training, key=key)


class GELUDropout(Layer):
    """``nn.GELU`` and the dropout behind it in one pass over memory.

    Use this layer in place of the two in the MLP of a transformer, with the p and the masks of
    :class:`Dropout`; :func:`thinned.convert` with ``fuse=True`` puts it there. In evaluation it is the
    activation alone.

    :func:`thinned.functional.gelu_dropout` has the formula.

    Source: Hendrycks and Gimpel 2016, as the function.

    >>> import torch, thinned
    >>> thinned.GELUDropout(0.5)(torch.ones(6), key=thinned.Key(7))
    tensor([0.0000, 0.0000, 0.0000, 1.6827, 1.6827, 1.6827])
    """

    def __init__(self, p: float = 0.5, approximate: Literal["none", "tanh"] = "none") -> None:
        super().__init__(p)
        _check_approximate(approximate)
        self.approximate = approximate

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        p, approximate = float(self.p), self.approximate
        return torch.ops.thinned.gelu_dropout(input, p, self.training, approximate=approximate)  # type: ignore[no-any-return]

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return gelu_dropout(input, self.p, self.training, approximate=self.approximate, key=key)


class SiLUDropout(Layer):
    """``nn.SiLU`` and the dropout behind it in one pass over memory.

    Use this layer in place of the two in an MLP, with the p and the masks of :class:`Dropout`;
    :func:`thinned.convert` with ``fuse=True`` puts it there. In evaluation it is the activation alone.

    :func:`thinned.functional.silu_dropout` has the formula.

    Source: Hendrycks and Gimpel 2016, as the function.

    >>> import torch, thinned
    >>> thinned.SiLUDropout(0.5)(torch.ones(6), key=thinned.Key(7))
    tensor([0.0000, 0.0000, 0.0000, 1.4621, 1.4621, 1.4621])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        return torch.ops.thinned.silu_dropout(input, float(self.p), self.training)  # type: ignore[no-any-return]

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return silu_dropout(input, self.p, self.training, key=key)


class DropoutAdd(Layer):
    """Dropout and the sum with a residual in one pass over memory.

    Use this layer at the end of a transformer's sublayer, in place of the sum of a residual and a
    :class:`Dropout`, whose p and masks it has. In evaluation it is the sum alone.

    :func:`thinned.functional.dropout_add` has the formula.

    Source: Vaswani et al. 2017, as the function.

    >>> import torch, thinned
    >>> thinned.DropoutAdd(0.5)(torch.ones(6), torch.ones(6), key=thinned.Key(7))
    tensor([1., 1., 1., 3., 3., 3.])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, input: Tensor, residual: Tensor, *, key: Key | None = None) -> Tensor:
        if (node := module_node(self, input, residual, key=key)) is not None:
            return node
        return dropout_add(input, residual, self.p, self.training, key=key)


def activation_of(layer: nn.Module) -> nn.Module:
    """The activation alone of a layer that is one with its dropout."""
    if isinstance(layer, GELUDropout):
        return nn.GELU(layer.approximate)
    return nn.ReLU() if isinstance(layer, ReLUDropout) else nn.SiLU()
