"""Field issues about data-parallel replicas, whose processes have the same seed."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thinned
from distributed.world import World
from models.field.halves import in_torch


def masks(dropout: nn.Module) -> Tensor:
    """Those of two steps of a rank, after the same seed in each."""
    torch.manual_seed(40)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(10, 10), dropout))
    steps = []
    for step in range(2):
        with thinned.address(model, seed=40, step=step):
            steps.append(model(torch.ones(4, 10)) != 0)
    return torch.stack(steps)


@in_torch("reproduces")
def test_transformers_31412_torch(world: World) -> None:
    """A Trainer seeds all its ranks alike, and then all have the same masks."""
    first, second = world.run(masks, nn.Dropout(0.5))
    assert first.equal(second)
    assert not first[0].equal(first[1])


def test_transformers_31412_thinned(world: World) -> None:
    first, second = world.run(masks, thinned.Dropout(0.5))
    assert not any(a.equal(b) for a in first for b in second)
    assert not first[0].equal(first[1])


def resumed(dropout: nn.Module, ranks: int, states: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
    """The mask of the whole batch in a step on so many ranks, and their random states before the next.

    The rank that finds no state of its own goes on with its own random numbers.
    """
    masks, after = [], []
    for rank, ids in enumerate(torch.arange(8).chunk(ranks)):
        torch.manual_seed(40 + rank)
        if states is not None and rank < len(states):
            torch.set_rng_state(states[rank])
        model = nn.Sequential(dropout)
        with thinned.address(model, seed=40, step=states is not None, samples=ids):
            masks.append(model(torch.ones(len(ids), 16)) != 0)
        after.append(torch.get_rng_state())
    return torch.cat(masks), after


def after_resuming(dropout: nn.Module, ranks: int) -> Tensor:
    """The mask of the second step, which runs on so many ranks; the first runs on two."""
    _, states = resumed(dropout, 2, None)
    mask, _ = resumed(dropout, ranks, states)
    return mask


@in_torch("reproduces")
@pytest.mark.parametrize("ranks", [1, 4])
def test_transformers_14994_torch(ranks: int) -> None:
    """The states of two ranks' generators are of no use to another number of ranks."""
    assert after_resuming(nn.Dropout(0.5), 2).equal(after_resuming(nn.Dropout(0.5), 2))
    assert not after_resuming(nn.Dropout(0.5), ranks).equal(after_resuming(nn.Dropout(0.5), 2))


@pytest.mark.parametrize("ranks", [1, 4])
def test_transformers_14994_thinned(ranks: int) -> None:
    assert after_resuming(thinned.Dropout(0.5), ranks).equal(after_resuming(thinned.Dropout(0.5), 2))


def stages(dropout: type[nn.Module], ranks: int) -> list[Tensor]:
    """The masks of two layers, which are on so many ranks of a pipeline, seeded alike."""
    model = nn.Sequential(dropout(0.5), dropout(0.5))
    masks: list[Tensor] = []
    for rank in range(ranks):
        torch.manual_seed(40)
        stage = model[2 * rank // ranks : 2 * (rank + 1) // ranks]  # keeps the layers' names
        with thinned.address(stage, seed=40, step=0):
            masks += [layer(torch.ones(4, 10)) != 0 for layer in stage]
    return masks


@in_torch("reproduces")
def test_torchtitan_514_torch() -> None:
    """Stages have random numbers of their own: here the second has those of the first."""
    one, other = stages(nn.Dropout, 2)
    assert one.equal(other)
    one, other = stages(nn.Dropout, 1)
    assert not one.equal(other)


def test_torchtitan_514_thinned() -> None:
    one, two = stages(thinned.Dropout, 1), stages(thinned.Dropout, 2)
    assert not one[0].equal(one[1])
    assert all(a.equal(b) for a, b in zip(one, two, strict=True))


class Skipping(nn.ModuleList):
    """LayerDrop as it is often written."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            if torch.rand(()) > 0.5:
                x = layer(x)
        return x


def trained(kind: str) -> str:
    """The error of training in a rank, whose seed is its own."""
    layers = [nn.Linear(4, 4) for _ in range(6)]
    model = DistributedDataParallel(thinned.LayerDrop(layers) if kind == "thinned" else Skipping(layers))
    torch.manual_seed(dist.get_rank())
    try:
        for _ in range(3):
            model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    except RuntimeError as error:
        return str(error)
    return "no error"


@in_torch("reproduces")
def test_fairseq2_484_torch(world: World) -> None:
    """Ranks skip different layers, and DistributedDataParallel waits for the gradients of all."""
    for error in world.run(trained, "torch"):
        assert "Expected to have finished reduction" in error


def test_fairseq2_484_thinned(world: World) -> None:
    """Without a key all layers run, and a decision chooses between output and input."""
    assert world.run(trained, "thinned") == ["no error"] * 2
