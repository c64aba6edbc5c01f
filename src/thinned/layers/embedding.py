"""Dropout of whole words from an embedding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import has_torch_function_variadic

from thinned import op
from thinned.checks import check_integer, check_real
from thinned.distributed.shards import is_dtensor
from thinned.keys import Key
from thinned.layers._arguments import (
    check_device,
    check_key,
    check_tensor,
    drops,
    key_for,
    threshold_and_scale,
)
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.layers.dropout import keep_mask
from thinned.nested import elementwise, shape_of
from thinned.torch_state import compiling, is_eager

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

    for the word :math:`w_i` at position :math:`i`: a word is dropped at all its positions or at none. Only
    the looked-up vectors are multiplied, not the entire embedding.

    Args:
        input: an int32 or int64 tensor of words, of any shape.
        weight: the embedding, a floating-point or complex tensor of shape ``(words, size)``.
        p: the probability of dropping a word, in [0, 1].
        training: False looks words up as :func:`torch.nn.functional.embedding` does, and so does ``p = 0``.
        padding_idx: as for :func:`torch.nn.functional.embedding`, as are the arguments after it.
        max_norm: longer vectors are shortened to this norm, in ``weight`` itself.
        norm_type: the p of the p-norm used with ``max_norm``.
        scale_grad_by_freq: divide a word's gradient by the number of its positions.
        sparse: the gradient of ``weight`` is a sparse tensor. It has no entries for dropped words, except in
            compiled code, which has no sparse gradients.
        key: as for :func:`~thinned.functional.dropout`; under a batch of keys each index of ``input``'s
            dimension 0, such as a sequence, has its own dropped words.

    Returns:
        A tensor of shape ``(*input.shape, size)`` and of ``weight``'s dtype.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError: ``weight`` is no tensor, or ``key`` no :class:`~thinned.Key`.
        RuntimeError: ``weight`` is of another dtype or has not two dimensions, or the keys' shape or device
            does not fit.
        IndexError, RuntimeError, AssertionError: as :func:`torch.nn.functional.embedding`.

    Source: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
    NeurIPS 2016, section 4.2, with dropped words for each sequence; Merity et al., "Regularizing and
    optimizing LSTM language models", ICLR 2018, section 4.3, with dropped words for the batch, as here under
    one key.

    >>> import torch, thinned
    >>> words = torch.tensor([0, 3, 0, 5])
    >>> thinned.functional.embedding_dropout(words, torch.ones(6, 2), p=0.5, key=thinned.Key(7))
    tensor([[0., 0.],
            [2., 2.],
            [0., 0.],
            [2., 2.]])
    """
    if has_torch_function_variadic(input, weight) and not compiling():
        return overridden(embedding_dropout, locals())
    _, scale = threshold_and_scale(p)
    active = drops("embedding_dropout", weight, p, training, None, argument="weight")
    if active and weight.dim() != 2:
        raise RuntimeError(
            f"embedding_dropout needs a weight of shape (words, size), got shape {tuple(weight.shape)}"
        )
    check_tensor("embedding_dropout", "input", input)
    if padding_idx is not None:
        check_integer("padding_idx", padding_idx)
    check_real("norm_type", norm_type)
    if max_norm is not None:
        check_real("max_norm", max_norm)
    if key is not None:
        check_key(key, shape_of(input))

    def look_up(words: Tensor) -> Tensor:
        return F.embedding(words, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)

    def drop(words: Tensor, key: Key | None) -> Tensor:
        # To know the places of kept words, Python waits for a GPU; only sparse gradients are worth that.
        by_place = (sparse or words.is_cpu) and is_eager(words) and is_eager(weight)
        if by_place:
            F.embedding(words, weight.detach()[:, :1], padding_idx)  # raises before a key is drawn
        else:
            y = look_up(words)
        key = key_for(words, key)
        mask = keep_mask(key, (*key.shape, len(weight)), p)
        if is_dtensor(words):
            if key.shape:
                rows = torch.arange(words.shape[0], device=words.device).view(-1, *(1,) * (words.dim() - 1))
                at = words, op.shard_like(rows, words)
                keep = op.locally(lambda words, rows: mask[rows, words], *at, shape=words.shape)
            else:
                keep = op.locally(lambda words: mask[words], words, shape=words.shape)
        elif key.shape:
            keep = mask.gather(1, words.flatten(1).long()).reshape(words.shape)
        else:
            keep = mask[words]
        # By parts, as y * scale would be NaN beside an infinite part.
        if not by_place or (scale_grad_by_freq and key.shape):  # frequencies are those of all places
            y = look_up(words) if by_place else y
            y = torch.view_as_complex(torch.view_as_real(y) * scale) if y.is_complex() else y * scale
            return torch.where(keep.unsqueeze(-1), y, 0)
        if max_norm is not None:
            torch.embedding_renorm_(weight.detach(), words.contiguous(), max_norm, norm_type)
        places = keep.flatten().nonzero().squeeze(1)
        kept = words.flatten().index_select(0, places)
        y = F.embedding(kept, weight, padding_idx, None, norm_type, scale_grad_by_freq, sparse)
        (torch.view_as_real(y) if y.is_complex() else y).mul_(scale)
        zeros = y.new_zeros(words.numel(), weight.shape[1])
        return zeros.index_copy_(0, places, y).view(*words.shape, weight.shape[1])

    if not active:
        return look_up(input)
    check_device("weight", weight, input)
    if input.is_nested:
        return elementwise("embedding_dropout", drop, input, key_for(input, key))
    return drop(input, key)


class EmbeddingDropout(Layer):
    """Drop whole words of a :class:`torch.nn.Embedding`, each at all of its places.

    Use this layer at the input of a language model; AWD-LSTM's p is 0.1. :class:`TokenDropout` decides for
    each place of a word instead.

    :func:`thinned.functional.embedding_dropout` has the formula.
    ``embedding`` remains a module of its own, so a decoder can share its weight, which is not dropped there.

    Args:
        embedding: a :class:`torch.nn.Embedding`.

    Shape:
        words ``(*)`` give ``(*, embedding_dim)``.

    Raises:
        TypeError: ``embedding`` is no :class:`torch.nn.Embedding`.

    Source: Gal & Ghahramani, NeurIPS 2016, section 4.2; Merity et al., ICLR 2018, section 4.3. The wrapper
    of an embedding is fastai's.

    >>> import torch, thinned
    >>> embedding = torch.nn.Embedding.from_pretrained(torch.ones(6, 2), freeze=False)
    >>> layer = thinned.EmbeddingDropout(embedding, p=0.5)
    >>> layer(torch.tensor([0, 3]), key=thinned.Key(7))
    tensor([[0., 0.],
            [2., 2.]], grad_fn=...)
    """

    def __init__(self, embedding: nn.Embedding, p: float = 0.1) -> None:
        super().__init__(p)
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding must be a torch.nn.Embedding, got {type(embedding).__name__}")
        self.embedding = embedding

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        e = self.embedding
        if not self.training:
            return e(input)  # type: ignore[no-any-return]
        options = (e.padding_idx, e.max_norm, e.norm_type, e.scale_grad_by_freq, e.sparse)
        p = float(self.p)
        return torch.ops.thinned.embedding_dropout(input, e.weight, p, True, *options)  # type: ignore[no-any-return]

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        e = self.embedding
        options = (e.padding_idx, e.max_norm, e.norm_type, e.scale_grad_by_freq, e.sparse)
        return embedding_dropout(input, e.weight, self.p, self.training, *options, key=key)
