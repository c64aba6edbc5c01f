"""Dropout of words: EmbeddingDropout."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, Masked
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.embedding import EmbeddingDropout

__all__ = ["ENTRIES"]


class EmbeddingDropoutFormula(nn.Module):
    """AWD-LSTM's code: masks all of the embedding for a few words."""

    def __init__(self, embedding: nn.Embedding, p: float = 0.1) -> None:
        super().__init__()
        self.embedding, self.p = embedding, p

    def forward(self, words: Tensor) -> Tensor:
        weight = self.embedding.weight
        if self.training and self.p:
            mask = weight.new_empty(len(weight), 1).bernoulli_(1 - self.p).expand_as(weight) / (1 - self.p)
            weight = mask * weight
        return F.embedding(words, weight)


def look_up_all(layer: nn.Module, weight: Tensor) -> Tensor:
    """Each word of an embedding once, so that the mask is one of the rows of the weight."""
    words = torch.arange(len(weight), device=weight.device)
    y: Tensor = torch.func.functional_call(layer, {"embedding.weight": weight}, words)
    return y


def one_word_one_decision(layer: Case, settings: Settings) -> Finding:
    """Three copies of 1,000 words at p = 0.5: equal rows, each all zero or without zeros."""
    words = torch.arange(1000, device=settings.device).repeat(3, 1)
    y = layer.make(p=0.5, words=1000, size=4)(words)
    same = torch.equal(y, y[:1].expand_as(y)) and bool(((y == 0).all(-1) | (y != 0).all(-1)).all())
    return holds_if(same, "one decision" if same else "decisions differ")


def plain_embedding(layer: Case, settings: Settings) -> Finding:
    """After eval(), 1,000 words give F.embedding of the weight bit for bit."""
    module = layer.make(p=0.5, words=1000, size=4).eval()
    words = torch.arange(1000, device=settings.device)
    same = torch.equal(module(words), F.embedding(words, next(module.parameters())))
    return holds_if(same, "the embedding" if same else "other values")


def make_embedding(p: float = 0.1, words: int = 40, size: int = 8) -> nn.Module:
    return EmbeddingDropout(nn.Embedding(words, size), p)


def make_embedding_formula(p: float = 0.1, words: int = 40, size: int = 8) -> nn.Module:
    return EmbeddingDropoutFormula(nn.Embedding(words, size), p)


ENTRIES = [
    Entry(
        EmbeddingDropout,
        mask="(words, 1)",
        source="Gal & Ghahramani 2016, section 4.2; AWD-LSTM",
        peer=Implementation("formula", make_embedding_formula),
        example=Example(
            lambda _: (torch.randint(40, (6, 5)),),
            identity_in_evaluation=False,
            saved_bytes=16 / 3,  # a kept word and its place, for three elements of the weight
        ),
        workload=Workload(
            lambda: (torch.randint(10_000, (64, 32)),), {"p": 0.1, "words": 10_000, "size": 512}
        ),
        masked=Masked((20_000, 3), shared=(1,), through=lambda _: look_up_all),
        exempt={
            "permuted input": "the output is a matrix of looked-up rows",
            "0-d input": "an embedding is a matrix",
        },
        special=[
            Law(
                "word",
                "word",
                "a word is dropped at all its places or at none",
                one_word_one_decision,
                why="A word that is dropped in one place is still learned from another.",
            ),
            Law(
                "word",
                "evaluation",
                "in evaluation the embedding's own values",
                plain_embedding,
                why="Predictions are random, or use other vectors than those that were trained.",
            ),
        ],
        make=make_embedding,
    )
]
