"""Targeted dropout against its candidates by sorting, and its decisions by keep_mask."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import cached, register_parametrization

import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers import targeted
from thinned.layers.targeted import TargetedDropout, targeted_dropout
from verdicts import verdict

KEY = thinned.Key(7)
(ENTRY,) = targeted.ENTRIES


def candidates(weight: Tensor, target: float, kind: str, dim: int = 0) -> Tensor:
    """The smallest by a stable sort in NumPy, in float64, of the weight's shape."""
    units = weight.movedim(dim, 0)
    flat = units.flatten(1).abs().double().numpy()
    size = flat if kind == "weight" else np.sqrt((flat**2).sum(1))
    order = np.argsort(size, axis=-1, kind="stable")
    chosen = np.zeros(size.shape, dtype=bool)
    count = math.floor(round(target * size.shape[-1], 6))
    np.put_along_axis(chosen, order[..., :count], True, axis=-1)
    in_units = torch.from_numpy(chosen).reshape(*chosen.shape, *(1,) * (2 - chosen.ndim))
    return in_units.expand(flat.shape).reshape(units.shape).movedim(0, dim)


@pytest.mark.parametrize("kind", ["weight", "unit"])
@pytest.mark.parametrize(
    ("shape", "dim", "dtype"),
    [
        ((64, 50), 0, torch.float32),
        ((100, 100), 0, torch.float64),  # 0.29 * 100 is 28.999999999999996
        ((20, 7, 3, 3), 0, torch.float32),
        ((6, 9, 5), 1, torch.float32),
        ((6, 9), -1, torch.complex64),
        ((5, 1), 0, torch.float32),
        ((0, 4), 0, torch.float32),
    ],
)
@pytest.mark.parametrize(("p", "target"), [(0.5, 0.5), (0.3, 0.75), (1.0, 0.29), (0.9, 1.0), (0.9, 0.0)])
@pytest.mark.usefixtures("backend")
def test_formula(
    kind: str, shape: tuple[int, ...], dim: int, dtype: torch.dtype, p: float, target: float
) -> None:
    weight = torch.randn(shape, dtype=dtype)
    shared = () if kind == "weight" else [d for d in range(len(shape)) if d != dim % len(shape)]
    keep = thinned.keep_mask(KEY, shape, p, broadcast_dims=shared)
    expected = torch.where(candidates(weight, target, kind, dim) & ~keep, 0, weight)
    layer = TargetedDropout(p, target=target, kind=kind, dim=dim)  # type: ignore[arg-type]
    assert layer(weight, key=KEY).equal(expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_position_orders_equal_magnitudes(dtype: torch.dtype) -> None:
    weight = torch.randn(30, 200).mul(4).round().to(dtype)
    y = targeted_dropout(weight, 1.0, target=0.29)
    assert y.dtype == dtype
    assert y.equal(torch.where(candidates(weight, 0.29, "weight"), 0, weight))


def test_a_dropped_weight_is_plus_zero_whatever_it_was() -> None:
    y = targeted_dropout(torch.tensor([[math.nan, -math.inf, -1.0, -0.0]]), 1.0, target=1.0)
    assert y.view(torch.int32).tolist() == [[0, 0, 0, 0]]


def test_nothing_to_do_returns_the_weight_itself() -> None:
    weight = torch.randn(4, 6)
    assert targeted_dropout(weight, 0.5, training=False) is weight
    assert targeted_dropout(weight, 0.0) is weight


@pytest.mark.parametrize(
    "make", [TargetedDropout, partial(targeted_dropout, torch.ones(2, 3), training=False)]
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"p": p}, f"between 0 and 1, but got {p}") for p in (-0.1, 1.5, math.nan)),
        *(({"target": x}, f"target has to be between 0 and 1, but got {x}") for x in (-0.1, 1.5, math.nan)),
        ({"kind": "row"}, "either 'weight' or 'unit', but got 'row'"),
    ],
)
def test_wrong_arguments(make: Callable[..., object], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**arguments)


def test_other_wrong_arguments() -> None:
    with pytest.raises(RuntimeError, match=r"at least two dimensions, got shape \(3,\)"):
        targeted_dropout(torch.ones(3))
    with pytest.raises(IndexError, match=r"dim has to be in -2 \.\. 1, but got 2"):
        targeted_dropout(torch.ones(2, 3), dim=2)
    with pytest.raises(RuntimeError, match=r"one key of shape \(\), got keys of shape \(2,\)"):
        targeted_dropout(torch.ones(2, 3), key=KEY.fold(torch.arange(2)))


def test_parametrization() -> None:
    linear = register_parametrization(nn.Linear(8, 4), "weight", TargetedDropout(0.5, target=0.5))
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


def test_repr() -> None:
    layer = TargetedDropout(0.3, target=0.4, kind="unit", dim=1)
    assert repr(layer) == "thinned.TargetedDropout(p=0.3, target=0.4, kind='unit', dim=1)"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_units() -> None:
    weight, layer = torch.randn(12, 8), TargetedDropout(kind="unit")
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert compiled(weight, key=KEY).equal(layer(weight, key=KEY))


def test_vmap_over_weights_and_keys() -> None:
    weights, keys = torch.randn(5, 12, 8), KEY.fold(torch.arange(5))
    y = torch.func.vmap(lambda w, bits: targeted_dropout(w, key=thinned.Key.from_bits(bits)))(
        weights, keys.bits
    )
    each = [targeted_dropout(weight, key=KEY.fold(i)) for i, weight in enumerate(weights)]
    assert y.equal(torch.stack(each))


class Wrong(TargetedDropout):
    """Targeted dropout with one thing wrong."""

    def __init__(self, wrong: str, p: float = 0.5, **arguments: Any) -> None:
        super().__init__(p * 1.03 if wrong == "rate" and p < 1 else p, **arguments)
        self.wrong = wrong

    def forward(self, weight: Tensor) -> Tensor:  # type: ignore[override]
        call = partial(targeted_dropout, p=self.p, target=self.target, kind=self.kind)
        if self.wrong == "columns":
            return call(weight, dim=1)
        if self.wrong == "largest":
            return torch.where(call(1 / weight) == 0, 0, weight)
        if self.wrong == "one key":
            return call(weight, key=KEY)
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
    assert verdict(ENTRY, law, partial(Wrong, wrong)) is Verdict.BROKEN


@pytest.mark.parametrize("law", ["rate, weight", "rate, unit", "independence"])
def test_the_authors_way_keeps_the_law(law: str) -> None:
    assert verdict(ENTRY, law, ENTRY.peer.make) is Verdict.HOLDS
