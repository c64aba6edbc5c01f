"""Alpha dropout, which sets to the value at which SELU saturates and keeps mean and variance."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinned.keys import Key
from thinned.layers._arguments import apply, threshold_and_scale
from thinned.layers.channels import changes, within_channels

__all__ = ["SATURATION", "AlphaDropout", "FeatureAlphaDropout", "alpha_dropout", "feature_alpha_dropout"]

SATURATION = 1.7580993408473766  # SELU's scale times its alpha: SELU goes to its negative


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Set each element to SELU's saturation value with probability ``p``, and keep mean 0 and variance 1.

    .. math:: y_i = a \cdot \begin{cases} x_i & u(i) < T \\ -\alpha' & \text{otherwise} \end{cases}
        \; + \; a \alpha' \hat p
        \qquad a = \frac{1}{\sqrt{q\,(1 + \alpha'^2 \hat p)}}, \quad \alpha' = 1.7580993408473766

    ``T = round((1-p) 2**32)`` and ``q = T / 2**32`` as in :func:`~thinned.functional.dropout`, and
    :math:`\hat p = 1 - q`: the constants are those of the probability with which elements are dropped, which
    is ``p`` to 32 bits. They are computed in double precision.

    Args:
        input: a float16, bfloat16, float32 or float64 tensor of any shape and strides.
        p: the probability of dropping an element, in [0, 1]; ``p = 1`` gives zeros.
        training: False, the default as in PyTorch, returns ``input`` itself, and so does ``p = 0``.
        inplace: write the result over ``input``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is :math:`-a \alpha' q` whatever it was, NaN and infinity included; its gradient is ``+0``.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError: ``input`` is no tensor, or ``key`` no :class:`~thinned.Key`.
        RuntimeError: ``input`` is of another dtype (NotImplementedError for complex ones), the keys' shape or
            device does not fit, or ``input`` cannot be written in place.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, section 3, "new dropout
    technique"; the signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.alpha_dropout(torch.zeros(6), 0.5, training=True, key=thinned.Key(7))
    tensor([-0.7792, -0.7792, -0.7792,  0.7792,  0.7792,  0.7792])
    """
    T, _ = threshold_and_scale(p)
    if not changes("alpha_dropout", input, p, training, key):
        return input
    return _apply("alpha_dropout", input, key, (), inplace, T)


def feature_alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Set whole channels to SELU's saturation value with probability ``p``: a decision for each ``(n, c)``.

    .. math:: y_{nc*} = a \cdot \begin{cases} x_{nc*} & u(nC + c) < T \\ -\alpha' & \text{otherwise}
        \end{cases} \; + \; a \alpha' \hat p

    with the constants of :func:`~thinned.functional.alpha_dropout`.

    Args:
        input: a float16, bfloat16, float32 or float64 tensor of shape ``(N, C, *)``. As in PyTorch, whose
            documentation also names ``(C, D, H, W)``, the first two dimensions always are ``N`` and ``C``.
        p: the probability of dropping a channel, in [0, 1]; ``p = 1`` gives zeros.
        training: False, the default as in PyTorch, returns ``input`` itself, and so does ``p = 0``.
        inplace: write the result over ``input``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is :math:`-a \alpha' q` whatever it was, NaN and infinity included; its gradient is ``+0``.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError: ``input`` is no tensor, or ``key`` no :class:`~thinned.Key`.
        RuntimeError: ``input`` has fewer than 2 dimensions while something is dropped, or is of another dtype
            (NotImplementedError for complex ones), the keys' shape or device does not fit, or ``input``
            cannot be written in place.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, section 3; for channels,
    Tompson et al., "Efficient object localization using convolutional networks", CVPR 2015, section 3.2; the
    signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.feature_alpha_dropout(torch.zeros(1, 4, 2), 0.5, training=True, key=thinned.Key(3))
    tensor([[[-0.7792, -0.7792],
             [-0.7792, -0.7792],
             [ 0.7792,  0.7792],
             [ 0.7792,  0.7792]]])
    """
    T, _ = threshold_and_scale(p)
    if not changes("feature_alpha_dropout", input, p, training, key):
        return input
    return _apply("feature_alpha_dropout", input, key, within_channels(input, p), inplace, T)


def _apply(
    name: str,
    input: Tensor,
    key: Key | None,
    broadcast_dims: Sequence[int],
    inplace: bool,
    T: int,
) -> Tensor:
    elementwise = name == "alpha_dropout"
    if not T:
        return apply(input, key, broadcast_dims, inplace, T, 0.0, elementwise=elementwise)
    if input.is_complex():
        raise NotImplementedError(
            f"{name} is not implemented for complex tensors, got {input.dtype} of shape {tuple(input.shape)}"
        )
    q = T / 2**32
    a = 1 / math.sqrt(q * (1 + SATURATION**2 * (1 - q)))
    shift, fill = a * SATURATION * (1 - q), -a * SATURATION * q
    return apply(input, key, broadcast_dims, inplace, T, a, shift, fill, elementwise=elementwise)


class AlphaDropout(torch.nn.AlphaDropout):
    r""":func:`thinned.functional.alpha_dropout` as a module: :class:`torch.nn.AlphaDropout` with a key.

    .. math:: y_i = a \cdot (x_i \text{ with probability } q = 1 - p \text{, else } -\alpha') + a \alpha' p
        \qquad a = \frac{1}{\sqrt{q\,(1 + \alpha'^2 p)}}, \quad \alpha' = 1.7580993408473766

    Args:
        p: the probability of dropping an element, in [0, 1].
        inplace: write the result over the input; PyTorch's module takes this argument and ignores it.

    Shape:
        any; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, section 3.

    >>> import torch, thinned
    >>> thinned.AlphaDropout(0.5)(torch.zeros(6), key=thinned.Key(7))
    tensor([-0.7792, -0.7792, -0.7792,  0.7792,  0.7792,  0.7792])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        return alpha_dropout(input, self.p, self.training, self.inplace, key=key)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    r""":func:`thinned.functional.feature_alpha_dropout` as a module: torch.nn's with a key.

    .. math:: y_{nc*} = a \cdot (x_{nc*} \text{ with probability } q = 1 - p \text{, else } -\alpha')
        + a \alpha' p

    with the constants of :class:`AlphaDropout`, and one decision for each ``(n, c)``.

    Args:
        p: the probability of dropping a channel, in [0, 1].
        inplace: write the result over the input; PyTorch's module takes this argument and ignores it.

    Shape:
        ``(N, C, *)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, section 3; Tompson et al.,
    "Efficient object localization using convolutional networks", CVPR 2015, section 3.2.

    >>> import torch, thinned
    >>> thinned.FeatureAlphaDropout(0.5)(torch.zeros(1, 4, 2), key=thinned.Key(3))
    tensor([[[-0.7792, -0.7792],
             [-0.7792, -0.7792],
             [ 0.7792,  0.7792],
             [ 0.7792,  0.7792]]])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        return feature_alpha_dropout(input, self.p, self.training, self.inplace, key=key)
