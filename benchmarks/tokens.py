"""Words, tokens and heads that are dropped and not computed, beside those that are computed and masked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import thinned
from benchmarks.case import Bound, Case, Work
from thinned.functional import drop_head, drop_head_attention, embedding_dropout, token_dropout

__all__ = ["tokens_cases"]

NONE, MASKED = "no dropout", "masked"
RATES = (0.2, 0.5)


def tokens_cases() -> Iterator[Case]:
    """Forward and backward, on one thread."""
    for shape, p in product(((32, 12, 197, 64), (8, 12, 512, 64)), RATES):
        bounds = (Bound(MASKED, 1.25 * (1 - p)),)
        yield _case(f"DropHead, {_size(shape)}, p = {p}", partial(_heads, shape, p), bounds)
    for p in RATES:
        yield _case(f"TokenDropout, 32 x 197 tokens of 192, p = {p}", partial(_tokens, p), ())
    for p in (0.1, 0.5):
        bounds = (Bound(MASKED, 1),)
        yield _case(f"EmbeddingDropout, 64 x 128 words of 512, p = {p}", partial(_words, p), bounds)


def _case(setting: str, make: Callable[[], Work], bounds: tuple[Bound, ...]) -> Case:
    return Case("dropped, not computed", setting, make, bounds, rounds=7)


def _size(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))


def _heads(shape: tuple[int, ...], p: float) -> Work:
    samples, heads, tokens, size = shape
    q, k, v = (torch.randn(samples, tokens, heads, size).transpose(1, 2).requires_grad_() for _ in range(3))

    def masked() -> Tensor:
        return drop_head(F.scaled_dot_product_attention(q, k, v), p)

    return {
        NONE: _trained(lambda: F.scaled_dot_product_attention(q, k, v), q, k, v),
        MASKED: _trained(masked, q, k, v),
        "thinned": _trained(lambda: drop_head_attention(q, k, v, p), q, k, v),
    }


class _Block(nn.Module):
    """A block of ViT-T, which takes jagged tensors too."""

    def __init__(self, size: int = 192, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.projections = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        self.out = nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        z = self.attention_norm(x)
        q, k, v = (project(z).unflatten(-1, (self.heads, -1)).transpose(1, 2) for project in self.projections)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm(x))  # type: ignore[no-any-return]


def _tokens(p: float) -> Work:
    block, x = _Block(), torch.randn(32, 197, 192).requires_grad_()

    def masked() -> Tensor:
        key = thinned.Key(7)
        return block(token_dropout(x, p, key=key), thinned.keep_mask(key, (32, 1, 1, 197), p))  # type: ignore[no-any-return]

    return {
        NONE: _trained(lambda: block(x), x),
        MASKED: _trained(masked, x),
        "thinned": _trained(lambda: block(token_dropout(x, p, layout=torch.jagged)).values(), x),
        "thinned.PatchDropout": _trained(lambda: block(thinned.functional.patch_dropout(x, p)), x),
    }


def _words(p: float) -> Work:
    weight, words = torch.randn(10_000, 512).requires_grad_(), torch.randint(10_000, (64, 128))

    def masked() -> Tensor:
        keep = thinned.keep_mask(thinned.Key(7), (10_000,), p)[words].unsqueeze(-1)
        return torch.where(keep, F.embedding(words, weight) / (1 - p), 0)

    return {
        NONE: _trained(lambda: F.embedding(words, weight), weight),
        MASKED: _trained(masked, weight),
        "thinned": _trained(lambda: embedding_dropout(words, weight, p), weight),
        "thinned, sparse": _trained(lambda: embedding_dropout(words, weight, p, sparse=True), weight),
    }


def _trained(call: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(call().sum(), leaves)
