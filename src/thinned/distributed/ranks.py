"""The data-parallel replicas of a model, and the one that this process computes."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thinned.checks import check_integer, got
from thinned.distributed.shards import is_dtensor
from thinned.torch_state import constant_when_compiled, fully_sharded_mesh, localized_mesh

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["DataParallel", "Replica", "has_peers", "replica_number", "replica_of", "shard_ids"]

DataParallel: TypeAlias = "Literal['auto'] | DeviceMesh | dist.ProcessGroup | int | None"


@dataclass(frozen=True)
class Replica:
    """The data-parallel replica that this process computes, alone or with a tensor-parallel group.

    Attributes:
        number: differs from replica to replica.
        ranks: global ranks, each at the position that is its replica's number; empty if only the number is
            known.
    """

    number: int
    ranks: tuple[int, ...] = ()

    def number_for(self, input: Tensor) -> int | None:
        """The number for a tensor, which is None for a DTensor that all replicas compute together."""
        if self.ranks and is_dtensor(input):
            return replica_number(self.ranks, _ranks_on(input.device_mesh))  # type: ignore[attr-defined]
        return self.number


def replica_number(replicas: Sequence[int], ranks: Collection[int]) -> int | None:
    """The number of the replica that the processes ``ranks`` compute together.

    It is the first position of one of them in ``replicas``, which has a rank of each replica. None if they
    compute all replicas: the mask of a DTensor on their mesh then has one global index.

    >>> replica_number((0, 2), {2, 3})  # two replicas, each on two tensor-parallel processes
    1
    >>> replica_number((0, 2), {0, 1, 2, 3}) is None
    True
    """
    inside = [number for number, rank in enumerate(replicas) if rank in ranks]
    return inside[0] if 0 < len(inside) < len(replicas) else None


def replica_of(model: nn.Module, data_parallel: DataParallel) -> Replica | None:
    """The replica of ``model`` in this process, or None where all processes compute one.

    ``"auto"`` takes the first line that applies, in which a number is a position in a group, from 0:

    ============================================================  =========================================
    the model                                                     the number of its replica
    ============================================================  =========================================
    this process is the only one                                  none
    is or has a ``DistributedDataParallel``                       rank in its process group
    is or has a module of ``fully_shard``, or of ``replicate``    position in the mesh of data-parallel
    on such a mesh                                                dimensions that it was given, row by row
    has DTensors for parameters, as ``parallelize_module`` makes  lowest global rank in their mesh; none if
                                                                  that has all processes
    any other                                                     rank in the default process group
    ============================================================  =========================================

    If several modules have a group or a mesh, the outermost counts. The module within a
    ``DistributedDataParallel`` does not know of it, and is one of the last two lines.

    Raises:
        TypeError: ``data_parallel`` is none of the accepted values.
        ValueError: this process is not in the group, or the integer is negative.
        RuntimeError: the parameters are DTensors on meshes of different processes, so that ``"auto"`` cannot
            tell the tensor-parallel group; or PyTorch lacks a name that ``"auto"`` needs.
    """
    if data_parallel is None or (data_parallel == "auto" and not has_peers()):
        return None
    if isinstance(data_parallel, int) and not isinstance(data_parallel, bool):
        check_integer("data_parallel", data_parallel, least=0)
        return Replica(data_parallel)
    ranks, together = _of_model(model) if data_parallel == "auto" else _of_group(data_parallel)
    number = replica_number(ranks, together)
    return None if number is None else Replica(number, ranks)


def shard_ids(total: int, data_parallel: DataParallel = "auto") -> Tensor:
    r"""The ids of this process's rows of a batch that is split into contiguous shards.

    .. math:: \text{arange}(total).\text{chunk}(n)[rank]

    On ``n`` processes, ``thinned.address(..., samples=shard_ids(total))`` has the masks that
    ``samples=torch.arange(total)`` has on one. Shards are those of :func:`torch.chunk`, as in DTensor's
    ``Shard`` and in ``nn.DataParallel``: the first have ``ceil(total / n)`` rows, the last fewer or none. For
    the shards of :func:`torch.tensor_split`, write ``torch.arange(total).tensor_split(n)[rank]``.

    These ids are places in a batch: an example has another mask at another place. Where the data set has
    indices, they are better ids. A ``DataLoader`` gives them for each batch if the data set returns them::

        class Indexed(Dataset):
            def __getitem__(self, index):
                return index, data[index]

        sampler = DistributedSampler(data, num_replicas, rank)
        for step, (ids, batch) in enumerate(DataLoader(Indexed(), 32, sampler=sampler)):
            with thinned.address(model, seed=7, step=step, samples=ids):
                model(batch)

    Args:
        total: the number of rows in the batch of all processes.
        data_parallel: the processes that split the batch: a mesh of the data-parallel dimensions, whose
            processes count row by row, or a process group. ``"auto"`` is the default group. ``None`` stands
            for one process.

    Shape:
        the result: ``(rows,)``, int64, on the CPU.

    Raises:
        TypeError: ``total`` is no integer, or ``data_parallel`` none of the accepted values.
        ValueError: ``total`` is negative, or this process is not in the group.

    >>> import torch
    >>> shard_ids(3)  # on one process
    tensor([0, 1, 2])
    """
    check_integer("total", total, least=0)
    ids = torch.arange(total, device="cpu")
    if data_parallel is None or (data_parallel == "auto" and not has_peers()):
        return ids
    ranks, _ = _of_world() if data_parallel == "auto" else _of_group(data_parallel)
    each = -(-total // len(ranks))
    start = each * ranks.index(dist.get_rank())
    return ids[start : start + each]


def _class(module: str, name: str) -> Any:
    return getattr(sys.modules.get(module), name, ())


_group: Any = getattr(dist, "group", None)


@constant_when_compiled
def has_peers() -> bool:
    """Whether torch.distributed is initialised with other processes."""
    # dist.is_initialized() takes twice as long.
    return getattr(_group, "WORLD", None) is not None and dist.get_world_size() > 1


Found: TypeAlias = tuple[tuple[int, ...], Collection[int]]  # a rank of each replica, and those of this one


def _of_world() -> Found:
    return tuple(range(dist.get_world_size())), (dist.get_rank(),)


def _of_group(group: Any) -> Found:
    if isinstance(group, _class("torch.distributed.device_mesh", "DeviceMesh")):
        ranks = _ranks_on(group)
    elif isinstance(group, _class("torch.distributed", "ProcessGroup")):
        ranks = tuple(dist.get_process_group_ranks(group))
    else:
        raise TypeError(
            "data_parallel must be 'auto', a DeviceMesh of the data-parallel dimensions, a ProcessGroup, the "
            f"number of a replica, or None, {got(group)}"
        )
    if (rank := dist.get_rank()) not in ranks:
        raise ValueError(
            f"data_parallel is a group of the ranks {list(ranks)}, without this process, which is rank {rank}"
        )
    return ranks, (rank,)


def _of_model(model: nn.Module) -> Found:
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            return _of_group(module.process_group)
        if (given := fully_sharded_mesh(module)) is not None:
            return _of_group(given)
    everyone, alone = _of_world()
    found: dict[frozenset[int], str] = {}
    parameter: Any
    for name, parameter in model.named_parameters():
        mesh = parameter.device_mesh if is_dtensor(parameter) else localized_mesh(parameter)
        if mesh is not None and mesh.get_coordinate() is not None:
            found.setdefault(frozenset(_ranks_on(mesh)), name)
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise RuntimeError(
            f"data_parallel='auto' cannot tell which processes compute one replica: {first} is a DTensor on "
            f"the ranks {sorted(a)} and {second} on {sorted(b)}; pass data_parallel= the mesh of the "
            "data-parallel dimensions, or None for the same masks on all processes"
        )
    return everyone, next(iter(found), alone)


@lru_cache(maxsize=64)
def _ranks_of(mesh: DeviceMesh, rank: int) -> tuple[int, ...]:  # noqa: ARG001  # a slice depends on the rank
    return tuple(mesh.mesh.flatten().tolist())


@constant_when_compiled
def _ranks_on(mesh: DeviceMesh) -> tuple[int, ...]:
    return _ranks_of(mesh, dist.get_rank())
