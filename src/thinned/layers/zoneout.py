"""Zoneout: units that keep their previous value."""

from __future__ import annotations

from torch import Tensor, nn

from thinned import functional as F
from thinned.functional.arguments import threshold_and_scale
from thinned.keys import Key

__all__ = ["Zoneout"]


class Zoneout(nn.Module):
    """:func:`thinned.functional.zoneout` as a module, for use in the loop over a recurrent cell's steps.

    Args:
        p: the probability that a unit keeps its previous value, in [0, 1].

    Shape:
        candidate and previous state ``(*)``; the output has the candidate's shape and dtype.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations", ICLR 2017,
    section 3.

    >>> import torch, thinned
    >>> cell, zoneout = torch.nn.GRUCell(3, 5), thinned.Zoneout(0.1)
    >>> state = torch.zeros(2, 5)
    >>> for input in torch.randn(4, 2, 3):
    ...     state = zoneout(cell(input, state), state)
    >>> state.shape
    torch.Size([2, 5])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        threshold_and_scale(p)
        self.p = p

    def forward(self, input: Tensor, previous: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return F.zoneout(input, previous, self.p, self.training, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}"
