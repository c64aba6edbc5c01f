"""Dropout of sequences under one mask for all time steps."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.overrides import has_torch_function_unary

from thinned.keys import Key
from thinned.layers._arguments import apply, check_key, drops, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.nested import refuse, shape_of
from thinned.torch_state import compiling

__all__ = ["LockedDropout", "locked_dropout", "pack_as", "pad"]

_Sequence = TypeVar("_Sequence", Tensor, PackedSequence)


def locked_dropout(
    input: _Sequence,
    p: float = 0.5,
    *,
    training: bool = True,
    batch_first: bool = False,
    inplace: bool = False,
    key: Key | None = None,
) -> _Sequence:
    r"""Zero features of a sequence with probability ``p``, the same ones at every time step.

    .. math:: y_{t,n,c} = \begin{cases} x_{t,n,c} / q & u(n, c) < T \\ +0 & \text{otherwise} \end{cases}

    Also known as variational dropout of recurrent networks.

    Args:
        input: a floating-point or complex tensor of shape ``(time, N, *)``, or ``(time, C)`` without a batch;
            or a :class:`~torch.nn.utils.rnn.PackedSequence`, whose mask is that of the padded sequences.
        p: the probability of dropping a feature of a sample, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        batch_first: ``input`` has shape ``(N, time, *)``; under one key both layouts have the same mask. A
            packed sequence has neither layout.
        inplace: write the result over ``input``.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys has one for each sample, in either
            layout. Samples of a packed sequence count in the order they had before they were sorted.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format, or a packed sequence with ``input``'s
        ``batch_sizes`` and indices; ``input`` itself if ``inplace``.

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
        return overridden(locked_dropout, locals())  # type: ignore[no-any-return]
    T, scale = threshold_and_scale(p)
    if isinstance(input, PackedSequence):
        return _of_packed(input, p, training, inplace, key)
    if not drops("locked_dropout", input, p, training, None):
        return input
    if input.is_nested and not (batch_first and input.dim() > 2):
        accepted = "one of shape (N, time, *) with batch_first=True"
        refuse(f"locked_dropout with batch_first={batch_first}", input, accepted)
    if input.dim() < 2:
        raise RuntimeError(
            f"locked_dropout needs a time and a feature dimension, got an input of shape {tuple(input.shape)}"
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


def _of_packed(
    input: PackedSequence, p: float, training: bool, inplace: bool, key: Key | None
) -> PackedSequence:
    if not drops("locked_dropout", input.data, p, training, None):
        return input
    if input.data.dim() < 2:
        raise RuntimeError(
            "locked_dropout needs a feature dimension, got a packed sequence with data of shape "
            f"{tuple(input.data.shape)}"
        )
    if key is not None:
        check_key(key, (int(input.batch_sizes[0]),))
    y = pack_as(input, locked_dropout(pad(input), p, batch_first=True, key=key))
    if not inplace:
        return y
    input.data.copy_(y.data)
    return input


def pad(packed: PackedSequence) -> Tensor:
    """The sequences, padded with zeros to shape ``(N, time, *)``, in the order before they were sorted."""
    return pad_packed_sequence(packed, batch_first=True)[0]


def pack_as(packed: PackedSequence, padded: Tensor) -> PackedSequence:
    """The reverse of :func:`pad`, with the ``batch_sizes`` and indices of ``packed``."""
    order = packed.sorted_indices
    # pack_padded_sequence sorts in an order of its own where lengths are equal.
    data = padded if order is None else padded.index_select(0, order)
    steps = torch.arange(int(packed.batch_sizes[0]))
    lengths = (packed.batch_sizes > steps[:, None]).sum(1)
    data = pack_padded_sequence(data, lengths, batch_first=True).data
    return PackedSequence(data, packed.batch_sizes, order, packed.unsorted_indices)


class LockedDropout(Layer):
    """Drop features of a sequence, the same at all time steps.

    Use this layer before, between and after recurrent layers, where the noise of a new mask at each step adds
    up. AWD-LSTM's p is 0.4 before and after its layers and 0.3 between. :class:`VariationalLSTM` has it
    inside. In transformers use :class:`Dropout`.

    :func:`thinned.functional.locked_dropout` has the formula.

    Shape:
        ``(time, N, *)``, ``(N, time, *)`` with ``batch_first``, ``(time, C)`` or a packed sequence; the
        output has the input's shape.

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

    def forward(self, input: _Sequence, *, key: Key | None = None) -> _Sequence:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return locked_dropout(
            input, self.p, training=self.training, batch_first=self.batch_first, inplace=self.inplace, key=key
        )
