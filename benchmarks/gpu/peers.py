"""What thinned is timed beside on a GPU, each as a function of a tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import thinned
from benchmarks.gpu import rand_kernel

__all__ = ["compiled", "layers"]

COLS = 4096


def layers(p: float) -> dict[str, Callable[[Tensor], Tensor]]:
    """The layers in eager mode."""
    return {
        "thinned": thinned.Dropout(p),
        "nn.Dropout": nn.Dropout(p),
        "stored mask": partial(_stored_mask, p),
        "tl.rand": partial(_TlRand.apply, p),
    }


def compiled(p: float, compiler: str) -> dict[str, Callable[[Tensor], Tensor]]:
    """Two of the layers, each compiled anew for the one shape that it is called with."""
    torch.compiler.reset()
    return {
        f"compiled {name}": torch.compile(layers(p)[name], fullgraph=True, dynamic=False, backend=compiler)
        for name in ("thinned", "nn.Dropout")
    }


def _stored_mask(p: float, x: Tensor) -> Tensor:
    mask = torch.rand_like(x) < 1 - p
    return x * mask / (1 - p)


class _TlRand(torch.autograd.Function):
    """As the layer norm of flash-attention drops: a random seed for each row, kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, p: float, x: Tensor) -> Tensor:
        rows = -(-x.numel() // COLS)
        ctx.p, seeds = p, torch.randint(2**32, (rows,), device=x.device)
        ctx.save_for_backward(seeds)
        return _drop(x, seeds, p)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (seeds,) = ctx.saved_tensors
        return None, _drop(grad, seeds, ctx.p)


def _drop(x: Tensor, seeds: Tensor, p: float) -> Tensor:
    out = torch.empty_like(x)
    rand_kernel.dropout[(len(seeds),)](x, out, seeds, x.numel(), p, COLS=COLS, num_warps=8)
    return out
