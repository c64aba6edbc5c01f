"""Dropout of sequences under one mask for all time steps."""

from __future__ import annotations

from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary

from thinned.keys import Key
from thinned.layers._arguments import apply, check_key, drops, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.nested import refuse, shape_of
from thinned.torch_state import compiling

__all__ = ["LockedDropout", "locked_dropout"]


def locked_dropout(
    input: Tensor,
    p: float = 0.5,
    *,
    training: bool = True,
    batch_first: bool = False,
    inplace: bool = False,
    key: Key | None = None,
) -> Tensor:
    r"""Zero features of a sequence with probability ``p``, the same ones at every time step.

    .. math:: y_{t,n,c} = \begin{cases} x_{t,n,c} / q & u(n, c) < T \\ +0 & \text{otherwise} \end{cases}

    Also known as variational dropout of recurrent networks.

    Args:
        input: a floating-point or complex tensor of shape ``(time, N, *)``, or ``(time, C)`` without a batch.
        p: the probability of dropping a feature of a sample, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        batch_first: ``input`` has shape ``(N, time, *)``; under one key both layouts have the same mask.
        inplace: write the result over ``input``.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys has one for each sample, in either
            layout.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; ``input`` itself if ``inplace``.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``input`` has fewer than two
            dimensions.

    Source: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
    NeurIPS 2016, section 4; Merity et al., "Regularizing and optimizing LSTM language models", ICLR 2018,
    section 4.2.

    >>> import torch, thinned
    >>> thinned.functional.locked_dropout(torch.ones(2, 6), p=0.5, key=thinned.Key(7))
    tensor([[0., 0., 0., 2., 2., 2.],
            [0., 0., 0., 2., 2., 2.]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(locked_dropout, locals())
    T, scale = threshold_and_scale(p)
    if not drops("locked_dropout", input, p, training, None):
        return input
    if input.is_nested and not (batch_first and input.dim() > 2):
        accepted = "one of shape (N, time, *) with batch_first=True"
        refuse(f"locked_dropout with batch_first={batch_first}", input, accepted)
    if input.dim() < 2:
        raise RuntimeError(
            f"locked_dropout needs a time and a feature dimension, got a tensor of shape {tuple(input.shape)}"
        )
    unbatched = input.dim() == 2
    # A batch of keys has one key for each index of dimension 0, so the samples go there.
    samples = input.unsqueeze(0) if unbatched else input if batch_first else input.transpose(0, 1)
    if key is not None:
        check_key(key, shape_of(samples))
    y = apply(samples, key, (1,), inplace, T, scale)
    if inplace:
        return input
    return y.squeeze(0) if unbatched else y if batch_first else y.transpose(0, 1)


class LockedDropout(Layer):
    """:func:`thinned.functional.locked_dropout` as a module.

    Shape:
        ``(time, N, *)``, ``(N, time, *)`` with ``batch_first``, or ``(time, C)``; the output has the input's
        shape.

    Source: Gal & Ghahramani, NeurIPS 2016, section 4; the name is that of AWD-LSTM's code, Merity et al.,
    ICLR 2018.

    >>> import torch, thinned
    >>> thinned.LockedDropout(0.5, batch_first=True)(torch.ones(1, 2, 6), key=thinned.Key(7))
    tensor([[[0., 0., 0., 2., 2., 2.],
             [0., 0., 0., 2., 2., 2.]]])
    """

    def __init__(self, p: float = 0.5, *, batch_first: bool = False, inplace: bool = False) -> None:
        super().__init__(p)
        self.batch_first = batch_first
        self.inplace = inplace

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return locked_dropout(
            input, self.p, training=self.training, batch_first=self.batch_first, inplace=self.inplace, key=key
        )
