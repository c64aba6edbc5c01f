"""The dropout layer of the tutorials, kept with its faults: what most people's first dropout looks like."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["TextbookDropout"]


class TextbookDropout(nn.Module):
    """Multiply by a random mask of zeros and ones, divide by the keep probability."""

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        super().__init__()
        self.p = p
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        mask = (torch.rand_like(x) < 1 - self.p).float()
        if self.inplace:
            return x.mul_(mask).div_(1 - self.p)
        return x * mask / (1 - self.p)
