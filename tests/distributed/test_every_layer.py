"""Each layer on DTensors in every placement on 1, 2 and 4 processes: the result of one, bit for bit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_module

import thinned
from distributed.placements import (
    ULPS,
    Call,
    cases_of,
    mesh,
    on_one_dimension,
    place,
    problem,
    some_placements,
    unordered,
)
from distributed.world import World
from layers.test_every_layer import example
from layers.test_tools import LAYERS, OF_WEIGHTS, SAMPLE_DIM
from thinned.compare.implementation import first
from thinned.compare.layers import Entry, entry_of

KEY = thinned.Key(7)
MOVED = "communicated|output: placed"
KEYLESS = ("Masksembles", "RDrop")
# Outputs with sums over elements, in an order that depends on the shards; and activations, which the kernel
# does not round as PyTorch does.
SUMS = (
    "GELUDropout",
    "SiLUDropout",
    "WeightDrop",
    "VariationalLSTM",
    "VariationalGRU",
    "MultiSampleDropout",
    "RDrop",
)


class Exempt(NamedTuple):
    """Placements, as a pattern of their names, in which PyTorch's own operations fetch data or refuse."""

    placements: str
    reason: str
    error: str = ""


RECURRENT = [
    Exempt(r"S\(0", "steps along dimension 0, which PyTorch then does not take apart", "unbind|flatten"),
    Exempt(r"S\(2", "its linear layers sum along dimension 2"),
]
EXEMPT: dict[str, list[Exempt]] = {
    "EmbeddingDropout": [Exempt(r"_S\(", "PyTorch's embedding takes no _StridedShard")],
    "MultiSampleDropout": [
        Exempt(r"S\(0.*S\(0", "its head flattens samples and dimension 0", r"unflatten|RuntimeError: 1\b"),
        Exempt(r"S\(1", "the head sums along dimension 1"),
    ],
    "PatchDropout": [Exempt(r"S\(1", "gathers the kept tokens along dimension 1")],
    "RDrop": [Exempt("S", "has no mask; its loss is a mean over dimension 0 of sums along dimension 1")],
    "TargetedDropout": [Exempt("S", "compares the elements of each index of dimension 0 with each other")],
    "VariationalDropout": [Exempt(r"S\(0", "sums the gradient of log_alpha over dimension 0")],
    "VariationalGRU": RECURRENT,
    "VariationalLSTM": RECURRENT,
    "WeightDrop": [Exempt(r"S\(1", "the linear layer sums along dimension 1")],
}
if torch.__version__ < "2.13":
    RECURRENT.append(Exempt(r"S\(1", "its linear layers flatten dimensions 0 and 1", "flatten"))
    EXEMPT["MultiSampleDropout"][0] = Exempt(r"S\(0", "its head flattens samples and dimension 0", "flatten")
    EXEMPT["RDrop"].append(Exempt(r"_S\(1", "PyTorch's sum takes no _StridedShard", "shard_order"))
    EXEMPT["WeightDrop"].append(Exempt(r"_S\(0", "PyTorch's linear takes no _StridedShard", "shard_order"))
    EXEMPT["Zoneout"] = [Exempt("S", "PyTorch gathers shards of two sizes")]

# No mask for the elements of the input; Masksembles multiplies them by constants, and PyTorch's activations
# sum first.
TAKE_PARTIAL = {
    "EmbeddingDropout",
    "GELUDropout",
    "ReLUDropout",
    "SiLUDropout",
    "LayerDrop",
    "Masksembles",
    "RDrop",
    "WeightDrop",
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
    # A recurrent layer takes 0.1 s for each placement; a tensor of five dimensions has 36 pairs.
    few = EXEMPT.get(name) is RECURRENT or entry.example.inputs(torch.float32)[0].dim() > 4
    cases = cases_of(world, call, every, on_one_dimension if few else unordered, sums)
    cases += cases_of(world, call, some, some_placements, sums)
    failed, ran = [], Counter[str]()
    unseen = set(EXEMPT.get(name, ()))
    for case in cases:
        exempt = [each for each in EXEMPT.get(name, ()) if re.search(each.placements, case.placement)]
        for each in case.problems:
            excuses = {
                one for one in exempt if re.match(f"raised.*({one.error})" if one.error else MOVED, each)
            }
            unseen -= excuses
            if not excuses:
                failed.append(f"{case.name}: {each}")
        ran[case.mesh] += case.name.startswith("rank 0")
    if world.size == 4:
        failed += [f"not exempt: {each}" for each in unseen]
    record_property("placements", [name, dict(ran)])
    assert not failed, "\n".join(failed)


def refusals() -> dict[str, str]:
    """What each layer says to a DTensor whose processes hold summands."""
    said = {}
    for entry in LAYERS:
        layer, inputs, options = call(entry.name, "no key" if entry.name in KEYLESS else "one key")
        distribute_module(layer, mesh(dist.get_world_size()))
        partial = [
            DTensor.from_local(x, mesh(dist.get_world_size()), [Partial()]) if x.is_floating_point() else x
            for x in inputs
        ]
        try:
            layer(*partial, **options)
            said[entry.name] = "nothing"
        except Exception as error:
            said[entry.name] = str(error)
    return said


def test_a_partial_input_is_refused_by_its_placement(worlds: dict[int, World]) -> None:
    """A mask of summands is no mask of their sum."""
    for said in worlds.setdefault(2, World(2)).run(refusals):
        assert {name for name, words in said.items() if "Partial(sum)" not in words} == TAKE_PARTIAL, said


def compiled(name: str) -> str:
    """How a layer's compiled result differs from that of one process."""
    torch.compiler.reset()
    layer, inputs, options = call(name, "no key" if name in KEYLESS else "one key")
    expected = first(layer(*inputs, **options)).detach()
    distribute_module(layer, mesh(2))
    dim = 1 if name in ("VariationalLSTM", "VariationalGRU") else 0
    sharded = [place(x, mesh(2), [Shard(dim)]) for x in inputs]
    y = first(torch.compile(layer, backend="aot_eager", fullgraph=True)(*sharded, **options))
    return problem(expected, y.detach(), ULPS * (name in SUMS))


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(entry.name, marks=() if entry.name == "GaussianDropout" else pytest.mark.slow)
        for entry in LAYERS
    ],
)
def test_compiled_code_is_one_graph_with_the_same_result(worlds: dict[int, World], name: str) -> None:
    if torch.__version__ < "2.13" and name in ("VariationalLSTM", "VariationalGRU", "MultiSampleDropout"):
        pytest.skip("PyTorch 2.11 flattens no dimensions of which the second is sharded")
    assert worlds.setdefault(2, World(2)).run(compiled, name) == [""] * 2
