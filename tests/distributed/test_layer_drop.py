"""LayerDrop in several processes: no rank waits for a layer that another skips."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import thinned
from distributed.world import World

pytestmark = pytest.mark.parametrize("world", [2], indirect=True)
DEPTH, STEPS = 6, 4
SEED = thinned.Key(3)


def stack(run_all: bool = False) -> thinned.LayerDrop:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(DEPTH)]
    return thinned.LayerDrop(layers, p=0.5, run_all=run_all)


def train(engine: str | None, decided_by: str) -> tuple[list[list[int]], list[Tensor]]:
    """The layers that ran at each step, and the parameters after the last."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if engine else (0, 1)
    layers = stack(run_all=decided_by == "run_all")
    model: nn.Module = layers
    if engine == "fsdp":
        mesh = init_device_mesh("cpu", (size,))
        for module in (*layers, layers):
            fully_shard(module, mesh=mesh)
    elif engine == "ddp":
        skips = decided_by in ("key", "address")
        model = DistributedDataParallel(layers, find_unused_parameters=skips)
    ran: list[list[int]] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran[-1].append(index))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batches = torch.randn(STEPS, 8, 4, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(rank)
    for step in range(STEPS):
        ids = torch.arange(8).chunk(size)[rank]
        arguments: dict[str, Any] = {}
        context: Any = nullcontext()
        if decided_by == "address":
            context = thinned.address(layers, seed=SEED, step=step, samples=ids)
        elif decided_by != "draw":
            arguments["key"] = SEED.fold(step).fold("")  # the address's
        ran.append([])
        with context:
            model(batches[step, ids], **arguments).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = [each.full_tensor() if isinstance(each, DTensor) else each for each in layers.parameters()]
    return ran, [each.detach() for each in weights]


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
@pytest.mark.parametrize("decided_by", ["key", "address", "run_all"])
def test_ranks_decide_alike(world: World, engine: str, decided_by: str) -> None:
    """A step is that of one process with the whole batch."""
    ran, expected = train(None, "key")
    assert 0 < sum(map(len, ran)) < DEPTH * STEPS
    for ran_there, weights in world.run(train, engine, decided_by):
        assert ran_there == ([list(range(DEPTH))] * STEPS if decided_by == "run_all" else ran)
        torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_ranks_that_draw_run_all_layers(world: World, engine: str) -> None:
    first, second = world.run(train, engine, "draw")
    assert first[0] == second[0] == [list(range(DEPTH))] * STEPS
    torch.testing.assert_close(first[1], second[1])
    assert all(each.isfinite().all() for each in first[1])


def loop() -> list[int]:
    layers = stack()
    torch.manual_seed(dist.get_rank())
    with pytest.raises(RuntimeError, match=r"\(each process draws which to skip\): .* the same key"):
        layers.surviving()
    with thinned.address(layers, seed=SEED, step=0):
        within = list(layers.surviving())
    assert list(layers.eval().surviving()) == list(layers)
    return [index for index, layer in enumerate(layers) if layer in within]


def test_a_loop_of_ones_own(world: World) -> None:
    first, second = world.run(loop)
    assert first == second
    assert 0 < len(first) < DEPTH


def batchwise() -> tuple[list[Tensor], Tensor]:
    """Masks that a batch shares, and one that it does not."""
    layers = {
        "depth": thinned.StochasticDepth(0.5, "batch"),
        "block": thinned.DropBlock2d(0.5, 3, batchwise=True),
        "shared": thinned.Dropout(0.5, broadcast_dims=(0,)),
        "dropout": thinned.Dropout(0.5),
    }
    model, x = nn.ModuleDict(layers), torch.ones(2, 16, 8, 8)
    with thinned.address(model, seed=SEED, step=0):
        *same, own = (layer(x) for layer in model.values())
    return same, own


def test_a_decision_for_the_batch_is_that_of_all_ranks(world: World) -> None:
    (first, own), (second, others) = world.run(batchwise)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert not own.equal(others)
