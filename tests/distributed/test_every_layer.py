"""Each layer on DTensors in every placement on 1, 2 and 4 processes: the result of one, bit for bit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned
from distributed.placements import Call, cases_of, every_placement, some_placements
from distributed.world import World
from layers.test_every_layer import example
from layers.test_tools import LAYERS, OF_WEIGHTS, SAMPLE_DIM
from thinned.compare.layers import Entry, entry_of

KEY = thinned.Key(7)
KEYLESS = ("Masksembles", "RDrop")
# Outputs with sums over elements, in an order that depends on the shards.
SUMS = ("WeightDrop", "VariationalLSTM", "VariationalGRU", "MultiSampleDropout", "RDrop")
# Dimensions along which a shard needs data of others, which PyTorch's operations then fetch.
MOVES: dict[str, tuple[set[int], str]] = {
    "PatchDropout": ({1}, "gathers the kept tokens from along dimension 1"),
    "WeightDrop": ({1}, "the linear layer sums along dimension 1"),
    "MultiSampleDropout": ({1}, "the linear layer sums along dimension 1"),
    "VariationalLSTM": ({0, 2}, "steps along dimension 0; its linear layers sum along dimension 2"),
    "VariationalGRU": ({0, 2}, "steps along dimension 0; its linear layers sum along dimension 2"),
    "TargetedDropout": ({1, 2}, "ranks the weights of each index of dimension 0"),
    "RDrop": ({0, 1}, "has no mask; its loss is a mean over dimension 0 of sums along dimension 1"),
}
worlds = pytest.mark.parametrize("world", [1, 2, 4], indirect=True, scope="module")


class Addressed(nn.Module):
    def __init__(self, layer: nn.Module, samples: Tensor | None) -> None:
        super().__init__()
        self.model, self.samples = nn.Sequential(layer), samples

    def forward(self, *inputs: Tensor) -> Any:
        with thinned.address(self.model, seed=3, step=5, samples=self.samples):
            return self.model[0](*inputs)


def call(name: str, keys: str) -> Call:
    layer, inputs = example(entry_of(name))
    ids = torch.arange(inputs[0].shape[SAMPLE_DIM.get(name, 0)]) + 10
    if keys == "no key":
        return Call(layer, inputs)
    if keys == "one key":
        return Call(layer, inputs, {"key": KEY})
    if keys == "a key for each sample":
        return Call(layer, inputs, {"key": KEY.fold(ids)})
    return Call(Addressed(layer, ids if keys == "an address with samples" else None), inputs)


@worlds
@pytest.mark.parametrize("entry", LAYERS, ids=lambda entry: entry.name)
def test_a_layer_has_the_result_of_one_process(
    world: World, entry: Entry, record_property: Callable[[str, object], None]
) -> None:
    name = entry.name
    kinds = ["an address", "an address with samples"]
    if name not in OF_WEIGHTS:
        kinds.append("a key for each sample")
    every = [(name, "no key" if name in KEYLESS else "one key")]
    some = [] if name in KEYLESS else [(name, keys) for keys in kinds]
    sums = name in SUMS
    cases = cases_of(world, call, every, every_placement, sums)
    cases += cases_of(world, call, some, some_placements, sums)
    moving, _ = MOVES.get(name, ((), ""))
    failed, ran = [], Counter[str]()
    for case in cases:
        problems = case.problems
        if case.sharded.intersection(moving):
            problems = [each for each in problems if not each.startswith(("communicated", "output: placed"))]
        failed += [f"{case.name}: {each}" for each in problems]
        ran[case.mesh] += case.name.startswith("rank 0")
    record_property("placements", [name, dict(ran)])
    assert not failed, "\n".join(failed)
