"""Trains one small transformer on text, on one process or on many: its dropout masks are always the same.

    python examples/train_anywhere.py
    torchrun --nproc-per-node 4 examples/train_anywhere.py --parallel tp+fsdp

A run prints the losses and a hash of all masks that were applied. The hash is one number for all ways of
parallelism, numbers of processes and devices. A run may stop, and go on in another way and on another number:

    python examples/train_anywhere.py --stop-at 5 --checkpoint /tmp/run --verbose
    torchrun --nproc-per-node 3 examples/train_anywhere.py --parallel ddp --checkpoint /tmp/run --verbose
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
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import thinned

BATCH, MICROBATCHES, LENGTH, WINDOWS = 16, 4, 64, 4000  # of examples, in a pipeline, of bytes, of examples
Parallel = Literal["none", "ddp", "fsdp", "tp", "tp+fsdp", "pp"]
Step = Callable[[Tensor, Tensor], Tensor]  # runs forward and backward; returns this process's part of the loss


class Block(nn.Module):
    """Causal self-attention, then an MLP. There are dropouts after each, and in the MLP."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.size = width // heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop1, self.drop2, self.drop3 = (thinned.Dropout(p) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        # Rows of qkv's weight are ordered by head, so that tensor parallelism splits it between heads.
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (-1, 3, self.size)).transpose(1, 2)
        attended = scaled_dot_product_attention(*qkv.unbind(-2), is_causal=True).transpose(1, 2).flatten(2)
        x = x + self.drop1(self.out(attended))
        hidden = self.drop2(gelu(self.up(self.norm2(x))))
        return x + self.drop3(self.down(hidden))


def transformer(width: int = 64, heads: int = 4, blocks: int = 4, p: float = 0.1) -> nn.Sequential:
    """A model of bytes. It needs no embedding of positions, since causal attention can count."""
    parts: dict[str, nn.Module] = {"embed": nn.Embedding(256, width), "drop": thinned.Dropout(p)}
    parts |= {f"block{i}": Block(width, heads, p) for i in range(blocks)}
    parts |= {"norm": nn.LayerNorm(width), "head": nn.Linear(width, 256, bias=False)}
    return nn.Sequential(OrderedDict(parts))


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The examples' part of the mean over the whole batch: such parts add up, whatever their sizes are."""
    return cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (BATCH * LENGTH)


# Activations are sharded along the sequence between blocks, along the features in the MLP. All are DTensors where
# they meet a dropout (use_local_output=False), which tells thinned.Dropout the shard's place in the whole.
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
    """Split the model in place; return what trains it on this process's examples."""
    dp = mesh["dp"]
    if how.startswith("tp"):
        parallelize_module(model, mesh["tp"], PLAN)
    if how.endswith("fsdp"):
        for block in model:
            if isinstance(block, Block):
                fully_shard(block, mesh=dp)
        fully_shard(model, mesh=dp)
    run = DistributedDataParallel(model, process_group=dp.get_group()) if how == "ddp" else model

    def step(x: Tensor, y: Tensor) -> Tensor:
        loss = mean_loss(run(x), y)
        (loss * dp.size()).backward()  # since DDP and FSDP divide the sum of gradients by the number of ranks
        return loss.detach()

    return step


def pipeline(part: nn.Sequential, mesh: DeviceMesh, device: torch.device) -> Step:
    """A pipeline in which this process has a part of the model; return what trains it."""
    stage = PipelineStage(part, mesh.get_local_rank(), mesh.size(), device, group=mesh.get_group())
    schedule = Schedule1F1B(stage, MICROBATCHES, mean_loss, scale_grads=False)

    def step(x: Tensor, y: Tensor) -> Tensor:
        losses: list[Tensor] = []
        schedule.step(*[x] * stage.is_first, target=y if stage.is_last else None, losses=losses)
        return torch.stack(losses).sum() if stage.is_last else torch.zeros(())

    step(*torch.zeros(2, BATCH, LENGTH, dtype=torch.long, device=device))  # the stages ask each other for shapes
    part.zero_grad()
    return step


class Masks:
    """Hashes the masks that the model's dropouts apply, as seen in their outputs and gradients.

    A step's hash is the sum modulo 2**64, over all kept elements, of a hash of step, site, sample and position.
    A sum does not depend on the order, so that those of all processes add up to that of a single one.
    """

    def __init__(self, model: nn.Module) -> None:
        for path, module in model.named_modules():
            if isinstance(module, thinned.Dropout):
                module.register_forward_hook(partial(self.add, path))

    def begin(self, step: int, samples: Tensor) -> None:
        """Set what the next outputs belong to."""
        self.step, self.samples, self.sum = step, samples, torch.tensor(0, device=samples.device)
        self.seen: Counter[str] = Counter()  # how many samples each site has seen: fewer than all are a microbatch

    def add(self, path: str, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        """Add the kept elements of one call."""
        samples = self.samples[self.seen[path] :][: len(output)]
        self.seen[path] += len(output)
        positions = torch.arange(output[0].numel(), device=output.device)
        hashes = mixed(self.step, crc32(path.encode()), samples[:, None], positions).view(output.shape)
        # Zeros in the output would not do: some elements of the input are 0 too.
        (mask,) = torch.autograd.grad(output, args, torch.ones_like(output), retain_graph=True)
        tensors = output, args[0], mask
        if isinstance(mask, DTensor):
            coordinates = zip(mask.device_mesh.get_coordinate(), mask.placements, strict=True)
            if any(coordinate and placement.is_replicate() for coordinate, placement in coordinates):
                return  # another process adds the same
            layout = mask.device_mesh, mask.placements
            hashes = distribute_tensor(hashes, *layout, src_data_rank=None).to_local()  # no communication
            tensors = tuple(tensor.to_local() for tensor in tensors)
        output, input, mask = tensors
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
    """The numbers of a step's examples, each once an epoch: a function of seed and step alone."""
    epoch, step = divmod(step, WINDOWS // BATCH)
    order = torch.randperm(WINDOWS, generator=torch.Generator().manual_seed(seed + epoch))
    return order[step * BATCH :][:BATCH]


def save_or_load(
    verb: Callable[..., Any], to: Path, model: nn.Module, optimizer: torch.optim.Optimizer, *run: int
) -> list[int]:
    """Weights, the optimizer's state and the numbers of a run, by dcp.save or dcp.load."""
    options = StateDictOptions(flatten_optimizer_state_dict=True)  # by names, so that stages of a pipeline fit
    weights, state = get_state_dict(model, optimizer, options=options)
    states = {"model": weights, "optimizer": state, "run": torch.tensor(run)}
    verb(states, checkpoint_id=to)
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=state, options=options
    )
    return states["run"].tolist()


def train(how: Parallel, device: torch.device, stop_at: int, seed: int, checkpoint: Path | None, dtype: torch.dtype):
    """Train in the present process group; the first step, and each step's hash and loss."""
    world = dist.get_world_size()
    tp = {"tp": world, "tp+fsdp": min(2, world)}.get(how, 1)
    pp = world if how == "pp" else 1
    mesh = init_device_mesh(device.type, (pp, world // pp // tp, tp), mesh_dim_names=("pp", "dp", "tp"))
    text = torch.frombuffer(bytearray("".join(topics.values()).encode()), dtype=torch.uint8)
    windows = text[: WINDOWS * LENGTH + 1].long().unfold(0, LENGTH + 1, LENGTH)

    torch.manual_seed(seed)
    model = transformer().to(device, dtype)
    if how == "pp":
        rank = mesh["pp"].get_local_rank()
        model = model[len(model) * rank // pp : len(model) * (rank + 1) // pp]  # keeps the names
        run = pipeline(model, mesh["pp"], device)
    else:
        run = parallelize(model, how, mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    masks = Masks(model)

    first = 0
    if checkpoint and (saved := [int(each.name) for each in checkpoint.glob("*")]):
        seed, first = save_or_load(dcp.load, checkpoint / str(max(saved)), model, optimizer, seed, first)
    hashes, losses = [], []
    for step in range(first, stop_at):
        samples = batch(seed, step).tensor_split(mesh["dp"].size())[mesh["dp"].get_local_rank()]
        x, y = (part.contiguous().to(device) for part in (windows[samples, :-1], windows[samples, 1:]))
        microbatches = {"microbatches": MICROBATCHES} if how == "pp" else {}
        masks.begin(step, samples.to(device))
        with thinned.address(model, seed=seed, step=step, samples=samples, **microbatches):
            losses.append(run(x, y))
        optimizer.step()
        optimizer.zero_grad()
        hashes.append(masks.sum)
    if checkpoint:
        save_or_load(dcp.save, checkpoint / str(stop_at), model, optimizer, seed, stop_at)

    hash, loss = torch.stack(hashes), torch.stack(losses).to(device, torch.float64)
    loss *= mesh["tp"].get_local_rank() == 0  # its other ranks have the same
    for each in (hash, loss):
        dist.all_reduce(each)
    return first, hash.tolist(), loss.tolist()


def main(
    parallel: Annotated[Parallel, typer.Option(help="the kind of parallelism; none is for one process")] = "none",
    stop_at: Annotated[int, typer.Option(help="the step to stop before")] = 20,
    checkpoint: Annotated[Path | None, typer.Option(help="a folder to go on from, and to save to")] = None,
    seed: Annotated[int, typer.Option(help="of weights, order and masks; a checkpoint brings its own")] = 0,
    dtype: Annotated[Literal["float32", "float64"], typer.Option()] = "float32",
    verbose: Annotated[bool, typer.Option("--verbose", help="print a hash and a loss for each step")] = False,
) -> None:
    """Train; print the losses and the hash of all masks."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cpu")
    if torch.accelerator.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device(torch.accelerator.current_accelerator().type, local_rank)
        torch.accelerator.set_device_index(local_rank)
    backend = dist.get_default_backend_for_device(device)
    alone = {} if dist.is_torchelastic_launched() else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(backend, **alone)
    if parallel == "none" and dist.get_world_size() > 1:
        raise typer.BadParameter("--parallel none is for one process")
    first, hashes, losses = train(parallel, device, stop_at, seed, checkpoint, getattr(torch, dtype))
    if dist.get_rank() == 0:
        if verbose:
            for step, (hash, loss) in enumerate(zip(hashes, losses, strict=True), first):
                print(f"step {step:3}  masks {hash % 2**64:016x}  loss {loss:.9f}")
        else:
            print("losses", *(f"{loss:.4f}" for loss in losses))
        name = f"{parallel:8} {dist.get_world_size()} processes"
        print(f"{name}  masks {sum(hashes) % 2**64:016x}  last loss {losses[-1]:.12f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
