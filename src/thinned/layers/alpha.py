"""Alpha dropout: dropped elements become SELU's saturation value; mean and variance are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary

from thinned.keys import Key
from thinned.layers._arguments import apply, drops, threshold_and_scale
from thinned.layers._module import SharingLayer, TorchLayer
from thinned.layers._overrides import module_node, overridden
from thinned.layers.channels import channel_dims
from thinned.torch_state import compiling

__all__ = ["SATURATION", "AlphaDropout", "FeatureAlphaDropout", "alpha_dropout", "feature_alpha_dropout"]

SATURATION = 1.7580993408473766  # SELU's scale times its alpha; SELU tends to -SATURATION


def alpha_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = False,
    inplace: bool = False,
    *,
    key: Key | None = None,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Set each element to SELU's saturation value with probability ``p``, and keep mean 0 and variance 1.

    .. math:: y_i = a \cdot \begin{cases} x_i & u(i) < T \\ -\alpha' & \text{otherwise} \end{cases}
        \; + \; a \alpha' \hat p
        \qquad a = \frac{1}{\sqrt{q\,(1 + \alpha'^2 \hat p)}}, \quad \alpha' = 1.7580993408473766

    ``T = round((1-p) 2**32)`` and ``q = T / 2**32`` as in :func:`~thinned.functional.dropout`. The constants
    are computed in double precision from :math:`\hat p = 1 - q`, which is ``p`` to 32 bits.

    Args:
        input: a float16, bfloat16, float32 or float64 tensor of any shape and strides.
        p: the probability of dropping an element, in [0, 1]; ``p = 1`` gives zeros.
        training: False, the default as in PyTorch, returns ``input`` itself, and so does ``p = 0``.
        inplace: write the result over ``input``.
        key: as for :func:`~thinned.functional.dropout`.
        broadcast_dims: dimensions along which all elements share one decision.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is :math:`-a \alpha' q` whatever it was, NaN and infinity included; its gradient is ``+0``.

    Raises:
        ValueError, TypeError, RuntimeError, IndexError: as :func:`~thinned.functional.dropout`.
        NotImplementedError: ``input`` is complex.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, section 3, "new dropout
    technique"; the signature is PyTorch's.

    >>> import torch, thinned
    >>> thinned.functional.alpha_dropout(torch.zeros(6), 0.5, training=True, key=thinned.Key(7))
    tensor([-0.7792, -0.7792, -0.7792,  0.7792,  0.7792,  0.7792])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(alpha_dropout, locals())
    return _alpha_dropout("alpha_dropout", input, p, training, inplace, key, broadcast_dims)


class AlphaDropout(SharingLayer, torch.nn.AlphaDropout):
    """Drop elements of a SELU network: :class:`torch.nn.AlphaDropout` with a key.

    Use this layer after :class:`torch.nn.SELU`, whose mean of 0 and variance of 1 it keeps. The paper's p is
    0.05 or 0.1. After another activation use :class:`Dropout`, which keeps the mean and raises the variance.

    :func:`thinned.functional.alpha_dropout` has the formula.

    Args:
        inplace: write the result over the input; PyTorch's module takes this argument and ignores it.
        broadcast_dims: as for the function, and as in Flax; a size of 1 in Keras's ``noise_shape``.

    Source: Klambauer et al. 2017, as the function.

    >>> import torch, thinned
    >>> thinned.AlphaDropout(0.5)(torch.zeros(6), key=thinned.Key(7))
    tensor([-0.7792, -0.7792, -0.7792,  0.7792,  0.7792,  0.7792])
    """

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return alpha_dropout(
            input, self.p, self.training, self.inplace, key=key, broadcast_dims=self.broadcast_dims
        )


def feature_alpha_dropout(
    input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False, *, key: Key | None = None
) -> Tensor:
    r""":func:`alpha_dropout` of whole channels, with one decision for each ``(n, c)``.

    .. math:: y_{nc*} = a \cdot \begin{cases} x_{nc*} & u(nC + c) < T \\ -\alpha' & \text{otherwise}
        \end{cases} \; + \; a \alpha' \hat p

    ``input`` has shape ``(N, C, *)``: the first two dimensions are always ``N`` and ``C``, as in PyTorch,
    although its documentation also names ``(C, D, H, W)``. The other arguments, the result and the errors are
    those of :func:`alpha_dropout`; fewer than 2 dimensions are a RuntimeError where something is dropped.

    Source: Klambauer et al. 2017, as :func:`alpha_dropout`; for channels, Tompson et al., "Efficient object
    localization using convolutional networks", CVPR 2015, section 3.2; the signature is PyTorch's.

    >>> import torch, thinned
    >>> y = thinned.functional.feature_alpha_dropout(torch.zeros(1, 4, 9), training=True, key=thinned.Key(3))
    >>> y.mean(2)
    tensor([[-0.7792, -0.7792,  0.7792,  0.7792]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(feature_alpha_dropout, locals())
    return _alpha_dropout("feature_alpha_dropout", input, p, training, inplace, key, None)


class FeatureAlphaDropout(TorchLayer, torch.nn.FeatureAlphaDropout):
    """Drop whole channels of a SELU network: :class:`torch.nn.FeatureAlphaDropout` with a key.

    Use this layer where :class:`torch.nn.SELU` follows a convolution, because neighbouring pixels are too
    alike for :class:`AlphaDropout` to regularize there. After another activation use :class:`Dropout2d`.

    :func:`thinned.functional.feature_alpha_dropout` has the formula.

    Source: Klambauer et al. 2017 and Tompson et al. 2015, as the function.

    >>> import torch, thinned
    >>> thinned.FeatureAlphaDropout(0.5)(torch.zeros(1, 4, 2), key=thinned.Key(3))[0, :, 0]
    tensor([-0.7792, -0.7792,  0.7792,  0.7792])
    """

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return feature_alpha_dropout(input, self.p, self.training, self.inplace, key=key)


def _alpha_dropout(
    name: str,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    key: Key | None,
    broadcast_dims: Sequence[int] | None,
) -> Tensor:
    """A channel's elements share one decision, unless ``broadcast_dims`` says otherwise."""
    T, _ = threshold_and_scale(p)
    if not drops(name, input, p, training, key):
        return input
    elementwise = broadcast_dims is not None
    if broadcast_dims is None:
        broadcast_dims = channel_dims(input, p)
    if not T:  # a is infinite, and y tends to 0
        return apply(input, key, broadcast_dims, inplace, T, 0.0, elementwise=elementwise)
    if input.is_complex():
        raise NotImplementedError(
            f"{name} is not implemented for complex tensors, got {input.dtype} of shape {tuple(input.shape)}"
        )
    q = T / 2**32
    a = 1 / math.sqrt(q * (1 + SATURATION**2 * (1 - q)))
    shift, fill = a * SATURATION * (1 - q), -a * SATURATION * q
    return apply(input, key, broadcast_dims, inplace, T, a, shift, fill, elementwise=elementwise)
