"""Dropout of recurrent networks: LockedDropout, EmbeddingDropout, Zoneout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinned.compare.laws import Finding
from thinned.compare.laws.adapt import seen_through
from thinned.compare.laws.every_layer import general_laws
from thinned.compare.laws.law import holds_if
from thinned.compare.laws.mask import Masked, masked_laws
from thinned.compare.layers.entry import Entry, Example, Implementation, LayerLaw, Workload
from thinned.compare.settings import Settings
from thinned.layers.embedding import EmbeddingDropout
from thinned.layers.locked import LockedDropout
from thinned.layers.zoneout import Zoneout

__all__ = ["ENTRIES"]


class LockedDropoutFormula(nn.Module):
    """That of the code of AWD-LSTM."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        mask = x.new_empty(1, *x.shape[1:]).bernoulli_(1 - self.p) / (1 - self.p)
        return mask.expand_as(x) * x


class EmbeddingDropoutFormula(nn.Module):
    """That of the code of AWD-LSTM, which masks the whole embedding."""

    def __init__(self, embedding: nn.Embedding, p: float = 0.1) -> None:
        super().__init__()
        self.embedding, self.p = embedding, p

    def forward(self, words: Tensor) -> Tensor:
        weight = self.embedding.weight
        if self.training and self.p:
            mask = weight.new_empty(len(weight), 1).bernoulli_(1 - self.p).expand_as(weight) / (1 - self.p)
            weight = mask * weight
        return F.embedding(words, weight)


class ZoneoutFormula(nn.Module):
    """The paper's, as arithmetic."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, candidate: Tensor, previous: Tensor) -> Tensor:
        zoned = (torch.rand_like(candidate) < self.p).to(candidate.dtype) if self.training else self.p
        return zoned * previous + (1 - zoned) * candidate


def look_up_all(layer: nn.Module, weight: Tensor) -> Tensor:
    """Each word of an embedding once: so its mask is one of the rows of the weight."""
    words = torch.arange(len(weight), device=weight.device)
    y: Tensor = torch.func.functional_call(layer, {"embedding.weight": weight}, words)
    return y


def one_word_one_decision(layer: Implementation, settings: Settings) -> Finding:
    words = torch.arange(1000, device=settings.device).repeat(3, 1)
    y = layer.make(p=0.5, words=1000, size=4)(words)
    same = torch.equal(y, y[:1].expand_as(y)) and bool(((y == 0).all(-1) | (y != 0).all(-1)).all())
    return holds_if(same, "one decision" if same else "decisions differ")


def plain_embedding(layer: Implementation, settings: Settings) -> Finding:
    module = layer.make(p=0.5, words=1000, size=4).eval()
    words = torch.arange(1000, device=settings.device)
    same = torch.equal(module(words), F.embedding(words, next(module.parameters())))
    return holds_if(same, "the embedding" if same else "other values")


def of_zeros(layer: nn.Module, x: Tensor) -> Tensor:
    """With a previous state of zeros, zoneout is dropout that scales by 1."""
    y: Tensor = layer(x, torch.zeros_like(x))
    return y


def either_value(layer: Implementation, settings: Settings) -> Finding:
    """Where infinities wait in what is not taken, and 1 has to stay beside 1e8."""
    infinity = torch.full((100, 100), float("inf"), device=settings.device)
    y = layer.make(p=0.5)(settings.ones(100, 100, dtype=torch.float32), infinity)
    exact = bool(((y == 1) | (y == infinity)).all())
    y = layer.make(p=0.5)(settings.ones(100, 100, dtype=torch.float32), torch.full_like(y, 1e8))
    exact &= bool(((y == 1) | (y == 1e8)).all())
    return holds_if(exact, "exact" if exact else "NaN" if y.isfinite().all() else "other values")


def expectation(layer: Implementation, settings: Settings) -> Finding:
    candidate = settings.normal(100, 100, dtype=torch.float32)
    previous = candidate.flip(0)
    wrong = [
        p
        for p in (0.0, 0.1, 0.5, 1.0)
        if not torch.allclose(
            layer.make(p=p).eval()(candidate, previous), p * previous + (1 - p) * candidate, atol=1e-6
        )
    ]
    return holds_if(not wrong, f"not at p = {wrong[0]}" if wrong else "the expectation")


def own_gradient(layer: Implementation, settings: Settings) -> Finding:
    """The gradient goes to the one of the two that was taken, unscaled, and nowhere else."""
    candidate = torch.ones(100, 100, device=settings.device, requires_grad=True)
    previous = torch.zeros_like(candidate, requires_grad=True)
    upstream = settings.normal(100, 100, dtype=torch.float32)
    y = layer.make(p=0.5)(candidate, previous)
    to_candidate, to_previous = torch.autograd.grad(y, (candidate, previous), upstream)
    taken = y == 1
    right = torch.equal(to_candidate, upstream * taken) and torch.equal(to_previous, upstream * ~taken)
    return holds_if(right, "to what was taken" if right else "elsewhere")


def _sequence(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(6, 5, 4, dtype=dtype),)


def _words(_: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randint(40, (6, 5)),)


def _states(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return torch.randn(6, 5, dtype=dtype), torch.randn(6, 5, dtype=dtype)


def _embedding_weight(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(40, 64, dtype=dtype),)


def make_embedding(p: float = 0.1, words: int = 40, size: int = 8) -> nn.Module:
    return EmbeddingDropout(nn.Embedding(words, size), p)


def make_embedding_formula(p: float = 0.1, words: int = 40, size: int = 8) -> nn.Module:
    return EmbeddingDropoutFormula(nn.Embedding(words, size), p)


_locked = Example(_sequence, {"p": 0.5})
_embedding = Example(_words, {"p": 0.5}, identity_in_evaluation=False)
# Words have no gradient; the embedding has one.
_of_words = [law for law in general_laws(_embedding) if law.name not in ("gradient", "saved")]
_of_weight = [
    law
    for law in general_laws(Example(_embedding_weight, {"p": 0.5}, saved_bytes=0.2))
    if law.name in ("gradient", "saved")
]
_zoneout = Example(_states, {"p": 0.5}, identity_in_evaluation=False, saved_bytes=1.0)

ENTRIES = [
    Entry(
        LockedDropout,
        functional="locked_dropout",
        mask="(1, N, C)",
        source="Gal & Ghahramani 2016, section 4; AWD-LSTM",
        peer=Implementation("formula", LockedDropoutFormula),
        laws=(*general_laws(_locked), *masked_laws(Masked((3, 200, 100), shared=(0,)))),
        example=_locked,
        workload=Workload(lambda: (torch.ones(64, 32, 512),), {"p": 0.5}, broadcast=(1, 32, 512)),
    ),
    Entry(
        EmbeddingDropout,
        functional="embedding_dropout",
        mask="(words, 1)",
        source="Gal & Ghahramani 2016, section 4.2; AWD-LSTM",
        peer=Implementation("formula", make_embedding_formula),
        laws=(
            *_of_words,
            *seen_through(look_up_all, (*_of_weight, *masked_laws(Masked((20_000, 3), shared=(1,))))),
            LayerLaw("word", "word", "a word is dropped at all its places or at none", one_word_one_decision),
            LayerLaw("word", "evaluation", "in evaluation the embedding's own values", plain_embedding),
        ),
        example=_embedding,
        workload=Workload(
            lambda: (torch.randint(10_000, (64, 32)),), {"p": 0.1, "words": 10_000, "size": 512}
        ),
        make=make_embedding,
    ),
    Entry(
        Zoneout,
        functional="zoneout",
        mask="(N, H), each step",
        source="Krueger et al. 2017, section 3",
        peer=Implementation("formula", ZoneoutFormula),
        laws=(
            *general_laws(_zoneout),
            *seen_through(of_zeros, masked_laws(Masked((20_000, 3), scale=lambda _: 1.0))),
            LayerLaw("zoneout", "values", "each value is one of the two, exactly", either_value),
            LayerLaw("zoneout", "expectation", "in evaluation p h' + (1-p) h", expectation),
            LayerLaw("zoneout", "gradient of both", "the gradient goes to what was taken", own_gradient),
        ),
        example=_zoneout,
        workload=Workload(lambda: (torch.ones(2048, 512), torch.zeros(2048, 512)), {"p": 0.2}),
    ),
]
