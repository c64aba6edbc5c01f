"""What a DTensor may be given as, and what is refused."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard
from torch.utils.flop_counter import FlopCounterMode

import thinned
from distributed.placements import mesh
from distributed.world import World
from thinned import torch_state
from thinned.distributed.shards import Run, parts_of, runs_of
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
        assert [position for run in runs for position in range(*run)] == expected.tolist()
        assert all(
            earlier.stop < run.start < run.stop for earlier, run in itertools.pairwise([Run(-2, -1), *runs])
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


def message_of(function: Any, *args: Any) -> str:
    """The error of a call."""
    try:
        function(*args)
    except RuntimeError as error:
        return str(error)
    return "no error"


def transformed() -> list[tuple[str, str]]:
    """Under each transform, the errors of summands and of a call without a key in processes of two seeds."""
    from thinned.distributed import same_key

    torch.manual_seed(dist.get_rank())
    summands = DTensor.from_local(x, mesh(2), [Partial()])
    messages = []
    for transform in (
        lambda f: torch.func.grad(lambda x: f(x).sum()),
        lambda f: torch.func.vmap(f, randomness="same"),
        lambda f: torch.func.functionalize(f),
    ):
        with_key, without = (transform(lambda x, key=key: dropout(x, 0.5, key=key)) for key in (KEY, None))
        same_key._checked.clear()
        messages.append((message_of(with_key, summands), message_of(without, sharded())))
    return messages


@worlds
def test_transforms_refuse_what_a_call_refuses(world: World) -> None:
    for messages in world.run(transformed):
        for of_summands, of_seeds in messages:
            assert "placements (Partial(sum),)" in of_summands
            assert "ranks 0 and 1 differ" in of_seeds


def addressed() -> tuple[Any, Any]:
    """A call and the same one under a transform, by the key of an address."""
    model = torch.nn.Sequential(thinned.Dropout(0.5))
    with thinned.address(model, seed=7, step=0):
        y: Any = model(sharded())
    with thinned.address(model, seed=7, step=0):
        again: Any = torch.func.vjp(model, sharded())[0]
    return y.full_tensor(), again.full_tensor()


@worlds
def test_a_transform_of_a_dtensor_folds_in_no_replica(world: World) -> None:
    for y, again in world.run(addressed):
        assert y.equal(again)


def in_mode(of_rank: int) -> str:
    """The error of a call with a key of this process's own, in one rank under a dispatch mode."""
    with FlopCounterMode(display=False) if dist.get_rank() == of_rank else nullcontext():
        return given([7, 8], dropout)


def traced() -> tuple[Any, Any]:
    """A call that computes no values."""
    from thinned.distributed import same_key

    same_key._checked.clear()
    with FakeTensorMode():
        y: Any = dropout(DTensor.from_local(torch.empty(4, 8), mesh(2), [Shard(0)]), 0.5)
    return type(y.to_local()), y.shape


@worlds
def test_a_mode_in_one_process_hides_no_key_from_the_others(world: World) -> None:
    """They would wait for it."""
    for message in world.run(in_mode, 0):
        assert "that of rank 0 is Key(7) and that of rank 1 is Key(8)" in message
    assert world.run(traced) == [(FakeTensor, (8, 8))] * 2


def in_two_worlds(folder: str) -> str:
    """The error of a call in processes of two seeds, in the second world of these processes."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dropout(sharded(), 0.5)
    mesh.cache_clear()
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=Path(folder, "store").as_uri(), rank=rank, world_size=size)
    torch.manual_seed(rank)
    return message_of(dropout, sharded(), 0.5)


def test_the_meshes_of_another_world_are_others(tmp_path: Path) -> None:
    """A process that is new there has checked none."""
    world = World(2)
    try:
        for message in world.run(in_two_worlds, str(tmp_path)):
            assert "ranks 0 and 1 differ" in message
    finally:
        world.stop()


def of_other_sizes() -> str:
    local = torch.ones(2 + 2 * dist.get_rank(), 8)
    return message_of(dropout, DTensor.from_local(local, mesh(2), [Shard(0)], shape=(6, 8), stride=(8, 1)))


@worlds
def test_a_shard_of_another_size_has_no_known_position(world: World) -> None:
    for rank, message in enumerate(world.run(of_other_sizes)):
        assert "has a shard of shape (3, 8) in this process" in message
        assert f"got one of ({2 + 2 * rank}, 8)" in message


def of_dynamic_sizes(function: Any) -> list[Tensor]:
    """The results of compiled code for batches of several sizes."""
    torch.compiler.reset()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True, dynamic=True)
    inputs = [distribute_tensor(x[:size], mesh(2), [Shard(0)], src_data_rank=None) for size in (6, 8, 5)]
    return [compiled(each, 0.5, key=KEY).full_tensor() for each in inputs]


@worlds
@pytest.mark.parametrize("function", [dropout, gaussian_dropout])
def test_compiled_code_takes_batches_of_any_size(world: World, function: Any) -> None:
    for found in world.run(of_dynamic_sizes, function):
        for y in found:
            assert y.equal(function(x[: y.shape[0]], 0.5, key=KEY))


def outside_of_the_mesh() -> tuple[int, ...]:
    """The shape of this process's shard of a DTensor on the first process."""
    alone = DTensor.from_local(x, DeviceMesh("cpu", [0]), [Shard(0)])
    y: Any = dropout(dropout(alone, 0.5), 0.5, key=KEY)
    return tuple(y.to_local().shape)


@worlds
def test_a_process_outside_of_the_mesh_has_no_mask(world: World) -> None:
    assert world.run(outside_of_the_mesh) == [(8, 8), (0,)]


def predicted() -> str:
    try:
        thinned.montecarlo.predict(torch.nn.Sequential(thinned.Dropout(0.5)), sharded(), samples=2)
    except TypeError as error:
        return str(error)
    return "no error"


@worlds
def test_predictions_are_of_plain_tensors(world: World) -> None:
    for message in world.run(predicted):
        assert "got a DTensor of shape (8, 8)" in message


def with_p_in_summands() -> Any:
    p: Any = DTensor.from_local(torch.tensor(0.25), mesh(2), [Partial()])
    y: Any = dropout(sharded(), p, key=KEY)
    return y.full_tensor()


@worlds
def test_p_is_the_number_of_a_whole_dtensor(world: World) -> None:
    for y in world.run(with_p_in_summands):
        assert y.equal(dropout(x, 0.5, key=KEY))


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
