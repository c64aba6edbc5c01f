"""Dropouts in plans of parallelize_module have the masks of one process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.utils.checkpoint import checkpoint

import oracle
import thinned
from distributed.world import World

SAMPLES, LENGTH, WIDTH, HIDDEN = 4, 8, 4, 12
P = 0.5


class FeedForward(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, hidden), nn.Linear(hidden, WIDTH)
        self.activation, self.dropout = nn.GELU(), thinned.Dropout(P)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.dropout(self.activation(self.up(x)))
        return self.down(h), h.detach()


class Block(nn.Module):
    """A transformer's block without attention, which returns what each of its dropouts returned, too."""

    def __init__(self, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.norm, self.ff, self.dropout = nn.LayerNorm(WIDTH), FeedForward(hidden), thinned.Dropout(P)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, h = self.ff(self.norm(x))
        y = self.dropout(y)
        return x + y, h, y.detach()


def plan(name: str) -> dict[str, ParallelStyle]:
    """Plans under which ``"ff.dropout"`` has the whole tensor's mask."""
    down = {"ff.down": RowwiseParallel()}
    if name == "tensor":
        return {"ff.up": ColwiseParallel(use_local_output=False), **down}
    if name == "style of the dropout":
        return {"ff.up": ColwiseParallel(), "ff.dropout": SequenceParallel(sequence_dim=-1), **down}
    if name == "module output":
        sharded = PrepareModuleOutput(
            output_layouts=Shard(-1), desired_output_layouts=Shard(-1), use_local_output=False
        )
        return {"ff.up": ColwiseParallel(), "ff.activation": sharded, **down}
    assert name == "sequence"
    return {
        "": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "ff": PrepareModuleInput(input_layouts=Shard(1), desired_input_layouts=Replicate()),
        "ff.up": ColwiseParallel(use_local_output=False),
        "ff.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
        "dropout": SequenceParallel(),
    }


PLANS = ["tensor", "style of the dropout", "module output", "sequence"]


def data(samples: int = SAMPLES) -> Tensor:
    return torch.randn(samples, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3)).double()


def block(hidden: int = HIDDEN) -> Block:
    torch.manual_seed(3)
    return Block(hidden).double()


def full(x: Tensor | None) -> Tensor:
    assert x is not None
    return (x.full_tensor() if isinstance(x, DTensor) else x).detach()


def results(
    model: nn.Module, x: Tensor, ids: Tensor | None = None, run: Callable[..., Any] | None = None
) -> list[Tensor]:
    """What the dropouts and the model return, then the gradients, all of them whole."""
    x = x.clone().requires_grad_()
    with thinned.address(model, seed=7, step=1, samples=ids):
        y, *dropped = (model if run is None else run)(x)
    full_loss = y.square().sum()
    full_loss.backward()
    grads = [x.grad, *(parameter.grad for parameter in model.parameters())]
    return [full(each) for each in (*dropped, y, *grads)]


def in_plan(name: str, hidden: int = HIDDEN, how: str = "eager", ids: Tensor | None = None) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(block(hidden), mesh, plan(name))
    run: Callable[..., Any] = model
    if how == "compiled":
        torch.compiler.reset()
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
    elif how == "checkpointed":
        run = partial(checkpoint, model, use_reentrant=False, preserve_rng_state=False)
    return results(model, data(), ids, run)


def assert_masks(got: list[Tensor], want: list[Tensor]) -> None:
    """The masks are the same, and the rest but for the order of sums."""
    for dropped, expected in zip(got[:2], want[:2], strict=True):
        oracle.assert_same(dropped != 0, expected != 0)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_has_the_masks_of_one_process(world: World, name: str) -> None:
    alone = results(block(), data())
    for got in world.run(in_plan, name):
        assert_masks(got, alone)


@pytest.mark.parametrize(
    ("world", "name"),
    [
        pytest.param(size, name, marks=[] if (size, name) == (2, "sequence") else pytest.mark.slow)
        for size in (2, 4)
        for name in PLANS
    ],
    indirect=["world"],
)
def test_so_it_has_compiled(world: World, name: str) -> None:
    alone = results(block(), data())
    for got in world.run(in_plan, name, how="compiled"):
        assert_masks(got, alone)


def test_so_it_has_in_a_checkpoint_without_random_states(world: World) -> None:
    alone = results(block(), data())
    for got in world.run(in_plan, "sequence", how="checkpointed"):
        assert_masks(got, alone)


def test_shards_may_be_uneven_or_empty(world: World) -> None:
    """Nine features are 5 and 4 on two ranks, and 3, 3, 3 and none on four."""
    alone = results(block(9), data())
    for got in world.run(in_plan, "tensor", 9):
        assert_masks(got, alone)


IDS = torch.tensor([8, 3, 5, 1])


def test_samples_have_their_masks_in_a_plan(world: World) -> None:
    alone = results(block(), data(), IDS)
    for got in world.run(in_plan, "sequence", ids=IDS):
        assert_masks(got, alone)


def features_as_plain_tensors() -> tuple[Tensor, Tensor]:
    """What ``"ff.dropout"`` returns under the plan of torch's tutorial, and the mask of such a tensor."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = parallelize_module(block(), mesh, {"ff.up": ColwiseParallel(), "ff.down": RowwiseParallel()})
    with torch.no_grad(), thinned.address(model, seed=7, step=1) as address:
        h = model(data())[1]
    assert not isinstance(h, DTensor)
    return h, address.mask_of("ff.dropout", h.shape, p=P)


def test_a_plain_tensor_is_a_whole_one(world: World) -> None:
    """A plain tensor does not say which features it holds, so those of all ranks share their masks."""
    for h, mask in world.run(features_as_plain_tensors):
        assert h.shape == (SAMPLES, LENGTH, HIDDEN // world.size)
        oracle.assert_same(h != 0, mask)


def in_two_dimensions(name: str) -> list[Tensor]:
    """FSDP2 over two groups of ranks, each of which shares out the features; gradients are averages."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    group = mesh["dp"].get_local_rank()
    model = fully_shard(parallelize_module(block(), mesh["tp"], plan(name)), mesh=mesh["dp"])
    return results(model, data().chunk(2)[group], IDS.chunk(2)[group])


@pytest.mark.parametrize("world", [4], indirect=True)
@pytest.mark.parametrize("name", PLANS)
def test_fsdp_and_a_plan_have_the_masks_of_one_process(world: World, name: str) -> None:
    alone = results(block(), data(), IDS)
    for rank, got in enumerate(world.run(in_two_dimensions, name)):
        group = rank // 2
        mine = [each.chunk(2)[group] for each in alone[:4]]
        assert_masks(got, [*mine, *(grad / 2 for grad in alone[4:])])
