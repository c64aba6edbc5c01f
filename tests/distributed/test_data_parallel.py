"""Masks of data-parallel replicas: by ids those of one process; without ids another in each replica."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler

import thinned
from distributed.world import World
from thinned import Key, Keyed
from thinned.distributed import shard_ids
from thinned.distributed.ranks import replica_of
from thinned.key_source import active
from thinned.torch_state import local_of

WIDTH, ROWS = 16, 8
four = pytest.mark.parametrize("world", [4], indirect=True)
two = pytest.mark.parametrize("world", [2], indirect=True)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), thinned.Dropout(0.5))


def mesh_of(**sizes: int) -> DeviceMesh:
    return init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def sharded(model: nn.Module, mesh: DeviceMesh | None = None) -> nn.Module:
    for layer in model.children():
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(net(), mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda model: model,
    "ddp": DistributedDataParallel,
    "fsdp": sharded,
    "hsdp": lambda model: sharded(model, mesh_of(outer=2, inner=dist.get_world_size() // 2)),
    "replicate": lambda model: replicate(model, mesh=mesh_of(dp=dist.get_world_size())),
}


class Indexed(Dataset[tuple[int, Tensor]]):
    """Examples with their indices, for ids."""

    def __len__(self) -> int:
        return 2 * ROWS

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        return index, torch.randn(WIDTH, generator=torch.Generator().manual_seed(index))


def masks_of_examples(wrap: str = "plain", rank: int = 0, size: int = 1) -> dict[tuple[int, int], list[bool]]:
    """The mask of each example that a rank gets from its loader in two epochs of training."""
    inner = net()
    model, kept = WRAPS[wrap](inner), []
    inner[2].register_forward_hook(lambda *call: kept.append(call[2] != 0))
    sampler = DistributedSampler(Indexed(), size, rank)
    found = {}
    for step, (ids, x) in enumerate(DataLoader(Indexed(), ROWS // size, sampler=sampler)):
        with thinned.address(model, seed=7, step=step, samples=ids):
            model(x).sum().backward()
        found |= {(step, int(i)): row for i, row in zip(ids, kept.pop().tolist(), strict=True)}
    return found


def masks_of_rank(wrap: str) -> dict[tuple[int, int], list[bool]]:
    return masks_of_examples(wrap, dist.get_rank(), dist.get_world_size())


@pytest.mark.parametrize("wrap", WRAPS)
def test_an_example_has_the_mask_of_one_process(world: World, wrap: str) -> None:
    """By the indices of a DataLoader with a DistributedSampler, on 1, 2 and 4 processes."""
    ranks = world.run(masks_of_rank, wrap)
    assert all(len(masks) == 2 * ROWS // world.size for masks in ranks)
    assert {call: row for masks in ranks for call, row in masks.items()} == masks_of_examples()


def masks_without_ids(wrap: str, **options: Any) -> list[list[list[bool]]]:
    """Each rank's mask and another's of it, in processes that have the same seed."""
    inner = net()
    model = WRAPS[wrap](inner)
    with thinned.address(model, seed=7, step=3, **options) as address:
        kept = model(torch.ones(ROWS, WIDTH)) != 0
    return [kept.tolist(), address.mask_of("2", (ROWS, WIDTH)).tolist()]


@pytest.mark.parametrize("wrap", WRAPS)
def test_without_ids_no_two_replicas_share_a_mask(world: World, wrap: str) -> None:
    """One process can look at the masks of any rank by its number."""
    ranks = world.run(masks_without_ids, wrap)
    for rank, (kept, looked_up) in enumerate(ranks):
        assert kept == looked_up
        address = thinned.address(net(), seed=7, step=3, data_parallel=rank)
        assert address.mask_of("2", (ROWS, WIDTH)).tolist() == kept
    assert len({str(kept) for kept, _ in ranks}) == world.size
    if wrap == "ddp":
        alone = thinned.address(net(), seed=7, step=3).mask_of("2", (ROWS, WIDTH))
        assert all(
            kept == alone.tolist() for kept, _ in world.run(masks_without_ids, wrap, data_parallel=None)
        )


def test_the_formula() -> None:
    address = thinned.address(net(), seed=7, step=3, data_parallel=5)
    assert address.key_of("2") == Key(7).fold(3).fold("#data parallel").fold(5).fold("2")
    assert address.key_of("2") != thinned.address(net(), seed=7, step=3).key_of("2")
    ids = thinned.address(net(), seed=7, step=3, samples=[4], data_parallel=5)
    assert ids.key_of("2") == Key(7).fold(3).fold("2").fold(torch.tensor([4]))


def test_no_site_has_the_key_that_replicas_are_folded_into() -> None:
    model = nn.Module()
    model.add_module("#data parallel", thinned.Dropout())
    site = thinned.address(model, seed=7, step=3).key_of("#data parallel")
    assert site != Key(7).fold(3).fold("#data parallel")


def numbers() -> dict[str, int | None]:
    """The number of the replica that this rank of 4 computes of a model."""
    grid = mesh_of(dp=2, tp=2)
    strided = DeviceMesh("cpu", [[0, 2], [1, 3]], mesh_dim_names=("dp", "tp"))
    reordered = DeviceMesh("cpu", [[3, 2], [0, 1]], mesh_dim_names=("outer", "inner"))
    within = tensor_parallel(grid["tp"])
    outside = DistributedDataParallel(within, device_mesh=grid["dp"])
    models = {
        "plain": net(),
        "without parameters": nn.Sequential(thinned.Dropout()),
        "ddp": DistributedDataParallel(net()),
        "the model within ddp": DistributedDataParallel(net()).module,
        "ddp within a model": nn.Sequential(DistributedDataParallel(net())),
        "compiled ddp": torch.compile(DistributedDataParallel(net())),
        "ddp of a group": DistributedDataParallel(net(), process_group=grid.get_group("dp")),
        "fsdp": sharded(net()),
        "fsdp within a model": nn.Sequential(sharded(net())),
        "hsdp": sharded(net(), mesh_of(outer=2, inner=2)),
        "reordered hsdp": sharded(net(), reordered),
        "fsdp + tp": sharded(tensor_parallel(grid["tp"]), grid["dp"]),
        "replicate + tp": replicate(tensor_parallel(grid["tp"]), mesh=grid["dp"]),
        "ddp + tp": outside,
        "the model within ddp + tp": within,
        "tp": tensor_parallel(grid["tp"]),
        "strided tp": tensor_parallel(strided["tp"]),
        "tp of all": tensor_parallel(mesh_of(tp=4)),
    }
    groups = {"mesh": grid, "slice": grid["dp"], "group": grid.get_group("dp"), "number": 9, "none": None}
    found = {name: replica_of(model, "auto") for name, model in models.items()}
    found |= {f"given {name}": replica_of(net(), group) for name, group in groups.items()}
    return {name: replica and replica.number for name, replica in found.items()}


@four
def test_the_number_of_a_replica(world: World) -> None:
    ranks = world.run(numbers)
    assert {name: [found[name] for found in ranks] for name in ranks[0]} == {
        "plain": [0, 1, 2, 3],
        "without parameters": [0, 1, 2, 3],
        "ddp": [0, 1, 2, 3],
        "the model within ddp": [0, 1, 2, 3],
        "ddp within a model": [0, 1, 2, 3],
        "compiled ddp": [0, 1, 2, 3],
        "ddp of a group": [0, 0, 1, 1],
        "fsdp": [0, 1, 2, 3],
        "fsdp within a model": [0, 1, 2, 3],
        "hsdp": [0, 1, 2, 3],
        "reordered hsdp": [2, 3, 1, 0],
        "fsdp + tp": [0, 0, 1, 1],
        "replicate + tp": [0, 0, 1, 1],
        "ddp + tp": [0, 0, 1, 1],
        "the model within ddp + tp": [0, 0, 2, 2],
        "tp": [0, 0, 2, 2],
        "strided tp": [0, 1, 0, 1],
        "tp of all": [None] * 4,
        "given mesh": [0, 1, 2, 3],
        "given slice": [0, 0, 1, 1],
        "given group": [0, 0, 1, 1],
        "given number": [9] * 4,
        "given none": [None] * 4,
    }


def masks_of_tensor_parallel(data_parallel: Any = "auto") -> list[list[bool]]:
    grid = mesh_of(dp=2, tp=2)
    model = sharded(tensor_parallel(grid["tp"]), grid["dp"]) if data_parallel == "auto" else net()
    if data_parallel == "mesh":
        data_parallel = grid["dp"]
    with thinned.address(model, seed=7, step=3, data_parallel=data_parallel):
        return (model(torch.ones(ROWS, WIDTH)) != 0).tolist()


@four
@pytest.mark.parametrize("data_parallel", ["auto", "mesh"])
def test_a_tensor_parallel_group_shares_its_masks(world: World, data_parallel: str) -> None:
    """Also where plain tensors hide the group, as in Megatron, and data_parallel= names the replicas."""
    a, b, c, d = world.run(masks_of_tensor_parallel, data_parallel)
    assert a == b != c == d


def ambiguous() -> str:
    grid = mesh_of(dp=2, tp=2)
    model = nn.Sequential(tensor_parallel(grid["tp"]), tensor_parallel(grid["dp"]))
    with pytest.raises(RuntimeError) as error:
        thinned.address(model, seed=7, step=3)
    thinned.address(model, seed=7, step=3, data_parallel=None)
    return str(error.value)


@four
def test_meshes_that_leave_the_replica_open(world: World) -> None:
    assert "0.0.weight is a DTensor on the ranks [2, 3] and 1.0.weight on [0, 2]" in world.run(ambiguous)[2]


def shared_decisions() -> list[Any]:
    model = nn.ModuleDict(
        {
            "layers": thinned.LayerDrop([nn.Identity() for _ in range(40)], p=0.5),
            "weights": thinned.WeightDrop(nn.Linear(9, 9, bias=False), "weight", p=0.5),
        }
    )
    with thinned.address(model, seed=7, step=3):
        layers = model["layers"].surviving()
        seen = [sum(layer is other for other in model["layers"]) for layer in layers]
        x = model["weights"](torch.eye(9)) != 0
        edges = thinned.functional.dropout_edge(torch.arange(40).reshape(2, 20), 0.5)[0]
    return [len(seen), x.tolist(), edges.tolist()]


@two
def test_what_all_samples_share_is_decided_alike(world: World) -> None:
    """Layers, weights and edges: a rank that skips another layer waits for others for ever."""
    a, b = world.run(shared_decisions)
    assert a == b


def keys_of_dtensors() -> dict[str, int]:
    """The key at a site for DTensors on meshes that hold a part of a replica, one, or all of them."""
    grid = mesh_of(dp=2, tp=2)
    x = torch.ones(8, 4)
    inputs: dict[str, Tensor] = {
        "plain": x,
        "one replica": distribute_tensor(x, grid["tp"], [Shard(1)]),
        "all replicas": distribute_tensor(x, grid, [Shard(0), Shard(1)]),
        "all, not tensor parallel": distribute_tensor(x, grid["dp"], [Shard(0)]),
    }
    found = {}
    for data_parallel in (grid["dp"], "auto"):
        for name, input in inputs.items():
            with thinned.address(net(), seed=7, step=3, data_parallel=data_parallel) as address:
                key = active.key_source.key_for(input, 0)
            found[f"{name}, {'auto' if data_parallel == 'auto' else 'mesh'}"] = int(key)
    found["alone"] = int(Key(7).fold(3).fold(""))
    assert address.replica is not None
    return found


@four
def test_the_key_of_a_dtensor(world: World) -> None:
    ranks = world.run(keys_of_dtensors)
    same = {name: [found[name] == ranks[0][name] for found in ranks] for name in ranks[0]}
    assert same == {
        "alone": [True] * 4,
        "plain, mesh": [True, True, False, False],
        "one replica, mesh": [True, True, False, False],
        "all replicas, mesh": [True] * 4,
        "all, not tensor parallel, mesh": [True] * 4,
        "plain, auto": [True, False, False, False],
        "one replica, auto": [True, True, False, False],  # its mesh shows what plain parameters do not
        "all replicas, auto": [True] * 4,
        "all, not tensor parallel, auto": [True, False, True, False],
    }
    whole = {"all replicas, mesh", "all, not tensor parallel, mesh", "all replicas, auto"}
    assert {name for name, key in ranks[0].items() if key == ranks[0]["alone"]} == {*whole, "alone"}


def ids_of_dtensors() -> tuple[list[bool], list[str]]:
    grid = mesh_of(dp=2)
    rank, errors, right = dist.get_rank(), [], []
    x = distribute_tensor(torch.ones(7, 4), grid, [Shard(0)])

    def keys(samples: Any, input: Tensor = x) -> Tensor:
        with thinned.address(net(), seed=7, step=3, samples=samples):
            key = active.key_source.key_for(input, 0)
        assert type(key.bits) is Tensor
        return key.bits

    expected = Key(7).fold(3).fold("").fold(torch.arange(7)).bits
    right.append(keys(torch.arange(7)).equal(expected))
    ids = distribute_tensor(torch.arange(7), grid, [Replicate()])
    right.append(keys(ids).equal(expected))
    with thinned.address(net(), seed=7, step=3, samples=ids):
        y = thinned.functional.dropout(x)
    whole = thinned.functional.dropout(torch.ones(7, 4), key=Key.from_bits(expected))
    right.append(y.full_tensor().equal(whole))
    features = distribute_tensor(torch.ones(14, 4), grid, [Shard(1)])
    right.append(len(keys(torch.arange(7), features)) == 14)
    even = DTensor.from_local(torch.ones(4, 4), grid, [Shard(0)])
    for samples, input in (
        (shard_ids(7), x),
        (torch.arange(4), even),
        (ids.redistribute(grid, [Shard(0)]), x),
    ):
        with pytest.raises((TypeError, RuntimeError)) as error:
            keys(samples, input)
        errors.append(str(error.value).replace(f"{4 - rank} in this one", "N in this one"))
    return right, errors


@two
def test_ids_of_a_dtensor_are_those_of_all_processes(world: World) -> None:
    for rank, (right, errors) in enumerate(world.run(ids_of_dtensors)):
        assert right == [True] * 4
        uneven, even, placed = errors
        assert f"7 rows in all processes and N in this one, but there are {4 - rank} samples" in uneven
        assert "8 rows in all processes and 4 in this one, but there are 4 samples" in even.replace("N", "4")
        assert (
            "got a DTensor of 7 ids with placements (Shard(dim=0),); pass samples.full_tensor(), which"
            in placed
        )


def shards() -> list[tuple[list[int], list[int]]]:
    size = dist.get_world_size()
    mesh = mesh_of(dp=size)
    wholes = [torch.arange(total) for total in range(2 * size + 2)]
    return [
        (
            distribute_tensor(whole, mesh, [Shard(0)]).to_local().tolist(),
            shard_ids(len(whole), data_parallel).tolist(),
        )
        for whole in wholes
        for data_parallel in ("auto", mesh, mesh.get_group())
    ]


def test_shards_are_those_of_dtensors(world: World) -> None:
    for rank in world.run(shards):
        assert all(ids == theirs for theirs, ids in rank)


def mask_of_shard() -> list[list[bool]]:
    ids, model = shard_ids(7), WRAPS["ddp"](net())
    with CommDebugMode() as comm, thinned.address(model, seed=7, step=3, samples=ids):
        mask = (thinned.functional.dropout(torch.ones(len(ids), WIDTH)) != 0).tolist()
    assert comm.get_total_counts() == 0
    with CommDebugMode() as comm, thinned.address(model, seed=7, step=3):
        thinned.functional.dropout(torch.ones(len(ids), WIDTH))
    assert comm.get_total_counts() == 0
    return mask


def test_contiguous_shards_have_the_mask_of_the_whole(world: World) -> None:
    with thinned.address(net(), seed=7, step=3, samples=torch.arange(7)):
        whole = (thinned.functional.dropout(torch.ones(7, WIDTH)) != 0).tolist()
    assert [row for rows in world.run(mask_of_shard) for row in rows] == whole


def check(arguments: list[dict[str, Any]]) -> str:
    """The error of the check in this rank, of which argument ``rank`` is."""
    options = {"seed": 7, "step": 3} | arguments[dist.get_rank()]
    try:
        thinned.address(net(), **options).check_agreement()
    except RuntimeError as error:
        return str(error)
    return ""


DISAGREEMENTS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "alike": ([{}, {}], ""),
    "other ids": ([{"samples": [4, 5]}, {"samples": [6, 7, 8]}], ""),
    "one replica": ([{"samples": [4, 5], "data_parallel": None}] * 2, ""),
    "seeds": ([{"seed": 7}, {"seed": 8}], "ranks 0 and 1 disagree on seed: Key(7) and Key(8)"),
    "steps": ([{}, {"step": torch.tensor([4])}], "ranks 0 and 1 disagree on step: 3 and 4"),
    "no ids": ([{"samples": [4, 5]}, {}], "ranks 0 and 1 disagree on samples: 2 ids and none"),
    "the same ids": (
        [{"samples": [4, 5]}, {"samples": [6, 5]}],
        "ranks 0 and 1 both have the sample 5, so its masks would be the same in two data-parallel replicas; "
        "give each example of all processes an id of its own",
    ),
    "counts": (
        [{"samples": [4, 5], "data_parallel": None}, {"samples": [4], "data_parallel": None}],
        "ranks 0 and 1 disagree on samples, though they compute one data-parallel replica: 2 ids and 1 ids",
    ),
    "rows": (
        [{"samples": [4, 5], "data_parallel": None}, {"samples": [4, 6], "data_parallel": None}],
        "ranks 0 and 1 disagree on samples, though they compute one data-parallel replica: 5 in row 1 and 6",
    ),
}


@two
@pytest.mark.parametrize("name", DISAGREEMENTS)
def test_every_rank_raises_where_two_disagree(world: World, name: str) -> None:
    arguments, message = DISAGREEMENTS[name]
    assert world.run(check, arguments) == [message] * 2


def test_one_process_agrees_with_itself() -> None:
    thinned.address(net(), seed=7, step=3).check_agreement()


def refused() -> list[str]:
    group = dist.new_group([0])
    mesh = DeviceMesh("cpu", [0])
    errors = []
    for data_parallel in (group, mesh, "everyone", 1.5, True, -1):
        try:
            thinned.address(net(), seed=7, step=3, data_parallel=data_parallel)
        except (TypeError, ValueError) as error:
            errors.append(str(error))
    return errors


@two
def test_what_data_parallel_may_not_be(world: World) -> None:
    rank = r"data_parallel is a group of the ranks [0], without this process, which is rank 1"
    *groups, word, real, truth, negative = world.run(refused)[1]
    assert groups[-1] == rank
    accepted = (
        "data_parallel must be 'auto', a DeviceMesh of the data-parallel dimensions, a ProcessGroup, the "
        "number of a replica, or None, got "
    )
    assert (word, real, truth) == tuple(
        accepted + got for got in ("'everyone' of type str", "1.5 of type float", "True of type bool")
    )
    assert negative == "data_parallel has to be at least 0, but got -1"


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    model, x = net(), torch.ones(ROWS, WIDTH)

    def within(x: Tensor) -> Tensor:
        with thinned.address(model, seed=7, step=3, data_parallel=2):
            return model(x)

    eager = within(x)
    with thinned.address(model, seed=7, step=3):
        assert not model(x).equal(eager)
    assert torch.compile(within, backend="aot_eager", fullgraph=True)(x).equal(eager)


def compiled() -> list[bool]:
    """Whether compiled code has the masks of eager code: the context is in it, then outside of it."""
    torch._dynamo.reset()
    model, layer, x, mesh = net(), thinned.Dropout(0.5), torch.ones(ROWS, WIDTH), mesh_of(dp=2)

    def within(x: Tensor, data_parallel: Any) -> Tensor:
        with thinned.address(model, seed=7, step=3, data_parallel=data_parallel):
            return model(x)

    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    thinned.address(model, seed=7, step=3, samples=[1])  # looks for no replica
    with pytest.raises(RuntimeError, match="call thinned"):
        compiler(within)(x, "auto")
    thinned.address(model, seed=7, step=3)
    thinned.address(model, seed=7, step=3, data_parallel=None)
    same = [compiler(within)(x, given).equal(within(x, given)) for given in ("auto", mesh, 5)]
    for input in (x, distribute_tensor(x, mesh, [Shard(0)])):
        with thinned.address(layer, seed=7, step=3):
            eager = layer(input)
        with thinned.address(layer, seed=7, step=3):
            y = compiler(layer)(input)
        same.append(y.equal(eager) if input is x else local_of(y).equal(local_of(eager)))
    return same


@two
@pytest.mark.slow
def test_compiled_on_several(world: World) -> None:
    assert world.run(compiled) == [[True] * 5] * 2


def keyed() -> list[list[float]]:
    return Keyed(net())(torch.ones(ROWS, WIDTH), key=Key(7)).tolist()


@two
def test_keyed_is_a_function_of_its_key(world: World) -> None:
    a, b = world.run(keyed)
    assert a == b == keyed()
