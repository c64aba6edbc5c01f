"""Dropout of whole tokens: removed from the sequence, or zeroed in their place."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor, nn

from thinned import op
from thinned.geometry import shared
from thinned.keys import Key
from thinned.layers._arguments import apply, check_input, key_for, threshold_and_scale
from thinned.nested import shape_of
from thinned.op.from_key import apply_linear

__all__ = ["PatchDropout", "TokenDropout", "check_prefix", "patch_dropout", "token_dropout"]


@overload
def patch_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    return_indices: Literal[False] = False,
    key: Key | None = None,
) -> Tensor: ...
@overload
def patch_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    return_indices: bool,
    key: Key | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]: ...
def patch_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    return_indices: bool = False,
    key: Key | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    r"""Keep a random subset of each sample's tokens, of one size for all, and remove the others.

    .. math:: y_n = (x_{n,1}, \dots, x_{n,P},\; x_{n,s_1}, \dots, x_{n,s_k})
        \qquad k = \max(1, \lfloor (L-P)(1-p) \rfloor)

    The first ``P`` tokens always stay. ``s`` are those ``k`` of the ``L - P`` others that have the smallest
    random numbers ``u``, each a function of the key and of the token's position in ``(N, L)`` alone; two
    equal numbers, which a pair has with probability ``2**-32``, count by position. So each subset is as
    likely as any other. What is kept is not rescaled: attention averages over the tokens that are there.

    Args:
        input: a floating-point or complex tensor of shape ``(N, L, *)``.
        p: the share of tokens to remove, in [0, 1]. ``k`` is counted in floating point, as timm does; at
            least one token stays, at ``p = 1`` too, which timm refuses.
        training: False returns ``input`` itself, and so does ``p = 0``.
        num_prefix_tokens: how many tokens in front always stay, such as a class token.
        ordered: keep the tokens' order; otherwise they come in random order.
        return_indices: return the kept tokens' indices too.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of shape ``(N, P + k, *)``; with ``return_indices`` also the int64 indices of the kept
        tokens among those after the prefix, of shape ``(N, k)``, or None where nothing was removed.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``num_prefix_tokens`` below 0.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``input`` has fewer than two
            dimensions, or fewer tokens than the prefix.

    Source: Liu et al., "PatchDropout: economizing vision transformers using patch dropout", WACV 2023,
    section 3; Li et al., "Scaling language-image pre-training via masking", CVPR 2023, section 3; the
    arguments are timm's.

    >>> import torch, thinned
    >>> x = torch.arange(14.0).view(2, 7, 1)
    >>> y, kept = thinned.functional.patch_dropout(x, 0.5, return_indices=True, key=thinned.Key(3))
    >>> y.squeeze(-1)
    tensor([[ 0.,  5.,  3.,  4.],
            [ 7., 11., 12.,  8.]])
    >>> kept
    tensor([[4, 2, 3],
            [3, 4, 0]])
    """
    threshold_and_scale(p)
    check_prefix(num_prefix_tokens)
    _check("patch_dropout", input, num_prefix_tokens, key, dense=training and p != 0)
    if not training or p == 0:
        return (input, None) if return_indices else input
    samples, tokens = input.shape[:2]
    droppable = tokens - num_prefix_tokens
    bits = key_for(input, key).bits
    numbers = op.uniform(bits, (samples, tokens), shared((samples, tokens), (), bits.dim()))
    # Stable, so that equal numbers have one order on every device.
    order = numbers[:, num_prefix_tokens:].sort(dim=1, stable=True).indices
    kept = order[:, : max(1, int(droppable * (1.0 - float(p))))]
    if ordered:
        kept = kept.sort(dim=1).values
    y = _take(input, kept, num_prefix_tokens)
    return (y, kept) if return_indices else y


def _take(x: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """Each sample's prefix, and behind it the tokens ``kept``, in one copy of whole rows."""
    samples, tokens = x.shape[:2]
    rows = kept + prefix
    if prefix:
        rows = torch.cat((torch.arange(prefix, device=x.device).expand(samples, prefix), rows), dim=1)
    first = torch.arange(samples, device=x.device).unsqueeze(1) * tokens
    y = x.flatten(0, 1).index_select(0, (first + rows).flatten())
    return y.view(*rows.shape, *x.shape[2:])


def token_dropout(
    input: Tensor,
    p: float = 0.5,
    training: bool = True,
    *,
    num_prefix_tokens: int = 0,
    scale: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Zero each token as a whole with probability ``p``, in its place: the sequence keeps its length.

    .. math:: y_{n,l} = \begin{cases} x_{n,l} & l < P \\ x_{n,l} / q & l \ge P,\; u(nL + l) < T \\
        0 & \text{otherwise} \end{cases}

    The first ``P`` tokens are neither zeroed nor scaled. The decisions are
    ``thinned.keep_mask(key, (N, L), p)``, whatever ``P`` is. Without a prefix this is
    :class:`torch.nn.Dropout1d` with tokens for channels.

    Args:
        input: a floating-point or complex tensor of shape ``(N, L, *)``.
        p: the probability of dropping a token, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        num_prefix_tokens: how many tokens in front are left alone, such as a class token.
        scale: divide what is kept by the keep probability ``q``; False leaves it as it is.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``num_prefix_tokens`` below 0.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``input`` has fewer than two
            dimensions, or fewer tokens than the prefix.

    Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NIPS 2016, section 4.2, which zeroes whole embeddings; there a word's decision is one for all
    its places, here each place has its own.

    >>> import torch, thinned
    >>> thinned.functional.token_dropout(torch.ones(1, 5, 2), 0.5, num_prefix_tokens=1, key=thinned.Key(3))
    tensor([[[1., 1.],
             [0., 0.],
             [2., 2.],
             [2., 2.],
             [2., 2.]]])
    """
    T, factor = threshold_and_scale(p)
    check_prefix(num_prefix_tokens)
    _check(
        "token_dropout", input, num_prefix_tokens, key, dense=training and p != 0 and num_prefix_tokens > 0
    )
    if not training or p == 0:
        return input
    factor = factor if scale else 1.0
    shared_dims = range(2, input.dim())
    if not num_prefix_tokens:
        return apply(input, key, shared_dims, False, T, factor)

    def behind_prefix(x: Tensor, key: Key) -> Tensor:
        y = apply(x, key, shared_dims, False, T, factor)
        y[:, :num_prefix_tokens] = x[:, :num_prefix_tokens]
        return y

    return apply_linear(behind_prefix, input, key_for(input, key))


def check_prefix(num_prefix_tokens: int) -> None:
    """Raise if this is no number of tokens."""
    if not isinstance(num_prefix_tokens, int):
        raise TypeError(
            f"num_prefix_tokens must be int, got {num_prefix_tokens!r} of type "
            f"{type(num_prefix_tokens).__name__}"
        )
    if num_prefix_tokens < 0:
        raise ValueError(f"num_prefix_tokens has to be at least 0, but got {num_prefix_tokens}")


def _check(
    name: str,
    input: Tensor,
    num_prefix_tokens: int,
    key: Key | None,
    *,
    dense: bool,
) -> None:
    check_input(name, input, key, dense=dense)
    if input.dim() < 2:
        raise RuntimeError(f"{name} needs a tensor of shape (N, L, *), got one of {shape_of(input)}")
    if not input.is_nested and input.shape[1] < num_prefix_tokens:
        raise RuntimeError(
            f"{name} got num_prefix_tokens={num_prefix_tokens} and a tensor of shape {tuple(input.shape)}, "
            f"which has {input.shape[1]} tokens along dimension 1"
        )


class PatchDropout(nn.Module):
    """:func:`thinned.functional.patch_dropout` as a module, with timm's arguments.

    Args:
        p: the share of tokens to remove, in [0, 1].
        num_prefix_tokens: how many tokens in front always stay, such as a class token.
        ordered: keep the tokens' order; otherwise they come in random order.
        return_indices: return a pair: the tokens, and the indices of the kept ones among those after the
            prefix, or None where nothing was removed. timm's ``PatchDropoutWithIndices`` does so.
        prob: timm's name for ``p``, for calls that were written for it.

    Shape:
        ``(N, L, *)`` becomes ``(N, num_prefix_tokens + k, *)`` in training, with
        ``k = max(1, int((L - num_prefix_tokens) * (1 - p)))``; in evaluation the input comes back.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``num_prefix_tokens`` below 0.
        TypeError: both ``p`` and ``prob``.

    Source: Liu et al., "PatchDropout: economizing vision transformers using patch dropout", WACV 2023,
    section 3; Li et al., "Scaling language-image pre-training via masking", CVPR 2023, section 3.

    >>> import torch, thinned
    >>> x = torch.arange(7.0).view(1, 7, 1)
    >>> thinned.PatchDropout(0.5, ordered=True)(x, key=thinned.Key(3)).flatten()
    tensor([0., 3., 4., 5.])
    """

    def __init__(
        self,
        p: float = 0.5,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        return_indices: bool = False,
        *,
        prob: float | None = None,
    ) -> None:
        super().__init__()
        if prob is not None:
            if p != 0.5:
                raise TypeError(f"PatchDropout() got p={p} and prob={prob}, two names for one argument")
            p = prob
        threshold_and_scale(p)
        check_prefix(num_prefix_tokens)
        self.p = p
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered
        self.return_indices = return_indices

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        return patch_dropout(
            input,
            self.p,
            self.training,
            num_prefix_tokens=self.num_prefix_tokens,
            ordered=self.ordered,
            return_indices=self.return_indices,
            key=key,
        )

    def extra_repr(self) -> str:
        return (
            f"p={self.p}, num_prefix_tokens={self.num_prefix_tokens}, ordered={self.ordered}, "
            f"return_indices={self.return_indices}"
        )


class TokenDropout(nn.Module):
    """:func:`thinned.functional.token_dropout` as a module.

    Args:
        p: the probability of dropping a token, in [0, 1].
        num_prefix_tokens: how many tokens in front are left alone, such as a class token.
        scale: divide what is kept by the keep probability.

    Shape:
        ``(N, L, *)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``num_prefix_tokens`` below 0.

    Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NIPS 2016, section 4.2, for words; here each place has its own decision.

    >>> import torch, thinned
    >>> thinned.TokenDropout(0.5, num_prefix_tokens=1)(torch.ones(1, 5, 2), key=thinned.Key(3))[..., 0]
    tensor([[1., 0., 2., 2., 2.]])
    """

    def __init__(self, p: float = 0.5, num_prefix_tokens: int = 0, scale: bool = True) -> None:
        super().__init__()
        threshold_and_scale(p)
        check_prefix(num_prefix_tokens)
        self.p = p
        self.num_prefix_tokens = num_prefix_tokens
        self.scale = scale

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        return token_dropout(
            input, self.p, self.training, num_prefix_tokens=self.num_prefix_tokens, scale=self.scale, key=key
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, num_prefix_tokens={self.num_prefix_tokens}, scale={self.scale}"
