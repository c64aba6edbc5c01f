"""A dropout of a DTensor with a key leaves every random state as it is, and enters no tracker of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, _random, distribute_tensor

import oracle
import thinned
from distributed.world import World
from thinned import Key

Dropout = Callable[[Tensor], Tensor]


def keyed(x: Tensor) -> Tensor:
    return thinned.functional.dropout(x, 0.5, key=Key(7))


def plain(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


def addressed(x: Tensor) -> Tensor:
    model = thinned.Dropout(0.5)
    with thinned.address(model, seed=7, step=1):
        y: Tensor = model(x)
    return y


def passes(dropout: Dropout) -> Tensor:
    """The whole result of a forward and a backward pass."""
    x = torch.ones(8, 8, requires_grad=True)
    y = dropout(distribute_tensor(x, init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(0)]))
    y.sum().backward()
    return y.detach().full_tensor()  # type: ignore[attr-defined,no-any-return]


class StatesTracker:
    """Megatron's CudaRNGStatesTracker, on CPUs."""

    def __init__(self, **seeds: int) -> None:
        self.states = {name: torch.Generator().manual_seed(seed).get_state() for name, seed in seeds.items()}

    @contextmanager
    def fork(self, name: str) -> Iterator[None]:
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states[name])
        try:
            yield
        finally:
            self.states[name] = torch.get_rng_state()
            torch.set_rng_state(outside)


class WatchedTracker(_random.OffsetBasedRNGTracker):
    """Torch's tracker of DTensors' random states, on CPUs, which counts the regions that are entered."""

    def __init__(self) -> None:
        self._use_distribute_region = True
        self.entered = 0

    @contextmanager
    def _distribute_region(self, *_: Any, **__: Any) -> Iterator[None]:
        self.entered += 1
        yield


def states() -> list[object]:
    return [torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())]


def in_fork(dropout: Dropout) -> tuple[bool, bool, Tensor]:
    """Whether Megatron's states, inside and outside of a fork, are the same after ``dropout``; its result."""
    tracker = StatesTracker(parallel=dist.get_rank() + 2718)
    before, inside = states(), tracker.states["parallel"]
    with tracker.fork("parallel"):
        y = passes(dropout)
    return tracker.states["parallel"].equal(inside), states() == before, y


@pytest.mark.parametrize("dropout", [keyed, addressed])
def test_a_fork_of_megatron_is_left_alone(world: World, dropout: Dropout) -> None:
    """Each rank has a state of its own there, and yet all have the mask of one process."""
    alone = dropout(torch.ones(8, 8))
    for inside, outside, y in world.run(in_fork, dropout):
        assert inside
        assert outside
        oracle.assert_same(y, alone)


def test_a_dropout_of_torch_moves_it(world: World) -> None:
    assert all(not inside and outside for inside, outside, _ in world.run(in_fork, plain))


def regions(dropout: Dropout) -> tuple[int, bool, bool]:
    """The regions of torch's tracker that were entered, and whether it and all states are as they were."""
    tracker = _random._rng_tracker = WatchedTracker()
    before = states()
    try:
        passes(dropout)
        return tracker.entered, _random._rng_tracker is tracker, states() == before
    finally:
        _random._rng_tracker = None


@pytest.mark.parametrize("dropout", [keyed, addressed])
def test_the_tracker_of_torch_is_left_alone(world: World, dropout: Dropout) -> None:
    assert world.run(regions, dropout) == [(0, True, True)] * world.size


def test_a_dropout_of_torch_enters_it(world: World) -> None:
    assert world.run(regions, plain) == [(1, True, False)] * world.size
