"""The dropout layer of a tutorial, kept with its faults: what most people's first dropout looks like."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["TUTORIAL", "TextbookDropout", "Tutorial"]


@dataclass(frozen=True)
class Tutorial:
    """Where a layer and a comparison come from."""

    author: str
    year: int
    title: str
    address: str


TUTORIAL = Tutorial(
    "Ravi Mandliya",
    2026,
    "Deeply Learning 1: Dropout Implementation from scratch",
    "https://github.com/mandliya/mandliya.github.io/blob/5df37ade9371009754568609d8aaf23c028de490/"
    "_posts/2026-02-17-deeply-learning-1-dropout-implementation-from-scratch.md",
)


class TextbookDropout(nn.Module):
    """Multiply by a random mask of zeros and ones, divide by the keep probability.

    The layer ``DropoutFromScratch`` of ``TUTORIAL``.
    """

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
