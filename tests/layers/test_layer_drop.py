"""LayerDrop: which layers run, and that what selects them is one decision everywhere."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import thinned
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers import layer_drop
from thinned.compare.settings import Settings
from thinned.layers.layer_drop import LayerDrop

KEY = thinned.Key(3)
LAWS = {law.name: law for law in layer_drop.ENTRIES[0].laws}


def stack(depth: int = 6, p: float = 0.5) -> LayerDrop:
    torch.manual_seed(0)
    return LayerDrop([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)], p=p)


def run(layers: LayerDrop, x: Tensor, key: thinned.Key) -> Tensor:
    keep = thinned.keep_mask(key, (len(layers),), layers.p)
    for layer, kept in zip(layers, keep.tolist(), strict=True):
        x = layer(x) if kept else x
    return x


@pytest.mark.usefixtures("subject")
def test_runs_what_the_mask_keeps() -> None:
    x = torch.randn(5, 4)
    layers = stack(12)
    for seed in range(10):
        key = thinned.Key(seed)
        assert layers(x, key=key).equal(run(layers, x, key))


def test_a_layer_left_out_is_not_run() -> None:
    layers, ran = stack(), []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    layers(torch.randn(5, 4), key=KEY).sum().backward()
    kept = thinned.keep_mask(KEY, (6,), 0.5).nonzero().flatten().tolist()
    assert ran == kept == [2, 3, 4, 5]
    assert [i for i, layer in enumerate(layers) if layer[0].weight.grad is not None] == kept


def test_number_of_layers_is_binomial() -> None:
    """As it is for the loop over fairseq's list."""
    depth, p, passes = 8, 0.4, 4000
    law = stats.binom.pmf(range(depth + 1), depth, 1 - p) * passes
    for make in (LayerDrop, layer_drop.LayerDropFormula):
        layers = layer_drop._make(make, p, plus=depth)
        torch.manual_seed(4)
        sums = [int(layers(torch.zeros((), dtype=torch.float64))) for _ in range(passes)]
        counts = np.bincount([total.bit_count() for total in sums], minlength=depth + 1)
        # The first of the counts are expected too rarely for chi-squared's law.
        observed = [counts[:3].sum(), *counts[3:]]
        expected = [law[:3].sum(), *law[3:]]
        assert min(expected) > 60
        assert stats.chisquare(observed, expected).pvalue > chance.FALSE_ALARM
        ran = np.array([[total >> bit & 1 for bit in range(depth)] for total in sums], dtype=bool)
        assert min(chance.rate(ran[:, bit], p) for bit in range(depth)) > chance.FALSE_ALARM
        assert chance.rate(ran, p * 1.1) < chance.FALSE_ALARM


@pytest.mark.parametrize("randomness", ["key", "seed"])
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_selects_the_same(randomness: str) -> None:
    x, layers = torch.randn(5, 4), stack()
    compiled = torch.compile(layers, fullgraph=True, backend="eager")
    for seed in range(5):
        results = []
        for each in (layers, compiled):
            torch.manual_seed(seed)
            layers.zero_grad()
            each(x, key=thinned.Key(seed) if randomness == "key" else None).sum().backward()
            grads = [torch.zeros_like(w) if w.grad is None else w.grad.clone() for w in layers.parameters()]
            torch.manual_seed(seed)
            results.append((each(x, key=thinned.Key(seed) if randomness == "key" else None), *grads))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)
    assert not compiled(x, key=thinned.Key(0)).equal(compiled(x, key=thinned.Key(1)))


def test_vmap_decides_for_each_example() -> None:
    x, layers = torch.randn(7, 5, 4), stack()
    keys = KEY.fold(torch.arange(7))
    y = torch.func.vmap(lambda x, bits: layers(x, key=thinned.Key.from_bits(bits)))(x, keys.bits)
    for i in range(7):
        torch.testing.assert_close(y[i], run(layers, x[i], KEY.fold(i)))
    with pytest.raises(RuntimeError, match="under vmap; call the LayerDrop itself"):
        torch.func.vmap(lambda bits: list(layers.surviving(key=thinned.Key.from_bits(bits))))(keys.bits)


@pytest.mark.usefixtures("fresh_compiler")
def test_surviving_is_the_loop_of_forward() -> None:
    x, layers = torch.randn(5, 4), stack()

    def loop(x: Tensor) -> Tensor:
        for layer in layers.surviving():
            x = layer(x)
        return x

    for call in (loop, torch.compile(loop, backend="eager")):
        torch.manual_seed(8)
        y = call(x)
        torch.manual_seed(8)
        assert y.equal(layers(x))
    survivors = layers.surviving(key=KEY)
    assert isinstance(survivors, Iterator)
    assert list(survivors) == [layers[i] for i in (2, 3, 4, 5)]


def test_a_key_for_each_layer() -> None:
    layers, x = stack(), torch.randn(5, 4)
    keys = KEY.fold(torch.arange(6))
    kept = [layer for i, layer in enumerate(layers) if thinned.keep_mask(KEY.fold(i), (1,), 0.5).item()]
    assert list(layers.surviving(key=keys)) == kept
    assert 0 < len(kept) < 6
    assert layers(x, key=keys).equal(nn.Sequential(*kept)(x))
    with pytest.raises(RuntimeError, match=r"keys of shape \(5,\) do not fit a tensor of shape \(6,\)"):
        layers(x, key=KEY.fold(torch.arange(5)))


def test_evaluation_runs_all() -> None:
    layers, x = stack().eval(), torch.randn(5, 4)
    state = torch.get_rng_state()
    assert layers(x).equal(nn.Sequential(*layers)(x))
    assert list(layers.surviving()) == list(layers)
    assert torch.get_rng_state().equal(state)


def test_p_is_read_at_each_call() -> None:
    layers, x = stack(), torch.randn(5, 4)
    layers.p = 1.0
    assert layers(x) is x
    layers.p = 0.0
    assert layers(x).equal(nn.Sequential(*layers)(x))


def test_a_module_list() -> None:
    layers = stack(p=0.3)
    plain = nn.ModuleList(copy.deepcopy(list(layers)))
    assert list(layers.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layers.state_dict())
    assert len(layers) == 6
    assert list(layers)[-1] is layers[-1]
    pruned = layers[::2]
    assert isinstance(pruned, LayerDrop)
    assert (len(pruned), pruned.p, pruned[1] is layers[2]) == (3, 0.3, True)
    layers.append(nn.Identity())
    assert len(layers) == 7
    assert repr(layers).startswith("LayerDrop(p=0.3\n  (0-5): 6 x Sequential(")
    x = torch.randn(5, 4)
    for twin in (copy.deepcopy(layers), pickle.loads(pickle.dumps(layers))):
        assert twin.p == 0.3
        assert twin(x, key=KEY).equal(layers(x, key=KEY))


def test_other_arguments_reach_each_layer() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, amount: float, *, times: int = 1) -> Tensor:
            return x + amount * times

    layers = LayerDrop([Add() for _ in range(6)], p=0.5)
    assert layers(torch.zeros(1), 2.0, times=3, key=KEY).item() == 2.0 * 3 * 4


def test_a_layer_that_changes_the_shape() -> None:
    layers = LayerDrop([nn.Identity(), nn.Linear(4, 3)], p=1e-9)
    with pytest.raises(RuntimeError, match=r"layer 1 turned \(5, 4\) into \(5, 3\)"):
        layers(torch.ones(5, 4))
    layers = LayerDrop([nn.GRU(4, 4)], p=1e-9)
    with pytest.raises(RuntimeError, match=r"layer 0 turned \(5, 4\) into a tuple"):
        layers(torch.ones(5, 4))


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_p_outside_0_to_1(p: float) -> None:
    message = re.escape(f"dropout probability has to be between 0 and 1, but got {p}")
    with pytest.raises(ValueError, match=message):
        LayerDrop([], p)
    layers = stack()
    layers.p = p
    with pytest.raises(ValueError, match=message):
        layers(torch.ones(5, 4))


def test_key_of_another_type() -> None:
    with pytest.raises(TypeError, match=r"write thinned\.Key\(7\)"):
        stack()(torch.ones(5, 4), key=7)  # type: ignore[arg-type]


class Wrong(LayerDrop):
    """LayerDrop with one thing wrong."""

    wrong = ""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.wrong == "pairs" and self.training:
            keep = thinned.keep_mask(
                thinned.Key(int(torch.empty((), dtype=torch.int64).random_())), (len(self),), self.p
            )
            for index, layer in enumerate(self):
                input = layer(input) if keep[index // 2 * 2] else input
            return input
        if self.wrong == "one key":
            return super().forward(input, *args, key=KEY, **kwargs)
        y = super().forward(input, *args, **kwargs)
        return input + (y - input) / (1 - self.p) if self.wrong == "scaled" and self.p < 1 else y


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("pairs", "independence"),
        ("one key", "independence"),
        ("scaled", "rate"),
        ("rate", "rate"),
        ("dropping", "evaluation"),
    ],
)
def test_a_wrong_layer_is_caught(wrong: str, law: str) -> None:
    def make(p: float, **arguments: Any) -> nn.Module:
        layers = layer_drop._make(Wrong, p * 1.07 if wrong == "rate" else p, **arguments)
        layers.wrong = wrong
        if wrong == "dropping":
            layers.eval = lambda: layers  # type: ignore[method-assign]
        return layers

    assert examine(LAWS[law], Implementation("wrong", make), Settings(quick=True)).verdict.is_breach
    assert examine(LAWS[law], layer_drop.ENTRIES[0].own, Settings(quick=True)).verdict is Verdict.HOLDS
