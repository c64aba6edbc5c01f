"""Dropout of elements, with one decision for each or shared along dimensions; and its mask."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function, has_torch_function_unary

from thinned import op
from thinned.checks import check_integer, integers
from thinned.geometry import shared
from thinned.keys import Key, StratifiedKey
from thinned.layers._arguments import apply, check_key, drops, kept, threshold_and_scale
from thinned.layers._module import SharingLayer
from thinned.layers._overrides import module_node, overridden
from thinned.torch_state import compiling

__all__ = ["Dropout", "dropout", "keep_mask"]


def dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Inverted dropout: zero each element with probability ``p``, scale the others so that the mean stays.

    .. math:: y_i = \begin{cases} x_i / q & u(i) < T \\ +0 & \text{otherwise} \end{cases}
        \qquad T = \operatorname{round}((1-p)\,2^{32}), \quad q = T / 2^{32}

    ``u(i)`` is a 32-bit number that depends on the key and on the position ``i`` alone, so nothing is saved
    for the backward pass and every device, process and recomputation draws the same mask.

    Args:
        input: a float16, bfloat16, float32, float64, complex64 or complex128 tensor of any shape and strides,
            or a nested one: under one key its components follow each other in the mask.
        p: the probability of dropping an element, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        inplace: write the result over ``input``.
        key: what the mask is a function of: one :class:`~thinned.Key`, or a batch of ``len(input)`` keys, one
            for each row, whose masks then do not depend on the row's place; or a tensor as in
            :meth:`Key.from_torch <thinned.Key.from_torch>`. Without one, a key is drawn from torch's default
            generator of ``input``'s device.
        broadcast_dims: dimensions along which all elements share one decision.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``. A dropped
        element is ``+0``, NaN and infinity included, and so is its gradient.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError: ``input`` is no tensor, ``key`` no :class:`~thinned.Key`, or ``p`` no number, such as a
            string or a tensor that requires grad.
        RuntimeError: the keys' shape or device does not fit; or where something is dropped, ``input`` is of
            another dtype or cannot be written in place.
        IndexError: ``input`` has no such dimension.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15
    (2014), section 4 and, for the scaling during training, section 10.

    >>> import thinned
    >>> thinned.functional.dropout(torch.ones(2, 6), p=0.5, key=thinned.Key(7))
    tensor([[0., 0., 0., 2., 2., 2.],
            [0., 0., 0., 2., 0., 0.]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(dropout, locals())
    T, scale = threshold_and_scale(p)
    if not drops("dropout", input, p, training, key):
        return input
    return apply(input, key, broadcast_dims, inplace, T, scale, elementwise=True)


class Dropout(SharingLayer, torch.nn.Dropout):
    """Drop single elements: everything :class:`torch.nn.Dropout` is, and a key.

    Use this layer between fully connected layers, with a p of 0.5 for hidden units and 0.2 for inputs, or
    after each sublayer of a transformer, with a p of 0.1. After convolutions use :class:`Dropout2d` or
    :class:`DropBlock2d`, in recurrent networks :class:`LockedDropout`. A batch normalization that follows has
    a wrong variance in evaluation.

    :func:`thinned.functional.dropout` has the formula.

    Source: Srivastava et al. 2014, as the function; for transformers, Vaswani et al. 2017, section 5.4; for
    batch normalization, Li et al., "Understanding the disharmony between dropout and batch normalization by
    variance shift", CVPR 2019; ``broadcast_dims`` as in Flax.

    >>> import thinned
    >>> thinned.Dropout(0.5)(torch.ones(6), key=thinned.Key(7))
    tensor([0., 0., 0., 2., 2., 2.])
    >>> thinned.Dropout(0.5, broadcast_dims=(0,))(torch.ones(2, 6), key=thinned.Key(7))
    tensor([[0., 0., 0., 2., 2., 2.],
            [0., 0., 0., 2., 2., 2.]])
    """

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return dropout(
            input, self.p, self.training, self.inplace, key=key, broadcast_dims=self.broadcast_dims
        )


def keep_mask(
    key: Key,
    shape: Sequence[int],
    p: float,
    *,
    device: torch.device | str | None = None,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    """The mask that :func:`dropout` applies to a tensor of ``shape`` under ``key``: True where it keeps.

    ``key`` may be a batch of ``shape[0]`` keys. The mask is a bool tensor, made on ``device``, by default the
    key's. The other arguments and the errors are those of :func:`dropout`.

    >>> import thinned
    >>> thinned.keep_mask(thinned.Key(7), (2, 6), p=0.5).int()
    tensor([[0, 0, 0, 1, 1, 1],
            [0, 0, 0, 1, 0, 0]], dtype=torch.int32)
    """
    if not isinstance(shape, Proxy):
        shape = integers("shape", shape)
    if not compiling() and (isinstance(shape, Proxy) or has_torch_function((key, *shape))):
        return overridden(keep_mask, locals())
    if not compiling():  # the operation's own error is about its schema
        for size in shape:
            check_integer("a size of shape", size)
    T, _ = threshold_and_scale(p)
    key = check_key(key, shape)
    key = key if device is None else key.to(device)
    dims = integers("broadcast_dims", broadcast_dims)
    if isinstance(key, StratifiedKey):
        return kept(key, shape, dims, T).expand(tuple(shape)).contiguous()
    return op.keep_mask(key.bits, shape, shared(shape, dims, key.bits.dim()), T)
