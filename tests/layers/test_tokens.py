"""PatchDropout and TokenDropout."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
from thinned import Key, keep_mask, spec
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers._peers import library_class
from thinned.compare.layers.tokens import ENTRIES, PatchDropoutFormula
from thinned.compare.memory import saved_by_call
from thinned.compare.settings import Settings
from thinned.layers.tokens import PatchDropout, TokenDropout, patch_dropout, token_dropout

KEY = Key(7)
LAWS, TOKEN_LAWS = ({law.name: law for law in entry.laws} for entry in ENTRIES)
# torch's own: Dynamo makes an instance of the function that it traces.


def positions(samples: int, tokens: int) -> Tensor:
    """Tokens that say where they stand."""
    return torch.arange(tokens).float().expand(samples, tokens).unsqueeze(-1)


def lowest(key: Key, samples: int, tokens: int, prefix: int, count: int) -> Tensor:
    """The formula: those whose numbers in the specification are lowest, in their order."""
    keys = key.bits.expand(samples).tolist()
    starts = [0] * samples if key.shape else [row * tokens for row in range(samples)]
    rows = []
    for one, start in zip(keys, starts, strict=True):
        numbers = spec.uniform(one % 2**64, np.arange(start, start + tokens, dtype=np.uint64))
        rows.append(np.argsort(numbers[prefix:], kind="stable")[:count])
    return torch.from_numpy(np.stack(rows))


@pytest.mark.usefixtures("subject")
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("key", [KEY, KEY.fold(torch.arange(4))], ids=["one key", "a key a row"])
def test_the_lowest_numbers_stay(key: Key, prefix: int, ordered: bool) -> None:
    x = torch.randn(4, 40, 3)
    y, kept = patch_dropout(x, 0.7, num_prefix_tokens=prefix, ordered=ordered, return_indices=True, key=key)
    wanted = lowest(key, 4, 40, prefix, int((40 - prefix) * (1 - 0.7)))
    wanted = wanted.sort(1).values if ordered else wanted
    assert kept is not None
    assert kept.equal(wanted)
    assert y[:, :prefix].equal(x[:, :prefix])
    assert y[:, prefix:].equal(x[:, prefix:].gather(1, wanted.unsqueeze(-1).expand(-1, -1, 3)))


def test_equal_numbers_count_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    from thinned import op

    monkeypatch.setattr(op, "uniform", lambda _, shape, __: torch.zeros(shape, dtype=torch.int32))
    assert patch_dropout(positions(1, 1000), 0.5, num_prefix_tokens=0).flatten().tolist() == list(range(500))


def test_every_ordered_choice_comes_equally_often() -> None:
    """2 of 5 in 20 ways."""
    _, kept = patch_dropout(positions(20_000, 6), 0.5, return_indices=True, key=KEY)
    assert kept is not None
    ways = torch.full((5, 5), -1)
    ways[~torch.eye(5, dtype=torch.bool)] = torch.arange(20)
    assert chance.uniformity(ways[kept[:, 0], kept[:, 1]].numpy(), 20) > chance.FALSE_ALARM


def test_shares_of_tokens_and_pairs() -> None:
    kept = torch.zeros(20_000, 8, dtype=torch.bool)
    places = patch_dropout(positions(20_000, 8), 0.6, num_prefix_tokens=0, key=KEY).squeeze(-1).long()
    stays = kept.scatter(1, places, True).numpy()
    assert (stays.sum(1) == 3).all()
    for one in range(8):
        assert chance.rate(stays[:, one], 1 - 3 / 8) > chance.FALSE_ALARM / 100
    for one, other in combinations(range(8), 2):
        both = stays[:, one] & stays[:, other]
        assert chance.rate(both, 1 - 3 * 2 / (8 * 7)) > chance.FALSE_ALARM / 100


@pytest.mark.parametrize("ordered", [False, True])
def test_agrees_with_timm_in_distribution(ordered: bool) -> None:
    peer = library_class("timm.layers.patch_dropout:PatchDropout") or PatchDropoutFormula
    torch.manual_seed(0)
    counts = []
    for layer in (PatchDropout(0.5, 1, ordered), peer(0.5, 1, ordered)):
        one, other = layer(positions(30_000, 5))[:, 1:, 0].long().T
        counts.append(torch.bincount(one * 5 + other, minlength=25))
    table = torch.stack(counts)
    assert (table[0] > 0).equal(table[1] > 0)
    assert stats.chi2_contingency(table[:, table[0] > 0].numpy()).pvalue > chance.FALSE_ALARM


@pytest.mark.parametrize("p", [0.0, 0.1, 0.25, 0.5, 0.7, 0.9, 0.99])
def test_as_many_stay_as_with_timm(p: float) -> None:
    peer = (library_class("timm.layers.patch_dropout:PatchDropout") or PatchDropoutFormula)(p)
    for tokens in range(2, 120):
        x = torch.empty(1, tokens, 1)
        assert PatchDropout(p)(x).shape == peer(x).shape


def test_one_token_stays_at_least() -> None:
    assert patch_dropout(torch.ones(3, 10, 2), 1.0).shape == (3, 2, 2)
    assert patch_dropout(torch.ones(3, 10, 2), 0.99).shape == (3, 2, 2)


def test_a_samples_subset_depends_on_its_key_alone() -> None:
    keys, order = KEY.fold(torch.arange(6)), torch.tensor([4, 2, 0, 5, 3, 1])
    x = torch.randn(6, 30, 2)
    y = patch_dropout(x, 0.5, key=keys)
    assert patch_dropout(x[order], 0.5, key=Key.from_bits(keys.bits[order])).equal(y[order])
    assert patch_dropout(x[2:3], 0.5, key=Key.from_bits(keys.bits[2:3])).equal(y[2:3])
    assert patch_dropout(x[2:3], 0.5, key=KEY.fold(2)).equal(y[2:3])


@pytest.mark.parametrize(
    "shape", [(3, 20), (3, 20, 4), (3, 20, 2, 2), (0, 20, 4), (3, 2, 0), (3, 1, 4), (0, 1)]
)
def test_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    y, kept = patch_dropout(x, 0.5, return_indices=True, key=KEY)
    left = shape[1] - 1
    count = min(left, max(1, left // 2))
    assert kept is not None
    assert kept.shape == (shape[0], count)
    assert y.shape == (shape[0], 1 + count, *shape[2:])
    index = kept.view(*kept.shape, *(1,) * (x.dim() - 2)).expand(-1, -1, *shape[2:])
    assert y[:, 1:].equal(x[:, 1:].gather(1, index))


def test_strides_do_not_matter() -> None:
    x = torch.randn(5, 30, 6)
    wanted = patch_dropout(x, 0.5, key=KEY)
    for other in (
        x.transpose(0, 1).contiguous().transpose(0, 1),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack((x, x), -1)[..., 0],
    ):
        assert patch_dropout(other, 0.5, key=KEY).equal(wanted)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_kept_tokens_are_bit_for_bit_what_they_were(dtype: torch.dtype) -> None:
    x = oracle.specials((2, 50, 7), dtype)
    y, kept = patch_dropout(x, 0.5, return_indices=True, key=KEY)
    assert kept is not None
    oracle.assert_same(y[:, 1:], x[:, 1:].gather(1, kept.unsqueeze(-1).expand(-1, -1, 7)))


def test_gradient_goes_to_the_kept_alone() -> None:
    x = torch.randn(3, 12, 4, dtype=torch.float64, requires_grad=True)
    y, kept = patch_dropout(x, 0.5, return_indices=True, key=KEY)
    assert kept is not None
    upstream = torch.randn_like(y)
    (grad,) = torch.autograd.grad(y, x, upstream)
    wanted = torch.zeros_like(x)
    wanted[:, 0] = upstream[:, 0]
    wanted[torch.arange(3).unsqueeze(1), 1 + kept] = upstream[:, 1:]
    assert grad.equal(wanted)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: patch_dropout(x, 0.5, key=KEY),
        lambda x: token_dropout(x, 0.5, key=KEY),
        lambda x: token_dropout(x, 0.5, num_prefix_tokens=2, key=KEY),
    ],
    ids=["patches", "tokens", "tokens behind a prefix"],
)
def test_derivatives(call: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, x)


def test_what_is_saved() -> None:
    x = torch.randn(4, 65, 64, requires_grad=True)
    indices = saved_by_call(lambda x: patch_dropout(x, 0.5), x) * x.numel()
    assert indices <= 8 * 4 * (1 + 32) + 64
    nothing = saved_by_call(lambda x: token_dropout(x, 0.5, num_prefix_tokens=1), x) * x.numel()
    assert nothing <= 64


TOKEN_KEYS = {"one key": KEY, "a key a row": KEY.fold(torch.arange(4))}


@pytest.mark.usefixtures("subject")
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("key", TOKEN_KEYS.values(), ids=TOKEN_KEYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64], ids=str)
def test_tokens_by_the_formula(dtype: torch.dtype, key: Key, prefix: int, scale: bool) -> None:
    x = oracle.specials((4, 30, 5), dtype)
    y = token_dropout(x, 0.3, num_prefix_tokens=prefix, scale=scale, key=key)
    kept = keep_mask(key, (4, 30), 0.3).unsqueeze(-1)
    wanted = oracle.dropout(x, key.bits, 0.3, (2,)) if scale else torch.where(kept, x, 0)
    assert ((wanted != 0) | (x == 0)).equal(kept | (x == 0))
    wanted[:, :prefix] = x[:, :prefix]
    oracle.assert_same(y, wanted)


def test_dropped_tokens_are_binomial_and_independent() -> None:
    y = token_dropout(torch.ones(60_000, 4, 2), 0.3, num_prefix_tokens=1, key=KEY)[..., 0]
    assert (y[:, 0] == 1).all()
    kept = (y[:, 1:] != 0).numpy()
    assert chance.rate(kept, 0.3) > chance.FALSE_ALARM
    assert chance.independence(*kept.T, p=0.3) > chance.FALSE_ALARM
    assert chance.independence(kept[::2], kept[1::2], p=0.3) > chance.FALSE_ALARM
    assert chance.mean(y[:, 1:].double().numpy(), 1.0, 0.3 / 0.7) > chance.FALSE_ALARM


def test_tokens_agree_with_torch_in_distribution() -> None:
    """As Dropout1d with tokens for channels: how many of 6 a sample loses."""
    torch.manual_seed(0)
    counts = [
        torch.bincount((layer(torch.ones(30_000, 6, 2))[..., 0] == 0).sum(1), minlength=7)
        for layer in (TokenDropout(0.5), nn.Dropout1d(0.5))
    ]
    assert stats.chi2_contingency(torch.stack(counts).numpy()).pvalue > chance.FALSE_ALARM


def test_the_prefix_changes_no_other_token() -> None:
    x = torch.randn(3, 20, 4)
    y = token_dropout(x, 0.5, key=KEY)
    for prefix in (1, 5, 20):
        behind = token_dropout(x, 0.5, num_prefix_tokens=prefix, key=KEY)
        assert behind[:, prefix:].equal(y[:, prefix:])
        assert behind[:, :prefix].equal(x[:, :prefix])


def test_a_samples_tokens_depend_on_its_key_alone() -> None:
    keys, order = KEY.fold(torch.arange(6)), torch.tensor([4, 2, 0, 5, 3, 1])
    x = torch.randn(6, 30, 2)
    y = token_dropout(x, 0.5, num_prefix_tokens=1, key=keys)
    moved = token_dropout(x[order], 0.5, num_prefix_tokens=1, key=Key.from_bits(keys.bits[order]))
    assert moved.equal(y[order])


def test_token_gradient_has_the_forward_mask() -> None:
    x = torch.full((50, 9, 3), math.nan, requires_grad=True)
    y = token_dropout(x, 0.5, num_prefix_tokens=2, key=KEY)
    upstream = torch.randn(50, 9, 3)
    (grad,) = torch.autograd.grad(y, x, upstream)
    factor = keep_mask(KEY, (50, 9), 0.5).unsqueeze(-1) * 2.0
    factor[:, :2] = 1
    assert grad.equal(upstream * factor)


def test_memory_format_is_kept() -> None:
    x = torch.randn(5, 6, 7).transpose(1, 2)
    for prefix in (0, 1):
        assert token_dropout(x, 0.5, num_prefix_tokens=prefix, key=KEY).stride() == x.stride()


@pytest.mark.parametrize(
    "layer", [PatchDropout(), TokenDropout(), TokenDropout(num_prefix_tokens=1)], ids=repr
)
def test_nothing_to_do_returns_the_input_itself(layer: nn.Module) -> None:
    x, state = torch.randn(2, 5, 3), torch.get_rng_state()
    none = copy.deepcopy(layer)
    none.p = 0.0  # type: ignore[assignment]
    assert none(x) is x
    assert layer.eval()(x) is x
    assert layer.eval()(x, key=KEY) is x
    assert torch.get_rng_state().equal(state)


def test_no_indices_where_nothing_is_removed() -> None:
    x = torch.randn(2, 5, 3)
    for layer in (PatchDropout(return_indices=True).eval(), PatchDropout(0.0, return_indices=True)):
        y, kept = layer(x)
        assert y is x
        assert kept is None


CALLS = {
    "patches": lambda x, key=None: patch_dropout(x, 0.5, key=key),
    "ordered": lambda x, key=None: patch_dropout(x, 0.5, num_prefix_tokens=0, ordered=True, key=key),
    "tokens": lambda x, key=None: token_dropout(x, 0.5, key=key),
    "prefix": lambda x, key=None: token_dropout(x, 0.5, num_prefix_tokens=2, key=key),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_compiled(call: Callable[..., Tensor]) -> None:
    """Value and gradient, at two lengths, with a key, keys and a drawn one."""
    fast = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, keys in ((9, (KEY, KEY.fold(torch.arange(4)), None)), (14, (KEY,))):
        for key in keys:
            results = []
            for each in (call, fast):
                torch.manual_seed(3)
                x = torch.linspace(1, 2, 4 * tokens * 3).view(4, tokens, 3).requires_grad_()
                y = each(x, key)
                results.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
            for eager, other in zip(*results, strict=True):
                oracle.assert_same(other, eager)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_vmap_over_keys_is_a_loop(call: Callable[..., Tensor]) -> None:
    x, keys = torch.randn(4, 9, 3), KEY.fold(torch.arange(5))
    over_keys = torch.func.vmap(lambda bits: call(x, Key.from_bits(bits)))(keys.bits)
    both = torch.func.vmap(lambda x, bits: call(x, Key.from_bits(bits)))(x.expand(5, 4, 9, 3), keys.bits)
    loop = torch.stack([call(x, KEY.fold(i)) for i in range(5)])
    assert over_keys.equal(loop)
    assert both.equal(loop)


@pytest.mark.parametrize("function", [patch_dropout, token_dropout])
class TestWrongArguments:
    @pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
    def test_p(self, function: Callable[..., Any], p: float) -> None:
        layer = PatchDropout if function is patch_dropout else TokenDropout
        message = re.escape(f"dropout probability has to be between 0 and 1, but got {p}")
        for call in (lambda: function(torch.ones(2, 3, 4), p, training=False), lambda: layer(p)):
            with pytest.raises(ValueError, match=message):
                call()

    def test_prefix(self, function: Callable[..., Any]) -> None:
        layer = PatchDropout if function is patch_dropout else TokenDropout
        x = torch.ones(2, 3, 4)
        for call in (lambda n: function(x, num_prefix_tokens=n), lambda n: layer(num_prefix_tokens=n)):
            with pytest.raises(ValueError, match="num_prefix_tokens has to be at least 0, but got -1"):
                call(-1)
            with pytest.raises(TypeError, match=r"num_prefix_tokens must be int, got 1\.0 of type float"):
                call(1.0)
        with pytest.raises(
            RuntimeError, match=re.escape("num_prefix_tokens=4 and a tensor of shape (2, 3, 4)")
        ):
            function(x, num_prefix_tokens=4)

    def test_input(self, function: Callable[..., Any]) -> None:
        with pytest.raises(
            RuntimeError, match=re.escape("needs a tensor of shape (N, L, *), got one of (3,)")
        ):
            function(torch.ones(3))
        with pytest.raises(RuntimeError, match=f"{function.__name__} needs a floating-point"):
            function(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(TypeError, match=f"{function.__name__}.*must be Tensor, not list"):
            function([1.0])

    def test_key(self, function: Callable[..., Any]) -> None:
        with pytest.raises(TypeError, match="key must be a"):
            function(torch.ones(2, 3), key=3)
        with pytest.raises(RuntimeError, match="keys of shape"):
            function(torch.ones(2, 3), key=KEY.fold(torch.arange(3)))


def test_timms_arguments() -> None:
    x = torch.randn(2, 9, 3)
    assert PatchDropout(0.25).p == 0.25
    assert PatchDropout(prob=0.25).p == 0.25
    assert PatchDropout().p == 0.5
    assert PatchDropout(0.25, 0, True).ordered
    assert PatchDropout(prob=0.25, num_prefix_tokens=2, ordered=True)(x).shape == (2, 7, 3)
    with pytest.raises(TypeError, match=r"p=0\.3 and prob=0\.25"):
        PatchDropout(0.3, prob=0.25)
    with pytest.raises(ValueError, match="between 0 and 1, but got 2"):
        PatchDropout(prob=2)


def test_modules() -> None:
    patches, tokens = PatchDropout(0.25, 2, True, True), TokenDropout(0.3, 1, scale=False)
    assert repr(patches) == "PatchDropout(p=0.25, num_prefix_tokens=2, ordered=True, return_indices=True)"
    assert repr(tokens) == "TokenDropout(p=0.3, num_prefix_tokens=1, scale=False)"
    x = torch.randn(3, 12, 2)
    for layer in (patches, tokens):
        twin = pickle.loads(pickle.dumps(layer))
        for one, other in zip(layer(x, key=KEY), twin(x, key=KEY), strict=True):
            assert one.equal(other)
    y, kept = patch_dropout(x, 0.25, num_prefix_tokens=2, ordered=True, return_indices=True, key=KEY)
    assert patches(x, key=KEY)[0].equal(y)
    assert patches(x, key=KEY)[1].equal(kept)
    wanted = token_dropout(x, 0.3, num_prefix_tokens=1, scale=False, key=KEY)
    assert tokens(x, key=KEY).equal(wanted)


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
        count = max(1, int(tokens * (1.0 - self.p)))
        if self.wrong == "one more":
            count += 1
        kept = numbers.argsort(1)[:, :count]
        if self.wrong == "with replacement":
            kept = torch.randint(tokens, (samples, count))
        rest = rest.gather(1, kept.unsqueeze(-1).expand(-1, -1, *rest.shape[2:]))
        if self.wrong == "scaled":
            rest = rest * (tokens / count)
        if self.wrong == "prefix behind":
            return torch.cat((rest, prefix), 1)
        y = torch.cat((prefix, rest), 1)
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
    def make(**arguments: Any) -> nn.Module:
        return Wrong(wrong, **arguments)

    found = examine(LAWS[law], Implementation("wrong", make), Settings(quick=True))
    assert found.verdict.is_breach
    right = examine(LAWS[law], Implementation("formula", PatchDropoutFormula), Settings(quick=True))
    assert right.verdict is Verdict.HOLDS


def test_a_dropped_prefix_is_caught() -> None:
    def make(p: float, num_prefix_tokens: int) -> nn.Module:  # noqa: ARG001
        return TokenDropout(p)

    found = examine(TOKEN_LAWS["prefix"], Implementation("wrong", make), Settings(quick=True))
    assert found.verdict is Verdict.BROKEN
