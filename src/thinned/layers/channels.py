"""Dropout of whole channels: one decision for each feature map of each sample."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary

from thinned.keys import Key
from thinned.layers._arguments import apply, drops, threshold_and_scale
from thinned.layers._module import TorchLayer
from thinned.layers._overrides import module_node, overridden
from thinned.nested import refuse, shape_of
from thinned.torch_state import compiling, constant_when_compiled

__all__ = [
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "channel_dims",
    "dropout1d",
    "dropout2d",
    "dropout3d",
]


def dropout1d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, key: Key | None = None
) -> Tensor:
    r"""Zero whole channels of a 1D feature map with probability ``p``: one decision for each row of ``L``.

    .. math:: y_{ncl} = \begin{cases} x_{ncl} / q & u(nC + c) < T \\ +0 & \text{otherwise} \end{cases}
        \qquad T = \operatorname{round}((1-p)\,2^{32}), \quad q = T / 2^{32}

    Args:
        input: a floating-point or complex tensor of shape ``(N, C, L)``, or ``(C, L)``, which has the mask of
            a batch of one.
        p: the probability of dropping a channel, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        inplace: write the result over ``input``.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys has one for each row of dimension 0.

    Returns:
        As :func:`~thinned.functional.dropout`: a dropped element is ``+0``, NaN and infinity included.

    Raises:
        ValueError, TypeError, RuntimeError: as :func:`~thinned.functional.dropout`.
        RuntimeError: ``input`` has another number of dimensions than 2 or 3, in evaluation too.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2; the signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.dropout1d(torch.ones(4, 3), 0.5, key=thinned.Key(3))
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [2., 2., 2.],
            [2., 2., 2.]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(dropout1d, locals())
    T, scale = threshold_and_scale(p)
    active = drops("dropout1d", input, p, training, key)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. Note that dropout1d "
            "exists to provide channel-wise dropout on inputs with 1 spatial dimension, a channel dimension, "
            f"and an optional batch dimension (i.e. 2D or 3D inputs). Its shape is {shape_of(input)}."
        )
    if not active:
        return input
    return apply(input, key, channel_dims(input, p, batched=input.dim() == 3), inplace, T, scale)


class Dropout1d(TorchLayer, torch.nn.Dropout1d):
    """Drop whole channels: :class:`torch.nn.Dropout1d` with a key.

    Use this layer after :class:`torch.nn.Conv1d`, where neighbouring steps of a signal are so alike that a
    :class:`Dropout` of single ones only lowers the effective learning rate. For ``(N, L, C)`` use
    :class:`LockedDropout` with ``batch_first``: the same for channels that lie last.

    :func:`thinned.functional.dropout1d` has the formula.

    Source: Tompson et al. 2015, as the function.

    >>> import torch, thinned
    >>> thinned.Dropout1d(0.5)(torch.ones(4, 2), key=thinned.Key(3))[:, 0]
    tensor([0., 0., 2., 2.])
    """

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return dropout1d(input, self.p, self.training, self.inplace, key=key)


def dropout2d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, key: Key | None = None
) -> Tensor:
    r"""Zero whole channels of a 2D feature map with probability ``p``: one decision for each ``(n, c)``.

    .. math:: y_{nchw} = \begin{cases} x_{nchw} / q & u(nC + c) < T \\ +0 & \text{otherwise} \end{cases}

    ``input`` has shape ``(N, C, H, W)``. As in PyTorch, 3 dimensions are ``(N, C, L)``, not ``(C, H, W)``,
    and other numbers of dimensions are deprecated and taken as ``(N, C, *)``. The other arguments, the result
    and the errors are those of :func:`dropout1d`, except that fewer than 2 dimensions are refused, and that
    only where something is dropped.

    Warns:
        UserWarning: ``input`` has another number of dimensions than 4.

    Source: Tompson et al. 2015, as :func:`dropout1d`; the signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.dropout2d(torch.ones(1, 4, 8, 8), 0.5, key=thinned.Key(3)).mean((0, 2, 3))
    tensor([0., 0., 2., 2.])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(dropout2d, locals())
    T, scale = threshold_and_scale(p)
    active = drops("dropout2d", input, p, training, key)
    dims = input.dim()
    if dims not in (3, 4):
        _warn(_deprecated(2, dims))
    if dims == 3:
        _warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior "
            "is desired - input is interpreted as shape (N, C, L), where C is the channel dim. This behavior "
            "will change in a future release to interpret the input as one without a batch dimension, i.e. "
            "shape (C, H, W). To maintain the 1D channel-wise dropout behavior, please switch to using "
            "dropout1d instead."
        )
    if not active:
        return input
    return apply(input, key, channel_dims(input, p), inplace, T, scale)


class Dropout2d(TorchLayer, torch.nn.Dropout2d):
    """Drop whole channels: :class:`torch.nn.Dropout2d` with a key.

    Use this layer after :class:`torch.nn.Conv2d`, where neighbouring pixels are so alike that a
    :class:`Dropout` of single ones only lowers the effective learning rate. To drop a part of a channel use
    :class:`DropBlock2d`.

    :func:`thinned.functional.dropout2d` has the formula.

    Source: Tompson et al. 2015, as the function.

    >>> import torch, thinned
    >>> thinned.Dropout2d(0.5)(torch.ones(1, 4, 1, 2), key=thinned.Key(3))[0, :, 0, 0]
    tensor([0., 0., 2., 2.])
    """

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return dropout2d(input, self.p, self.training, self.inplace, key=key)


def dropout3d(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, *, key: Key | None = None
) -> Tensor:
    r"""Zero whole channels of a 3D feature map with probability ``p``: one decision for each ``(n, c)``.

    .. math:: y_{ncdhw} = \begin{cases} x_{ncdhw} / q & u(nC + c) < T \\ +0 & \text{otherwise} \end{cases}

    ``input`` has shape ``(N, C, D, H, W)``, or ``(C, D, H, W)``, which has the mask of a batch of one. As in
    PyTorch, other numbers of dimensions are deprecated and taken as ``(C, *)``. The other arguments, the
    result and the errors are those of :func:`dropout1d`, except that only a 0-d tensor is refused, and that
    only where something is dropped.

    Warns:
        UserWarning: ``input`` has another number of dimensions than 4 or 5.

    Source: Tompson et al. 2015, as :func:`dropout1d`; the signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.dropout3d(torch.ones(1, 4, 2, 8, 8), 0.5, key=thinned.Key(3)).mean((0, 2, 3, 4))
    tensor([0., 0., 2., 2.])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(dropout3d, locals())
    T, scale = threshold_and_scale(p)
    active = drops("dropout3d", input, p, training, key)
    dims = input.dim()
    if dims not in (4, 5):
        _warn(_deprecated(3, dims))
    if not active:
        return input
    return apply(input, key, channel_dims(input, p, batched=dims == 5), inplace, T, scale)


class Dropout3d(TorchLayer, torch.nn.Dropout3d):
    """Drop whole channels: :class:`torch.nn.Dropout3d` with a key.

    Use this layer after :class:`torch.nn.Conv3d`, where neighbouring voxels are so alike that a
    :class:`Dropout` of single ones only lowers the effective learning rate. To drop a part of a channel use
    :class:`DropBlock3d`.

    :func:`thinned.functional.dropout3d` has the formula.

    Source: Tompson et al. 2015, as the function.

    >>> import torch, thinned
    >>> thinned.Dropout3d(0.5)(torch.ones(1, 4, 1, 1, 2), key=thinned.Key(3))[0, :, 0, 0, 0]
    tensor([0., 0., 2., 2.])
    """

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return dropout3d(input, self.p, self.training, self.inplace, key=key)


# Dynamo cannot trace a warning; a constant function runs once, while the call is compiled.
@constant_when_compiled
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def _deprecated(spatial: int, dims: int) -> str:
    """The text of PyTorch's warning."""
    name = f"dropout{spatial}d"
    return (
        f"{name}: Received a {dims}-D input to {name}, which is deprecated and will result in an error in a "
        "future release. To retain the behavior and silence this warning, please use dropout instead. Note "
        f"that {name} exists to provide channel-wise dropout on inputs with {spatial} spatial dimensions, a "
        f"channel dimension, and an optional batch dimension (i.e. {spatial + 1}D or {spatial + 2}D inputs)."
    )


def channel_dims(input: Tensor, p: float, *, batched: bool = True) -> range:
    """The dimensions along which a channel's elements lie: those after ``(N, C)``, or ``(C,)`` without batch.

    RuntimeError for an ``input`` without channels, except at ``p = 1`` as in PyTorch.
    """
    leading = 2 if batched else 1
    if input.is_nested and not batched:
        refuse("dropout of (C, *)", input, "one of shape (N, C, *), which is a batch of samples")
    if input.dim() < leading and p != 1:
        raise RuntimeError(
            "Feature dropout requires at least 2 dimensions in the input, "
            f"got a tensor of shape {shape_of(input)}"
        )
    return range(leading, input.dim())
