"""Dropout of whole words from an embedding."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional
from torch import Tensor, nn

from thinned import op
from thinned.geometry import shared
from thinned.keys import Key
from thinned.layers._arguments import check_input, check_key, key_for, threshold_and_scale
from thinned.nested import elementwise, shape_of

__all__ = ["EmbeddingDropout", "embedding_dropout"]


def embedding_dropout(
    input: Tensor,
    weight: Tensor,
    p: float = 0.1,
    training: bool = True,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Look words up in an embedding from which each word is dropped with probability ``p``.

    .. math:: y_i = \begin{cases} E_{w_i} / q & u(w_i) < T \\ +0 & \text{otherwise} \end{cases}

    for the word :math:`w_i` at place :math:`i`: a word is dropped at all places or at none, and only the rows
    that are looked up are touched.

    Args:
        input: an int32 or int64 tensor of words, of any shape.
        weight: the embedding, a floating-point or complex tensor of shape ``(words, size)``.
        p: the probability of dropping a word, in [0, 1].
        training: False looks words up as :func:`torch.nn.functional.embedding` does, and so does ``p = 0``.
        padding_idx: as for :func:`torch.nn.functional.embedding`, as are the arguments after it.
        max_norm: the norm to which longer rows are shortened, in ``weight`` itself.
        norm_type: of which p-norm ``max_norm`` is.
        scale_grad_by_freq: divide a word's gradient by the number of its places.
        sparse: the gradient of ``weight`` is a sparse tensor.
        key: as for :func:`~thinned.functional.dropout`; a batch of keys has one for each row of ``input``,
            which then has words dropped that are its own.

    Returns:
        A tensor of shape ``(*input.shape, size)`` and of ``weight``'s dtype.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError: ``weight`` is no tensor, or ``key`` no :class:`~thinned.Key`.
        RuntimeError: ``weight`` is of another dtype or has not two dimensions, or the keys' shape or device
            does not fit.
        IndexError, RuntimeError, AssertionError: as :func:`torch.nn.functional.embedding`.

    Source: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
    NeurIPS 2016, section 4.2, where each sequence has words of its own dropped; Merity et al., "Regularizing
    and optimizing LSTM language models", ICLR 2018, section 4.3, where the batch has, as here under one key.

    >>> import torch, thinned
    >>> words = torch.tensor([0, 3, 0, 5])
    >>> thinned.functional.embedding_dropout(words, torch.ones(6, 2), p=0.5, key=thinned.Key(7))
    tensor([[0., 0.],
            [2., 2.],
            [0., 0.],
            [2., 2.]])
    """
    T, scale = threshold_and_scale(p)
    check_input("embedding_dropout", weight, None)
    if weight.dim() != 2:
        raise RuntimeError(
            f"embedding_dropout needs a weight of shape (words, size), got shape {tuple(weight.shape)}"
        )
    if key is not None:
        check_key(key, shape_of(input))
    if input.is_nested and training and p != 0:
        drop = partial(
            embedding_dropout,
            weight=weight,
            p=p,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )
        return elementwise("embedding_dropout", drop, input, key_for(input, key))
    y = torch.nn.functional.embedding(
        input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse
    )
    if not training or p == 0:
        return y
    keep = _keep_words(key_for(input, key).bits, input, len(weight), T)
    return torch.where(keep.unsqueeze(-1), y * scale, 0)


def _keep_words(bits: Tensor, words: Tensor, size: int, T: int) -> Tensor:
    if not bits.dim():
        return op.keep_mask(bits, (size,), shared((size,)), T)[words]
    shape = (len(bits), size)
    keep = op.keep_mask(bits, shape, shared(shape, key_dims=1), T)
    return keep.gather(1, words.flatten(1).long()).reshape(words.shape)


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

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        e = self.embedding
        return embedding_dropout(
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
