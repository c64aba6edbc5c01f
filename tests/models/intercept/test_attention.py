"""Attention equals its formula with thinned's mask, and torch's where nothing is dropped."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

import oracle
import thinned
from thinned.models.intercept import intercept
from thinned.models.intercept.attention import scaled_dot_product_attention

KEY = thinned.Key(7)
P = 0.3
Q = round((1 - P) * 2**32) / 2**32


def documented(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout: Any = lambda weights: weights,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The reference of torch's documentation, in float64, with a dropout of its own."""
    dtype = query.dtype
    query, key, value = query.double(), key.double(), value.double()
    length, source = query.size(-2), key.size(-2)
    scale_factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    bias = torch.zeros(length, source, dtype=query.dtype)
    if is_causal:
        assert attn_mask is None
        allowed = torch.ones(length, source, dtype=torch.bool).tril(diagonal=0)
        bias.masked_fill_(allowed.logical_not(), float("-inf"))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros(attn_mask.shape, dtype=query.dtype).masked_fill(~attn_mask, float("-inf"))
        else:
            bias = attn_mask.double() + bias
    if enable_gqa:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
        value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
    weights = torch.softmax(query @ key.transpose(-2, -1) * scale_factor + bias, dim=-1)
    return (dropout(weights) @ value).to(dtype)


def ours(weights: Tensor) -> Tensor:
    return weights * thinned.keep_mask(KEY.fold(0), weights.shape, P) / Q


def tensors(
    *leading: int, kv: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    torch.manual_seed(0)
    query = torch.randn(*leading, 5, 8, dtype=dtype)
    return [query, *(torch.randn(*(kv or leading), 7, size, dtype=dtype) for size in (8, 6))]


CASES: dict[str, tuple[list[Tensor], dict[str, Any]]] = {
    "plain": (tensors(2, 3), {}),
    "two dimensions": (tensors(), {}),
    "five dimensions": (tensors(2, 2, 3), {}),
    "causal": (tensors(2, 3), {"is_causal": True}),
    "scale": (tensors(2, 3), {"scale": 0.7}),
    "gqa": (tensors(2, 4, kv=(2, 2)), {"enable_gqa": True}),
    "gqa causal": (tensors(2, 4, kv=(2, 1)), {"enable_gqa": True, "is_causal": True}),
    "bool mask": (tensors(2, 3), {"attn_mask": torch.rand(2, 1, 5, 7).argsort(-1) < 4}),
    "float mask": (tensors(2, 3), {"attn_mask": torch.randn(5, 7)}),
    "float64": (tensors(2, 3, dtype=torch.float64), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_sdpa_is_the_documented_formula(case: str) -> None:
    qkv, options = CASES[case]
    with intercept(key=KEY):
        y = torch_functional.scaled_dot_product_attention(*qkv, dropout_p=P, **options)
    torch.testing.assert_close(y, documented(*qkv, dropout=ours, **options), rtol=2e-5, atol=2e-6)
    oracle.assert_same(y, scaled_dot_product_attention(*qkv, dropout_p=P, **options, mask_key=KEY.fold(0)))


@pytest.mark.parametrize("case", CASES)
def test_nearly_nothing_dropped_is_nearly_torchs(case: str) -> None:
    """Our reading of every option is torch's own: at a p that rounds to 0 the two are the same."""
    qkv, options = CASES[case]
    expected = torch_functional.scaled_dot_product_attention(*qkv, **options)
    got = scaled_dot_product_attention(*qkv, dropout_p=1e-12, **options)
    torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-6)


def test_a_query_that_may_attend_to_nothing_gives_zeros() -> None:
    qkv = [x.requires_grad_() for x in tensors(2, 3)]
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    for attn_mask in (mask, torch.zeros(5, 7).masked_fill(~mask, -math.inf)):
        y = scaled_dot_product_attention(*qkv, attn_mask=attn_mask, dropout_p=P)
        assert y[:, :, 2].eq(0).all()
        assert all(grad.isfinite().all() for grad in torch.autograd.grad(y.sum(), qkv))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_as_near_as_torch(dtype: torch.dtype) -> None:
    """The error is at most twice that of the formula in torch's operations, both against float64."""
    qkv = [x.to(dtype) for x in tensors(4, 8)]
    exact = documented(*(x.double() for x in qkv), dropout=ours)
    weights = (qkv[0] @ qkv[1].transpose(-2, -1) / math.sqrt(8)).softmax(-1)
    keep = thinned.keep_mask(KEY.fold(0), weights.shape, P)
    plain = (weights * keep / Q) @ qkv[2]
    y = scaled_dot_product_attention(*qkv, dropout_p=P, mask_key=KEY.fold(0))
    assert y.dtype == dtype
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_meta_tensors_have_no_autocast() -> None:
    x = torch.empty(2, 3, 4, device="meta")
    with intercept(key=KEY):
        y = torch_functional.scaled_dot_product_attention(x, x, x, dropout_p=P)
    assert y.is_meta
    assert y.shape == x.shape


def test_autocast_applies_to_the_arguments() -> None:
    qkv, mask = tensors(2, 3), torch.randn(5, 7)
    low = [x.bfloat16() for x in (*qkv, mask)]
    with torch.autocast("cpu", torch.bfloat16), intercept(key=KEY):
        y = torch_functional.scaled_dot_product_attention(*qkv, mask, dropout_p=P)
        assert torch_functional.scaled_dot_product_attention(*qkv, mask).dtype == y.dtype == torch.bfloat16
    oracle.assert_same(y, scaled_dot_product_attention(*low, dropout_p=P, mask_key=KEY.fold(0)))


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"enable_gqa": True}], ids=str)
def test_gradcheck(options: dict[str, bool]) -> None:
    kv = (2, 2) if "enable_gqa" in options else None
    qkv = [x.requires_grad_() for x in tensors(2, 4, kv=kv, dtype=torch.float64)]

    def attend(*qkv: Tensor) -> Tensor:
        with intercept(key=KEY):
            return torch_functional.scaled_dot_product_attention(*qkv, dropout_p=P, **options)

    assert torch.autograd.gradcheck(attend, qkv, fast_mode=True)


def test_keys_for_rows() -> None:
    """A sample's result does not depend on its place, given its key."""
    qkv, keys = tensors(4, 3), KEY.fold(torch.arange(4))
    y = scaled_dot_product_attention(*qkv, dropout_p=P, mask_key=keys)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = [x[order] for x in qkv]
    again = scaled_dot_product_attention(
        *shuffled, dropout_p=P, mask_key=thinned.Key.from_bits(keys.bits[order])
    )
    torch.testing.assert_close(again, y[order])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dropout_p": 1.5}, ValueError, "between 0 and 1, but got 1.5"),
        ({"is_causal": True, "attn_mask": torch.zeros(5, 7)}, RuntimeError, "should not be set"),
        ({"attn_mask": torch.zeros(5, 7, dtype=torch.int64)}, RuntimeError, "torch.int64"),
        ({"key": torch.zeros(2, 2, 7, 8), "enable_gqa": True}, RuntimeError, "(2, 2, 7, 8) and (2, 3, 5, 8)"),
        ({"key": torch.zeros(2, 2, 7, 8)}, RuntimeError, "size"),
    ],
    ids=["p", "causal and mask", "mask of integers", "gqa heads", "heads"],
)
def test_errors(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = dict(zip(("query", "key", "value"), tensors(2, 3), strict=True))
    with pytest.raises(error, match=re.escape(message)):
        scaled_dot_product_attention(**(arguments | {"dropout_p": P} | change))


def multi_head(**arguments: Any) -> nn.MultiheadAttention:
    torch.manual_seed(1)
    return nn.MultiheadAttention(8, 2, dropout=P, **arguments)


MULTI_HEAD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "batch first": ({"batch_first": True}, {}),
    "bias_kv": ({"add_bias_kv": True}, {}),
    "zero_attn": ({"add_zero_attn": True}, {}),
    "other sizes": ({"kdim": 6, "vdim": 4}, {}),
    "no bias": ({"bias": False, "kdim": 6, "vdim": 4}, {}),
    "padding": ({"add_bias_kv": True, "add_zero_attn": True}, {"key_padding_mask": torch.rand(3, 7) < 0.3}),
    "2d mask": ({}, {"attn_mask": torch.rand(5, 7).argsort(-1) > 4}),
    "3d mask": ({"add_zero_attn": True}, {"attn_mask": torch.randn(6, 5, 7)}),
    "both": ({}, {"attn_mask": torch.randn(5, 7), "key_padding_mask": torch.randn(3, 7)}),
    "causal": ({}, {"attn_mask": torch.full((5, 7), -math.inf).triu(1), "is_causal": True}),
}


def given(mha: nn.MultiheadAttention, batched: bool = True) -> list[Tensor]:
    torch.manual_seed(2)
    lengths = ((5, 8), (7, mha.kdim), (7, mha.vdim))
    made = [torch.randn(length, 3, size) for length, size in lengths]
    if not batched:
        return [x[:, 0] for x in made]
    return [x.transpose(0, 1) for x in made] if mha.batch_first else made


@pytest.mark.parametrize("case", MULTI_HEAD)
@pytest.mark.parametrize("need_weights", [True, False])
def test_multi_head_reads_its_arguments_as_torch(case: str, need_weights: bool) -> None:
    """At a p that rounds to 0, where we drop nothing and still compute, the two agree."""
    options, call = MULTI_HEAD[case]
    mha = multi_head(**options)
    mha.dropout = 1e-12
    x = given(mha)
    expected, their_weights = mha.eval()(*x, **call, need_weights=need_weights)
    mha.train()
    with intercept(key=KEY) as context:
        y, weights = mha(*x, **call, need_weights=need_weights)
    assert context.count == 1
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    assert (weights is None) == (their_weights is None)
    if need_weights:
        torch.testing.assert_close(weights, their_weights)


@pytest.mark.parametrize("batched", [True, False])
def test_multi_head_is_the_formula(batched: bool) -> None:
    mha = multi_head()
    query, key, value = given(mha, batched)
    projected = [
        torch_functional.linear(x, w, b)
        for x, w, b in zip(
            (query, key, value), mha.in_proj_weight.chunk(3), mha.in_proj_bias.chunk(3), strict=True
        )
    ]
    if not batched:
        projected = [x.unsqueeze(1) for x in projected]
    q, k, v = (x.unflatten(2, (2, 4)).permute(1, 2, 0, 3) for x in projected)
    weights = ours((q @ k.transpose(-2, -1) / 2).softmax(-1))
    y = mha.out_proj((weights @ v).permute(2, 0, 1, 3).flatten(2))
    if not batched:
        y, weights = y.squeeze(1), weights.squeeze(0)
    for options in (
        {"need_weights": False},
        {"need_weights": True},
        {"need_weights": True, "average_attn_weights": False},
    ):
        with intercept(key=KEY):
            got, got_weights = mha(query, key, value, **options)
        torch.testing.assert_close(got, y)
        if got_weights is not None:
            expected = weights if "average_attn_weights" in options else weights.mean(-3)
            torch.testing.assert_close(got_weights, expected)


def test_multi_head_static_keys() -> None:
    mha = multi_head()
    query, key, value = given(mha)
    static = {"static_k": torch.randn(6, 4, 4), "static_v": torch.randn(6, 4, 4)}
    arguments = (mha.in_proj_weight, mha.in_proj_bias, None, None, False, 1e-12)
    arguments += (mha.out_proj.weight, mha.out_proj.bias)

    def forward(training: bool) -> Tensor:
        return torch_functional.multi_head_attention_forward(
            query, key, value, 8, 2, *arguments, training=training, **static
        )[0]

    with intercept():
        y = forward(True)
    torch.testing.assert_close(y, forward(False))


def test_multi_head_gradcheck() -> None:
    mha = multi_head().double()
    x = [x.double().requires_grad_() for x in given(mha)]

    def attend(*x: Tensor) -> Tensor:
        with intercept(key=KEY):
            return mha(*x)[0]

    assert torch.autograd.gradcheck(attend, x, fast_mode=True)


def test_multi_head_errors_repeat_what_was_given() -> None:
    mha = multi_head()
    x = given(mha)
    with intercept():
        with pytest.raises(RuntimeError, match=re.escape("(5, 6)")):
            mha(*x, attn_mask=torch.zeros(5, 6), need_weights=False)
        with pytest.raises(AssertionError, match=re.escape("(3, 6)")):
            mha(*x, key_padding_mask=torch.zeros(3, 6))
        with pytest.raises(RuntimeError, match="is_causal"):
            mha(*x, is_causal=True)
        with pytest.raises(AssertionError, match="got 7"):
            mha(torch.zeros(5, 3, 7), *x[1:])
