"""DropHead and DropKey."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
import thinned
from thinned import Key, keep_mask
from thinned.compare.layers.attention import ENTRIES, DropHeadFormula, DropKeyFormula
from thinned.geometry import shared
from thinned.layers.attention import DropHead, DropKey, drop_head, drop_head_attention, drop_key
from thinned.layers.residual import residual
from verdicts import breaks

KEY = Key(7)
KEYS = {"one key": KEY, "a key a row": KEY.fold(torch.arange(6))}
REAL = [dtype for dtype in oracle.DTYPES if not dtype.is_complex]
normalizations = pytest.mark.parametrize("normalize", ["kept", "expected"])


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_heads_by_the_formula(dtype: torch.dtype, key: Key, p: float) -> None:
    """Values and gradients, with NaN and infinities among both."""
    x = oracle.specials((6, 4, 5, 3), dtype).requires_grad_()
    kept = keep_mask(key, (6, 4), p)
    assert kept.any(1).all() == (p < 1)
    assert not kept.all(1).all()
    opmath = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    factor = (4 / kept.sum(1).clamp(min=1).to(opmath)).view(-1, 1, 1, 1)

    def by_formula(x: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(by_formula(x.real), by_formula(x.imag))
        return torch.where(kept[..., None, None], (x.to(opmath) * factor).to(x.dtype), 0)

    upstream = x.detach().flip(0)
    y = drop_head(x, p, key=key)
    oracle.assert_same(y, by_formula(x.detach()))
    oracle.assert_same(torch.autograd.grad(y, x, upstream)[0], by_formula(upstream))
    expected = drop_head(x, p, normalize="expected", key=key)
    oracle.assert_same(expected, oracle.dropout(x, key.bits, p, (2, 3)))


@normalizations
def test_heads_agree_with_the_formula_in_distribution(normalize: Any) -> None:
    """Every value that a sample's first head can take."""
    torch.manual_seed(0)
    counts = []
    for layer in (DropHead(0.5, normalize=normalize), DropHeadFormula(0.5, normalize=normalize)):
        y = layer(torch.ones(30_000, 4, 1, 1)).nan_to_num(nan=0.0)[:, 0, 0, 0]
        counts.append(torch.bincount((y * 3).round().long(), minlength=13))
    table = torch.stack(counts)
    assert (table[0] > 0).equal(table[1] > 0)
    assert stats.chi2_contingency(table[:, table[0] > 0].numpy()).pvalue > chance.FALSE_ALARM


@normalizations
def test_the_heads_dimension(normalize: Any) -> None:
    x = torch.randn(6, 4, 5, 3)
    y = drop_head(x, 0.5, normalize=normalize, key=KEY)
    for dim in (-3, 2, -2, 3):
        moved = drop_head(x.movedim(1, dim), 0.5, dim=dim, normalize=normalize, key=KEY)
        assert moved.movedim(dim, 1).equal(y)
    assert drop_head(x[0], 0.5, dim=0, normalize=normalize, key=KEY).equal(y[0])


def both_attentions(
    call: Callable[..., Tensor], key: Key | None, p: float = 0.5, heads: int = 4, **options: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Value and gradients of ``call``, and those of drop_head after attention, of 6 samples with 4 heads."""
    normalize, mask = options.pop("normalize", "kept"), options.get("attn_mask")
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(6, length, n, size, generator=generator).transpose(1, 2).requires_grad_()
        for length, n, size in ((5, 4, 8), (7, heads, 8), (7, heads, 3))
    )
    upstream = torch.randn(6, 4, 5, 3, generator=generator)

    def drop_after(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = F.scaled_dot_product_attention(q, k, v, **options)
        return drop_head(y, p, normalize=normalize, key=key)

    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return call(q, k, v, p, normalize=normalize, key=key, **options)

    leaves = [x for x in (q, k, v, mask) if x is not None and x.requires_grad]
    results = []
    for each in (both, drop_after):
        torch.manual_seed(3)
        y = each(q, k, v)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, upstream), torch.get_rng_state()])
    return results[0], results[1]


def close(one: list[Tensor], other: list[Tensor]) -> None:
    for mine, expected in zip(one, other, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-5)


ALLOWED = torch.rand(6, 4, 5, 7, generator=torch.Generator().manual_seed(1)) < 0.7
ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none kept": {"p": 1.0},
    "expected, causal, scale": {"normalize": "expected", "is_causal": True, "scale": 0.7},
    "groups": {"heads": 2, "enable_gqa": True, "attn_mask": ALLOWED[0, 0]},
    "mask of all": {"attn_mask": ALLOWED},
    "mask of samples": {"attn_mask": ALLOWED[:, :1, :1]},
    "mask of heads": {"attn_mask": ALLOWED[0].double().neg().float().requires_grad_()},
}


@pytest.mark.parametrize("key", [*KEYS.values(), None], ids=[*KEYS, "drawn"])
@pytest.mark.parametrize("options", ATTENTIONS.values(), ids=ATTENTIONS)
def test_attention_of_kept_heads_is_attention_with_heads_dropped(
    options: dict[str, Any], key: Key | None
) -> None:
    close(*both_attentions(drop_head_attention, key, **options))


def test_attention_computes_kept_heads_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    attend, computed = F.scaled_dot_product_attention, []

    def counting(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        computed.append(q.shape[0])
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counting)
    q = torch.randn(6, 4, 5, 8)
    y = drop_head_attention(q, q, q, 0.5, key=KEY)
    assert computed == [int(keep_mask(KEY, (6, 4), 0.5).sum())]
    assert y.transpose(1, 2).is_contiguous()
    assert drop_head_attention(q, q, q, 0.5, training=False).equal(attend(q, q, q))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mask", [None, ALLOWED], ids=["no mask", "masks"])
def test_compiled_attention_has_one_graph_for_any_number_of_heads(mask: Tensor | None) -> None:
    fast = torch.compile(drop_head_attention, fullgraph=True, backend="aot_eager")
    close(*both_attentions(fast, KEY, attn_mask=mask))
    with torch.compiler.set_stance("fail_on_recompile"):
        for i in range(3):
            close(*both_attentions(fast, KEY.fold(i), attn_mask=mask))


def test_attention_in_address_and_in_a_residual_branch() -> None:
    """The masks are those of drop_head, for all rows of the batch and for some."""
    x, samples = torch.randn(6, 4, 5, 8), torch.arange(6)

    def masked(x: Tensor) -> Tensor:
        return drop_head(F.scaled_dot_product_attention(x, x, x), 0.5)

    class Model(nn.Module):
        def __init__(self, branch: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.branch = branch

        def forward(self, x: Tensor) -> Tensor:
            return residual(self.branch(x), self.branch, 0.5)

    for given in (samples, None):
        results = []
        for branch in (masked, lambda x: drop_head_attention(x, x, x, 0.5)):
            model = Model(branch)
            with thinned.address(model, seed=0, step=0, samples=given):
                results.append(model(x))
        torch.testing.assert_close(*results)


@pytest.mark.filterwarnings(
    "ignore:There is a performance drop"
)  # PyTorch's attention on the CPU has no rule
def test_attention_under_vmap_is_masked() -> None:
    x = torch.randn(3, 2, 4, 5, 8)
    y = torch.func.vmap(lambda x: drop_head_attention(x, x, x, 0.5, key=KEY))(x)
    torch.testing.assert_close(
        y, torch.stack([drop_head_attention(each, each, each, 0.5, key=KEY) for each in x])
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dims", [(), (1,), (1, 2), (-1,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_keys_by_the_formula(dtype: torch.dtype, key: Key, dims: tuple[int, ...]) -> None:
    x = oracle.specials((6, 3, 5, 7), dtype).requires_grad_()
    lowest, upstream = torch.finfo(dtype).min, x.detach().flip(0)
    by_formula = partial(oracle.masked_affine, key=key.bits, geometry=shared(x.shape, dims, key.bits.dim()))
    y = drop_key(x, 0.5, broadcast_dims=dims, key=key)
    value = by_formula(x, T=2**31, scale=1.0, fill=lowest)
    oracle.assert_same(y, torch.where(x.isneginf() | x.isnan(), x.detach(), value))
    (gradient,) = torch.autograd.grad(y, x, upstream)
    oracle.assert_same(gradient, by_formula(upstream, T=2**31, scale=1.0))


def test_keys_agree_with_the_paper_in_distribution() -> None:
    """How many of 6 keys a query has no weight for; in float32 none of 6 counts as 6 of 6 in both."""
    torch.manual_seed(0)
    counts = [
        torch.bincount((layer(torch.randn(2_000, 3, 5, 6)).softmax(-1) == 0).sum(-1).flatten(), minlength=6)
        for layer in (DropKey(0.5), DropKeyFormula(0.5))
    ]
    assert stats.chi2_contingency(torch.stack(counts).numpy()).pvalue > chance.FALSE_ALARM


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "call",
    [
        drop_head,
        partial(drop_head, normalize="expected"),
        drop_key,
        partial(drop_key, broadcast_dims=(1, 2)),
    ],
    ids=["kept", "expected", "keys", "whole keys"],
)
def test_compiled(call: Callable[..., Tensor]) -> None:
    """Value and gradient, at two lengths, with a key, keys and a drawn one."""
    fast = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, keys in ((5, (KEY, KEY.fold(torch.arange(4)), None)), (7, (KEY,))):
        for key in keys:
            results = []
            for each in (call, fast):
                torch.manual_seed(3)
                x = torch.linspace(1, 2, 4 * 3 * tokens * 2).view(4, 3, tokens, 2).requires_grad_()
                y = each(x, key=key)
                results.append((y.detach(), *torch.autograd.grad(y.clamp(min=-9).square().sum(), x)))
            for eager, other in zip(*results, strict=True):
                oracle.assert_same(other, eager)


def test_wrong_arguments() -> None:
    x, q = torch.ones(2, 3), torch.ones(2, 4, 5, 8)
    for k, options in ((q[:, :2], {}), (q[:1], {"attn_mask": q[:, :3]}), (q[:, :3], {"enable_gqa": True})):
        with pytest.raises(RuntimeError, match=r"does not fit q of shape \(2, 4, 5, 8\)"):
            drop_head_attention(q, k, k, **options)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"q of shape \(N, H, L, E\), got \(4, 5, 8\)"):
        drop_head_attention(q[0], q[0], q[0])
    with pytest.raises(ValueError, match="either 'kept' or 'expected'"):
        drop_head_attention(q, q, q, normalize="all")  # type: ignore[arg-type]
    for call in (lambda: DropHead(normalize="all"), lambda: drop_head(x, normalize="all")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="either 'kept' or 'expected', but got 'all'"):
            call()
    with pytest.raises(IndexError, match=re.escape("dim=2 and a tensor of shape (2, 3); accepted: -2 .. 1")):
        drop_head(x, dim=2)
    with pytest.raises(IndexError, match="a tensor with a dimension for the heads"):
        drop_head(torch.ones(()), dim=0)
    state = torch.get_rng_state()
    with pytest.raises(IndexError, match=re.escape("names dimension 2, but for shape (2, 3)")):
        drop_key(x, broadcast_dims=(2,))
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(RuntimeError, match="needs real logits, got torch"):
        drop_key(x.to(torch.complex64))


def test_modules() -> None:
    heads, keys = DropHead(0.25, dim=2, normalize="expected"), DropKey(0.3, broadcast_dims=[1, 2])
    assert repr(heads) == "thinned.DropHead(p=0.25, dim=2, normalize='expected')"
    assert repr(keys) == "thinned.DropKey(p=0.3, broadcast_dims=(1, 2))"
    x = torch.randn(3, 4, 5, 6)
    assert heads(x, key=KEY).equal(drop_head(x, 0.25, dim=2, normalize="expected", key=KEY))
    assert keys(x, key=KEY).equal(drop_key(x, 0.3, broadcast_dims=(1, 2), key=KEY))


class _WrongKeys(nn.Module):
    def __init__(self, p: float = 0.5, *, wrong: str) -> None:
        super().__init__()
        self.p, self.wrong = p, wrong

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand_like(x) < 1 - self.p
        if self.wrong == "scaled":
            return torch.where(keep, x / (1 - self.p), torch.finfo(x.dtype).min)
        return torch.where(keep, x, -math.inf if self.wrong == "-inf" else torch.finfo(x.dtype).min)


HEADS, KEYS_ENTRY = ENTRIES


@pytest.mark.parametrize("law", ["share of kept", "mean of kept"])
def test_a_wrong_drop_head_is_caught(law: str) -> None:
    assert breaks(HEADS, law, partial(DropHead, normalize="expected"))


@pytest.mark.parametrize(
    ("law", "make"),
    [
        ("weights", partial(_WrongKeys, wrong="scaled")),
        ("no keys", partial(_WrongKeys, wrong="-inf")),
        ("forbidden keys", partial(_WrongKeys, wrong="-inf")),
        ("forbidden keys", partial(_WrongKeys, wrong="lowest for -inf")),
        ("gradient of dropped", DropKeyFormula),
    ],
)
def test_a_wrong_drop_key_is_caught(law: str, make: Callable[..., nn.Module]) -> None:
    assert breaks(KEYS_ENTRY, law, make)
