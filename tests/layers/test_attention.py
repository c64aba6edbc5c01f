"""DropHead and DropKey."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
from thinned import Key, keep_mask
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers.attention import ENTRIES, DropHeadFormula, DropKeyFormula
from thinned.compare.layers.entry import Implementation
from thinned.compare.memory import saved_by_call
from thinned.compare.settings import Settings
from thinned.geometry import shared
from thinned.layers.attention import DropHead, DropKey, drop_head, drop_key

KEY = Key(7)
KEYS = {"one key": KEY, "a key a row": KEY.fold(torch.arange(6))}
HEAD_LAWS, KEY_LAWS = ({law.name: law for law in entry.laws} for entry in ENTRIES)
REAL = [dtype for dtype in oracle.DTYPES if not dtype.is_complex]
# torch's own: Dynamo makes an instance of the function that it traces.


def share(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """H / kept of decisions ``(N, H)``."""
    return (kept.shape[1] / kept.sum(1).to(dtype)).view(-1, 1, 1, 1)


@pytest.mark.usefixtures("subject")
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_heads_by_the_formula(dtype: torch.dtype, key: Key) -> None:
    x = oracle.specials((6, 4, 5, 3), dtype)
    kept = keep_mask(key, (6, 4), 0.5)
    assert kept.any(1).all()
    assert not kept.all(1).all()
    opmath = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    factor = share(kept, opmath)
    if dtype.is_complex:
        scaled = torch.view_as_complex(torch.view_as_real(x) * factor.unsqueeze(-1))
    else:
        scaled = (x.to(opmath) * factor).to(dtype)
    wanted = torch.where(kept[..., None, None], scaled, torch.zeros((), dtype=dtype))
    oracle.assert_same(drop_head(x, 0.5, key=key), wanted)
    expected = oracle.dropout(x, key.bits, 0.5, (2, 3))
    oracle.assert_same(drop_head(x, 0.5, normalize="expected", key=key), expected)


def test_kept_heads_share_the_weight_of_all() -> None:
    """A sample's mean stays, unless it has lost all of its heads, as Binomial(N, p**H) samples have."""
    y = drop_head(torch.ones(60_000, 3, 2, 1), 0.4, key=KEY)
    assert (y[:, :, :1] == y).all()
    lost = (y == 0).flatten(1).all(1)
    assert torch.allclose(y.mean((1, 2, 3))[~lost], torch.ones(()))
    assert chance.rate(~lost.numpy(), 0.4**3) > chance.FALSE_ALARM
    kept = (y[:, :, 0, 0] != 0).numpy()
    assert chance.rate(kept, 0.4) > chance.FALSE_ALARM
    assert chance.independence(*kept.T, p=0.4) > chance.FALSE_ALARM
    assert chance.independence(kept[::2], kept[1::2], p=0.4) > chance.FALSE_ALARM


@pytest.mark.parametrize("normalize", ["kept", "expected"])
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


@pytest.mark.parametrize("normalize", ["kept", "expected"])
def test_all_heads_dropped_are_zero(normalize: Any) -> None:
    x = torch.full((3, 4, 2, 2), math.nan, requires_grad=True)
    y = drop_head(x, 1.0, normalize=normalize, key=KEY)
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, math.nan))
    oracle.assert_same(y, torch.zeros_like(x))
    oracle.assert_same(grad, torch.zeros_like(x))


@pytest.mark.parametrize("normalize", ["kept", "expected"])
def test_the_heads_dimension(normalize: Any) -> None:
    x = torch.randn(6, 4, 5, 3)
    y = drop_head(x, 0.5, normalize=normalize, key=KEY)
    for dim in (-3, 2, -2, 3):
        moved = drop_head(x.movedim(1, dim), 0.5, dim=dim, normalize=normalize, key=KEY)
        assert moved.movedim(dim, 1).equal(y)
    assert drop_head(x[0], 0.5, dim=0, normalize=normalize, key=KEY).equal(y[0])


def test_head_gradient_is_the_forwards_factor() -> None:
    x = torch.full((50, 4, 2, 3), math.nan, requires_grad=True)
    upstream = torch.randn(x.shape)
    (grad,) = torch.autograd.grad(drop_head(x, 0.5, key=KEY), x, upstream)
    kept = keep_mask(KEY, (50, 4), 0.5)
    assert grad.equal(torch.where(kept[..., None, None], upstream * share(kept, torch.float32), 0))


@pytest.mark.usefixtures("subject")
@pytest.mark.parametrize("dims", [(), (1,), (1, 2), (-1,), (0, 1, 2, 3)], ids=str)
@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("dtype", REAL, ids=str)
def test_keys_by_the_formula(dtype: torch.dtype, key: Key, dims: tuple[int, ...]) -> None:
    x = oracle.specials((6, 3, 5, 7), dtype)
    lowest = torch.finfo(dtype).min
    wanted = oracle.masked_affine(x, key.bits, shared(x.shape, dims, key.bits.dim()), 2**31, 1.0, fill=lowest)
    wanted = torch.where(x.isneginf() | x.isnan(), x, wanted)
    oracle.assert_same(drop_key(x, 0.5, broadcast_dims=dims, key=key), wanted)


def test_dropped_keys_are_binomial_and_independent() -> None:
    kept = (drop_key(torch.zeros(300, 4, 50, 4), 0.3, key=KEY) == 0).numpy()
    assert chance.rate(kept, 0.3) > chance.FALSE_ALARM
    assert chance.independence(*kept.reshape(-1, 4).T, p=0.3) > chance.FALSE_ALARM
    assert chance.independence(*kept.swapaxes(0, 1), p=0.3) > chance.FALSE_ALARM
    assert chance.independence(kept[:, :, ::2], kept[:, :, 1::2], p=0.3) > chance.FALSE_ALARM


def test_keys_agree_with_the_paper_in_distribution() -> None:
    """How many of 6 keys a query has no weight for; in float32 none of 6 counts as 6 of 6 in both."""
    torch.manual_seed(0)
    counts = [
        torch.bincount((layer(torch.randn(2_000, 3, 5, 6)).softmax(-1) == 0).sum(-1).flatten(), minlength=6)
        for layer in (DropKey(0.5), DropKeyFormula(0.5))
    ]
    assert stats.chi2_contingency(torch.stack(counts).numpy()).pvalue > chance.FALSE_ALARM


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("p", [0.5, 0.9, 1.0])
def test_weights_are_those_of_the_kept_keys(p: float, dtype: torch.dtype) -> None:
    """Equal ones where a query has lost all."""
    x = torch.randn(40, 2, 3, 4).to(dtype)
    kept = keep_mask(KEY, x.shape, p)
    weights = drop_key(x, p, key=KEY).softmax(-1)
    lost = ~kept.any(-1)
    assert lost.any()
    assert (weights[lost] == 0.25).all()
    wanted = x.masked_fill(~kept, -math.inf).softmax(-1)
    assert weights[~lost].equal(wanted[~lost])


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("dims", [(), (1, 2)], ids=str)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_forbidden_stays_so(when: str, dims: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of a causal mask; the first query has one key, and loses it half of the time."""
    x, causal = torch.randn(40, 2, 5, 5).to(dtype), torch.full((5, 5), -math.inf, dtype=dtype).triu(1)
    if when == "before":
        y = drop_key(x + causal, 0.5, broadcast_dims=dims, key=KEY)
    else:
        y = drop_key(x, 0.5, broadcast_dims=dims, key=KEY) + causal
    weights = y.softmax(-1)
    assert not weights.isnan().any()
    assert not weights.triu(1).any()
    lost = y[..., 0, 0] == torch.finfo(dtype).min
    assert lost.any()
    assert (weights[..., 0, 0] == 1).all()


@pytest.mark.parametrize("dims", [(), (1, 2)], ids=str)
def test_gradient_of_a_dropped_logit_is_zero(dims: tuple[int, ...]) -> None:
    x = torch.randn(30, 4, 5, 6, requires_grad=True)
    y = drop_key(x, 0.5, broadcast_dims=dims, key=KEY)
    upstream = torch.randn(x.shape)
    (grad,) = torch.autograd.grad(y, x, upstream)
    assert grad.equal(torch.where(keep_mask(KEY, x.shape, 0.5, broadcast_dims=dims), upstream, 0))


CALLS: dict[str, Callable[..., Tensor]] = {
    "kept": lambda x, key=None: drop_head(x, 0.5, key=key),
    "expected": lambda x, key=None: drop_head(x, 0.5, normalize="expected", key=key),
    "each key": lambda x, key=None: drop_key(x, 0.5, key=key),
    "whole keys": lambda x, key=None: drop_key(x, 0.5, broadcast_dims=(1, 2), key=key),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@calls
def test_derivatives(call: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)

    def of_finite(x: Tensor) -> Tensor:
        return call(x, KEY).clamp(min=-100)

    assert torch.autograd.gradcheck(of_finite, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(of_finite, x)


@calls
def test_nothing_of_the_inputs_size_is_saved(call: Callable[..., Tensor]) -> None:
    x = torch.randn(4, 4, 32, 32, requires_grad=True)
    assert saved_by_call(call, x) * x.numel() <= 8 * 4 * 4


@calls
def test_a_samples_result_depends_on_its_key_alone(call: Callable[..., Tensor]) -> None:
    keys, order = KEY.fold(torch.arange(6)), torch.tensor([4, 2, 0, 5, 3, 1])
    x = torch.randn(6, 4, 5, 3)
    y = call(x, keys)
    assert call(x[order], Key.from_bits(keys.bits[order])).equal(y[order])
    assert call(x[2:3], KEY.fold(2)).equal(y[2:3])


@calls
def test_memory_format_is_kept(call: Callable[..., Tensor]) -> None:
    x = torch.randn(2, 5, 4, 3).transpose(1, 2)
    assert call(x).stride() == x.stride()
    assert call(x, KEY).equal(call(x.contiguous(), KEY))


@calls
def test_vmap_over_keys_is_a_loop(call: Callable[..., Tensor]) -> None:
    x, keys = torch.randn(2, 4, 3, 3), KEY.fold(torch.arange(5))
    loop = torch.stack([call(x, KEY.fold(i)) for i in range(5)])
    assert torch.func.vmap(lambda bits: call(x, Key.from_bits(bits)))(keys.bits).equal(loop)
    both = torch.func.vmap(lambda x, bits: call(x, Key.from_bits(bits)))
    assert both(x.expand(5, *x.shape), keys.bits).equal(loop)
    same = torch.func.vmap(lambda x: call(x, KEY))(x.expand(5, *x.shape))
    assert same.equal(call(x, KEY).expand(5, *x.shape))


@pytest.mark.usefixtures("fresh_compiler")
@calls
def test_compiled(call: Callable[..., Tensor]) -> None:
    """Value and gradient, at two lengths, with a key, keys and a drawn one."""
    fast = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens, keys in ((5, (KEY, KEY.fold(torch.arange(4)), None)), (7, (KEY,))):
        for key in keys:
            results = []
            for each in (call, fast):
                torch.manual_seed(3)
                x = torch.linspace(1, 2, 4 * 3 * tokens * 2).view(4, 3, tokens, 2).requires_grad_()
                y = each(x, key)
                results.append((y.detach(), *torch.autograd.grad(y.clamp(min=-9).square().sum(), x)))
            for eager, other in zip(*results, strict=True):
                oracle.assert_same(other, eager)


@pytest.mark.parametrize("layer", [DropHead(), DropHead(normalize="expected"), DropKey()], ids=repr)
def test_nothing_to_do_returns_the_input_itself(layer: nn.Module) -> None:
    x, state = torch.randn(2, 5, 3, 3), torch.get_rng_state()
    none = copy.deepcopy(layer)
    none.p = 0.0  # type: ignore[assignment]
    assert none(x) is x
    assert layer.eval()(x) is x
    assert layer.eval()(x, key=KEY) is x
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize(("function", "layer"), [(drop_head, DropHead), (drop_key, DropKey)])
class TestWrongArguments:
    @pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
    def test_p(self, function: Callable[..., Any], layer: type[nn.Module], p: float) -> None:
        message = re.escape(f"dropout probability has to be between 0 and 1, but got {p}")
        for call in (lambda: function(torch.ones(2, 3), p, training=False), lambda: layer(p)):
            with pytest.raises(ValueError, match=message):
                call()

    def test_input(self, function: Callable[..., Any], layer: type[nn.Module]) -> None:
        for call in (function, layer()):
            with pytest.raises(RuntimeError, match=f"{function.__name__} needs a floating-point"):
                call(torch.ones(2, 3, dtype=torch.int64))
            with pytest.raises(TypeError, match=f"{function.__name__}.*must be Tensor, not list"):
                call([1.0])

    def test_key(self, function: Callable[..., Any], layer: type[nn.Module]) -> None:
        for call in (function, layer()):
            with pytest.raises(TypeError, match="key must be a"):
                call(torch.ones(2, 3), key=3)
            with pytest.raises(RuntimeError, match="keys of shape"):
                call(torch.ones(2, 3), key=KEY.fold(torch.arange(3)))


def test_wrong_arguments_of_one_layer() -> None:
    x = torch.ones(2, 3)
    for call in (lambda: DropHead(normalize="all"), lambda: drop_head(x, normalize="all")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="either 'kept' or 'expected', but got 'all'"):
            call()
    with pytest.raises(IndexError, match=re.escape("dim=2 and a tensor of shape (2, 3); accepted: -2 .. 1")):
        drop_head(x, dim=2)
    with pytest.raises(IndexError, match="a tensor with a dimension for the heads"):
        drop_head(torch.ones(()), dim=0)
    with pytest.raises(IndexError, match="names dimension 2"):
        drop_key(x, broadcast_dims=(2,))
    with pytest.raises(RuntimeError, match="needs real logits, got torch"):
        drop_key(x.to(torch.complex64))


def test_modules() -> None:
    heads, keys = DropHead(0.25, dim=2, normalize="expected"), DropKey(0.3, broadcast_dims=[1, 2])
    assert repr(heads) == "DropHead(p=0.25, dim=2, normalize='expected')"
    assert repr(keys) == "DropKey(p=0.3, broadcast_dims=(1, 2))"
    x = torch.randn(3, 4, 5, 6)
    for layer in (heads, keys):
        assert pickle.loads(pickle.dumps(layer))(x, key=KEY).equal(layer(x, key=KEY))
    assert heads(x, key=KEY).equal(drop_head(x, 0.25, dim=2, normalize="expected", key=KEY))
    assert keys(x, key=KEY).equal(drop_key(x, 0.3, broadcast_dims=(1, 2), key=KEY))


def wrong_heads(p: float = 0.5, normalize: str = "kept", *, wrong: str) -> nn.Module:
    if wrong == "2 % more":
        return DropHead(1.02 * p, normalize=normalize)  # type: ignore[arg-type]
    if wrong == "scaled by 1/q":
        return DropHead(p, normalize="expected")
    return _OneForAll(DropHead(p))


class _OneForAll(nn.Module):
    """Each mask for two samples."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x[::2]).repeat_interleave(2, dim=0)[: len(x)]
        return y


class _WrongKeys(nn.Module):
    def __init__(self, p: float = 0.5, *, wrong: str, **_: Any) -> None:
        super().__init__()
        self.p, self.wrong = p, wrong

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand_like(x) < 1 - self.p * (1.02 if self.wrong == "2 % more" else 1.0)
        if self.wrong == "scaled":
            return torch.where(keep, x / (1 - self.p), torch.finfo(x.dtype).min)
        return torch.where(keep, x, -math.inf if self.wrong == "-inf" else torch.finfo(x.dtype).min)


@pytest.mark.parametrize(
    ("law", "make", "wrong"),
    [
        (HEAD_LAWS["rate"], wrong_heads, "2 % more"),
        (HEAD_LAWS["share of kept"], wrong_heads, "scaled by 1/q"),
        (HEAD_LAWS["mean of kept"], wrong_heads, "scaled by 1/q"),
        (HEAD_LAWS["independence"], wrong_heads, "one mask for two samples"),
        (KEY_LAWS["rate"], _WrongKeys, "2 % more"),
        (KEY_LAWS["sharing"], _WrongKeys, "not shared"),
        (KEY_LAWS["kept values"], _WrongKeys, "scaled"),
        (KEY_LAWS["weights"], _WrongKeys, "scaled"),
        (KEY_LAWS["no keys"], _WrongKeys, "-inf"),
        (KEY_LAWS["forbidden keys"], _WrongKeys, "-inf"),
        (KEY_LAWS["forbidden keys"], _WrongKeys, "lowest for -inf"),
        (KEY_LAWS["gradient of dropped"], DropKeyFormula, ""),
    ],
    ids=lambda value: value.name if hasattr(value, "name") else str(value) if isinstance(value, str) else "",
)
def test_a_wrong_layer_is_caught(law: Any, make: Callable[..., nn.Module], wrong: str) -> None:
    def made(**arguments: Any) -> nn.Module:
        return make(**arguments, wrong=wrong) if wrong else make(**arguments)

    assert examine(law, Implementation("wrong", made), Settings(quick=True)).verdict is Verdict.BROKEN
