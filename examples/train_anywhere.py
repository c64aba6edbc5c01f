"""Trains one small transformer on text, on one process or many, split in any way: the masks are the same.

    python examples/train_anywhere.py
    torchrun --nproc-per-node 4 examples/train_anywhere.py --parallel tp+fsdp

A run prints the losses and a hash of all masks that it applied. The hash is one number for all kinds of
parallelism, numbers of processes and devices. A run may stop and go on elsewhere, with the same masks:

    python examples/train_anywhere.py --verbose --checkpoint /tmp/run --stop-at 5
    torchrun --nproc-per-node 3 examples/train_anywhere.py --verbose --checkpoint /tmp/run --parallel ddp
"""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics  # 460 kB of English that come with Python
from typing import Annotated, Any, Literal
from zlib import crc32

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import typer
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor import parallel as tensor_parallel
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel
from torch.nn.functional import gelu, nll_loss, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import thinned

WINDOWS, LENGTH, BATCH, MICROBATCHES = 4000, 64, 16, 4  # a window is an example: LENGTH bytes of the text
Parallel = Literal["none", "ddp", "fsdp", "tp", "tp+fsdp", "pp"]
Step = Callable[
    [Tensor, Tensor], Tensor
]  # runs forward and backward; returns this process's part of the loss


class Block(nn.Module):
    """Causal self-attention and an MLP, with a dropout after each and one within the MLP."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop1, self.drop2, self.drop3 = (thinned.Dropout(p) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        # The outputs of qkv are ordered by head, so that tensor parallelism splits them between heads.
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.size)).transpose(1, 2)
        attended = scaled_dot_product_attention(*qkv.unbind(-2), is_causal=True)
        x = x + self.drop1(self.out(attended.transpose(1, 2).flatten(2)))
        return x + self.drop3(self.down(self.drop2(gelu(self.up(self.norm2(x))))))


def transformer(width: int = 64, heads: int = 4, blocks: int = 4, p: float = 0.1) -> nn.Sequential:
    """A model of bytes. Causal attention needs no embedding of positions."""
    parts: dict[str, nn.Module] = {"embed": nn.Embedding(256, width), "drop": thinned.Dropout(p)}
    parts |= {f"block{i}": Block(width, heads, p) for i in range(blocks)}
    parts |= {"norm": nn.LayerNorm(width), "head": nn.Linear(width, 256), "log": nn.LogSoftmax(-1)}
    return nn.Sequential(OrderedDict(parts))


def part_of_loss(output: Tensor, targets: Tensor) -> Tensor:
    """These examples' part of the mean over the batch: parts of any sizes add up to it."""
    return nll_loss(output.flatten(0, 1), targets.flatten(), reduction="sum") / (BATCH * LENGTH)


# Activations are sharded along the sequence between layers, and along the features within the MLP. Where they
# meet a dropout they are DTensors (use_local_output=False), which tell it the place of a shard in the whole.
PLAN = {
    "embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1), use_local_output=False),
    "block*.norm*": SequenceParallel(),
    "block*.qkv": ColwiseParallel(input_layouts=Shard(1)),
    "block*.out": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    "block*.up": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
    "block*.down": RowwiseParallel(output_layouts=Shard(1), use_local_output=False),
    "norm": SequenceParallel(),
    "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
}


def parallelize(model: nn.Sequential, how: Parallel, mesh: DeviceMesh) -> Step:
    """Split the model in place; return what trains it."""
    dp = mesh["dp"]
    if how.startswith("tp"):
        tensor_parallel.parallelize_module(model, mesh["tp"], PLAN)
    if how.endswith("fsdp"):
        for block in filter(lambda part: isinstance(part, Block), model):
            fully_shard(block, mesh=dp)
        fully_shard(model, mesh=dp)
    run = DistributedDataParallel(model, process_group=dp.get_group()) if how == "ddp" else model

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = part_of_loss(run(x), y)
        (loss * dp.size()).backward()  # DDP and FSDP divide the sum of gradients by the number of ranks
        return loss.detach()

    return step


def pipeline(part: nn.Sequential, mesh: DeviceMesh, device: torch.device) -> Step:
    """Make a part of the model a stage of a pipeline; return what trains it."""
    stage = PipelineStage(part, mesh.get_local_rank(), mesh.size(), device, group=mesh.get_group())
    schedule = Schedule1F1B(stage, MICROBATCHES, part_of_loss, scale_grads=False)

    def step(x: Tensor, y: Tensor) -> Tensor:
        losses: list[Tensor] = []
        schedule.step(*[x] * stage.is_first, target=y if stage.is_last else None, losses=losses)
        return torch.stack(losses).sum() if stage.is_last else torch.zeros((), device=device)

    step(*torch.zeros(2, BATCH, LENGTH, dtype=torch.long, device=device))  # the stages learn their shapes
    part.zero_grad()
    return step


class Masks:
    """Hashes the masks that a model's dropouts apply, as seen in their outputs and gradients.

    The hash of a step is the sum, modulo 2**64, of a hash of step, site, sample and position for each element
    that is kept. The order does not matter, so the sums of all processes add up to the sum of a single one.
    """

    def __init__(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if isinstance(module, thinned.Dropout):
                module.register_forward_hook(partial(self.add, path))

    def begin(self, step: int, samples: Tensor) -> None:
        """Say which step and samples the next outputs belong to."""
        self.step, self.samples, self.sum = step, samples, torch.tensor(0, device=samples.device)
        self.seen: Counter[str] = Counter()  # samples that each site has had; a microbatch has a part

    def add(self, path: str, _: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Add the elements that one call kept."""
        samples = self.samples[self.seen[path] :][: len(output)]
        self.seen[path] += len(output)
        positions = torch.arange(output[0].numel(), device=output.device)
        hashes = mixed(self.step, crc32(path.encode()), samples[:, None], positions).view(output.shape)
        # Unlike the output, the gradient tells a dropped element from an input of 0.
        (mask,) = torch.autograd.grad(output, inputs, torch.ones_like(output), retain_graph=True)
        input = inputs[0]
        if isinstance(mask, DTensor):
            mesh, placements = mask.device_mesh, mask.placements
            where = zip(mesh.get_coordinate(), placements, strict=True)
            if any(coordinate > 0 and placement.is_replicate() for coordinate, placement in where):
                return  # another process adds the same
            hashes = distribute_tensor(hashes, mesh, placements, src_data_rank=None).to_local()
            input, output, mask = input.to_local(), output.to_local(), mask.to_local()
        assert output.equal(input * mask)
        self.sum += torch.where(mask != 0, hashes, 0).sum()


def mixed(*numbers: int | Tensor) -> Tensor:
    """A 64-bit hash of integers: rounds of SplitMix64, in int64, which wraps."""
    bits = torch.tensor(0)
    for number in numbers:
        bits = bits + number - 0x61C8864680B583EB
        bits = (bits ^ bits >> 30 & 2**34 - 1) * -0x40A7B892E31B1A47
        bits = (bits ^ bits >> 27 & 2**37 - 1) * -0x6B2FB644ECCEEE15
        bits = bits ^ bits >> 31 & 2**33 - 1
    return bits


def batch(seed: int, step: int) -> Tensor:
    """The numbers of a step's windows, each once an epoch: a function of seed and step."""
    epoch, step = divmod(step, WINDOWS // BATCH)
    order = torch.randperm(WINDOWS, generator=torch.Generator().manual_seed(seed + epoch))
    return order[step * BATCH :][:BATCH]


def save_or_load(
    verb: Callable[..., Any], folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *run: int
) -> list[int]:
    """Save or load weights and the optimizer's state, by names of the whole model, and numbers of the run."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    states = {"model": weights, "optimizer": state, "run": torch.tensor(run)}
    verb(states, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options)
    return states["run"].tolist()


def train(
    how: Parallel,
    device: torch.device,
    stop_at: int,
    checkpoint: Path | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, list[int], list[float]]:
    """Train on the processes of the default group; return the first step, and each step's hash and loss."""
    world = dist.get_world_size()
    pp, tp = world if how == "pp" else 1, {"tp": world, "tp+fsdp": min(2, world)}.get(how, 1)
    mesh = init_device_mesh(device.type, (pp, world // pp // tp, tp), mesh_dim_names=("pp", "dp", "tp"))
    torch.manual_seed(seed)
    model = transformer().to(device, dtype)
    if how == "pp":
        stage = mesh["pp"].get_local_rank()
        model = model[len(model) * stage // pp : len(model) * (stage + 1) // pp]  # keeps the parts' names
        run, microbatches = pipeline(model, mesh["pp"], device), MICROBATCHES
    else:
        run, microbatches = parallelize(model, how, mesh), None
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    first = 0
    if checkpoint and (saved := [int(file.parent.name) for file in checkpoint.glob("*/.metadata")]):
        seed, first = save_or_load(dcp.load, checkpoint / str(max(saved)), model, optimizer, seed, first)
        stop_at = max(first, stop_at)

    text = torch.tensor(list("".join(topics.values()).encode()[: WINDOWS * LENGTH + 1]))
    windows = text.unfold(0, LENGTH + 1, LENGTH)
    masks = Masks(model)
    hashes = torch.zeros(stop_at - first, dtype=torch.int64, device=device)
    losses = hashes.double()
    for step in range(first, stop_at):
        samples = batch(seed, step).tensor_split(mesh["dp"].size())[mesh["dp"].get_local_rank()]
        x, y = windows[samples, :-1].to(device), windows[samples, 1:].to(device)
        masks.begin(step, samples.to(device))
        with thinned.address(model, seed=seed, step=step, samples=samples, microbatches=microbatches):
            losses[step - first] = run(x, y)
        optimizer.step()
        optimizer.zero_grad()
        hashes[step - first] = masks.sum
    if checkpoint and first < stop_at:
        save_or_load(dcp.save, checkpoint / str(stop_at), model, optimizer, seed, stop_at)
    losses *= mesh["tp"].get_local_rank() == 0  # the other ranks of tp have the same
    dist.all_reduce(hashes)
    dist.all_reduce(losses)
    return first, hashes.tolist(), losses.tolist()


def main(
    parallel: Annotated[
        Parallel, typer.Option(help="none is for 1 process; tp and pp are for 1, 2, 4")
    ] = "none",
    stop_at: Annotated[int, typer.Option(help="the step to stop before")] = 20,
    checkpoint: Annotated[Path | None, typer.Option(help="a folder to go on from, and to save to")] = None,
    seed: Annotated[int, typer.Option(help="of weights, order and masks; a checkpoint has its own")] = 0,
    dtype: Annotated[Literal["float32", "float64"], typer.Option(help="of the weights")] = "float32",
    verbose: Annotated[bool, typer.Option("--verbose", help="print a hash for each step")] = False,
) -> None:
    """Train a transformer; print the losses and the hash of all masks."""
    local_rank, local_world = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
    device = torch.device("cpu")
    if torch.cuda.device_count() >= max(1, local_world):
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(dist.get_default_backend_for_device(device), **alone)
    world = dist.get_world_size()
    if parallel == "none" and world > 1:
        raise typer.BadParameter("--parallel none is for 1 process")
    first, hashes, losses = train(parallel, device, stop_at, checkpoint, seed, getattr(torch, dtype))
    if dist.get_rank() == 0:
        for step, (mask, loss) in enumerate(zip(hashes, losses, strict=True), first):
            typer.echo(f"step {step:3}  loss {loss:.6f}" + f"  masks {mask % 2**64:016x}" * verbose)
        typer.echo(f"{parallel}, {world} processes: masks {sum(hashes) % 2**64:016x}")
    dist.barrier()  # gloo's threads may abort an exit while they hold a tensor (pytorch/pytorch#179291)
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
