"""PatchDropout and TokenDropout."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
from thinned import Key, keep_mask, op, spec
from thinned.compare.laws import Verdict
from thinned.compare.layers._peers import library_class
from thinned.compare.layers.tokens import ENTRIES, PatchDropoutFormula
from thinned.layers.tokens import PatchDropout, TokenDropout, patch_dropout, token_dropout
from verdicts import verdict

KEY = Key(7)
PATCHES, TOKENS = ENTRIES
TIMM = library_class("timm.layers.patch_dropout:PatchDropout") or PatchDropoutFormula

KEYS = {"one key": KEY, "a key per sample": KEY.fold(torch.arange(4))}
each_key = pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)


def positions(samples: int, tokens: int) -> Tensor:
    """Tokens whose value is their position."""
    return torch.arange(tokens).float().expand(samples, tokens).unsqueeze(-1)


def lowest(key: Key, samples: int, tokens: int, prefix: int, count: int) -> Tensor:
    """The formula: the tokens whose numbers in the specification are lowest, in the numbers' order."""
    keys = key.bits.expand(samples).tolist()
    starts = [0] * samples if key.shape else [row * tokens for row in range(samples)]
    rows = []
    for one, start in zip(keys, starts, strict=True):
        numbers = spec.uniform(one % 2**64, np.arange(start, start + tokens, dtype=np.uint64))
        rows.append(np.argsort(numbers[prefix:], kind="stable")[:count])
    return torch.from_numpy(np.stack(rows))


@pytest.mark.usefixtures("backend")
@each_key
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize(
    ("shape", "prefix", "p"),
    [
        ((4, 40, 3), 1, 0.7),
        ((4, 40), 0, 0.5),
        ((4, 40, 2, 2), 3, 0.3),
        ((4, 10, 2), 1, 1.0),
        ((4, 10, 2), 0, 0.99),
        ((4, 2, 0), 1, 0.5),
        ((4, 1, 3), 1, 0.5),
    ],
)
def test_the_lowest_numbers_stay(
    key: Key, ordered: bool, shape: tuple[int, ...], prefix: int, p: float
) -> None:
    """Bit for bit as they were: NaN and the other special numbers of each dtype too."""
    wanted = lowest(key, *shape[:2], prefix, max(1, int((shape[1] - prefix) * (1 - p))))
    wanted = wanted.sort(1).values if ordered else wanted
    index = wanted.view(*wanted.shape, *(1,) * (len(shape) - 2)).expand(-1, -1, *shape[2:])
    for dtype in oracle.DTYPES:
        x = oracle.specials(shape, dtype)
        y, kept = PatchDropout(p, prefix, ordered, True)(x, key=key)
        assert kept.equal(wanted)
        oracle.assert_same(y, torch.cat((x[:, :prefix], x[:, prefix:].gather(1, index)), 1))


def test_no_samples() -> None:
    assert patch_dropout(torch.ones(0, 20, 4)).shape == (0, 1 + 9, 4)
    assert patch_dropout(torch.ones(0, 1)).shape == (0, 1)


def test_position_orders_equal_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "uniform", lambda _, shape, __: torch.zeros(shape, dtype=torch.int32))
    assert patch_dropout(positions(1, 1000), 0.5, num_prefix_tokens=0).flatten().tolist() == list(range(500))


@pytest.mark.parametrize("ordered", [False, True])
def test_agrees_with_timm_in_distribution(ordered: bool) -> None:
    counts = []
    for layer in (PatchDropout(0.5, 1, ordered), TIMM(0.5, 1, ordered)):
        one, other = layer(positions(30_000, 5))[:, 1:, 0].long().T
        counts.append(torch.bincount(one * 5 + other, minlength=25))
    table = torch.stack(counts)
    assert (table[0] > 0).equal(table[1] > 0)
    assert stats.chi2_contingency(table[:, table[0] > 0].numpy()).pvalue > chance.FALSE_ALARM


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 0.99])
def test_as_many_stay_as_with_timm(p: float) -> None:
    for tokens in range(2, 120):
        x = torch.empty(1, tokens, 1)
        assert PatchDropout(p)(x).shape == TIMM(p)(x).shape


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("prefix", [0, 2, 30])
@each_key
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_tokens_by_the_formula(dtype: torch.dtype, key: Key, prefix: int, scale: bool) -> None:
    """Value and gradient, in the input's memory format."""
    kept = keep_mask(key, (4, 30), 0.3).unsqueeze(-1)

    def formula(x: Tensor) -> Tensor:
        y = oracle.dropout(x, key.bits, 0.3, (2,)) if scale else torch.where(kept, x, 0)
        assert ((y != 0) | (x == 0)).equal(kept | (x == 0))
        y[:, :prefix] = x[:, :prefix]
        return y

    x = oracle.specials((4, 5, 30), dtype).transpose(1, 2)
    upstream = x.flip(0)
    leaf = x.clone().requires_grad_()
    y = TokenDropout(0.3, num_prefix_tokens=prefix, scale=scale)(leaf, key=key)
    assert y.stride() == x.stride()
    oracle.assert_same(y, formula(x))
    oracle.assert_same(torch.autograd.grad(y, leaf, upstream)[0], formula(upstream))


def test_tokens_agree_with_torch_in_distribution() -> None:
    """As Dropout1d with tokens in place of channels: the number of 6 tokens that a sample loses."""
    counts = [
        torch.bincount((layer(torch.ones(30_000, 6, 2))[..., 0] == 0).sum(1), minlength=7)
        for layer in (TokenDropout(0.5), nn.Dropout1d(0.5))
    ]
    assert stats.chi2_contingency(torch.stack(counts).numpy()).pvalue > chance.FALSE_ALARM


without_warning = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def keep_of(key: Key, prefix: int) -> Tensor:
    """Of 4 samples with 5 tokens; without a prefix, a sample of :data:`KEY` loses all."""
    keep = keep_mask(key, (4, 5), 0.7)
    keep[:, :prefix] = True
    return keep


@without_warning
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_jagged_tokens_are_those_that_the_masked_form_keeps(key: Key, prefix: int) -> None:
    keep, results = keep_of(key, prefix), []
    assert prefix or key.shape or not keep.any(1).all()
    x = torch.randn(4, 5, 3).requires_grad_()
    upstream = torch.randn(4, 5, 3)[keep]
    for layout in (torch.jagged, torch.strided):
        y = TokenDropout(0.7, num_prefix_tokens=prefix, layout=layout)(x, key=key)
        if layout is torch.jagged:
            assert y.layout is torch.jagged
            assert y.offsets().diff().equal(keep.sum(1))
        y = y.values() if layout is torch.jagged else y[keep]
        results.append((y.detach(), *torch.autograd.grad(y, x, upstream)))
    for jagged, masked in zip(*results, strict=True):
        oracle.assert_same(jagged, masked)


@without_warning
def test_jagged_tokens_of_a_jagged_tensor() -> None:
    x = torch.nested.nested_tensor([torch.randn(size, 3) for size in (4, 0, 2, 6)], layout=torch.jagged)
    for key in KEYS.values():
        y = token_dropout(x, 0.5, layout=torch.jagged, key=key)
        for jagged, masked in zip(y.unbind(), token_dropout(x, 0.5, key=key).unbind(), strict=True):
            oracle.assert_same(jagged, masked[masked.any(1)])


@without_warning
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of Dynamo, for any jagged tensor
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_of_jagged_tokens_is_attention_with_dropped_tokens_masked(compiled: bool) -> None:
    """Values and gradients; one sample keeps no token. Another mask compiles nothing anew."""
    linear = nn.Linear(6, 6)

    def jagged(x: Tensor, key: Key) -> Tensor:
        x = F.layer_norm(linear(token_dropout(x, 0.7, layout=torch.jagged, key=key)), (6,))
        heads = x.unflatten(-1, (2, 3)).transpose(1, 2)
        y: Tensor = F.scaled_dot_product_attention(heads, heads, heads)
        return y.transpose(1, 2).values()

    def masked(x: Tensor, key: Key) -> Tensor:
        keep = keep_of(key, 0)
        heads = (
            F.layer_norm(linear(token_dropout(x, 0.7, key=key)), (6,)).unflatten(-1, (2, 3)).transpose(1, 2)
        )
        y = F.scaled_dot_product_attention(heads, heads, heads, attn_mask=keep[:, None, None])
        return y.transpose(1, 2)[keep]

    x = torch.randn(4, 5, 6).requires_grad_()
    fast = torch.compile(jagged, backend="aot_eager") if compiled else jagged
    for i, key in enumerate((KEY, KEY.fold(1), KEY.fold(2))):
        with torch.compiler.set_stance("fail_on_recompile" if i and compiled else "default"):
            y = fast(x, key)
        expected = masked(x, key)
        torch.testing.assert_close(y, expected)
        (grad,), (wanted,) = (torch.autograd.grad(each.square().sum(), x) for each in (y, expected))
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


def test_jagged_tokens_are_refused_where_their_number_has_to_be_known() -> None:
    layer, x = TokenDropout(layout=torch.jagged), torch.ones(2, 3, 4)
    assert repr(layer).endswith("layout=torch.jagged)")
    assert layer.eval()(x) is x
    layer.train()
    for call in (
        lambda: torch.func.vmap(partial(layer, key=KEY))(x[None]),
        lambda: layer(x.to("meta")),
        lambda: layer(torch.nested.nested_tensor([x[0], x[1]], layout=torch.jagged).transpose(1, 2)),
        lambda: layer.__prepare_scriptable__(),
    ):
        with pytest.raises(NotImplementedError, match=r"layout=torch\.jagged"):
            call()
    with pytest.raises(ValueError, match=r"but got torch\.sparse_coo"):
        TokenDropout(layout=torch.sparse_coo)


def test_nothing_to_drop_returns_the_input_itself() -> None:
    x = torch.randn(2, 5, 3)
    for layer in (PatchDropout(0.0), TokenDropout(0.0), TokenDropout(0.0, num_prefix_tokens=1)):
        assert layer(x) is x
    for layer in (PatchDropout(return_indices=True).eval(), PatchDropout(0.0, return_indices=True)):
        y, kept = layer(x)
        assert y is x
        assert kept is None


CALLS = {
    "patches": partial(patch_dropout, p=0.5),
    "ordered": partial(patch_dropout, p=0.5, num_prefix_tokens=0, ordered=True),
    "tokens": partial(token_dropout, p=0.5),
    "prefix": partial(token_dropout, p=0.5, num_prefix_tokens=2),
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@each_call
def test_forward_mode(call: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(call, key=KEY), x, check_forward_ad=True)


@pytest.mark.usefixtures("fresh_compiler")
@each_call
def test_compiled_with_dynamic_shapes(call: Callable[..., Tensor]) -> None:
    """Value and gradient, at two lengths, with a key, keys and a drawn one."""
    fast = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, keys in ((9, (*KEYS.values(), None)), (14, (KEY,))):
        for key in keys:
            results = []
            for each in (call, fast):
                torch.manual_seed(3)
                x = torch.linspace(1, 2, 4 * tokens * 3).view(4, tokens, 3).requires_grad_()
                y = each(x, key=key)
                results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
            for eager, other in zip(*results, strict=True):
                oracle.assert_same(other, eager)


@each_call
def test_vmap_over_keys_is_a_loop(call: Callable[..., Tensor]) -> None:
    x, keys = torch.randn(4, 9, 3), KEY.fold(torch.arange(5))
    loop = torch.stack([call(x, key=KEY.fold(i)) for i in range(5)])
    for dims, first in (((None, 0), x), ((0, 0), x.expand(5, 4, 9, 3))):
        mapped = torch.func.vmap(lambda x, bits: call(x, key=Key.from_bits(bits)), dims)
        assert mapped(first, keys.bits).equal(loop)


IN_EVALUATION = {"input": torch.ones(2, 3, 4), "training": False}


@pytest.mark.parametrize(
    "make",
    [
        PatchDropout,
        TokenDropout,
        partial(patch_dropout, **IN_EVALUATION),
        partial(token_dropout, **IN_EVALUATION),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        *(({"p": p}, ValueError, f"between 0 and 1, but got {p}") for p in (-0.1, 1.5, math.nan)),
        ({"num_prefix_tokens": -1}, ValueError, "num_prefix_tokens has to be at least 0, but got -1"),
        (
            {"num_prefix_tokens": 1.0},
            TypeError,
            "num_prefix_tokens must be an integer, got 1.0 of type float",
        ),
        (
            {"num_prefix_tokens": None},
            TypeError,
            "num_prefix_tokens must be an integer, got None of type NoneType",
        ),
        ({"p": "half"}, TypeError, "p must be a float, got 'half' of type str"),
    ],
)
def test_wrong_arguments(
    make: Callable[..., object], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        make(**arguments)


def test_no_prefix_in_training() -> None:
    with pytest.raises(TypeError, match="num_prefix_tokens must be an integer, got None"):
        token_dropout(torch.ones(2, 3), num_prefix_tokens=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [patch_dropout, token_dropout])
def test_wrong_inputs(function: Callable[..., Any]) -> None:
    for x, message in (
        (torch.ones(3), "needs an input of shape (N, L, *), got one of (3,)"),
        (torch.ones(2, 3, 4), "num_prefix_tokens=4 and a tensor of shape (2, 3, 4)"),
    ):
        with pytest.raises(RuntimeError, match=re.escape(message)):
            function(x, num_prefix_tokens=4)


def test_timms_arguments() -> None:
    assert PatchDropout(0.25).p == PatchDropout(prob=0.25).p == 0.25
    assert PatchDropout().p == 0.5
    layer = PatchDropout(prob=0.25, num_prefix_tokens=2, ordered=True)
    assert layer(torch.randn(2, 9, 3)).shape == (2, 7, 3)
    with pytest.raises(TypeError, match=r"p=0\.3 and prob=0\.25"):
        PatchDropout(0.3, prob=0.25)
    with pytest.raises(ValueError, match="between 0 and 1, but got 2"):
        PatchDropout(prob=2)


def test_repr() -> None:
    patches, tokens = PatchDropout(0.25, 2, True, True), TokenDropout(0.3, num_prefix_tokens=1, scale=False)
    assert (
        repr(patches)
        == "thinned.PatchDropout(p=0.25, num_prefix_tokens=2, ordered=True, return_indices=True)"
    )
    assert repr(tokens) == "thinned.TokenDropout(p=0.3, num_prefix_tokens=1, scale=False)"


class Wrong(PatchDropoutFormula):
    """PatchDropout with one thing wrong."""

    def __init__(self, wrong: str, p: float = 0.5, **arguments: Any) -> None:
        super().__init__(p, **arguments)
        self.wrong = wrong

    def forward(self, x: Tensor) -> Any:
        prefix, rest = x[:, : self.prefix], x[:, self.prefix :]
        samples, tokens = rest.shape[:2]
        numbers = torch.rand(samples, tokens)
        if self.wrong == "first 2 % more often":
            numbers[:, 0] += (torch.rand(samples) < 0.02) * -1.0
        elif self.wrong == "neighbours together":
            numbers = numbers[:, ::2].repeat_interleave(2, dim=1)[:, :tokens]
        elif self.wrong == "one subset for two samples":
            numbers[1::2] = numbers[::2][: len(numbers[1::2])]
        count = max(1, int(tokens * (1.0 - self.p))) + (self.wrong == "one more")
        kept = numbers.argsort(1)[:, :count]
        if self.wrong == "with replacement":
            kept = torch.randint(tokens, (samples, count))
        rest = rest.gather(1, kept.unsqueeze(-1).expand(-1, -1, *rest.shape[2:]))
        if self.wrong == "scaled":
            rest = rest * (tokens / count)
        y = torch.cat((rest, prefix) if self.wrong == "prefix behind" else (prefix, rest), 1)
        return (y, kept + (self.wrong == "indices count the prefix")) if self.return_indices else y


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("first 2 % more often", "share of a token"),
        ("neighbours together", "share of a pair"),
        ("neighbours together", "subsets"),
        ("one subset for two samples", "independence"),
        ("one more", "number kept"),
        ("with replacement", "whole tokens"),
        ("scaled", "whole tokens"),
        ("prefix behind", "whole tokens"),
        ("unordered", "order"),
        ("indices count the prefix", "indices"),
    ],
)
def test_a_wrong_layer_is_caught(wrong: str, law: str) -> None:
    assert verdict(PATCHES, law, partial(Wrong, wrong)).is_breach
    assert verdict(PATCHES, law, PatchDropoutFormula) is Verdict.HOLDS


def test_a_dropped_prefix_is_caught() -> None:
    def make(p: float, num_prefix_tokens: int) -> nn.Module:  # noqa: ARG001
        return TokenDropout(p)

    assert verdict(TOKENS, "prefix", make) is Verdict.BROKEN
