"""Recurrent networks with thinned's dropout between their layers, called with the arguments of torch.lstm."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from thinned import functional as F
from thinned.key_source import refuse_rows
from thinned.keys import Key
from thinned.layers._arguments import check_p, key_for

__all__ = ["Packed", "Padded", "run"]


# The arguments of torch.lstm, torch.gru, torch.rnn_tanh and torch.rnn_relu, and those for a packed sequence.
Padded = namedtuple("Padded", "input hx params has_biases num_layers dropout train bidirectional batch_first")
Packed = namedtuple("Packed", "data batch_sizes hx params has_biases num_layers dropout train bidirectional")


def run(
    kernel: Callable[..., Any],
    arguments: Padded | Packed,
    next_key: Callable[[], Key | None] = lambda: None,
) -> tuple[Tensor, ...]:
    r"""Call ``kernel`` once for each layer of the network, with dropout between the layers.

    .. math:: x^{(0)} = \text{input}, \qquad
        x^{(l)} = \operatorname{dropout}_l(\operatorname{layer}_l(x^{(l-1)})) \quad (l < L), \qquad
        y = \operatorname{layer}_L(x^{(L-1)})

    Each layer's mask has shape ``(N, T, D * H)`` in either layout: ``N`` samples of ``T`` steps, ``D``
    directions. For a packed sequence it has the data's shape, ``(steps of all samples, D * H)``. The data do
    not say which row belongs to which sample, so within :func:`thinned.address` that mask does not depend on
    ``samples``.

    Args:
        kernel: ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``.
        arguments: the arguments of ``kernel``.
        next_key: returns the key of each dropout in turn, or None to draw one.

    Returns:
        The result of ``kernel`` for all layers.

    Source: Zaremba et al., "Recurrent neural network regularization", 2014, section 3.2; the signature is
    PyTorch's.

    >>> import thinned
    >>> from thinned.models.intercept import intercept
    >>> gru = torch.nn.GRU(3, 4, num_layers=2, dropout=0.5)
    >>> with intercept(key=thinned.Key(7)):
    ...     y, h = gru(torch.randn(5, 2, 3))
    >>> y.shape, h.shape
    (torch.Size([5, 2, 4]), torch.Size([2, 2, 4]))
    """
    x, hx, params, p = arguments[0], arguments.hx, arguments.params, arguments.dropout
    check_p(p)
    batch_sizes = (arguments.batch_sizes,) if isinstance(arguments, Packed) else ()
    batch_first = (arguments.batch_first,) if isinstance(arguments, Padded) else ()
    options = arguments.has_biases, 1, 0.0, arguments.train, arguments.bidirectional, *batch_first

    def drop(x: Tensor) -> Tensor:
        transposed = batch_first == (False,)
        x = x.transpose(0, 1) if transposed else x
        key = next_key()
        if batch_sizes and key is None:
            refuse_rows("dropout of a packed sequence")
        y = F.dropout(x, p, key=key_for(x, key, sample_dim=None if batch_sizes else 0))
        return y.transpose(0, 1) if transposed else y

    directions, params_each = 1 + arguments.bidirectional, len(params) // arguments.num_layers
    states: list[list[Tensor]] = []
    may_warn = x.is_cuda and not torch.compiler.is_compiling()
    with warnings.catch_warnings() if may_warn else nullcontext():
        if may_warn:
            # cuDNN's chunk holds the weights of all layers, so one layer's are no whole chunk.
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        for i in range(arguments.num_layers):
            x = drop(x) if i else x
            own = slice(i * directions, (i + 1) * directions)
            state = hx[own] if isinstance(hx, Tensor) else [h[own] for h in hx]
            weights = params[i * params_each : (i + 1) * params_each]
            x, *last = kernel(x, *batch_sizes, state, weights, *options)
            states.append(last)
    return x, *(torch.cat(each_layers) for each_layers in zip(*states, strict=True))
