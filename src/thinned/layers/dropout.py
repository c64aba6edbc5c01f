"""Element-wise dropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from thinned import functional as F
from thinned.keys import Key

__all__ = ["Dropout"]


class Dropout(torch.nn.Dropout):
    """:func:`thinned.functional.dropout` as a module: everything :class:`torch.nn.Dropout` is, and a key.

    Args:
        p: the probability of dropping an element, in [0, 1].
        inplace: write the result over the input.

    Shape:
        any; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15
    (2014).

    >>> import thinned
    >>> layer = thinned.Dropout(p=0.5)
    >>> layer(torch.ones(6), key=thinned.Key(7))
    tensor([0., 0., 0., 2., 2., 2.])
    >>> layer.eval()(torch.ones(6))
    tensor([1., 1., 1., 1., 1., 1.])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        if math.isnan(p):
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return F.dropout(input, self.p, self.training, self.inplace, key=key)
