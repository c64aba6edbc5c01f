"""DropHead and DropKey."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
from thinned import Key, keep_mask
from thinned.compare.layers.attention import ENTRIES, DropHeadFormula, DropKeyFormula
from thinned.geometry import shared
from thinned.layers.attention import DropHead, DropKey, drop_head, drop_key
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
    x = torch.ones(2, 3)
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
