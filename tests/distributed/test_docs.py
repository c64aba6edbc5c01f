"""The programs of docs/distributed.md run, on two processes, with the masks of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import thinned
from distributed.world import World

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
PROGRAMS = {
    part.partition("\n")[0].partition(":")[0]: part.partition("```python\n")[2].partition("```")[0]
    for part in PAGE.read_text().split("\n## ")
    if "```python" in part
}
# What the programs import.
NAMES = {
    each.__name__: each
    for each in (
        ColwiseParallel, DistributedDataParallel, PipelineStage, RowwiseParallel, Schedule1F1B, Shard,
        distribute_tensor, fully_shard, init_device_mesh, parallelize_module, thinned,
    )
}  # fmt: skip
worlds = pytest.mark.parametrize("world", [2], indirect=True, scope="module")
x, ids = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.ff = nn.Sequential()
        self.ff.add_module("up", nn.Linear(4, 8))
        self.ff.add_module("dropout", thinned.Dropout(0.5))
        self.ff.add_module("down", nn.Linear(8, 4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.ff(x)
        return y


def alone() -> Tensor:
    model = Model()
    with thinned.address(model, seed=7, step=0, samples=ids):
        y: Tensor = model(x.double()).detach()
    return y


def program(name: str) -> Any:
    """What a program computes in this rank of two."""
    rank, model = dist.get_rank(), Model()
    outputs: list[Tensor] = []
    mine = slice(4 * rank, 4 * rank + 4)
    model.register_forward_hook(lambda *call: outputs.append(call[2].detach() + 0))
    names: dict[str, Any] = NAMES | {
        "model": model,
        "rank": rank,
        "x": x.double(),
        "ids": ids,
        "y": torch.zeros(8, 4).double(),
        "step": 0,
    }
    if name == "Data parallel":
        names |= {"loader": [(ids[mine], x[mine].double(), 0.0)], "loss_of": lambda output, _: output.sum()}
    elif name == "Tensor and sequence parallel":
        names |= {"mesh": init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))}
    elif name == "FSDP and tensor parallel together":
        exec(PROGRAMS["Tensor and sequence parallel"].partition("parallelize_module")[0], names)
    elif name == "Pipeline":
        part = Model()
        part.ff = part.ff[:2] if rank == 0 else part.ff[2:]
        part.ff.register_forward_hook(lambda *call: outputs.append(call[2].detach() + 0))
        device = torch.device("cpu")
        names |= {"part": part, "size": 2, "device": device, "loss_fn": mse_loss}
    elif name == "DTensors":
        names |= {"mesh": init_device_mesh("cpu", (2, 1))}
    code = PROGRAMS[name].replace('"cuda", (2, 4)', '"cpu", (1, 2)')
    exec(code, names)
    if name == "Tensor and sequence parallel":
        with thinned.address(model, seed=7, step=0, samples=ids):
            model(x.double())
    return outputs


@worlds
@pytest.mark.parametrize("name", [name for name in PROGRAMS if "Stop" not in name])
def test_a_program_runs_with_the_masks_of_one_process(world: World, name: str) -> None:
    expected = alone()
    for rank, outputs in enumerate(world.run(program, name)):
        if name == "Data parallel":
            torch.testing.assert_close(outputs[0], expected[4 * rank : 4 * rank + 4])
        elif name == "Pipeline":
            if rank == 1:
                torch.testing.assert_close(torch.cat(outputs[-4:]), expected)
        elif name != "DTensors":  # which compares by itself
            torch.testing.assert_close(outputs[-1], expected)


def test_the_page_shows_the_picture_of_ranks() -> None:
    assert "](pictures/ranks.png)" in PAGE.read_text()
    assert (PAGE.parent / "pictures" / "ranks.png").exists()


def test_each_kind_of_parallelism_has_a_program() -> None:
    assert len(PROGRAMS) == 6
