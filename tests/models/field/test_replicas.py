"""Field issues about data-parallel replicas, whose processes have the same seed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thinned
from distributed.world import World
from models.field.halves import in_torch


@pytest.fixture
def world(worlds: dict[int, World]) -> World:
    return worlds.setdefault(2, World(2))


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
