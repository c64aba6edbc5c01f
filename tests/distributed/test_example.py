"""The example of training on any number of processes: one hash of all masks, and losses that agree."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import thinned
from distributed.world import World
from process import PATIENCE

EXAMPLE = Path(__file__).parents[2] / "examples" / "train_anywhere.py"
Worlds = dict[int, World]
MATRIX = [("none", 1), ("ddp", 3), ("fsdp", 3)]
MATRIX += [(how, count) for how in ("ddp", "fsdp", "tp", "tp+fsdp", "pp") for count in (1, 2, 4)]


def example() -> Any:
    return type("Example", (), runpy.run_path(str(EXAMPLE)))


def trained(*args: Any) -> tuple[int, list[int], list[float]]:
    return example().train(*args)


def test_a_run_goes_on_in_other_ways(worlds: Worlds, alone: str, tmp_path: Path) -> None:
    hashes, losses = hashes_of_steps(alone), hash_and_losses(alone)[1]
    world, first = worlds.setdefault(2, World(2)), 0
    for how, stop_at in ("fsdp", 1), ("pp", 2), ("tp", 4):
        curve, other = world.run(trained, how, torch.device("cpu"), stop_at, tmp_path)
        assert curve == other
        assert curve[0] == first
        assert [f"{each % 2**64:016x}" for each in curve[1]] == hashes[first:stop_at]
        assert curve[2] == pytest.approx(losses[first:stop_at], rel=1e-6)
        first = stop_at


def hash_of_step(step: int) -> int:
    """The hash of the masks that an address gives."""
    code = example()
    model, samples = code.transformer(), code.batch(0, step)
    address, total = thinned.address(model, seed=0, step=step, samples=samples), torch.tensor(0)
    for path, module in model.named_modules():
        if isinstance(module, thinned.Dropout):
            width = 256 if path.endswith("drop2") else 64
            mask = address.mask_of(path, (len(samples), 64, width))
            positions = torch.arange(64 * width)
            hashes = code.mixed(step, crc32(path.encode()), samples[:, None], positions)
            total += hashes[mask.flatten(1)].sum()
    return int(total)


def sums_of(placements: list[Any]) -> int:
    """The sum that this rank adds to the hash of one dropout."""
    model = torch.nn.Sequential(thinned.Dropout(0.5))
    masks, samples = example().Masks(model), torch.arange(3)
    masks.begin(0, samples)
    x = torch.arange(12.0).view(3, 4)  # an element is 0, in the input and in the output
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    with thinned.address(model, seed=0, step=0, samples=samples):
        model(distribute_tensor(x, mesh, placements).requires_grad_())
    return int(masks.sum)


def test_replicas_count_once_and_zeros_too(worlds: Worlds) -> None:
    mask = thinned.address(torch.nn.Sequential(thinned.Dropout(0.5)), seed=0, step=0, samples=[0, 1, 2])
    hashes = example().mixed(0, crc32(b"0"), torch.arange(3)[:, None], torch.arange(4))
    expected = int(hashes[mask.mask_of("0", (3, 4))].sum())
    world = worlds.setdefault(2, World(2))
    for placement in Replicate(), Shard(0), Shard(1):
        assert (sum(world.run(sums_of, [placement])) - expected) % 2**64 == 0


def test_another_position_sample_site_or_step_has_another_hash() -> None:
    mixed = example().mixed
    numbers = torch.arange(6)
    parts = (numbers.view(shape) for shape in ((6, 1, 1, 1), (6, 1, 1), (6, 1), (6,)))
    assert len(mixed(*parts).unique()) == 6**4
    # SplitMix64 with the seed 0: its first number.
    assert int(mixed(0)) % 2**64 == 0xE220A8397B1DCDAF


def run(count: int, *args: str, script: Path = EXAMPLE) -> str:
    """What a script prints; with a count of 1 it needs no torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command = [sys.executable, *(launcher if count > 1 else []), str(script), *args]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def hashes_of_steps(told: str) -> list[str]:
    return re.findall(r"step .*  masks (\w{16})", told)


def hash_and_losses(told: str) -> tuple[str, list[float]]:
    (masks,) = re.findall(r"processes: masks (\w{16})", told)
    return masks, [float(loss) for loss in re.findall(r"loss (\S+)", told)]


@pytest.fixture(scope="module")
def alone() -> str:
    """What one process prints."""
    return run(1, "--stop-at=4", "--verbose")


def test_the_hash_is_of_the_masks_of_the_addresses(alone: str) -> None:
    hashes = [hash_of_step(step) % 2**64 for step in range(4)]
    assert hashes_of_steps(alone) == [f"{each:016x}" for each in hashes]
    assert hash_and_losses(alone)[0] == f"{sum(hashes) % 2**64:016x}"


@pytest.fixture(scope="module")
def long() -> str:
    """What one process prints in a longer run."""
    return run(1, "--verbose")


@pytest.mark.slow
@pytest.mark.parametrize(("how", "count"), MATRIX)
def test_all_ways_have_one_hash(how: str, count: int, long: str) -> None:
    masks, losses = hash_and_losses(run(count, f"--parallel={how}"))
    assert masks == hash_and_losses(long)[0] == "3d040103e8ca5550"  # on any machine
    assert losses == pytest.approx(hash_and_losses(long)[1], rel=1e-6)
    assert len(losses) == 20
    assert losses[-1] < 3.2 < 5.5 < losses[0]  # it learns


@pytest.mark.slow
def test_an_elastic_run_has_the_masks_of_the_uninterrupted_one(tmp_path: Path, long: str) -> None:
    hashes = []
    for count, how, stop_at in (1, "none", 2), (3, "ddp", 3), (4, "tp+fsdp", 6), (2, "fsdp", 8):
        run_to = f"--parallel={how}", f"--stop-at={stop_at}", f"--checkpoint={tmp_path}"
        hashes += hashes_of_steps(run(count, "--verbose", *run_to))
        assert len(hashes) == stop_at
    assert hashes == hashes_of_steps(long)[:8]
    assert run(2, *run_to).endswith("masks 0000000000000000\n")  # no step is left


@pytest.mark.slow
def test_the_picture_is_of_parts_of_one_mask(tmp_path: Path) -> None:
    run(4, str(tmp_path), script=EXAMPLE.parent / "ranks.py")  # which compares them
    assert (tmp_path / "ranks.png").stat().st_size < 60_000
