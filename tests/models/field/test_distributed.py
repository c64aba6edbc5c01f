"""Field issues about torch.distributed: masks of shards, replicas, stages, and of ranks that resume."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, _random, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import oracle
import thinned
from distributed.world import World
from models.field.halves import in_torch, seeded
from models.field.test_recomputed import WITHOUT_STATE, recomputes_other_masks, residual
from thinned import Key

Dropout = Callable[[Tensor], Tensor]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]
ONES = torch.ones(8, 8)


def plain(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


def keyed(x: Tensor) -> Tensor:
    return thinned.functional.dropout(x, 0.5, key=Key(7))


def whole(dropout: Dropout, placement: Placement, apart: bool = False) -> Tensor:
    """The whole result of a dropout of a DTensor, on ranks seeded alike or ``apart``."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    x = distribute_tensor(ONES, mesh, [placement])
    torch.manual_seed(dist.get_rank() if apart else 3)
    y = dropout(x)
    assert isinstance(y, DTensor)
    return y.full_tensor()


def shards_alike(y: Tensor) -> bool:
    first, second = y.chunk(2)
    return first.equal(second)


@in_torch("reproduces")
def test_pytorch_168058_torch(world: World) -> None:
    """A mask depends on how many ranks there are, and on the dimension that they share out."""
    rows, columns = (world.run(whole, plain, Shard(dim))[0] for dim in (0, 1))
    alone = seeded(plain, ONES)
    assert not rows.equal(alone)
    assert not columns.equal(alone)
    assert not columns.equal(rows)


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()], ids=str)
def test_pytorch_168058_thinned(world: World, placement: Placement) -> None:
    for y in world.run(whole, keyed, placement):
        oracle.assert_same(y, keyed(ONES))


def without_a_tracker() -> None:
    """Torch says itself that its repair is not for CPUs."""
    with pytest.warns(UserWarning, match="may not have complete support on cpu"):
        whole(plain, Shard(0))
    with pytest.raises(RuntimeError, match="Got cpu instead"):
        _random.OffsetBasedRNGTracker(init_device_mesh("cpu", (dist.get_world_size(),)))


@in_torch("reproduces")
def test_pytorch_138329_torch(world: World) -> None:
    """On CPUs every shard has the same mask."""
    assert all(map(shards_alike, world.run(whole, plain, Shard(0))))
    world.run(without_a_tracker)


def random_state(dropout: Dropout) -> bool:
    """Whether a dropout of a DTensor leaves the random states as they are, and makes no tracker."""
    torch.manual_seed(3)
    before, tracker = torch.get_rng_state(), _random._rng_tracker
    whole(dropout, Shard(0))
    return torch.get_rng_state().equal(before) and _random._rng_tracker is tracker


def test_pytorch_138329_thinned(world: World) -> None:
    assert not any(map(shards_alike, world.run(whole, keyed, Shard(0))))
    assert all(world.run(random_state, keyed))


@in_torch("reproduces")
def test_pytorch_103910_torch(world: World) -> None:
    """Tensor parallelism wants other masks for shards and the same for replicas; no seeds give both."""
    assert not hasattr(_random, "TensorParallelRNGTracker")
    assert all(map(shards_alike, world.run(whole, plain, Shard(0))))
    first, second = world.run(whole, plain, Replicate(), apart=True)
    assert not first.equal(second)


@pytest.mark.parametrize("apart", [False, True])
def test_pytorch_103910_thinned(world: World, apart: bool) -> None:
    """One key gives both, whatever the seeds."""
    assert not any(map(shards_alike, world.run(whole, keyed, Shard(0), apart)))
    for replica in world.run(whole, keyed, Replicate(), apart):
        oracle.assert_same(replica, keyed(ONES))


@pytest.fixture
def group_of_one() -> Iterator[None]:
    """A process group in this process, for what needs a mesh and no other rank."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def through_a_mesh(dropout: Dropout, device: str) -> Tensor:
    """The issue's program: a tensor passes through a DTensor, and comes back on the mesh's device."""
    tensor = DTensor.from_local(ONES, init_device_mesh(device, (1,))).full_tensor()
    return seeded(dropout, tensor).cpu()


@pytest.mark.usefixtures("group_of_one")
@in_torch("needs a GPU")
def test_pytorch_146190_torch() -> None:
    """The mesh is one of GPUs, so the dropout after it has the numbers of a GPU."""
    assert not through_a_mesh(plain, "cuda").equal(seeded(plain, ONES))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("device", DEVICES)
def test_pytorch_146190_thinned(device: str) -> None:
    oracle.assert_same(through_a_mesh(keyed, device), keyed(ONES))
    inside = keyed(DTensor.from_local(ONES, init_device_mesh(device, (1,))))
    assert isinstance(inside, DTensor)
    oracle.assert_same(inside.full_tensor().cpu(), keyed(ONES))


def offloaded(device: str) -> Any:
    """What FSDP2 makes of a parameter that it offloads: on a CPU, within a mesh of GPUs."""
    mesh = init_device_mesh(device, (1,))
    x = DTensor.from_local(torch.ones(8, 8, device=device), mesh, [Shard(0)])
    return torch.empty_like(x, device="cpu").fill_(1)


def in_region(dropout: Dropout, x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        return dropout(x)


@pytest.mark.usefixtures("group_of_one")
@in_torch("needs a GPU")
def test_pytorch_196562_torch() -> None:
    """The tracker of the GPU's state restores the CPU's, so all draws on the CPU are the same."""
    x = offloaded("cuda")
    first, second = plain(x), plain(x)
    assert first.to_local().equal(second.to_local())


@in_torch("reproduces")
def test_pytorch_196562_torch_region() -> None:
    """So they are without a GPU, within the region that the tracker enters for each operation."""
    assert in_region(plain, ONES).equal(in_region(plain, ONES))


@pytest.mark.usefixtures("group_of_one")
@pytest.mark.parametrize("device", DEVICES)
def test_pytorch_196562_thinned(device: str) -> None:
    """Masks by address need no random state, so none is restored."""
    model = nn.Sequential(thinned.Dropout(0.5), thinned.Dropout(0.5))
    x = offloaded(device)
    with thinned.address(model, seed=7, step=1):
        first, second = (in_region(dropout, x) for dropout in model)
    assert not first.to_local().equal(second.to_local())


def stage(dropout: type[nn.Module], sites: range) -> nn.Module:
    return nn.Sequential(OrderedDict((str(site), dropout(0.5)) for site in sites))


IDS = torch.arange(8)


def pipeline(dropout: type[nn.Module], chunks: int) -> Tensor | None:
    """Four dropouts, two in each of two ranks."""
    rank = dist.get_rank()
    part = stage(dropout, range(2 * rank, 2 * rank + 2))
    schedule = ScheduleGPipe(PipelineStage(part, rank, 2, torch.device("cpu")), chunks)
    torch.manual_seed(3)
    with thinned.address(part, seed=7, step=1, samples=IDS, microbatches=chunks):
        y: Tensor | None = schedule.step(*([ONES] if rank == 0 else []))
    return y


def in_one_process(dropout: type[nn.Module], chunks: int) -> Tensor:
    model = stage(dropout, range(4))
    torch.manual_seed(3)
    with thinned.address(model, seed=7, step=1, samples=IDS, microbatches=chunks):
        return torch.cat([model(x) for x in ONES.chunk(chunks)])


@in_torch("reproduces")
def test_pytorch_55036_torch(world: World) -> None:
    """With other partitions a dropout comes to other numbers of its device's generator."""
    assert not world.run(pipeline, nn.Dropout, 2)[1].equal(in_one_process(nn.Dropout, 2))


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_pytorch_55036_thinned(world: World, chunks: int) -> None:
    """Any number of partitions and of chunks has the masks of one process."""
    oracle.assert_same(world.run(pipeline, thinned.Dropout, chunks)[1], in_one_process(thinned.Dropout, 1))


def trained(dropout: type[nn.Module], apart: bool = False) -> Tensor:
    """Weights after three steps, on as many ranks as there are, seeded alike or ``apart``."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), dropout(0.5), nn.Linear(8, 8)).double()
    replica = model if size == 1 else DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    x, ids = torch.randn(8, 8, dtype=torch.float64), torch.arange(8)[rank::size]
    torch.manual_seed(3 + rank * apart)
    for step in range(3):
        optimizer.zero_grad()
        with thinned.address(model, seed=7, step=step, samples=ids):
            replica(x[ids]).square().mean().backward()
        optimizer.step()
    return model[0].weight.detach().clone()


@pytest.mark.parametrize("apart", [False, True])
@in_torch("reproduces")
def test_vescale_52_torch(world: World, apart: bool) -> None:
    """Data-parallel training with dropout is not the training on one device, whatever the seeds."""
    for weights in world.run(trained, nn.Dropout, apart):
        assert not weights.allclose(trained(nn.Dropout))


def test_vescale_52_thinned(world: World) -> None:
    """A sample has the same masks on any rank, so weights differ by the order of sums at most."""
    for weights in world.run(trained, thinned.Dropout):
        torch.testing.assert_close(weights, trained(thinned.Dropout))


def resumed(dropout: type[nn.Module], folder: str) -> tuple[Tensor, Tensor]:
    """A step's result in the first run of a rank, and in the run that resumes there."""
    rank = dist.get_rank()
    model, ids = nn.Sequential(dropout(0.5)), IDS[rank::2]
    x = ONES[ids]

    def step(number: int) -> Tensor:
        with thinned.address(model, seed=7, step=number, samples=ids):
            y: Tensor = model(x)
        return y

    torch.manual_seed(rank)
    step(0)
    state = {"rng": torch.get_rng_state(), "step": 1}
    dcp.save(state, checkpoint_id=folder)
    first = step(1)
    state["step"] = -1
    dcp.load(state, checkpoint_id=folder)
    torch.set_rng_state(state["rng"])
    return first, step(state["step"])


@in_torch("reproduces")
def test_megatron_lm_6858_torch(world: World, tmp_path: Path) -> None:
    """Ranks save their random states under one name, and all resume with that of rank 0."""
    (kept, same), (first, other) = world.run(resumed, nn.Dropout, str(tmp_path))
    assert same.equal(kept)
    assert not other.equal(first)
    assert other.equal(same)


def test_megatron_lm_6858_thinned(world: World, tmp_path: Path) -> None:
    """Seed and step are all that masks need, and they are the same on all ranks."""
    for first, again in world.run(resumed, thinned.Dropout, str(tmp_path)):
        oracle.assert_same(again, first)


def recomputes_other_masks_sharded(dropout: type[nn.Module]) -> bool:
    return recomputes_other_masks(fully_shard(residual(dropout)), WITHOUT_STATE[False])


@in_torch("reproduces")
def test_olmo_core_828_torch_sharded(world: World) -> None:
    """So it does under FSDP2, where each block is checkpointed."""
    assert all(world.run(recomputes_other_masks_sharded, nn.Dropout))


def test_olmo_core_828_thinned_sharded(world: World) -> None:
    assert not any(world.run(recomputes_other_masks_sharded, thinned.Dropout))
