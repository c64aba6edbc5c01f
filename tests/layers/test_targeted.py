"""Targeted dropout against its candidates by sorting, and its decisions by keep_mask."""

from __future__ import annotations

import copy
import math
import pickle
import re

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached, register_parametrization

import chance
import thinned
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers import targeted
from thinned.compare.settings import Settings
from thinned.layers.targeted import TargetedDropout, targeted_dropout

KEY = thinned.Key(7)
LAWS = {law.name: law for law in targeted.ENTRIES[0].laws}


def weight_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def candidates(weight: Tensor, target: float, kind: str, dim: int = 0) -> Tensor:
    """The smallest by a stable sort in NumPy, in float64, of the weight's shape."""
    units = weight.detach().movedim(dim, 0)
    flat = units.flatten(1).double().numpy()
    size = np.abs(flat) if kind == "weight" else np.sqrt((flat**2).sum(1))
    order = np.argsort(size, axis=-1, kind="stable")
    chosen = np.zeros(size.shape, dtype=bool)
    count = math.floor(round(target * size.shape[-1], 6))
    np.put_along_axis(chosen, order[..., :count], True, axis=-1)
    whole = torch.from_numpy(chosen)
    if kind == "unit":
        whole = whole[:, None].expand(flat.shape)
    return whole.reshape(units.shape).movedim(0, dim)


def expected(weight: Tensor, p: float, target: float, kind: str, dim: int = 0) -> Tensor:
    shared = () if kind == "weight" else [d for d in range(weight.dim()) if d != dim % weight.dim()]
    keep = thinned.keep_mask(KEY, weight.shape, p, broadcast_dims=shared)
    return torch.where(candidates(weight, target, kind, dim) & ~keep, 0, weight)


@pytest.mark.parametrize("kind", ["weight", "unit"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((64, 50), 0), ((20, 7, 3, 3), 0), ((6, 9, 5), 1), ((6, 9), -1), ((5, 1), 0), ((0, 4), 0)],
)
@pytest.mark.parametrize(("p", "target"), [(0.5, 0.5), (0.3, 0.75), (1.0, 0.29), (0.9, 1.0), (0.9, 0.0)])
@pytest.mark.usefixtures("subject")
def test_formula(kind: str, shape: tuple[int, ...], dim: int, p: float, target: float) -> None:
    weight = weight_of(*shape)
    y = targeted_dropout(weight, p, target, kind, dim=dim, key=KEY)  # type: ignore[arg-type]
    assert y.equal(expected(weight, p, target, kind, dim))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_equal_magnitudes_go_by_place(dtype: torch.dtype) -> None:
    weight = weight_of(30, 200).mul(4).round().to(dtype)
    y = targeted_dropout(weight, 1.0, 0.29)
    assert y.dtype == dtype
    assert y.equal(expected(weight, 1.0, 0.29, "weight"))
    zeroed = (y == 0) & (weight != 0)
    assert (zeroed | (candidates(weight, 0.29, "weight"))).sum(1).eq(58).all()


def test_fraction_is_not_lost_to_rounding() -> None:
    """0.29 * 100 is 28.999999999999996."""
    assert targeted_dropout(torch.rand(3, 100) + 1, 1.0, 0.29).eq(0).sum(1).tolist() == [29] * 3


def test_complex_weight() -> None:
    weight = torch.complex(weight_of(6, 10), weight_of(6, 10, seed=1))
    y = targeted_dropout(weight, 1.0, 0.5)
    assert ((y == 0) == candidates(weight.abs(), 0.5, "weight")).all()


def test_a_dropped_weight_is_plus_zero_whatever_it_was() -> None:
    weight = torch.tensor([[math.nan, -math.inf, -1.0, -0.0]])
    y = targeted_dropout(weight, 1.0, 1.0)
    assert y.view(torch.int32).tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(("kind", "p"), [("weight", 0.3), ("unit", 0.3), ("weight", 0.05)])
def test_rate_among_candidates(kind: str, p: float) -> None:
    shape = (1000, 400) if kind == "weight" else (40_000, 4)
    weight = weight_of(*shape)
    y = targeted_dropout(weight, p, 0.5, kind, key=KEY)  # type: ignore[arg-type]
    chosen = candidates(weight, 0.5, kind)
    kept = (y != 0)[chosen] if kind == "weight" else (y != 0)[chosen].view(-1, 4)[:, 0]
    assert chance.rate(kept.numpy(), p) > chance.FALSE_ALARM
    if kind == "weight":
        assert chance.rate(kept.numpy(), p * 1.1) < chance.FALSE_ALARM


def test_agrees_in_distribution_with_the_peer() -> None:
    """How many of 20 candidates a row loses: the counts of both fit one law."""
    torch.manual_seed(1)
    weight = weight_of(40_000, 40)
    p, counts = 0.5, []
    for layer in (TargetedDropout(p, 0.5), targeted.TargetedDropoutFormula(p, 0.5)):
        lost = (layer(weight) == 0).sum(1).clamp(5, 15)
        counts.append(np.bincount(lost.numpy(), minlength=16)[5:])
    from scipy import stats

    assert stats.chi2_contingency(np.stack(counts)).pvalue > chance.FALSE_ALARM


def test_gradient_has_the_mask() -> None:
    weight = weight_of(40, 30).requires_grad_()
    upstream = weight_of(40, 30, seed=1)
    y = targeted_dropout(weight, 0.5, 0.5, key=KEY)
    (gradient,) = torch.autograd.grad(y, weight, upstream)
    assert gradient.equal(torch.where(y == 0, 0, upstream))
    double = weight_of(4, 6, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: targeted_dropout(w, 0.5, 0.5, key=KEY), double)
    assert torch.autograd.gradgradcheck(lambda w: targeted_dropout(w, 0.5, 0.5, key=KEY).square(), double)


def test_nothing_to_do_returns_the_weight_itself() -> None:
    weight, state = weight_of(4, 6), torch.get_rng_state()
    assert targeted_dropout(weight, 0.5, training=False) is weight
    assert targeted_dropout(weight, 0.0) is weight
    assert TargetedDropout().eval()(weight) is weight
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("value", [-0.1, 1.5, math.nan])
def test_arguments_outside_0_to_1(value: float) -> None:
    for call in (
        lambda **arguments: targeted_dropout(torch.ones(2, 3), training=False, **arguments),
        TargetedDropout,
    ):
        with pytest.raises(ValueError, match=re.escape(f"between 0 and 1, but got {value}")):
            call(p=value)
        with pytest.raises(ValueError, match=re.escape(f"target has to be between 0 and 1, but got {value}")):
            call(target=value)


def test_other_wrong_arguments() -> None:
    weight = torch.ones(2, 3)
    with pytest.raises(ValueError, match="either 'weight' or 'unit', but got 'row'"):
        TargetedDropout(kind="row")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"at least two dimensions, got shape \(3,\)"):
        targeted_dropout(torch.ones(3))
    with pytest.raises(IndexError, match=r"dim has to be in -2 \.\. 1, but got 2"):
        targeted_dropout(weight, dim=2)
    with pytest.raises(RuntimeError, match=r"one key of shape \(\), got keys of shape \(2,\)"):
        targeted_dropout(weight, key=KEY.fold(torch.arange(2)))
    with pytest.raises(RuntimeError, match=r"got torch\.int64 of shape \(2, 3\)"):
        targeted_dropout(weight.long())
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        targeted_dropout([1.0])  # type: ignore[arg-type]


def test_parametrization() -> None:
    linear = register_parametrization(nn.Linear(8, 4), "weight", TargetedDropout(0.5, 0.5))
    original = linear.parametrizations.weight.original
    assert "parametrizations.weight.original" in linear.state_dict()
    torch.manual_seed(3)
    first = linear.weight
    torch.manual_seed(3)
    assert linear.weight.equal(first)
    assert not all(linear.weight.equal(first) for _ in range(5))
    with cached():
        assert linear.weight is linear.weight
    linear(torch.ones(1, 8)).sum().backward()
    assert 0 < original.grad.count_nonzero() < 32
    twin = copy.deepcopy(linear).eval()
    assert twin.weight.equal(original)
    assert linear.training


def test_pickled() -> None:
    layer = pickle.loads(pickle.dumps(TargetedDropout(0.3, 0.4, "unit", 1)))
    assert repr(layer) == "TargetedDropout(p=0.3, target=0.4, kind='unit', dim=1)"


@pytest.mark.parametrize("kind", ["weight", "unit"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kind: str) -> None:
    weight, layer = weight_of(12, 8), TargetedDropout(0.5, 0.5, kind)  # type: ignore[arg-type]
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert compiled(weight, key=KEY).equal(layer(weight, key=KEY))
    torch.manual_seed(5)
    drawn = compiled(weight)
    torch.manual_seed(5)
    assert drawn.equal(layer(weight))


def test_vmap_over_weights_and_keys() -> None:
    weights, keys = weight_of(5, 12, 8), KEY.fold(torch.arange(5))
    y = torch.func.vmap(lambda w, bits: targeted_dropout(w, key=thinned.Key.from_bits(bits)))(
        weights, keys.bits
    )
    each = [targeted_dropout(weight, key=KEY.fold(i)) for i, weight in enumerate(weights)]
    assert y.equal(torch.stack(each))


class Wrong(TargetedDropout):
    """Targeted dropout with one thing wrong."""

    def __init__(self, wrong: str, p: float = 0.5, target: float = 0.5, kind: str = "weight") -> None:
        super().__init__(p * 1.03 if wrong == "rate" and p < 1 else p, target, kind)  # type: ignore[arg-type]
        self.wrong = wrong

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        if self.wrong == "columns":
            return targeted_dropout(weight, self.p, self.target, self.kind, dim=1)
        if self.wrong == "largest":
            kept = targeted_dropout(1 / weight, self.p, self.target, self.kind)
            return torch.where(kept == 0, 0, weight)
        if self.wrong == "one key":
            return targeted_dropout(weight, self.p, self.target, self.kind, key=KEY)
        y = super().forward(weight)
        return y / (1 - self.p) if self.wrong == "scaled" and self.p < 1 else y


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("rate", "rate, weight"),
        ("rate", "rate, unit"),
        ("columns", "candidates, weight"),
        ("largest", "candidates, weight"),
        ("columns", "candidates, unit"),
        ("scaled", "others, weight"),
        ("one key", "independence"),
    ],
)
def test_a_wrong_layer_is_caught(wrong: str, law: str) -> None:
    layer = Implementation("wrong", lambda **arguments: Wrong(wrong, **arguments))
    assert examine(LAWS[law], layer, Settings(quick=True)).verdict is Verdict.BROKEN
