"""Dropout layers that are each wrong in one way, to see whether a comparison notices:

thinned compare examples/broken_dropout.py:ForgetsToScale --quick --check
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


class Correct(nn.Module):
    """Right, if slow; the layers below replace one of its methods each."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, self.keep(x)) if self.training and self.p > 0 else x

    def keep(self, x: Tensor) -> Tensor:
        """Which elements are kept."""
        return with_probability(1 - self.p, x)

    def drop(self, x: Tensor, keep: Tensor) -> Tensor:
        """Kept elements, scaled, and zeros."""
        if not (x.is_floating_point() or x.is_complex()):
            raise TypeError(f"dropout needs a floating or complex tensor, but got {x.dtype}")
        scale = 1 / (1 - self.p) if self.p < 1 else 0
        return torch.where(keep, x * scale, 0)


def with_probability(q: float, x: Tensor) -> Tensor:
    """A mask of x's shape whose elements are set with probability q."""
    return torch.rand_like(x, dtype=torch.float64) < q


class ForgetsToScale(Correct):
    """Kept elements stay what they are, so that the mean shrinks to (1-p) x."""

    def drop(self, x: Tensor, keep: Tensor) -> Tensor:
        return super().drop(x, keep) * (1 - self.p)


class ScalesInEvaluation(Correct):
    """Multiplies by 1-p in evaluation, as dropout without a scale in training would have to."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else x * (1 - self.p)


class ReusesMask(Correct):
    """Keeps the first mask of each shape, and so trains one thinned network instead of all of them."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.masks: dict[torch.Size, Tensor] = {}

    def keep(self, x: Tensor) -> Tensor:
        return self.masks.setdefault(x.shape, super().keep(x))


class CorrelatesNeighbours(Correct):
    """Copies one decision in ten from the element before."""

    def keep(self, x: Tensor) -> Tensor:
        keep = super().keep(x)
        before = keep.flatten().roll(1).view_as(keep)
        return torch.where(with_probability(0.1, x), before, keep)


class DropsRows(Correct):
    """Decides once for each row of the last dimension."""

    def keep(self, x: Tensor) -> Tensor:
        return super().keep(x[..., :1]).expand_as(x) if x.ndim else super().keep(x)


class LooksAtValues(Correct):
    """Drops negative numbers half as often."""

    def keep(self, x: Tensor) -> Tensor:
        return super().keep(x) | (x.real < 0) & with_probability(0.5, x)


class DropsTooOften(Correct):
    """Drops 2 % more than p, 0.51 at p = 0.5, and scales for p."""

    def keep(self, x: Tensor) -> Tensor:
        return with_probability(1 - 1.02 * self.p, x)


class WrongGradient(Correct):
    """Sends the gradient back through a mask of its own."""

    def drop(self, x: Tensor, keep: Tensor) -> Tensor:
        y = super().drop(x, keep)
        other = super().drop(x, self.keep(x))
        return other + (y - other).detach()


class StraightThrough(Correct):
    """Sends the whole gradient back, also to dropped elements."""

    def drop(self, x: Tensor, keep: Tensor) -> Tensor:
        return x + (super().drop(x, keep) - x).detach()


class DropsInEvaluation(Correct):
    """Asks for p alone, and never whether the model is in training."""

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x, self.keep(x)) if self.p > 0 else x


class MakesMaskOnCPU(Correct):
    """Draws where torch.rand draws by default, wherever the input is."""

    def keep(self, x: Tensor) -> Tensor:
        return torch.rand(x.shape, dtype=torch.float64) < 1 - self.p


class DrawsFromNumPy(Correct):
    """Draws from a generator that neither torch.manual_seed nor checkpointing knows."""

    def keep(self, x: Tensor) -> Tensor:
        return torch.as_tensor(np.random.random(x.shape) < 1 - self.p, device=x.device)
