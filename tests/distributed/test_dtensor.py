"""What a DTensor may be given as, and what is refused."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import thinned
from distributed.placements import mesh
from distributed.world import World
from thinned import torch_state
from thinned.distributed.shards import parts_of, runs_of
from thinned.functional import dropout, gaussian_dropout

KEY = thinned.Key(7)
STRATIFIED = KEY.stratified(3, 5), KEY.stratified(torch.arange(8), 8)
worlds = pytest.mark.parametrize("world", [2], indirect=True, scope="module")
x = torch.arange(1.0, 65).view(8, 8)


def sharded(dim: int = 0) -> DTensor:
    return distribute_tensor(x, mesh(2), [Shard(dim)], src_data_rank=None)


class Mesh:
    """A mesh without processes, seen from one coordinate."""

    def __init__(self, shape: tuple[int, ...], coordinate: tuple[int, ...]) -> None:
        self.shape, self.coordinate = shape, coordinate

    def get_coordinate(self) -> tuple[int, ...]:
        return self.coordinate


def split(positions: Tensor, placement: Any, count: int, index: int) -> Tensor:
    """PyTorch's own shard of positions."""
    pieces, _ = placement._split_tensor(positions, count, with_padding=False)
    return pieces[index]  # type: ignore[no-any-return]


placements = st.one_of(
    st.just(Replicate()),
    st.just(Shard(0)),
    st.integers(1, 4).map(lambda factor: _StridedShard(0, split_factor=factor)),
)


@given(st.integers(0, 30), st.lists(st.tuples(placements, st.integers(1, 4)), min_size=1, max_size=3))
def test_runs_are_the_positions_of_pytorchs_shards(size: int, dims: list[tuple[Any, int]]) -> None:
    counts = tuple(count for _, count in dims)
    for coordinate in itertools.product(*map(range, counts)):
        expected = torch.arange(size)
        for (placement, count), index in zip(dims, coordinate, strict=True):
            if not isinstance(placement, Replicate):
                expected = split(expected, placement, count, index)
        (runs,) = runs_of((size,), Mesh(counts, coordinate), tuple(placement for placement, _ in dims))
        assert [position for run in runs for position in run] == expected.tolist()
        assert all(
            run and earlier.stop < run.start for earlier, run in itertools.pairwise([range(-1), *runs])
        )


def test_a_process_outside_of_the_mesh_has_no_part() -> None:
    class Outside(Mesh):
        def get_coordinate(self) -> Any:
            return None

    assert list(parts_of(runs_of((4, 4), Outside((2,), (0,)), (Shard(0),)))) == []


def partial_input() -> str:
    try:
        dropout(DTensor.from_local(x, mesh(2), [Partial()]), 0.5, key=KEY)
    except RuntimeError as error:
        return str(error)
    return "no error"


def partial_gradient() -> tuple[Any, Tensor]:
    """The gradient of an input whose output's gradient is a sum of the processes' own."""
    leaf = sharded().redistribute(placements=[Replicate()]).detach().requires_grad_()
    y = dropout(leaf, 0.5, key=KEY)
    y.backward(DTensor.from_local(x, mesh(2), [Partial()]))
    assert leaf.grad is not None
    return leaf.grad.placements, leaf.grad.full_tensor()


@worlds
def test_summands_are_refused_but_not_as_a_gradient(world: World) -> None:
    for message in world.run(partial_input):
        assert "placements (Partial(sum),)" in message
        assert "(8, 8)" in message
    for placed, grad in world.run(partial_gradient):
        assert placed == (Partial(),)
        assert grad.equal(dropout(2 * x, 0.5, key=KEY))


def drawn(seeds: list[int], advanced: list[int], compiled: bool) -> Any:
    """The result of a call without a key, in processes that have been seeded and have drawn so."""
    from thinned.distributed import same_key

    same_key._checked.clear()
    torch.compiler.reset()
    torch.manual_seed(seeds[dist.get_rank()])
    torch.rand(advanced[dist.get_rank()])
    function = torch.compile(dropout, backend="aot_eager", fullgraph=True) if compiled else dropout
    try:
        y: Any = function(sharded(), 0.5)
    except Exception as error:
        return str(error)
    with nullcontext() if compiled else CommDebugMode() as counted:  # Dynamo gives up within a mode
        again: Any = function(sharded(), 0.5)
    assert counted is None or counted.get_total_counts() == 0
    assert again.placements == y.placements == (Shard(0),)
    return y.full_tensor(), again.full_tensor()


@worlds
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_call_without_a_key_draws_that_of_one_process(world: World, compiled: bool) -> None:
    torch.manual_seed(3)
    expected = dropout(x, 0.5), dropout(x, 0.5)
    for found in world.run(drawn, [3, 3], [0, 0], compiled):
        for one, other in zip(found, expected, strict=True):
            assert one.equal(other)


@worlds
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_processes_that_would_draw_different_keys_are_told_so(world: World, compiled: bool) -> None:
    """In each process, so that none waits for another."""
    for message in world.run(drawn, [3, 4], [0, 0], compiled):
        assert "ranks 0 and 1 differ: seeded with 3 and 4" in message
    for message in world.run(drawn, [3, 3], [0, 1], compiled):
        assert "ranks 0 and 1 differ: both seeded with 3, they have drawn differently since" in message


def given(numbers: list[Any], function: Any, strata: int = 0) -> str:
    """The error of a call with a key of this process's own."""
    from thinned.distributed import same_key

    same_key._checked.clear()
    number = numbers[dist.get_rank()]
    key = thinned.Key(number) if isinstance(number, int) else KEY.fold(torch.tensor(number))
    try:
        function(sharded(), 0.5, key=key.stratified(1, strata) if strata else key)
    except RuntimeError as error:
        return str(error)
    return "no error"


@worlds
@pytest.mark.parametrize("function", [dropout, gaussian_dropout], ids=["mask", "noise"])
def test_processes_with_different_keys_are_told_so(world: World, function: Any) -> None:
    for message in world.run(given, [7, 2**64 - 1], function):
        assert f"that of rank 0 is Key(7) and that of rank 1 is Key({2**64 - 1})" in message
    for message in world.run(given, [[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 8]], function):
        assert "that of rank 1 is a batch of 8" in message
    assert world.run(given, [7, 7], function) == ["no error"] * 2
    for message in world.run(given, [7, 8], function, 5):
        assert "a DTensor's mask needs one key" in message


class Public:
    """A DTensor without the private names that save time."""

    from_local = staticmethod(DTensor.from_local)

    def __init__(self, x: DTensor) -> None:
        self.x = x

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.x, name)


def without_private_names() -> Tensor:
    y = sharded(1)
    local = torch_state.local_of(Public(y))
    assert local.equal(y.to_local())
    doubled: DTensor = torch_state.with_local(Public(y), local * 2)
    assert doubled.placements == y.placements
    return doubled.full_tensor()


@worlds
def test_private_names_are_no_need(world: World) -> None:
    assert all(doubled.equal(2 * x) for doubled in world.run(without_private_names))


def inplace(dim: int) -> Tensor:
    y = sharded(dim)
    assert dropout(y, 0.5, inplace=True, key=KEY) is y
    return y.full_tensor()


def transposed() -> tuple[Tensor, Tensor]:
    """Of an input that is not contiguous, the output and the gradient of the input."""
    leaf = sharded().detach().requires_grad_()
    y = dropout(leaf.t(), 0.5, key=KEY)
    y.sum().backward()
    assert leaf.grad is not None
    return y.full_tensor(), leaf.grad.full_tensor()


def stratified() -> list[Tensor]:
    calls: list[Any] = []
    for key in STRATIFIED:
        calls += [dropout(sharded(1), 0.5, key=key), gaussian_dropout(sharded(), 0.5, key=key)]
    return [y.full_tensor() for y in calls]


@worlds
def test_in_place_strides_and_strata(world: World) -> None:
    expected = dropout(x, 0.5, key=KEY)
    for dim in (0, 1):
        assert all(y.equal(expected) for y in world.run(inplace, dim))
    leaf = x.clone().requires_grad_()
    y = dropout(leaf.t(), 0.5, key=KEY)
    y.sum().backward()
    for output, grad in world.run(transposed):
        assert output.equal(y)
        assert grad.equal(leaf.grad)
    for found in world.run(stratified):
        for key in STRATIFIED:
            assert found.pop(0).equal(dropout(x, 0.5, key=key))
            assert found.pop(0).equal(gaussian_dropout(x, 0.5, key=key))


def of_edges() -> str:
    edges = distribute_tensor(torch.arange(8).view(2, 4), mesh(2), [Shard(1)], src_data_rank=None)
    try:
        thinned.functional.dropout_edge(edges, 0.5, key=KEY)
    except NotImplementedError as error:
        return str(error)
    return "no error"


def intercepted() -> list[Tensor]:
    """Torch's own dropout and attention of DTensors, whose heads are sharded."""
    q = distribute_tensor(x.view(1, 4, 4, 4) / 64, mesh(2), [Shard(1)], src_data_rank=None)
    with thinned.intercept(key=KEY):
        of_heads: Any = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        dropped: Any = F.dropout(sharded(), 0.5)
    return [of_heads.full_tensor(), dropped.full_tensor()]


@worlds
def test_intercepted_functions_of_torch_and_edges(world: World) -> None:
    q = x.view(1, 4, 4, 4) / 64
    with thinned.intercept(key=KEY):
        expected = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5), F.dropout(x, 0.5)
    for of_heads, dropped in world.run(intercepted):
        assert of_heads.equal(expected[0])
        assert dropped.equal(expected[1])
    for message in world.run(of_edges):
        assert "dropout_edge takes no DTensor" in message
        assert "(2, 4)" in message
