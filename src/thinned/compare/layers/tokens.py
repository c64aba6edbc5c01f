"""Dropout of tokens: PatchDropout, TokenDropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor, nn

from thinned.compare.figures import significant
from thinned.compare.implementation import Case, Example, Implementation, Masked, first, normal, ones
from thinned.compare.laws.chance import FALSE_ALARM
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import Formula, from_library, library_class
from thinned.compare.settings import Settings
from thinned.layers.tokens import PatchDropout, TokenDropout

__all__ = ["ENTRIES"]


class PatchDropoutFormula(nn.Module):
    def __init__(
        self, p: float = 0.5, num_prefix_tokens: int = 1, ordered: bool = False, return_indices: bool = False
    ) -> None:
        super().__init__()
        self.p, self.prefix, self.ordered, self.return_indices = p, num_prefix_tokens, ordered, return_indices

    def forward(self, x: Tensor) -> Any:
        if not self.training or self.p == 0:
            return (x, None) if self.return_indices else x
        prefix, x = x[:, : self.prefix], x[:, self.prefix :]
        count = max(1, int(x.shape[1] * (1.0 - self.p)))
        kept = torch.rand(x.shape[:2], device=x.device).argsort(dim=1)[:, :count]
        if self.ordered:
            kept = kept.sort(dim=1).values
        x = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, *x.shape[2:]))
        y = torch.cat((prefix, x), dim=1)
        return (y, kept) if self.return_indices else y


class TokenDropoutFormula(Formula):
    def __init__(self, p: float = 0.5, num_prefix_tokens: int = 0, scale: bool = True) -> None:
        super().__init__(p)
        self.prefix, self.scale = num_prefix_tokens, scale

    def drop(self, x: Tensor) -> Tensor:
        mask = (torch.rand(*x.shape[:2], *(1,) * (x.dim() - 2), device=x.device) < 1 - self.p).to(x.dtype)
        if self.scale and self.p < 1:
            mask = mask / (1 - self.p)
        mask[:, : self.prefix] = 1
        return x * mask


def _from_timm(without_indices: Any) -> Callable[..., nn.Module]:
    def make(
        p: float = 0.5, num_prefix_tokens: int = 1, ordered: bool = False, return_indices: bool = False
    ) -> nn.Module:
        with_indices = library_class("timm.layers.patch_dropout:PatchDropoutWithIndices")
        layer: nn.Module = (with_indices if return_indices else without_indices)(
            prob=p, num_prefix_tokens=num_prefix_tokens, ordered=ordered
        )
        return layer

    return make


SAMPLES = 210_000  # at which a token's share that is 2 % off shows
TOKENS, KEPT = 6, 3  # behind a prefix of one, at p = 0.5: 20 subsets


def _positions(samples: int, tokens: int, settings: Settings) -> Tensor:
    """Tokens of two channels that say where they stand: sample and position."""
    sample, position = torch.meshgrid(torch.arange(samples), torch.arange(tokens), indexing="ij")
    return torch.stack((sample, position), dim=-1).float().to(settings.device)


def _kept(layer: Case, settings: Settings) -> Tensor:
    """True for the tokens behind the prefix that a sample keeps: ``(SAMPLES, TOKENS)`` bools."""
    y = first(layer.make(p=0.5)(_positions(SAMPLES, 1 + TOKENS, settings)))
    places = y[:, 1:, 1].long() - 1
    return torch.zeros(SAMPLES, TOKENS, dtype=torch.bool, device=places.device).scatter(1, places, True)


def number_kept(layer: Case, settings: Settings) -> Finding:
    """The shape of the output for five lengths and p, each with a prefix of 0, 1 and 3."""
    for tokens, p in ((9, 0.5), (50, 0.25), (17, 0.75), (3, 0.9), (64, 0.01)):
        for prefix in (0, 1, 3):
            x = settings.ones(2, prefix + tokens, 4, dtype=torch.float32)
            y = first(layer.make(p=p, num_prefix_tokens=prefix)(x))
            wanted = (2, prefix + max(1, int(tokens * (1 - p))), 4)
            if y.shape != wanted:
                return holds_if(False, f"{tokens} at p = {p} became {tuple(y.shape)}")
    return holds_if(True, "exact")


def whole_tokens(layer: Case, settings: Settings) -> Finding:
    """Tokens that hold their own sample and position show where each came from."""
    x = _positions(100, 50, settings)
    for prefix in (0, 1, 3):
        y = first(layer.make(p=0.5, num_prefix_tokens=prefix)(x))
        if not torch.equal(y[:, :prefix], x[:, :prefix]):
            return holds_if(False, "prefix changed")
        places = y[..., 1].long()
        if not torch.equal(y, x.gather(1, places.unsqueeze(-1).expand(-1, -1, 2))):
            return holds_if(False, "tokens changed, or of another sample")
        if any(len(row.unique()) < len(row) for row in places):
            return holds_if(False, "a token twice")
    return holds_if(True, "as they were")


def share_of_a_token(layer: Case, settings: Settings) -> Finding:
    """Counts each of 6 tokens over 210,000 samples that keep 3."""
    counts = _kept(layer, settings).sum(0)
    return _binomial(counts.tolist(), KEPT / TOKENS, "a token")


def share_of_a_pair(layer: Case, settings: Settings) -> Finding:
    """Without replacement, the second of a pair stays with probability (k-1)/(L-1)."""
    kept = _kept(layer, settings).double()
    first_of_pair, second = torch.triu_indices(TOKENS, TOKENS, offset=1)
    counts = (kept.T @ kept)[first_of_pair, second]
    return _binomial(counts.tolist(), KEPT * (KEPT - 1) / (TOKENS * (TOKENS - 1)), "a pair")


def subsets(layer: Case, settings: Settings) -> Finding:
    """Chi-squared of the 20 subsets of 3 out of 6 tokens, over 210,000 samples."""
    kept = _kept(layer, settings).long()
    number = (kept << torch.arange(TOKENS, device=kept.device)).sum(1)
    possible = [mask for mask in range(2**TOKENS) if mask.bit_count() == KEPT]
    counts = torch.bincount(number, minlength=2**TOKENS)[possible].tolist()
    return _chi_squared(counts, [SAMPLES / len(possible)] * len(possible))


def independence(layer: Case, settings: Settings) -> Finding:
    """How many tokens two independent subsets share is hypergeometric."""
    one, two = _kept(layer, settings), _kept(layer, settings)
    law = stats.hypergeom(TOKENS, KEPT, KEPT)
    for a, b, where in ((one, two, "two calls"), (one[::2], one[1::2], "neighbours")):
        counts = torch.bincount((a & b).sum(1), minlength=KEPT + 1).tolist()
        found = _chi_squared(counts, [len(a) * float(law.pmf(j)) for j in range(KEPT + 1)])
        if found.verdict.is_breach:
            return holds_if(False, f"{found.measured}, {where}")
    return holds_if(True, "independent")


def order(layer: Case, settings: Settings) -> Finding:
    """With ordered=True the positions of 100 samples rise."""
    y = first(layer.make(p=0.5, ordered=True)(_positions(100, 50, settings)))
    places = y[..., 1]
    kept = bool((places.diff(dim=1) > 0).all())
    return holds_if(kept, "kept" if kept else "changed")


def indices(layer: Case, settings: Settings) -> Finding:
    """Gathering the returned indices from the input gives the output."""
    x = _positions(100, 50, settings)
    for ordered in (False, True):
        module = layer.make(p=0.5, return_indices=True, ordered=ordered)
        y, kept = module(x)
        if not torch.equal(y[:, 1:], x[:, 1:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 2))):
            return holds_if(False, "of other tokens")
        if module.eval()(x)[1] is not None:
            return holds_if(False, "not None in evaluation")
    return holds_if(True, "of the kept tokens")


def prefix_untouched(layer: Case, settings: Settings) -> Finding:
    """The prefix of 1,000 samples is equal bit for bit, and its gradient is 1."""
    x = settings.normal(1000, 5, 3, dtype=torch.float32).requires_grad_()
    y = layer.make(p=0.5, num_prefix_tokens=2)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    if not torch.equal(y[:, :2], x[:, :2]) or not (gradient[:, :2] == 1).all():
        return holds_if(False, "prefix changed")
    return holds_if(bool((y[:, 2:] == 0).any()), "untouched")


def without_scale(layer: Case, settings: Settings) -> Finding:
    """Kept elements equal the input bit for bit."""
    x = settings.normal(1000, 5, 3, dtype=torch.float32)
    y = layer.make(p=0.5, scale=False)(x)
    return holds_if(torch.equal(y, x * (y != 0)), "as they are")


def _binomial(counts: Sequence[float], p: float, what: str) -> Finding:
    """Each count is Binomial(SAMPLES, p); together they raise a false alarm with the usual probability."""
    low, high = stats.binom.interval(1 - FALSE_ALARM / len(counts), SAMPLES, p)
    worst = max(counts, key=lambda count: abs(count - SAMPLES * p))
    share = f"{what} {worst / SAMPLES:.4f}"
    if low <= worst <= high:
        return holds_if(True, share)
    return holds_if(False, f"{share}, beyond {low / SAMPLES:.4f} to {high / SAMPLES:.4f}")


def _chi_squared(counts: Sequence[float], expected: Sequence[float]) -> Finding:
    """The expected counts are in the hundreds, so that the law is chi-squared's far into its tail."""
    if sum(counts) < round(sum(expected)):
        return holds_if(False, "impossible outcomes")
    statistic = sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))
    pvalue = float(stats.chi2.sf(statistic, len(counts) - 1))
    return holds_if(
        pvalue >= FALSE_ALARM, f"χ² = {significant(statistic)} of {len(counts) - 1}", pvalue=pvalue
    )


_patches, _tokens = partial(Law, "patches"), partial(Law, "tokens")

ENTRIES = [
    Entry(
        PatchDropout,
        mask="a subset of L for each of N",
        source="Liu et al. 2023, section 3; timm",
        peer=from_library("timm.layers.patch_dropout:PatchDropout", PatchDropoutFormula, _from_timm),
        example=Example(normal(4, 9, 16), saved_bytes=0.5),
        workload=Workload(ones(16, 257, 256), {"p": 0.5}),
        special=[
            _patches(
                "number kept",
                "prefix and max(1, int(L (1-p))) of L others stay",
                number_kept,
                level=Level.UNLIKE_TORCH,
                why="Sequences have another length, and memory and time another size, than p says.",
            ),
            _patches(
                "whole tokens",
                "a sample's own tokens stay, unscaled, none twice",
                whole_tokens,
                why="Samples mix, or a patch is no longer what the embedding made of it.",
            ),
            _patches(
                "share of a token",
                "each of L stays with probability k/L",
                share_of_a_token,
                why="Some places of the image are seen less often than others.",
            ),
            _patches(
                "share of a pair",
                "both stay with probability k(k-1)/(L(L-1))",
                share_of_a_pair,
                why="Some patches are never, or always, seen together.",
            ),
            _patches(
                "subsets",
                "each of the C(L, k) subsets comes equally often",
                subsets,
                why="The network sees the same few subsets again and again.",
            ),
            _patches(
                "independence",
                "samples and calls have independent subsets",
                independence,
                why="A batch shows one subset many times instead of many.",
            ),
            _patches(
                "order",
                "ordered=True keeps the order",
                order,
                why="Layers that depend on the order, such as a convolution, see a shuffled image.",
            ),
            _patches(
                "indices",
                "return_indices gives those of the kept, None in evaluation",
                indices,
                why="A decoder puts patches back in wrong places.",
            ),
        ],
    ),
    Entry(
        TokenDropout,
        mask="(N, L, 1)",
        source="Gal and Ghahramani 2016, section 4.2, for words",
        peer=Implementation("formula", TokenDropoutFormula),
        example=Example(normal(4, 9, 16), {"p": 0.5, "num_prefix_tokens": 1}),
        workload=Workload(ones(16, 257, 256), {"p": 0.2, "num_prefix_tokens": 1}),
        masked=Masked((5000, 4, 3), shared=(2,)),
        special=[
            _tokens(
                "prefix",
                "the prefix is neither dropped nor scaled",
                prefix_untouched,
                why="The class token, from which the prediction comes, is lost at random.",
            ),
            _tokens(
                "scale=False",
                "a kept token stays as it is",
                without_scale,
                why="Embeddings are scaled although scale=False asked for them as they are.",
            ),
        ],
    ),
]
