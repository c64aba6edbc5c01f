"""Attention with thinned's dropout of its weights, called with the arguments of torch.nn.functional."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from thinned import functional as F
from thinned.keys import Key
from thinned.layers._arguments import autocasts, check_p, key_for
from thinned.torch_state import (
    canonical_mask,
    in_projection,
    in_projection_packed,
    mha_shape_check,
    safe_softmax,
)

__all__ = ["multi_head_attention_forward", "scaled_dot_product_attention"]

torch_functional: Any = torch.nn.functional  # pad and linear have no types


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    mask_key: Key | None = None,
) -> Tensor:
    r"""Attention with dropout of its weights, as :func:`torch.nn.functional.scaled_dot_product_attention`.

    .. math:: y = D(\operatorname{softmax}(s\, Q K^\top + B))\, V \qquad
        D(w)_i = \begin{cases} w_i / q & u(i) < T \\ 0 & \text{otherwise} \end{cases}

    ``B`` is ``attn_mask``, or ``-inf`` where a boolean ``attn_mask`` is False or, if ``is_causal``, where
    the weight's column is greater than its row. ``i`` is the row-major position in the weights, which have
    shape ``(N, ..., H, L, S)``. As in PyTorch, a query that may attend to nothing gives zeros, and autocast
    applies to the arguments.

    Args:
        query: of shape ``(N, ..., H, L, E)``.
        key: of shape ``(N, ..., H, S, E)``.
        value: of shape ``(N, ..., H, S, E_v)``.
        attn_mask: a boolean tensor, True where attention is allowed, or a tensor to add to the logits; it
            broadcasts to the shape of the weights.
        dropout_p: the probability of dropping a weight, in [0, 1]; in evaluation as well.
        is_causal: forbid a query to attend to later keys; without an ``attn_mask`` only.
        scale: the logits' factor; default: ``1 / sqrt(E)``.
        enable_gqa: let ``key`` and ``value`` have fewer heads than ``query``. Consecutive heads of ``query``
            then share one.
        mask_key: the mask's key, as ``key`` of :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of shape ``(N, ..., H, L, E_v)``.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1] or NaN.
        RuntimeError: ``is_causal`` with an ``attn_mask``; shapes or dtypes that do not fit.
        NotImplementedError: nested tensors.

    Source: Vaswani et al., "Attention is all you need", NeurIPS 2017, section 3.2.1; the signature is
    PyTorch's.

    >>> import thinned
    >>> q, v = torch.zeros(1, 4, 2), torch.ones(1, 4, 1)
    >>> scaled_dot_product_attention(q, q, v, dropout_p=0.5, mask_key=thinned.Key(3)).flatten()
    tensor([1.0000, 2.0000, 1.5000, 1.5000])
    """
    check_p(dropout_p)
    if any(x.is_nested for x in (query, key, value)):
        raise NotImplementedError(
            "scaled_dot_product_attention of nested tensors has no dropout of thinned's; pad them first"
        )
    device = query.device.type
    autocast = autocasts(device)
    if autocast:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = _cast(query, dtype), _cast(key, dtype), _cast(value, dtype)
        attn_mask = None if attn_mask is None else _cast(attn_mask, dtype)
    with torch.autocast(device, enabled=False) if autocast else nullcontext():
        weights = _weights(query, key, attn_mask, is_causal, scale, enable_gqa)
        weights = F.dropout(weights, dropout_p, key=key_for(weights, mask_key))
        return weights @ _repeated(value, query, enable_gqa)


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _repeated(x: Tensor, query: Tensor, enable_gqa: bool) -> Tensor:
    if not enable_gqa or x.shape[-3] == query.shape[-3]:
        return x
    if query.shape[-3] % x.shape[-3]:
        raise RuntimeError(
            f"the number of heads in key and value must divide that in query, got shapes "
            f"{tuple(x.shape)} and {tuple(query.shape)}"
        )
    return x.repeat_interleave(query.shape[-3] // x.shape[-3], -3)


def _weights(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    logits = (query * factor) @ _repeated(key, query, enable_gqa).transpose(-2, -1)
    if is_causal:
        if attn_mask is not None:
            raise RuntimeError("Explicit attn_mask should not be set when is_causal=True")
        attn_mask = logits.new_ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return logits.softmax(-1)
    if attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -math.inf)
    elif attn_mask.dtype in (logits.dtype, torch.float32):
        logits = logits + attn_mask.to(logits.dtype)
    else:
        raise RuntimeError(
            "Expected attn_mask dtype to be bool or float or to match query dtype, but got "
            f"attn_mask.dtype: {attn_mask.dtype} and query.dtype: {query.dtype} instead."
        )
    return safe_softmax(logits, -1)  # type: ignore[no-any-return]


def multi_head_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
    *,
    mask_key: Key | None = None,
) -> tuple[Tensor, Tensor | None]:
    """All heads of attention, as :func:`torch.nn.functional.multi_head_attention_forward` in training.

    The arguments are PyTorch's, without ``training``, and ``mask_key`` as for
    :func:`scaled_dot_product_attention`. The mask has shape ``(N, num_heads, L, S)``, whether
    ``need_weights`` or not. As in PyTorch, the weights that are returned are those after dropout.

    Raises:
        ValueError: ``dropout_p`` outside [0, 1] or NaN.
        RuntimeError, AssertionError: arguments that do not fit each other, as in PyTorch.

    >>> import thinned
    >>> from thinned.models.intercept import intercept
    >>> mha = torch.nn.MultiheadAttention(4, 2, dropout=0.5)
    >>> x = torch.randn(5, 3, 4)
    >>> with intercept(key=thinned.Key(7)):
    ...     y, weights = mha(x, x, x, average_attn_weights=False)
    >>> bool((weights[thinned.keep_mask(thinned.Key(7).fold(0), weights.shape, 0.5)] > 0).all())
    True
    """
    batched = mha_shape_check(query, key, value, key_padding_mask, attn_mask, num_heads)
    if not batched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    length, batch, embed_dim = query.shape
    head_dim = embed_dim // num_heads
    if embed_dim != embed_dim_to_check or head_dim * num_heads != embed_dim:
        raise AssertionError(
            f"was expecting an embedding dimension of {embed_dim_to_check}, divisible by num_heads = "
            f"{num_heads}, but got {embed_dim}"
        )
    if is_causal and attn_mask is None:
        raise RuntimeError("Need attn_mask if specifying the is_causal hint.")

    if use_separate_proj_weight:
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        projections = (q_proj_weight, k_proj_weight, v_proj_weight)
        q, k, v = in_projection(query, key, value, *projections, *biases)
    else:
        q, k, v = in_projection_packed(query, key, value, in_proj_weight, in_proj_bias)
    if bias_k is not None and bias_v is not None:
        k = torch.cat([k, bias_k.repeat(1, batch, 1)])
        v = torch.cat([v, bias_v.repeat(1, batch, 1)])

    def heads(x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], batch, num_heads, head_dim).permute(1, 2, 0, 3)

    q = heads(q)
    k = heads(k) if static_k is None else static_k.reshape(batch, num_heads, -1, head_dim)
    v = heads(v) if static_v is None else static_v.reshape(batch, num_heads, -1, head_dim)
    if add_zero_attn:
        k, v = torch_functional.pad(k, (0, 0, 0, 1)), torch_functional.pad(v, (0, 0, 0, 1))
    hint = is_causal and key_padding_mask is None and not need_weights
    added = (bias_k is not None and bias_v is not None) + add_zero_attn
    bias = _merged(None if hint else attn_mask, key_padding_mask, added, q, k)

    weights: Tensor | None = None
    if need_weights:
        # Not scaled_dot_product_attention: torch gives NaN here, not 0, where nothing may be attended to.
        logits = (q * math.sqrt(1 / q.shape[-1])) @ k.transpose(-2, -1)
        weights = (logits if bias is None else logits + bias).softmax(-1)
        weights = F.dropout(weights, dropout_p, key=key_for(weights, mask_key))
        y = weights @ v
    else:
        y = scaled_dot_product_attention(q, k, v, bias, dropout_p, hint, mask_key=mask_key)
    y = y.permute(2, 0, 1, 3).reshape(length * batch, embed_dim)
    y = torch_functional.linear(y, out_proj_weight, out_proj_bias)
    y = y.reshape(length, batch, y.shape[1])
    if weights is not None and average_attn_weights:
        weights = weights.mean(1)
    if not batched:
        y, weights = y.squeeze(1), None if weights is None else weights.squeeze(0)
    return y, weights


def _merged(
    attn_mask: Tensor | None, padding: Tensor | None, added: int, q: Tensor, k: Tensor
) -> Tensor | None:
    """Both masks as one bias for logits of shape (N, H, L, S); neither has the last ``added`` columns."""
    (batch, num_heads, length, _), source = q.shape, k.shape[2]
    if attn_mask is not None:
        attn_mask = _additive(attn_mask, "attn_mask", added, q)
        shape = tuple(attn_mask.shape)
        if shape not in ((length, source), (batch * num_heads, length, source)):
            raise RuntimeError(
                f"the attn_mask of shape {shape}, columns that were added included, does not fit; accepted: "
                f"({length}, {source}) and ({batch * num_heads}, {length}, {source})"
            )
        if attn_mask.dim() == 3:
            attn_mask = attn_mask.reshape(batch, num_heads, length, source)
    if padding is None:
        return attn_mask
    padding = _additive(padding, "key_padding_mask", added, q)
    if tuple(padding.shape) != (batch, source):
        raise AssertionError(
            f"Expected a key_padding_mask of shape {(batch, source)}, columns that were added included, but "
            f"got {tuple(padding.shape)}"
        )
    padding = padding[:, None, None]
    return padding if attn_mask is None else attn_mask + padding


def _additive(mask: Tensor, name: str, added: int, q: Tensor) -> Tensor:
    canonical = canonical_mask(mask, name, None, "", q.dtype, check_other=False)
    padded: Tensor = torch_functional.pad(canonical, (0, added))
    return padded
