"""Token dropout: PatchDropout removes tokens from the sequence, TokenDropout zeroes them in place."""

from __future__ import annotations

from functools import partial
from typing import Literal, overload

import torch
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary

from thinned import op
from thinned.checks import check_integer
from thinned.distributed.shards import is_dtensor
from thinned.geometry import shared
from thinned.keys import Key
from thinned.layers._arguments import apply, check_p, drops, key_for, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.nested import shape_of
from thinned.op.from_key import apply_linear
from thinned.torch_state import compiling

__all__ = ["PatchDropout", "TokenDropout", "patch_dropout", "token_dropout"]


@overload
def patch_dropout(
    input: Tensor,
    p: float = 0.5,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    return_indices: Literal[False] = False,
    training: bool = True,
    key: Key | None = None,
) -> Tensor: ...
@overload
def patch_dropout(
    input: Tensor,
    p: float = 0.5,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    return_indices: bool,
    training: bool = True,
    key: Key | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]: ...
def patch_dropout(
    input: Tensor,
    p: float = 0.5,
    *,
    num_prefix_tokens: int = 1,
    ordered: bool = False,
    return_indices: bool = False,
    training: bool = True,
    key: Key | None = None,
) -> Tensor | tuple[Tensor, Tensor | None]:
    r"""Remove a random share ``p`` of each sample's tokens; every sample keeps the same number.

    .. math:: y_n = (x_{n,1}, \dots, x_{n,P},\; x_{n,s_1}, \dots, x_{n,s_k})
        \qquad k = \max(1, \lfloor (L-P)(1-p) \rfloor)

    The first ``P`` tokens always stay. ``s`` are the ``k`` other tokens with the smallest random numbers
    ``u``, which depend on the key and on the token's position in ``(N, L)`` alone. Position orders equal
    numbers, which a pair has with probability ``2**-32``. All subsets are equally likely. Kept tokens are
    not rescaled, because attention averages over the tokens that are present.

    Args:
        input: a floating-point or complex tensor of shape ``(N, L, *)``.
        p: the share of tokens to remove, in [0, 1]. ``k`` is computed in floating point, as in timm; at
            least one token stays, even at ``p = 1``, which timm refuses.
        num_prefix_tokens: the number of leading tokens that always stay, such as a class token.
        ordered: keep the tokens' order; otherwise they come in random order.
        return_indices: also return the indices of the kept tokens.
        training: False returns ``input`` itself, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of shape ``(N, P + k, *)``; with ``return_indices`` also the int64 indices of the kept
        tokens among those after the prefix, of shape ``(N, k)``, or None where nothing was removed.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``num_prefix_tokens`` below 0.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``input`` has fewer than two
            dimensions, or fewer tokens than the prefix.

    Source: Liu et al., "PatchDropout: economizing vision transformers using patch dropout", WACV 2023,
    section 3; Li et al., "Scaling language-image pre-training via masking", CVPR 2023, section 3.

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
    if has_torch_function_unary(input) and not compiling():
        return overridden(patch_dropout, locals())
    check_p(p)
    if not _drops("patch_dropout", input, p, training, key, num_prefix_tokens, dense=True):
        return (input, None) if return_indices else input
    samples, tokens = input.shape[:2]
    if is_dtensor(input):
        input = op.unsharded(input, 1)
    bits = key_for(input, key).bits
    numbers = op.uniform(bits, (samples, tokens), shared((samples, tokens), (), bits.dim()))
    # A stable sort orders equal numbers alike on every device.
    order = numbers[:, num_prefix_tokens:].sort(dim=1, stable=True).indices
    kept = order[:, : max(1, int(order.shape[1] * (1.0 - float(p))))]
    if ordered:
        kept = kept.sort(dim=1).values
    take = partial(_take, prefix=num_prefix_tokens)
    if is_dtensor(input):
        kept = op.shard_like(kept.view(*kept.shape, *(1,) * (input.dim() - 2)), input).flatten(1)
        shape = (samples, num_prefix_tokens + kept.shape[1], *input.shape[2:])
        y = op.locally(take, input, kept, shape=shape)
    else:
        y = take(input, kept)
    return (y, kept) if return_indices else y


def _take(x: Tensor, kept: Tensor, prefix: int) -> Tensor:
    """Each sample's prefix, then its ``kept`` tokens, in one copy: gather and cat would copy twice."""
    samples, tokens = x.shape[:2]
    positions = kept + prefix
    if prefix:
        leading = torch.arange(prefix, device=x.device).expand(samples, prefix)
        positions = torch.cat((leading, positions), dim=1)
    first = torch.arange(samples, device=x.device).unsqueeze(1) * tokens
    y = x.flatten(0, 1).index_select(0, (first + positions).flatten())
    return y.view(*positions.shape, *x.shape[2:])


class PatchDropout(Layer):
    """Remove tokens from a sequence, with timm's arguments in timm's order.

    Use this layer in a vision transformer after the position embedding: at p = 0.5 each block computes on
    half of the patches. Where every token has a target, as in segmentation, use :class:`TokenDropout`.

    :func:`thinned.functional.patch_dropout` has the formula. With ``return_indices`` the layer is timm's
    ``PatchDropoutWithIndices``.

    Args:
        prob: timm's name for ``p``; TypeError if both are given.

    Source: Liu et al., WACV 2023, section 3; Li et al., CVPR 2023, section 3.

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
        if prob is not None and p != 0.5:
            raise TypeError(f"PatchDropout() got p={p} and prob={prob}, two names for one argument")
        super().__init__(*(p, "p") if prob is None else (prob, "prob"))
        _check_prefix(num_prefix_tokens)
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered
        self.return_indices = return_indices

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return patch_dropout(
            input,
            self.p,
            num_prefix_tokens=self.num_prefix_tokens,
            ordered=self.ordered,
            return_indices=self.return_indices,
            training=self.training,
            key=key,
        )


def token_dropout(
    input: Tensor,
    p: float = 0.5,
    *,
    num_prefix_tokens: int = 0,
    scale: bool = True,
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Zero a token, all its channels at once, with probability ``p``; the sequence keeps its length.

    .. math:: y_{n,l} = \begin{cases} x_{n,l} & l < P \\ x_{n,l} / q & l \ge P,\; u(nL + l) < T \\
        0 & \text{otherwise} \end{cases}

    The first ``P`` tokens are neither zeroed nor scaled. The mask is ``thinned.keep_mask(key, (N, L), p)``
    for every ``P``. Without a prefix this is :class:`torch.nn.Dropout1d` with tokens in place of channels.

    Args:
        input: a floating-point or complex tensor of shape ``(N, L, *)``.
        p: the probability of dropping a token, in [0, 1].
        num_prefix_tokens: the number of leading tokens to leave alone, such as a class token.
        scale: divide kept tokens by the keep probability ``q``; False leaves them unscaled.
        training: False returns ``input`` itself, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format. The errors are :func:`patch_dropout`'s.

    Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NIPS 2016, section 4.2, which zeroes word embeddings. There all places of a word share one
    decision; here each place has its own.

    >>> import torch, thinned
    >>> thinned.functional.token_dropout(torch.ones(1, 5, 2), 0.5, num_prefix_tokens=1, key=thinned.Key(3))
    tensor([[[1., 1.],
             [0., 0.],
             [2., 2.],
             [2., 2.],
             [2., 2.]]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(token_dropout, locals())
    T, factor = threshold_and_scale(p)
    if not _drops("token_dropout", input, p, training, key, num_prefix_tokens, dense=num_prefix_tokens != 0):
        return input
    factor = factor if scale else 1.0
    shared_dims = range(2, input.dim())
    if not num_prefix_tokens:
        return apply(input, key, shared_dims, False, T, factor)

    def behind_prefix(x: Tensor, key: Key) -> Tensor:
        y = apply(x, key, shared_dims, False, T, factor)
        if is_dtensor(x):
            prefix = torch.arange(x.shape[1], device=x.device) < num_prefix_tokens
            return torch.where(op.shard_like(prefix.view(-1, *(1,) * (x.dim() - 2)), x), x, y)
        y[:, :num_prefix_tokens] = x[:, :num_prefix_tokens]
        return y

    return apply_linear(behind_prefix, input, key_for(input, key))


class TokenDropout(Layer):
    """Zero whole tokens of a sequence, which keeps its length.

    Use this layer on embeddings where every token has a target, as in tagging. :class:`PatchDropout` removes
    tokens and saves their time. :class:`EmbeddingDropout` drops a word at all of its places.

    :func:`thinned.functional.token_dropout` has the formula.

    Source: Gal and Ghahramani, NIPS 2016, section 4.2, for words.

    >>> import torch, thinned
    >>> thinned.TokenDropout(0.5, num_prefix_tokens=1)(torch.ones(1, 5, 2), key=thinned.Key(3))[..., 0]
    tensor([[1., 0., 2., 2., 2.]])
    """

    def __init__(self, p: float = 0.5, *, num_prefix_tokens: int = 0, scale: bool = True) -> None:
        super().__init__(p)
        _check_prefix(num_prefix_tokens)
        self.num_prefix_tokens = num_prefix_tokens
        self.scale = scale

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return token_dropout(
            input,
            self.p,
            num_prefix_tokens=self.num_prefix_tokens,
            scale=self.scale,
            training=self.training,
            key=key,
        )


def _check_prefix(num_prefix_tokens: int) -> None:
    check_integer("num_prefix_tokens", num_prefix_tokens, least=0)


def _drops(
    name: str,
    input: Tensor,
    p: float,
    training: bool,
    key: Key | None,
    num_prefix_tokens: int,
    *,
    dense: bool,
) -> bool:
    _check_prefix(num_prefix_tokens)
    if not drops(name, input, p, training, key, dense=dense):
        return False
    if input.dim() < 2:
        raise RuntimeError(f"{name} needs an input of shape (N, L, *), got one of {shape_of(input)}")
    if not input.is_nested and input.shape[1] < num_prefix_tokens:
        raise RuntimeError(
            f"{name} got num_prefix_tokens={num_prefix_tokens} and a tensor of shape {tuple(input.shape)}, "
            f"which has {input.shape[1]} tokens along dimension 1"
        )
    return True
