"""Recurrent networks whose layers are separated by thinned's dropout, with the arguments of torch.lstm."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thinned import functional as F
from thinned.keys import Key
from thinned.layers._arguments import key_for, threshold_and_scale

__all__ = ["run_packed", "run_padded"]


def run_padded(
    kernel: Callable[..., Any],
    input: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
    *,
    next_key: Callable[[], Key | None] = lambda: None,
) -> tuple[Tensor, ...]:
    r"""All layers of a recurrent network, each a call of ``kernel``, with dropout between them.

    .. math:: x^{(0)} = \text{input}, \qquad
        x^{(l)} = \operatorname{dropout}_l(\operatorname{layer}_l(x^{(l-1)})) \quad (l < L), \qquad
        y = \operatorname{layer}_L(x^{(L-1)})

    Each layer's mask is one of shape ``(N, T, D * H)``, whatever the layout: ``N`` samples of ``T`` steps,
    ``D`` directions.

    ``kernel`` is ``torch.lstm``, ``torch.gru``, ``torch.rnn_tanh`` or ``torch.rnn_relu``, and what follows
    are its arguments; ``next_key`` gives the key of each dropout in turn, or None to draw one.

    Returns:
        What ``kernel`` returns.

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

    def layer(x: Tensor, state: Any, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return kernel(x, state, weights, has_biases, 1, 0.0, train, bidirectional, batch_first)  # type: ignore[no-any-return]

    def drop(x: Tensor) -> Tensor:
        rows = x if batch_first else x.transpose(0, 1)
        y = F.dropout(rows, dropout, key=key_for(rows, next_key()))
        return y if batch_first else y.transpose(0, 1)

    return _layers(layer, drop, input, hx, params, num_layers, dropout, bidirectional)


def run_packed(
    kernel: Callable[..., Any],
    data: Tensor,
    batch_sizes: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    *,
    next_key: Callable[[], Key | None] = lambda: None,
) -> tuple[Tensor, ...]:
    """:func:`run_padded` of the data of a packed sequence.

    Each layer's mask is one of the data's shape ``(steps of all samples, D * H)``: which row is of which
    sample the data do not say, so that within :func:`thinned.address` a mask does not depend on ``samples``.
    """

    def layer(x: Tensor, state: Any, weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return kernel(x, batch_sizes, state, weights, has_biases, 1, 0.0, train, bidirectional)  # type: ignore[no-any-return]

    def drop(x: Tensor) -> Tensor:
        return F.dropout(x, dropout, key=key_for(x, next_key(), sample_dim=None))

    return _layers(layer, drop, data, hx, params, num_layers, dropout, bidirectional)


def _layers(
    layer: Callable[[Tensor, Any, Sequence[Tensor]], tuple[Tensor, ...]],
    drop: Callable[[Tensor], Tensor],
    x: Tensor,
    hx: Tensor | Sequence[Tensor],
    params: Sequence[Tensor],
    num_layers: int,
    dropout: float,
    bidirectional: bool,
) -> tuple[Tensor, ...]:
    threshold_and_scale(dropout)
    rows, each = 1 + bidirectional, len(params) // num_layers
    states: list[tuple[Tensor, ...]] = []
    for i in range(num_layers):
        if i:
            x = drop(x)
        own = slice(i * rows, (i + 1) * rows)
        state = hx[own] if isinstance(hx, Tensor) else [h[own] for h in hx]
        weights = params[i * each : (i + 1) * each]
        if x.is_cuda and not torch.compiler.is_compiling():
            with warnings.catch_warnings():
                # One layer's weights are no single chunk where all layers' are.
                warnings.filterwarnings(
                    "ignore", "RNN module weights are not part of single contiguous chunk"
                )
                x, *last = layer(x, state, weights)
        else:
            x, *last = layer(x, state, weights)
        states.append(tuple(last))
    return x, *(torch.cat(each_layers) for each_layers in zip(*states, strict=True))
