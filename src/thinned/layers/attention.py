"""Dropout inside attention: DropHead drops heads, DropKey drops keys before the softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from operator import index
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from thinned import op
from thinned.checks import check_integer, check_real, integers
from thinned.geometry import dims_of
from thinned.keys import Key
from thinned.layers._arguments import (
    apply,
    broadcasts,
    check_device,
    check_tensor,
    drops,
    kept,
    key_for,
    threshold_and_scale,
)
from thinned.layers._module import Layer, checked_dims
from thinned.layers._overrides import module_node, overridden
from thinned.layers.residual import computes_rows
from thinned.nested import shape_of
from thinned.op.from_key import apply_linear
from thinned.op.noise import opmath
from thinned.torch_state import compiling, is_eager

# PyTorch 2.11 compiles no attention whose mask has a number of rows that is not known before.
COMPILES_MASKS_OF_ROWS = torch.__version__ >= "2.13"

__all__ = ["DropHead", "DropKey", "drop_head", "drop_head_attention", "drop_key"]


def drop_head(
    input: Tensor,
    p: float = 0.5,
    *,
    training: bool = True,
    dim: int = 1,
    normalize: Literal["kept", "expected"] = "kept",
    key: Key | None = None,
) -> Tensor:
    r"""Zero each attention head's output with probability ``p``: one decision for each sample and head.

    .. math:: y_{n,h} = \begin{cases} s_n\, x_{n,h} & u(nH + h) < T \\ 0 & \text{otherwise} \end{cases}
        \qquad s_n = \frac{H}{\#\{h : u(nH + h) < T\}}
        \quad\text{("kept"; "expected" has } 1/q \text{)}

    ``"kept"`` divides by the share of heads that the sample keeps, as the paper does: a sum over equal heads
    does not change, and :math:`E[y] = (1 - p^H)\, x` because a sample that loses every head is zero.
    ``"expected"`` divides by the keep probability, as dropout does: :math:`E[y] = x`.

    Args:
        input: the heads' outputs before they are joined, a floating-point or complex tensor of shape
            ``(N, H, L, D)``, or of any other with samples in dimension 0 and heads in ``dim``.
        p: the probability of dropping a head, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        dim: the heads' dimension; 0 for the heads of a single sample.
        normalize: ``"kept"`` or ``"expected"``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or another ``normalize``.
        IndexError: ``input`` has no such dimension.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`.

    Source: Zhou et al., "Scheduled DropHead: a regularization method for transformer models", Findings of
    EMNLP 2020, section 3.

    >>> import torch, thinned
    >>> thinned.functional.drop_head(torch.ones(2, 3, 1, 2), 0.5, key=thinned.Key(3)).flatten(1)
    tensor([[0., 0., 0., 0., 3., 3.],
            [1., 1., 1., 1., 1., 1.]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(drop_head, locals())
    T, scale = threshold_and_scale(p)
    check_integer("dim", dim)
    _check_normalize(normalize)
    if not drops("drop_head", input, p, training, key, dense=normalize == "kept"):
        return input
    ndim = input.dim()
    if not -ndim <= dim < ndim:
        raise IndexError(
            f"drop_head got dim={dim} and a tensor of shape {shape_of(input)}; accepted: "
            f"{f'{-ndim} .. {ndim - 1}' if ndim else 'a tensor with a dimension for the heads'}"
        )
    # index: Dynamo finds no number in a tuple with a symbolic one, and would share the mask among heads.
    dim = index(dim) % ndim
    shared_dims = [d for d in range(ndim) if d not in (0, dim)]
    if normalize == "expected":
        return apply(input, key, shared_dims, False, T, scale)

    def by_kept(x: Tensor, key: Key) -> Tensor:
        y = apply(x, key, shared_dims, False, T, 1.0)
        factor = op.shard_like(_share(kept(key, x.shape, shared_dims, T), dim, x.dtype), x)
        if y.is_complex():
            # A complex product would make NaN of the finite part beside an infinite one.
            torch.view_as_real(y).mul_(factor.unsqueeze(-1))
        else:
            y.mul_(factor)
        return y

    return apply_linear(by_kept, input, key_for(input, key))


def _share(keep: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """The number of heads over that of kept heads, for values of ``dtype``."""
    return keep.shape[dim] / keep.sum(dim, keepdim=True).clamp(min=1).to(opmath(dtype))


def drop_head_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: float = 0.5,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    normalize: Literal["kept", "expected"] = "kept",
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Attention in which each head is dropped with probability ``p``, and computed only if it is kept.

    .. math:: y_{n,h} = \begin{cases} s_n\, \operatorname{softmax}(c\, Q_{n,h} K_{n,h}^\top + B_{n,h})\,
        V_{n,h} & u(nH + h) < T \\ 0 & \text{otherwise} \end{cases}

    This is ``drop_head(scaled_dot_product_attention(q, k, v), p)`` with the same mask, to the order of
    floating-point sums, in about ``1 - p`` of the time of attention. ``s`` is that of :func:`drop_head`.

    All heads are computed, and the result masked, where Python cannot know which are kept: under
    :func:`torch.vmap` and other transforms, in traces, and for DTensors. Compiled code has one graph for any
    number of kept heads; that of PyTorch 2.11 computes all heads if samples or heads have masks of their own.

    Args:
        q: the queries, of shape ``(N, H, L, E)``.
        k: the keys of attention, of shape ``(N, H, S, E)``.
        v: the values, of shape ``(N, H, S, E_v)``.
        p: the probability of dropping a head, in [0, 1].
        attn_mask: as for :func:`torch.nn.functional.scaled_dot_product_attention`, as are the three arguments
            after it; it broadcasts to ``(N, H, L, S)``.
        is_causal: forbid a query to attend to later keys.
        scale: the factor ``c`` of the logits; by default ``1 / sqrt(E)``.
        enable_gqa: let ``k`` and ``v`` have fewer heads than ``q``.
        normalize: ``"kept"`` or ``"expected"``, as for :func:`drop_head`.
        training: False computes attention without dropout, and so does ``p = 0``.
        key: the mask's key, as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of shape ``(N, H, L, E_v)``; in memory ``(N, L, H, E_v)``, so that heads join without a copy.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or another ``normalize``.
        NotImplementedError: nested tensors.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout` and as
            :func:`torch.nn.functional.scaled_dot_product_attention`; ``q`` has not four dimensions.

    Source: Zhou et al., "Scheduled DropHead: a regularization method for transformer models", Findings of
    EMNLP 2020, section 3.

    >>> import torch, thinned
    >>> q, v = torch.zeros(2, 3, 4, 2), torch.ones(2, 3, 4, 1)
    >>> thinned.functional.drop_head_attention(q, q, v, 0.5, key=thinned.Key(3))[:, :, 0].squeeze(-1)
    tensor([[0., 0., 3.],
            [1., 1., 1.]])
    """
    if has_torch_function_variadic(q, k, v) and not compiling():
        return overridden(drop_head_attention, locals())
    T, inverse = threshold_and_scale(p)
    _check_normalize(normalize)
    active = drops("drop_head_attention", q, p, training, key, dense=True, argument="q")
    attend = partial(F.scaled_dot_product_attention, is_causal=is_causal, scale=scale)
    if not active:
        return attend(q, k, v, attn_mask, enable_gqa=enable_gqa)
    _check_attention(q, k, v, attn_mask, enable_gqa)
    if scale is not None:
        check_real("scale", scale)
    has_masks = attn_mask is not None and attn_mask.shape[:-2].numel() > 1
    if not all(computes_rows(x) for x in (q, k, v, attn_mask) if x is not None) or (
        has_masks and compiling() and not COMPILES_MASKS_OF_ROWS
    ):
        y = attend(q, k, v, attn_mask, enable_gqa=enable_gqa)
        return drop_head(y, p, normalize=normalize, key=key)
    samples, heads = q.shape[:2]
    keep = kept(key_for(q, key), (samples, heads), (), T)
    sample, head = keep.nonzero().unbind(1)

    def of_kept(x: Tensor) -> Tensor:
        # A dimension of size 1 broadcasts; consecutive heads of q share one of k and v.
        rows, own = x.shape[:2]
        place = sample % rows * own + head * own // heads
        return x.flatten(0, 1).index_select(0, place).unsqueeze(1)

    if attn_mask is not None and has_masks:
        attn_mask = of_kept(attn_mask[(None,) * (4 - attn_mask.dim())])
    y = attend(of_kept(q), of_kept(k), of_kept(v), attn_mask).squeeze(1)
    if normalize == "expected":
        y = y * inverse
    else:
        y = (y * _share(keep, 1, y.dtype)[sample].unsqueeze(-1)).to(y.dtype)
    shape = samples, heads, *y.shape[1:]
    zeros = torch.empty_permuted(shape, (0, 2, 1, 3), dtype=y.dtype, device=y.device).zero_()
    return zeros.index_put_((sample, head), y)


def _check_attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, enable_gqa: bool) -> None:
    if q.dim() != 4:
        raise RuntimeError(f"drop_head_attention needs q of shape (N, H, L, E), got {tuple(q.shape)}")
    samples, heads, queries, _ = q.shape
    others = {"k": k, "v": v} | ({} if attn_mask is None else {"attn_mask": attn_mask})
    for name, x in others.items():
        check_tensor("drop_head_attention", name, x)
        check_device(name, x, q, "q")
        if name == "attn_mask":
            fits = broadcasts(x.shape, (samples, heads, queries, k.shape[2]))
        else:
            fits = x.dim() == 4 and x.shape[0] in (1, samples)
            fits = fits and (x.shape[1] in (1, heads) or (enable_gqa and not heads % max(x.shape[1], 1)))
        if not fits:
            raise RuntimeError(
                f"drop_head_attention got {name} of shape {tuple(x.shape)}, which does not fit q of shape "
                f"{tuple(q.shape)}"
            )


def _check_normalize(normalize: str) -> None:
    if normalize not in ("kept", "expected"):
        raise ValueError(f"normalize has to be either 'kept' or 'expected', but got {normalize!r}")


def _mask_shape(x: Tensor, key: Key, shared_dims: Sequence[int]) -> list[int]:
    """``x``'s shape, with size 1 along shared dimensions; samples with keys of their own share nothing."""
    once = {dim % x.dim() for dim in shared_dims} - set(range(key.bits.dim()))
    return [1 if dim in once else size for dim, size in enumerate(x.shape)]


class DropHead(Layer):
    """Drop whole heads of attention, for inputs such as ``(N, H, L, D)``.

    Use this layer on the heads' outputs before they are joined, so that the model does not rely on a few
    heads. The paper varies p by :func:`thinned.schedules.v_shape`. For single attention weights use
    :class:`DropKey`.

    :func:`thinned.functional.drop_head` has the formula. :func:`thinned.functional.drop_head_attention` does
    not compute dropped heads.

    Source: Zhou et al., "Scheduled DropHead", Findings of EMNLP 2020, section 3.

    >>> import thinned
    >>> thinned.DropHead(0.5)(torch.ones(2, 3, 1, 1), key=thinned.Key(3)).flatten()
    tensor([0., 0., 3., 1., 1., 1.])
    """

    def __init__(
        self, p: float = 0.5, *, dim: int = 1, normalize: Literal["kept", "expected"] = "kept"
    ) -> None:
        super().__init__(p)
        check_integer("dim", dim)
        _check_normalize(normalize)
        self.dim = dim
        self.normalize = normalize

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return drop_head(
            input, self.p, training=self.training, dim=self.dim, normalize=self.normalize, key=key
        )


def drop_key(
    input: Tensor,
    p: float = 0.5,
    *,
    training: bool = True,
    broadcast_dims: Sequence[int] = (),
    key: Key | None = None,
) -> Tensor:
    r"""Drop keys of attention with probability ``p``: their logits become the lowest finite number.

    .. math:: y_i = \begin{cases} x_i & u(i) < T \\ \min(x_i, -m) & \text{otherwise} \end{cases}
        \qquad m = \text{the dtype's largest finite number}

    The softmax that follows gives a dropped key no weight and shares it among the others, so that nothing is
    rescaled. A query that loses all of its keys attends to all of them equally, because ``-m`` is finite; the
    paper's ``-1e12`` gives NaN in float16. A logit of ``-inf`` stays ``-inf``: what a causal or padding mask
    of ``-inf`` forbids stays forbidden, whether that mask is added before or after. A mask of ``-m`` does not
    promise that.

    Args:
        input: the logits right before the softmax, a floating-point tensor such as ``(N, H, L_q, L_k)``.
        p: the probability of dropping, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        broadcast_dims: dimensions along which all share one decision. By default each query of each head
            drops keys of its own, as in the paper; ``(1,)`` drops the same keys in all heads, ``(1, 2)`` for
            all queries too.
        key: what the mask is a function of, as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format. The gradient of a dropped logit is 0.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError, RuntimeError, IndexError: as :func:`~thinned.functional.dropout`; ``input`` is complex.

    Source: Li et al., "DropKey for vision transformer", CVPR 2023, section 3 and algorithm 1.

    >>> import torch, thinned
    >>> thinned.functional.drop_key(torch.zeros(2, 4), 0.5, key=thinned.Key(3)).softmax(-1)
    tensor([[0.0000, 0.0000, 0.5000, 0.5000],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(drop_key, locals())
    T, _ = threshold_and_scale(p)
    if not drops("drop_key", input, p, training, key, dense=True):
        return input
    if input.is_complex():
        raise RuntimeError(f"drop_key needs real logits, got {input.dtype} of shape {tuple(input.shape)}")
    dims = integers("broadcast_dims", broadcast_dims)
    shared_dims = dims_of(input.shape, dims)  # raises IndexError before a key is drawn
    lowest = torch.finfo(input.dtype).min

    def derivative(x: Tensor, key: Key) -> Tensor:
        return apply(x, key, dims, False, T, 1.0)

    def value(x: Tensor, key: Key) -> Tensor:
        if dims:
            # One pass of the kernel over the mask; a bool mask and masked_fill would take twice as long.
            no_limit = x.new_full((), math.inf).expand(_mask_shape(x, key, dims))
            return torch.minimum(x, apply(no_limit, key, (), False, T, 1.0, fill=lowest))
        # One pass more only for -inf, the one number below the fill.
        y = apply(x, key, (), False, T, 1.0, fill=lowest)
        return torch.minimum(y, x, out=y if is_eager(y) else None)

    return apply_linear(derivative, input, key_for(input, key, shared_dims=shared_dims), value)


class DropKey(Layer):
    """Drop keys of attention, on the logits right before the softmax.

    Use this layer in vision transformers instead of a :class:`Dropout` after the softmax, which leaves rows
    that no longer sum to 1. The paper's p falls from the first block to the last. Fused attention, such as
    :func:`torch.nn.functional.scaled_dot_product_attention`, has no place for a layer: use its ``dropout_p``.

    :func:`thinned.functional.drop_key` has the formula.

    Source: Li et al., "DropKey for vision transformer", CVPR 2023, section 3 and algorithm 1.

    >>> import thinned
    >>> thinned.DropKey(0.5)(torch.zeros(1, 4), key=thinned.Key(3)).softmax(-1)
    tensor([[0.0000, 0.0000, 0.5000, 0.5000]])
    """

    def __init__(self, p: float = 0.5, *, broadcast_dims: Sequence[int] = ()) -> None:
        super().__init__(p)
        self.broadcast_dims = checked_dims(broadcast_dims)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return drop_key(input, self.p, training=self.training, broadcast_dims=self.broadcast_dims, key=key)
