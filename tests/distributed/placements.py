"""Calls with DTensors in every placement, compared with the same call in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

import thinned
from distributed.world import World
from montecarlo.common import ulps
from thinned.compare.implementation import first
from thinned.functional import dropout

ULPS = 16  # of the largest number, between sums in different orders
Place = tuple[DeviceMesh, tuple[Placement, ...]]


class Call(NamedTuple):
    """A module or a function, its inputs and its options."""

    function: Any
    inputs: Sequence[Tensor]
    options: Mapping[str, Any] = {}


class Results(NamedTuple):
    """The output of a call, the gradients of its inputs and those of the function's parameters."""

    output: Any
    grads: list[Any]
    of_parameters: list[Any]


class Case(NamedTuple):
    """One placement of one call; ``problems`` are empty if it equals one process's."""

    name: str
    mesh: str
    placement: str
    problems: list[str]


@cache
def mesh(*shape: int) -> DeviceMesh:
    return compared(init_device_mesh("cpu", shape))


@cache
def mesh_of(*ranks: int) -> DeviceMesh:
    return compared(DeviceMesh("cpu", ranks))


def compared(made: DeviceMesh) -> DeviceMesh:
    """A mesh after its first mask, which compares the keys of its processes and so communicates."""
    dropout(place(torch.ones(1), made, [Replicate()] * made.ndim), key=thinned.Key(0))
    return made


def on_one_dimension(dims: int) -> Iterator[Place]:
    """The mesh of all ranks, with each placement of a tensor of so many dimensions."""
    for placement in (Replicate(), *map(Shard, range(dims))):
        yield mesh(dist.get_world_size()), (placement,)


def every_placement(dims: int) -> Iterator[Place]:
    """Those, and each pair on the mesh of 2x2."""
    yield from on_one_dimension(dims)
    if dist.get_world_size() == 4:
        for pair in product((Replicate(), *map(Shard, range(dims))), repeat=2):
            yield mesh(2, 2), pair
        for dim in range(dims):
            # As FSDP2 shards a parameter that tensor parallelism has sharded.
            yield mesh(2, 2), (_StridedShard(dim, split_factor=2), Shard(dim))


def unordered(dims: int) -> Iterator[Place]:
    """:func:`every_placement`, with one of (Shard(i), Shard(j)) and (Shard(j), Shard(i))."""
    seen = set()
    for mesh, placement in every_placement(dims):
        if frozenset(placement) not in seen or len(placement) < 2:
            seen.add(frozenset(placement))
            yield mesh, placement


def some_placements(dims: int) -> Iterator[Place]:
    """Shards along the first or the last dimension, and along both."""
    size = dist.get_world_size()
    for dim in {0, dims - 1}:
        yield mesh(size), (Shard(dim),)
    if size == 4:
        yield mesh(2, 2), (Shard(0), Shard(dims - 1))


def place(x: Tensor, mesh: DeviceMesh, placement: Sequence[Placement]) -> Any:
    """A DTensor of what each process has; a dimension that ``x`` lacks is not sharded."""
    fitting = [each if getattr(each, "dim", -1) < x.dim() else Replicate() for each in placement]
    return distribute_tensor(x, mesh, fitting, src_data_rank=None)


def results(call: Call) -> Results:
    function, inputs, options = call
    inputs = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    y = first(function(*inputs, **options))
    if not y.requires_grad:
        return Results(y, [], [])
    cotangent: Any = torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)
    if hasattr(y, "device_mesh"):
        cotangent = place(cotangent, y.device_mesh, y.placements)
    y.backward(cotangent)  # not torch.autograd.grad, in which CommDebugMode fails
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    return Results(y.detach(), [x.grad for x in inputs], [each.grad for each in parameters])


def problem(expected: Any, found: Any, tolerance: float) -> str:
    """The difference in this process's shard; empty if there is none."""
    if expected is None or found is None:
        return "" if found is expected else f"{found} instead of {expected}"
    if found.shape != expected.shape:
        return f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if any(each.is_partial() for each in found.placements):
        local, found = expected, found.full_tensor()
    else:
        local = place(expected, found.device_mesh, found.placements).to_local()
        found = found.to_local()
    if found.shape != local.shape:
        return f"a shard of shape {tuple(found.shape)} instead of {tuple(local.shape)}"
    if found.equal(local) or (tolerance and ulps(found, local) <= tolerance):
        return ""
    return f"{int((found != local).sum())} of {local.numel()} elements differ"


def problems(call: Call, expected: Results, mesh: DeviceMesh, placement: Any, sums: bool) -> list[str]:
    """How a call with DTensors differs from one process's."""
    if isinstance(call.function, nn.Module):
        distribute_module(call.function, mesh)
    inputs = [place(x, mesh, placement) for x in call.inputs]
    try:
        with CommDebugMode() as counted:
            found = results(call._replace(inputs=inputs))
    except Exception as error:
        return [f"raised {type(error).__name__}: {error}"]
    tolerance = ULPS * sums
    said = [
        f"output: {problem(expected.output, found.output, tolerance)}",
        *(f"gradient: {problem(*pair, tolerance)}" for pair in zip(expected.grads, found.grads, strict=True)),
        *(
            f"parameter's gradient: {problem(*pair, ULPS)}"
            for pair in zip(expected.of_parameters, found.of_parameters, strict=True)
        ),
    ]
    if counted.get_total_counts():
        said.append(f"communicated: {', '.join(map(str, counted.get_comm_counts()))}")
    same_shape = found.output.shape == inputs[0].shape
    if same_shape and mesh.size() > 1 and found.output.placements != inputs[0].placements:
        said.append(f"output: placed as {found.output.placements}")
    return [each for each in said if not each.endswith(": ")]


def compare(
    make: Callable[..., Call],
    calls: Iterable[tuple[Any, ...]],
    expected: Iterable[Results],
    placements: Callable[[int], Iterable[Place]],
    sums: bool,
) -> list[Case]:
    """In a rank: each placement of each call ``make(*arguments)``."""
    cases = []
    for arguments, of_one in zip(calls, expected, strict=True):
        made = make(*arguments)
        for mesh, placement in placements(made.inputs[0].dim()):
            call = copy.deepcopy(made)
            cases.append(
                Case(
                    ", ".join(map(str, arguments)),
                    "x".join(map(str, mesh.shape)),
                    ", ".join(map(str, placement)),
                    problems(call, of_one, mesh, placement, sums),
                )
            )
    return cases


def cases_of(
    world: World,
    make: Callable[..., Call],
    calls: Sequence[tuple[Any, ...]],
    placements: Callable[[int], Iterable[Place]] = every_placement,
    sums: bool = False,
) -> list[Case]:
    """Each placement of each call ``make(*arguments)`` on a world, compared with a call in this process.

    The outputs differ by no bit, or by 16 ulps of the largest number if they are ``sums``.
    """
    expected = [results(make(*arguments)) for arguments in calls]
    return [
        case._replace(name=f"rank {rank} of {case.mesh}, {case.name}, {case.placement}")
        for rank, cases in enumerate(world.run(compare, make, calls, expected, placements, sums))
        for case in cases
    ]
