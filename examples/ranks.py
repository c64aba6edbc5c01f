"""Draws which ranks share which mask, from the masks that 4 processes apply.

torchrun --nproc-per-node 4 examples/ranks.py docs/pictures
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import typer
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

import thinned

SAMPLES, FEATURES = 8, 24
ROWS: dict[str, tuple[tuple[int, int], Placement]] = {  # the sizes of dp and tp, and the placement on tp
    "dp 4": ((4, 1), Replicate()),
    "tp 4, replicated": ((1, 4), Replicate()),
    "tp 4, sharded": ((1, 4), Shard(1)),
    "dp 2, tp 2, replicated": ((2, 2), Replicate()),
    "dp 2, tp 2, sharded": ((2, 2), Shard(1)),
}
DROPPED, KEPT, ELSEWHERE = 0, 1, 2
FILLS, FRAMES = ["#30363d", "white", "#d8dee4"], ["#0969da", "#e36209", "#1a7f37", "#a475f9"]


def main(to: Path) -> None:
    """Apply the masks on each rank; draw them on rank 0."""
    dist.init_process_group("gloo")
    whole = drop(torch.arange(SAMPLES), torch.ones(SAMPLES, FEATURES))
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    grid = figure.subplots(len(ROWS), 5)
    for (name, (sizes, placement)), (first, *panels) in zip(ROWS.items(), grid, strict=True):
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("dp", "tp"))
        part = part_of(mesh, placement)
        parts = [torch.empty_like(part) for _ in panels]
        dist.all_gather(parts, part)
        assert all(part.where(part == ELSEWHERE, whole).equal(part) for part in parts)
        draw(first, whole, "one process", "#8c959f")
        first.set_ylabel(name.replace(", ", "\n"), rotation=0, ha="right", va="center")
        frames = [FRAMES[next(i for i in range(4) if parts[i].equal(part))] for part in parts]
        for rank, (panel, part, frame) in enumerate(zip(panels, parts, frames, strict=True)):
            draw(panel, part, f"rank {rank}", frame)
    if dist.get_rank() == 0:
        figure.savefig(to / "ranks.png", dpi=90)
    dist.destroy_process_group()


def drop(samples: Tensor, activation: Tensor) -> Tensor:
    """Which elements of an activation of these samples are kept."""
    model = nn.Sequential(thinned.Dropout(0.5))
    with thinned.address(model, seed=0, step=0, samples=samples):
        return (model(activation) != 0).long()


def part_of(mesh: DeviceMesh, placement: Placement) -> Tensor:
    """What this rank applies, in its place in the whole."""
    samples = torch.arange(SAMPLES).chunk(mesh["dp"].size())[mesh["dp"].get_local_rank()]
    features = torch.arange(FEATURES).expand(len(samples), FEATURES)
    here = distribute_tensor(features, mesh["tp"], [placement], src_data_rank=None)
    part = torch.full((SAMPLES, FEATURES), ELSEWHERE)
    part[samples[:, None], here.to_local()] = drop(
        samples, torch.ones_like(here, dtype=torch.float)
    ).to_local()
    return part


def draw(axes: Axes, part: Tensor, title: str, frame: str) -> None:
    """One panel; equal parts have equal frames."""
    axes.imshow(part, cmap=ListedColormap(FILLS), vmin=0, vmax=2)
    axes.set_title(title, fontsize=9, pad=3)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set(color=frame, linewidth=3)


if __name__ == "__main__":
    typer.run(main)
