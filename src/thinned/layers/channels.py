"""Dropout of whole channels: one decision for each feature map of each sample."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from thinned.keys import Key
from thinned.layers._arguments import apply, check_input, check_key, threshold_and_scale
from thinned.nested import refuse, shape_of
from thinned.torch_state import constant_when_compiled

__all__ = [
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "changes",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "within_channels",
]


def dropout1d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
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
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is ``+0``, NaN and infinity included, and so is its gradient.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        RuntimeError: ``input`` has another number of dimensions, in evaluation too, or is of another dtype,
            or cannot be written in place; the keys' shape or device does not fit.
        TypeError: ``input`` is no tensor, or ``key`` no :class:`~thinned.Key`.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2; the signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.dropout1d(torch.ones(4, 3), 0.5, key=thinned.Key(3))
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [2., 2., 2.],
            [2., 2., 2.]])
    """
    T, scale = threshold_and_scale(p)
    busy = changes("dropout1d", input, p, training, key)
    if input.dim() not in (2, 3):
        raise RuntimeError(
            f"dropout1d: Expected 2D or 3D input, but received a {input.dim()}D input. Note that dropout1d "
            "exists to provide channel-wise dropout on inputs with 1 spatial dimension, a channel dimension, "
            f"and an optional batch dimension (i.e. 2D or 3D inputs). Its shape is {shape_of(input)}."
        )
    if not busy:
        return input
    return apply(input, key, within_channels(input, p, batched=input.dim() == 3), inplace, T, scale)


def dropout2d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Zero whole channels of a 2D feature map with probability ``p``: one decision for each ``(n, c)``.

    .. math:: y_{nchw} = \begin{cases} x_{nchw} / q & u(nC + c) < T \\ +0 & \text{otherwise} \end{cases}
        \qquad T = \operatorname{round}((1-p)\,2^{32}), \quad q = T / 2^{32}

    Args:
        input: a floating-point or complex tensor of shape ``(N, C, H, W)``. As in PyTorch, three dimensions
            count as ``(N, C, L)``, with a warning, and not as a sample without a batch; other numbers of
            dimensions are deprecated, and count as ``(N, C, *)``.
        p: the probability of dropping a channel, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        inplace: write the result over ``input``.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys has one for each row of dimension 0.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is ``+0``, NaN and infinity included, and so is its gradient.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        RuntimeError: ``input`` has fewer than 2 dimensions while something is dropped, or is of another
            dtype, or cannot be written in place; the keys' shape or device does not fit.
        TypeError: ``input`` is no tensor, or ``key`` no :class:`~thinned.Key`.

    Warns:
        UserWarning: ``input`` has another number of dimensions than 4.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2; the signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.dropout2d(torch.ones(1, 4, 1, 3), 0.5, key=thinned.Key(3))[0, :, 0]
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [2., 2., 2.],
            [2., 2., 2.]])
    """
    T, scale = threshold_and_scale(p)
    busy = changes("dropout2d", input, p, training, key)
    dims = input.dim()
    if dims not in (3, 4):
        _warn(
            f"dropout2d: Received a {dims}-D input to dropout2d, which is deprecated and will result in an "
            "error in a future release. To retain the behavior and silence this warning, please use dropout "
            "instead. Note that dropout2d exists to provide channel-wise dropout on inputs with 2 spatial "
            "dimensions, a channel dimension, and an optional batch dimension (i.e. 3D or 4D inputs)."
        )
    if dims == 3:
        _warn(
            "dropout2d: Received a 3D input to dropout2d and assuming that channel-wise 1D dropout behavior "
            "is desired - input is interpreted as shape (N, C, L), where C is the channel dim. This behavior "
            "will change in a future release to interpret the input as one without a batch dimension, i.e. "
            "shape (C, H, W). To maintain the 1D channel-wise dropout behavior, please switch to using "
            "dropout1d instead."
        )
    if not busy:
        return input
    return apply(input, key, within_channels(input, p), inplace, T, scale)


def dropout3d(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Zero whole channels of a 3D feature map with probability ``p``: one decision for each ``(n, c)``.

    .. math:: y_{ncdhw} = \begin{cases} x_{ncdhw} / q & u(nC + c) < T \\ +0 & \text{otherwise} \end{cases}
        \qquad T = \operatorname{round}((1-p)\,2^{32}), \quad q = T / 2^{32}

    Args:
        input: a floating-point or complex tensor of shape ``(N, C, D, H, W)``, or ``(C, D, H, W)``, which has
            the mask of a batch of one. As in PyTorch, other numbers of dimensions are deprecated, and count
            as ``(C, *)``.
        p: the probability of dropping a channel, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        inplace: write the result over ``input``.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys has one for each row of dimension 0.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is ``+0``, NaN and infinity included, and so is its gradient.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        RuntimeError: ``input`` has no dimension while something is dropped, or is of another dtype, or
            cannot be written in place; the keys' shape or device does not fit.
        TypeError: ``input`` is no tensor, or ``key`` no :class:`~thinned.Key`.

    Warns:
        UserWarning: ``input`` has another number of dimensions than 4 or 5.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2; the signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.dropout3d(torch.ones(4, 1, 1, 3), 0.5, key=thinned.Key(3))[:, 0, 0]
    tensor([[0., 0., 0.],
            [0., 0., 0.],
            [2., 2., 2.],
            [2., 2., 2.]])
    """
    T, scale = threshold_and_scale(p)
    busy = changes("dropout3d", input, p, training, key)
    dims = input.dim()
    if dims not in (4, 5):
        _warn(
            f"dropout3d: Received a {dims}-D input to dropout3d, which is deprecated and will result in an "
            "error in a future release. To retain the behavior and silence this warning, please use dropout "
            "instead. Note that dropout3d exists to provide channel-wise dropout on inputs with 3 spatial "
            "dimensions, a channel dimension, and an optional batch dimension (i.e. 4D or 5D inputs)."
        )
    if not busy:
        return input
    return apply(input, key, within_channels(input, p, batched=dims == 5), inplace, T, scale)


# Dynamo cannot trace a warning; so marked, it comes once, when the call is compiled.
@constant_when_compiled
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=3)


def changes(name: str, input: Tensor, p: float, training: bool, key: Key | None) -> bool:
    """Whether there is something to drop; if so, ``input`` has been checked for it.

    As in PyTorch, an ``input`` that comes back as it is may be of any dtype.
    """
    busy = training and p != 0
    if busy or not isinstance(input, Tensor):
        check_input(name, input, key)
    elif key is not None:
        check_key(key, shape_of(input) if input.is_nested else input.shape)
    return busy


def within_channels(input: Tensor, p: float, *, batched: bool = True) -> range:
    """The dimensions of ``(N, C, *)``, or ``(C, *)``, along which a channel's elements lie.

    As in PyTorch, it does not matter where channels are if ``p`` is 1.
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


class Dropout1d(torch.nn.Dropout1d):
    r""":func:`thinned.functional.dropout1d` as a module: :class:`torch.nn.Dropout1d` with a key.

    .. math:: y_{ncl} = x_{ncl} / q \text{ with probability } q = 1 - p
        \text{, one decision for each } (n, c) \text{, else } 0

    Args:
        p: the probability of dropping a channel, in [0, 1].
        inplace: write the result over the input.

    Shape:
        ``(N, C, L)`` or ``(C, L)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2.

    >>> import torch, thinned
    >>> thinned.Dropout1d(0.5)(torch.ones(4, 2), key=thinned.Key(3))
    tensor([[0., 0.],
            [0., 0.],
            [2., 2.],
            [2., 2.]])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        return dropout1d(input, self.p, self.training, self.inplace, key=key)


class Dropout2d(torch.nn.Dropout2d):
    r""":func:`thinned.functional.dropout2d` as a module: :class:`torch.nn.Dropout2d` with a key.

    .. math:: y_{nchw} = x_{nchw} / q \text{ with probability } q = 1 - p
        \text{, one decision for each } (n, c) \text{, else } 0

    Args:
        p: the probability of dropping a channel, in [0, 1].
        inplace: write the result over the input.

    Shape:
        ``(N, C, H, W)``, or, with a warning as in PyTorch, ``(N, C, L)``; the output has the input's shape,
        dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2.

    >>> import torch, thinned
    >>> thinned.Dropout2d(0.5)(torch.ones(1, 4, 1, 2), key=thinned.Key(3)).flatten(2)
    tensor([[[0., 0.],
             [0., 0.],
             [2., 2.],
             [2., 2.]]])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        return dropout2d(input, self.p, self.training, self.inplace, key=key)


class Dropout3d(torch.nn.Dropout3d):
    r""":func:`thinned.functional.dropout3d` as a module: :class:`torch.nn.Dropout3d` with a key.

    .. math:: y_{ncdhw} = x_{ncdhw} / q \text{ with probability } q = 1 - p
        \text{, one decision for each } (n, c) \text{, else } 0

    Args:
        p: the probability of dropping a channel, in [0, 1].
        inplace: write the result over the input.

    Shape:
        ``(N, C, D, H, W)`` or ``(C, D, H, W)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section
    3.2.

    >>> import torch, thinned
    >>> thinned.Dropout3d(0.5)(torch.ones(1, 4, 1, 1, 2), key=thinned.Key(3)).flatten(2)
    tensor([[[0., 0.],
             [0., 0.],
             [2., 2.],
             [2., 2.]]])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        return dropout3d(input, self.p, self.training, self.inplace, key=key)
