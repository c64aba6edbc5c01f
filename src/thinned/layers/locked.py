"""Dropout of sequences under one mask for all time steps."""

from __future__ import annotations

from torch import Tensor, nn

from thinned import functional as F
from thinned.functional.arguments import threshold_and_scale
from thinned.keys import Key

__all__ = ["LockedDropout"]


class LockedDropout(nn.Module):
    """:func:`thinned.functional.locked_dropout` as a module: one mask for all time steps.

    Args:
        p: the probability of dropping a feature of a sample, in [0, 1].
        batch_first: the samples are dimension 0 and time is dimension 1, and not the other way round.
        inplace: write the result over the input.

    Shape:
        ``(time, N, *)``, ``(N, time, *)`` with ``batch_first``, or ``(time, C)``; the output has the input's
        shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
    NeurIPS 2016, section 4; Merity et al., "Regularizing and optimizing LSTM language models", ICLR 2018,
    section 4.2, whose code gave the layer its name.

    >>> import torch, thinned
    >>> thinned.LockedDropout(0.5, batch_first=True)(torch.ones(2, 3, 3), key=thinned.Key(7))
    tensor([[[0., 0., 0.],
             [0., 0., 0.],
             [0., 0., 0.]],
            [[2., 2., 2.],
             [2., 2., 2.],
             [2., 2., 2.]]])
    """

    def __init__(self, p: float = 0.5, batch_first: bool = False, inplace: bool = False) -> None:
        super().__init__()
        threshold_and_scale(p)
        self.p = p
        self.batch_first = batch_first
        self.inplace = inplace

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return F.locked_dropout(input, self.p, self.training, self.batch_first, self.inplace, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}, batch_first={self.batch_first}, inplace={self.inplace}"
