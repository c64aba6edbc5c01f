"""Dropout of DTensors of up to four dimensions in every placement, with uneven and empty shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard

import thinned
from distributed.placements import Call, Place, cases_of, mesh_of, some_placements
from distributed.world import World
from thinned.functional import alpha_dropout, drop_path, dropout, dropout2d

KEY = thinned.Key(7)
# On 4 processes, 5 are sharded as 2, 2, 1, 0; 1 as 1, 0, 0, 0.
SHAPES = [(), (5,), (1, 6), (7, 3), (5, 0, 3), (5, 2, 9), (3, 5, 1, 6), (4, 2, 4, 130)]
KEYS: dict[str, Callable[[Tensor], thinned.Key]] = {
    "one key": lambda _: KEY,
    "a key for each row": KEY.fold,
    "stratified keys": lambda rows: KEY.stratified(rows, 4),
}


def in_place(x: Tensor, p: float, key: thinned.Key) -> Tensor:
    return dropout(x * 1, p, inplace=True, key=key)


def transposed(x: Tensor, p: float, key: thinned.Key) -> Tensor:
    """A DTensor whose strides descend in another order."""
    return dropout(x.transpose(0, 1), p, key=key).transpose(0, 1)


FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    each.__name__: each for each in (dropout, alpha_dropout, drop_path, dropout2d, in_place, transposed)
}


def call(name: str, shape: tuple[int, ...], keys: str, dtype: torch.dtype = torch.float32) -> Call:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    key = KEYS[keys](torch.arange(shape[0] if shape else 1))
    return Call(lambda x: FUNCTIONS[name](x, 0.3, key=key), [x])


def check(world: World, record_property: Callable[[str, object], None], name: str, *calls: Any) -> None:
    cases = cases_of(world, call, *calls)
    ran = Counter(case.mesh for case in cases if case.name.startswith("rank 0"))
    record_property("placements", [name, dict(ran)])
    failed = [f"{case.name}: {each}" for case in cases for each in case.problems]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("world", [1, 2, 4], indirect=True, scope="module")
class TestPlacements:
    def test_shapes(self, world: World, record_property: Callable[[str, object], None]) -> None:
        check(world, record_property, "shapes", [("dropout", shape, "one key") for shape in SHAPES])

    def test_functions_keys_and_dtypes(
        self, world: World, record_property: Callable[[str, object], None]
    ) -> None:
        calls = [("dropout", (5, 2, 9), keys) for keys in KEYS if keys != "one key"]
        calls += [(name, (3, 5, 1, 6), "one key") for name in FUNCTIONS if name != "dropout"]
        calls += [
            ("dropout", (7, 3), "one key", dtype)
            for dtype in (torch.bfloat16, torch.float64, torch.complex64)
        ]
        check(world, record_property, "functions", calls, some_placements)


def odd_meshes(dims: int) -> Iterator[Place]:
    """Some of the ranks, or all in another order."""
    size = dist.get_world_size()
    for ranks in ((1,), (size - 1, 0), range(size - 1, -1, -1)):
        for placement in (Replicate(), *map(Shard, range(dims))):
            yield mesh_of(*ranks), (placement,)


def test_meshes_of_some_ranks(world: World, record_property: Callable[[str, object], None]) -> None:
    """A process outside of the mesh has nothing, and says nothing."""
    check(world, record_property, "odd meshes", [("dropout", (5, 2, 9), "a key for each row")], odd_meshes)
