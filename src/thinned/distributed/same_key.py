"""A check that the processes of a mesh have the same key for a DTensor's mask."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from thinned.torch_state import constant_when_compiled, real_object, without_transforms

__all__ = ["check_same_generators", "check_same_key"]

_checked: WeakKeyDictionary[Any, set[tuple[Any, str]]] = WeakKeyDictionary()


def check_same_key(mesh: Any, key: Tensor) -> None:
    """Raise in every process of ``mesh`` if two have different keys; only at the first call for a mesh.

    That is where processes with a seed each are found, and a collective for each key would take longer than
    its mask. All processes of the mesh have to call this.
    """
    if (mesh, "given") not in (checked := _checked_in_this_world()):
        found = _of_all(mesh, [(dist.get_rank(), key.tolist())])
        rank, first = found[0]
        for other, theirs in found:
            if theirs != first:
                raise RuntimeError(
                    "a DTensor's mask needs one key in all processes of its mesh, but that of rank "
                    f"{rank} is {_shown(first)} and that of rank {other} is {_shown(theirs)}"
                )
        checked.add((mesh, "given"))


@constant_when_compiled
def check_same_generators(mesh: Any) -> None:
    """As :func:`check_same_key`, for keys that each process draws from its default generator."""
    mesh = real_object(mesh)
    if (mesh, "drawn") in (checked := _checked_in_this_world()):
        return
    cpu = mesh.device_type == "cpu"
    device: Any = torch if cpu else torch.get_device_module(mesh.device_type)
    with without_transforms():
        digest = blake2b(device.get_rng_state().cpu().numpy().tobytes()).hexdigest()
    seed = torch.initial_seed() if cpu else device.initial_seed()
    (rank, seed, digest), *others = _of_all(mesh, [(dist.get_rank(), seed, digest)])
    for other, its_seed, its_digest in others:
        if its_digest != digest:
            how = f"seeded with {seed} and {its_seed}"
            if seed == its_seed:
                how = f"both seeded with {seed}, they have drawn differently since"
            raise RuntimeError(
                "a dropout without a key on a DTensor takes one from each process's default generator, and "
                f"those of ranks {rank} and {other} differ: {how}; accepted: the same torch.manual_seed in "
                "all, a key=, or a call within thinned.address"
            )
    checked.add((mesh, "drawn"))


def _checked_in_this_world() -> set[tuple[Any, str]]:
    """The meshes that are checked since ``init_process_group``: meshes of two such calls may be equal."""
    return _checked.setdefault(dist.group.WORLD, set())


def _of_all(mesh: Any, found: list[Any]) -> list[Any]:
    """What the processes of a mesh have found. A process outside of it, which has no shard, asks none."""
    if mesh.get_coordinate() is None:
        return found
    with without_transforms():
        for group in mesh.get_all_groups():
            parts: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(parts, found, group=group)
            found = [each for part in parts for each in part]
    return found


def _shown(key: Any) -> str:
    return f"Key({key % 2**64})" if isinstance(key, int) else f"a batch of {len(key)}, not the same"
