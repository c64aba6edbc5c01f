"""Dropouts as people write them at home: right, and each unlike torch.nn.Dropout in a way of its own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Plain(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(x) if self.training else x

    def drop(self, x: Tensor) -> Tensor:
        return x * torch.empty_like(x).bernoulli_(1 - self.p) / (1 - self.p)


class OfProbabilities(Plain):
    def drop(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x, 1 - self.p)) / (1 - self.p)


class Fills(Plain):
    def drop(self, x: Tensor) -> Tensor:
        dropped = torch.rand(x.shape, device=x.device) < self.p
        return x.masked_fill(dropped, 0.0) * (1.0 / (1.0 - self.p))


class Chooses(Plain):
    def drop(self, x: Tensor) -> Tensor:
        kept = torch.rand(x.shape, device=x.device) >= self.p
        return torch.where(kept, x / (1 - self.p), torch.zeros_like(x))


class WritesACopy(Plain):
    def drop(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[torch.rand_like(x) < self.p] = 0
        return y / (1 - self.p)


class HoldsPInABuffer(Plain):
    p: Tensor

    def __init__(self, rate: float = 0.5) -> None:
        nn.Module.__init__(self)
        self.register_buffer("p", torch.tensor(rate))

    def drop(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= self.p) / (1 - self.p)


class HoldsALambda(Plain):
    def __init__(self, keep_prob: float = 0.5) -> None:
        super().__init__(1 - keep_prob)
        self.drop = lambda x: nn.functional.dropout(x, self.p)  # type: ignore[method-assign]


class SavesAMask(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = (torch.rand_like(x) > p).to(x.dtype) / (1 - p)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return gradients[0] * mask, None


class OwnFunction(Plain):
    def drop(self, x: Tensor) -> Tensor:
        result: Tensor = SavesAMask.apply(x, self.p)
        return result


def always(x: Tensor, dropout_rate: float = 0.5) -> Tensor:
    return x * (torch.rand_like(x) >= dropout_rate) / (1 - dropout_rate)
