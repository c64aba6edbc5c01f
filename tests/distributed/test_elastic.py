"""A run that stops on N processes and resumes on M has the masks and weights of the uninterrupted one."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import thinned
from distributed.world import World

SEED, BATCH, STEPS = 7, 10, 2  # steps of each part of the run
Masks = dict[tuple[int, str], Tensor]

torch.manual_seed(5)
DATA, TARGETS = torch.randn(80, 6, dtype=torch.float64), torch.randn(80, 3, dtype=torch.float64)
ORDER = torch.randperm(80)


def new_model() -> nn.Sequential:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), thinned.Dropout(0.3))
    return nn.Sequential(block, thinned.DropPath(0.2), nn.Linear(6, 3), thinned.Dropout(0.1)).double()


def train(model: nn.Module, optimizer: Any, steps: range, rank: int, size: int) -> Masks:
    """Train with this rank's part of each batch, and return the masks."""
    masks: Masks = {}
    for step in steps:
        ids = ORDER[step * BATCH :][:BATCH].tensor_split(size)[rank]

        def record(path: str, y: Tensor, step: int = step) -> None:
            masks[step, path] = y != 0

        hooks = [
            module.register_forward_hook(lambda _, __, y, path=path: record(path, y))
            for path, module in model.named_modules()
            if type(module).__module__.startswith("thinned")
        ]
        with thinned.address(model, seed=SEED, step=step, samples=ids):
            # FSDP averages gradients over ranks.
            loss = (model(DATA[ids]) - TARGETS[ids]).square().sum() * size / BATCH
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        for hook in hooks:
            hook.remove()
    return masks


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def states(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return dict(zip(("model_state_dict", "optim_state_dict"), get_state_dict(model, optimizer), strict=True))


def resume(source: Path | None, target: Path) -> tuple[Masks, dict[str, Tensor]]:
    """Train on from a checkpoint, which has weights, the optimizer's state, and the number of steps."""
    model = new_model()
    fully_shard(model[0])
    fully_shard(model)
    optimizer = optimizer_of(model)
    first = 0
    if source is not None:
        saved = {**states(model, optimizer), "step": 0}
        dcp.load(saved, checkpoint_id=source)
        first = saved.pop("step")
        set_state_dict(model, optimizer, **saved)
    last = first + STEPS
    masks = train(model, optimizer, range(first, last), dist.get_rank(), dist.get_world_size())
    saved = {**states(model, optimizer), "step": last}
    dcp.save(saved, checkpoint_id=target)
    return masks, {name: weight.full_tensor() for name, weight in saved["model_state_dict"].items()}


@pytest.mark.parametrize("sizes", [(2, 4), pytest.param((1, 3, 4, 2), marks=pytest.mark.slow)])
def test_another_number_of_processes(
    sizes: tuple[int, ...], worlds: dict[int, World], tmp_path: Path
) -> None:
    model = new_model()
    expected = train(model, optimizer_of(model), range(STEPS * len(sizes)), 0, 1)
    masks: Masks = {}
    folders = [None, *(tmp_path / f"{number} on {size}" for number, size in enumerate(sizes))]
    for size, (source, target) in zip(sizes, pairwise(folders), strict=True):
        ranks = worlds.setdefault(size, World(size)).run(resume, source, target)
        masks |= {site: torch.cat([mine[site] for mine, _ in ranks]) for site in ranks[0][0]}
    assert masks.keys() == expected.keys()
    assert [site for site in masks if not masks[site].equal(expected[site])] == []
    weights = ranks[0][1]
    assert all(weights[name].allclose(weight, atol=1e-10) for name, weight in model.state_dict().items())
