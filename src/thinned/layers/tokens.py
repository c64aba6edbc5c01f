"""Token dropout: PatchDropout removes tokens from the sequence, TokenDropout zeroes or removes them."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
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
from thinned.nested import is_packed, of_values, refuse, shape_of
from thinned.op.from_key import apply_linear
from thinned.torch_state import compiling, is_eager, outside_graphs

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

    The result is a dense tensor, so every layer that follows computes ``P + k`` tokens, attention included,
    and needs no mask. The second example puts tokens back at their places.

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

    >>> patches = torch.zeros(2, 6, 1)  # or a learned vector for what was removed
    >>> patches.scatter(1, kept.unsqueeze(-1).expand(y[:, 1:].shape), y[:, 1:]).squeeze(-1)
    tensor([[ 0.,  0.,  3.,  4.,  5.,  0.],
            [ 8.,  0.,  0., 11., 12.,  0.]])
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
    half of the patches. Where every token has a target, as in segmentation, use :class:`TokenDropout`, or
    put the tokens back by ``return_indices``, as the function's example does.

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
    layout: torch.layout = torch.strided,
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Zero a token, all its channels at once, with probability ``p``; the sequence keeps its length.

    .. math:: y_{n,l} = \begin{cases} x_{n,l} & l < P \\ x_{n,l} / q & l \ge P,\; u(nL + l) < T \\
        0 & \text{otherwise} \end{cases}

    The first ``P`` tokens are neither zeroed nor scaled. The mask is ``thinned.keep_mask(key, (N, L), p)``
    for every ``P``. Without a prefix this is :class:`torch.nn.Dropout1d` with tokens in place of channels.

    With ``layout=torch.jagged`` the result has the kept tokens alone: a nested tensor of shape ``(N, j, *)``,
    in which ``j`` differs from sample to sample. Linear layers, normalizations,
    :func:`torch.nn.functional.scaled_dot_product_attention` and the layers of thinned take it, and compute
    the kept tokens only. A sample that keeps no token has length 0, which attention takes too. On the CPU
    PyTorch attends sample by sample, without a fused kernel: a block of ViT-T takes 0.74 of the masked form's
    time at p = 0.5, and 1.2 times that time at p = 0.2. There ``to_padded_tensor`` and a mask can be better.

    Args:
        input: a floating-point or complex tensor of shape ``(N, L, *)``; also a nested one of layout
            torch.jagged, if there is no prefix.
        p: the probability of dropping a token, in [0, 1].
        num_prefix_tokens: the number of leading tokens to leave alone, such as a class token.
        scale: divide kept tokens by the keep probability ``q``; False leaves them unscaled.
        layout: ``torch.strided`` puts zeros in place of dropped tokens, ``torch.jagged`` leaves them out.
        training: False returns ``input`` itself, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format, or a nested tensor.

    Raises:
        ValueError: another ``layout``. The other errors are :func:`patch_dropout`'s.
        NotImplementedError: ``layout=torch.jagged`` for DTensors, for nested tensors that are not jagged in
            dimension 1 or have holes, under :func:`torch.vmap` and other transforms, and in traces. Under
            :func:`torch.compile` it breaks the graph, and :func:`torch.utils.checkpoint.checkpoint` takes the
            layers that follow, but not the call itself: each nested tensor has symbolic sizes of its own.

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

    With a key, :func:`~thinned.functional.keep_mask` tells which tokens were kept. So a loss over kept tokens
    has their targets, and a model puts tokens back at their places:

    >>> x, key = torch.arange(1.0, 9).view(2, 4, 1), thinned.Key(3)
    >>> y = thinned.functional.token_dropout(x, 0.5, layout=torch.jagged, key=key)
    >>> keep = thinned.keep_mask(key, (2, 4), 0.5)  # with a prefix: keep[:, :num_prefix_tokens] = True
    >>> targets = torch.arange(8).view(2, 4)
    >>> y.values().squeeze(-1), targets[keep]
    (tensor([ 6.,  8., 10., 12., 14., 16.]), tensor([2, 3, 4, 5, 6, 7]))
    >>> torch.zeros(2, 4, 1).index_put((keep,), y.values()).squeeze(-1)
    tensor([[ 0.,  0.,  6.,  8.],
            [10., 12., 14., 16.]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(token_dropout, locals())
    T, factor = threshold_and_scale(p)
    _check_layout(layout)
    if not _drops("token_dropout", input, p, training, key, num_prefix_tokens, dense=num_prefix_tokens != 0):
        return input
    factor = factor if scale else 1.0
    if layout is not torch.jagged:
        return _masked_tokens(input, key, num_prefix_tokens, T, factor)
    return _kept_tokens(input, key, num_prefix_tokens, T, factor)


@outside_graphs  # PyTorch compiles layers of nested tensors, but not in the graph that makes them
def _kept_tokens(x: Any, key: Key | None, num_prefix_tokens: int, T: int, factor: float) -> Tensor:
    if x.is_nested and not (x.layout is torch.jagged and is_packed(x)):
        refuse("token_dropout with layout=torch.jagged", x, "a jagged one, ragged in 1 and without holes")
    rows = x.values() if x.is_nested else x.flatten(0, 1)
    if not is_eager(rows):
        raise NotImplementedError(
            f"token_dropout with layout=torch.jagged got a {type(x).__name__} under a transform or in a "
            "trace; accepted: a plain tensor, not on the meta device; or use layout=torch.strided"
        )
    key = key_for(x, key)
    y, ones = _masked_tokens(x, key, num_prefix_tokens, T, factor), rows.new_ones(rows.shape[0])
    if x.is_nested:
        offsets, rows = x.offsets(), y.values()
        keep = apply(of_values(x, ones), key, (), False, T, 1.0).values()
    else:
        samples, tokens = x.shape[:2]
        offsets, rows = torch.arange(samples + 1, device=x.device) * tokens, y.flatten(0, 1)
        keep = apply(ones.view(samples, tokens), key, (), False, T, 1.0)
        keep[:, :num_prefix_tokens] = 1
        keep = keep.flatten()
    before = F.pad((keep != 0).cumsum(0), (1, 0))
    kept = rows.index_select(0, keep.nonzero().squeeze(1))
    return torch.nested.nested_tensor_from_jagged(kept, before[offsets])


def _masked_tokens(input: Tensor, key: Key | None, num_prefix_tokens: int, T: int, factor: float) -> Tensor:
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

    Use this layer on embeddings where every token has a target, as in tagging. With ``layout=torch.jagged``
    the layers that follow compute the kept tokens alone. :class:`PatchDropout` keeps the same number of
    tokens in every sample. :class:`EmbeddingDropout` drops a word at all of its places.

    :func:`thinned.functional.token_dropout` has the formula.

    Source: Gal and Ghahramani, NIPS 2016, section 4.2, for words.

    >>> import torch, thinned
    >>> thinned.TokenDropout(0.5, num_prefix_tokens=1)(torch.ones(1, 5, 2), key=thinned.Key(3))[..., 0]
    tensor([[1., 0., 2., 2., 2.]])
    """

    layout: torch.layout = torch.strided  # on the class, so that layers pickled without it still run

    def __init__(
        self,
        p: float = 0.5,
        *,
        num_prefix_tokens: int = 0,
        scale: bool = True,
        layout: torch.layout = torch.strided,
    ) -> None:
        super().__init__(p)
        _check_prefix(num_prefix_tokens)
        _check_layout(layout)
        self.num_prefix_tokens = num_prefix_tokens
        self.scale = scale
        if layout is not torch.strided:
            self.layout = layout

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return token_dropout(
            input,
            self.p,
            num_prefix_tokens=self.num_prefix_tokens,
            scale=self.scale,
            layout=self.layout,
            training=self.training,
            key=key,
        )


def _check_prefix(num_prefix_tokens: int) -> None:
    check_integer("num_prefix_tokens", num_prefix_tokens, least=0)


def _check_layout(layout: torch.layout) -> None:
    if layout not in (torch.strided, torch.jagged):
        raise ValueError(f"layout has to be either torch.strided or torch.jagged, but got {layout!r}")


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
