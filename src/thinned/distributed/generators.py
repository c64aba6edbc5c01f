"""A check that the processes of a mesh draw the same keys from their default generators."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist

from thinned.torch_state import constant_when_compiled

__all__ = ["check_generators"]

_checked: set[Any] = set()


@constant_when_compiled
def check_generators(mesh: Any) -> None:
    """Raise in every process of ``mesh`` unless their generators are in one state; once for each mesh.

    All processes of the mesh have to call this. Later calls return at once: a collective for each key would
    take longer than its mask.
    """
    if mesh in _checked:
        return
    cpu = mesh.device_type == "cpu"
    device: Any = torch if cpu else torch.get_device_module(mesh.device_type)
    seed = torch.initial_seed() if cpu else device.initial_seed()
    digest = blake2b(device.get_rng_state().cpu().numpy().tobytes()).hexdigest()
    found = [(dist.get_rank(), seed, digest)]
    for group in mesh.get_all_groups():
        parts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(parts, found, group=group)
        found = [each for part in parts for each in part]
    (rank, seed, digest), *others = found
    for other, its_seed, its_digest in others:
        if its_digest != digest:
            how = f"seeded with {seed} and {its_seed}"
            if seed == its_seed:
                how = f"both seeded with {seed}, they have drawn differently since"
            raise RuntimeError(
                "a dropout without a key on a DTensor takes one from each process's default generator, and "
                f"those of ranks {rank} and {other} differ: {how}; accepted: the "
                "same torch.manual_seed in all, a key=, or a call within thinned.address"
            )
    _checked.add(mesh)
