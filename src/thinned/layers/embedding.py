"""Dropout of whole words from an embedding."""

from __future__ import annotations

from torch import Tensor, nn

from thinned import functional as F
from thinned.functional.arguments import threshold_and_scale
from thinned.keys import Key

__all__ = ["EmbeddingDropout"]


class EmbeddingDropout(nn.Module):
    """An embedding from which whole words are dropped: :func:`thinned.functional.embedding_dropout`.

    The embedding stays the module that it is, so that its weight can be tied to a decoder's, which is not
    dropped from.

    Args:
        embedding: a :class:`torch.nn.Embedding`, whose arguments are kept to.
        p: the probability of dropping a word, in [0, 1].

    Shape:
        words ``(*)`` give ``(*, embedding_dim)``.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError: ``embedding`` is no :class:`torch.nn.Embedding`.

    Source: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
    NeurIPS 2016, section 4.2; Merity et al., "Regularizing and optimizing LSTM language models", ICLR 2018,
    section 4.3. That it wraps an embedding is fastai's.

    >>> import torch, thinned
    >>> embedding = torch.nn.Embedding.from_pretrained(torch.ones(6, 2), freeze=False)
    >>> layer = thinned.EmbeddingDropout(embedding, p=0.5)
    >>> layer(torch.tensor([0, 3]), key=thinned.Key(7))
    tensor([[0., 0.],
            [2., 2.]], grad_fn=...)
    """

    def __init__(self, embedding: nn.Embedding, p: float = 0.1) -> None:
        super().__init__()
        threshold_and_scale(p)
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be a torch.nn.Embedding, got {type(embedding).__name__}")
        self.embedding = embedding
        self.p = p

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        e = self.embedding
        return F.embedding_dropout(
            input,
            e.weight,
            self.p,
            self.training,
            e.padding_idx,
            e.max_norm,
            e.norm_type,
            e.scale_grad_by_freq,
            e.sparse,
            key=key,
        )

    def extra_repr(self) -> str:
        return f"p={self.p}"
