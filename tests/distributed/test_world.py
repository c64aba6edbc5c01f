"""The processes that tests of torch.distributed run in."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import thinned
from distributed.world import World
from process import PATIENCE


@pytest.fixture
def hasty() -> Iterator[World]:
    """A world of its own, which waits 1 s for the others once one rank has failed."""
    world = World(2, grace=1)
    yield world
    world.stop()


def total(x: Tensor) -> Tensor:
    x = x + dist.get_rank()
    dist.all_reduce(x)
    return x


def who() -> tuple[int, int]:
    return dist.get_rank(), os.getpid()


def leave_a_state() -> tuple[float, Tensor]:
    number, mask = torch.rand(()).item(), thinned.functional.dropout(torch.ones(9))
    thinned.address(thinned.Dropout(), seed=1, step=0).__enter__()
    return number, mask


def one_fails(how: str) -> None:
    if dist.get_rank() == 1:
        if how == "raises":
            raise FloatingPointError("broken here")
        if how == "dies":
            os._exit(3)
        time.sleep(100)
    dist.barrier()


def not_to_be_pickled() -> object:
    return lambda: None


def test_results_are_in_the_order_of_ranks(world: World) -> None:
    first, second = world.run(who), world.run(who)
    assert [rank for rank, _ in first] == list(range(world.size))
    assert first == second  # the same processes
    for x in world.run(total, torch.ones(2)):
        assert x.tolist() == [sum(range(world.size)) + world.size] * 2


def test_a_run_starts_afresh(world: World) -> None:
    """From one seed in each rank, and without the key source that the last run left."""
    number, mask = world.run(leave_a_state)[0]
    for again, other in world.run(leave_a_state):
        assert again == number
        assert other.equal(mask)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", "rank 1 of 2 raised\nTraceback(.|\n)*in one_fails(.|\n)*FloatingPointError: broken here"),
        ("dies", "rank 1 of 2 died with exit code 3"),
        ("hangs", "rank 1 of 2 was still running after 1 s\n(.|\n)*in one_fails"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_rank_that_fails_is_named_and_the_next_run_works(hasty: World, how: str, message: str) -> None:
    before = hasty.run(who)
    if how == "hangs":
        hasty.patience = 1
    with pytest.raises(RuntimeError, match=message):
        hasty.run(one_fails, how)
    for _, pid in before:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    hasty.patience = PATIENCE
    assert [rank for rank, _ in hasty.run(who)] == [0, 1]


def test_a_result_that_cannot_be_pickled_is_an_error(hasty: World) -> None:
    with pytest.raises(
        RuntimeError, match=r"rank [01] of 2 raised\n(.|\n)*pickle(.|\n)*rank [01] of 2 raised\n"
    ):
        hasty.run(not_to_be_pickled)
