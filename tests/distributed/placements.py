"""Calls with DTensors in every placement, compared with the same call in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import _StridedShard

from montecarlo.common import ulps
from thinned.compare.implementation import first

Call = tuple[Any, list[Tensor], dict[str, Any]]  # a module or a function, its inputs, its options
ULPS = 16  # between sums in different orders


@cache
def mesh(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def placements(dims: int) -> Iterator[tuple[DeviceMesh, tuple[Placement, ...]]]:
    """Each mesh of this world, with each placement of a tensor of so many dimensions."""
    size = dist.get_world_size()
    each = [Replicate(), *map(Shard, range(dims))]
    for placement in each:
        yield mesh(size), (placement,)
    if size == 4:
        for pair in product(each, repeat=2):
            yield mesh(2, 2), pair
        for dim in range(dims):
            # As FSDP2 shards what tensor parallelism has sharded.
            yield mesh(2, 2), (_StridedShard(dim, split_factor=2), Shard(dim))


def place(x: Tensor, mesh: DeviceMesh, placement: Sequence[Placement]) -> Any:
    """A DTensor of what each process has; a dimension that ``x`` lacks is not sharded."""
    fitting = [each if getattr(each, "dim", -1) < x.dim() else Replicate() for each in placement]
    return distribute_tensor(x, mesh, fitting, src_data_rank=None)


def called(
    call: Call, inputs: list[Any], cotangent: Callable[[Any], Any]
) -> tuple[Any, list[Any], list[Any]]:
    """Output, and gradients of inputs and parameters."""
    function, _, options = call
    inputs = [x.requires_grad_(x.is_floating_point()) for x in inputs]
    y = first(function(*inputs, **options))
    if not y.requires_grad:
        return y, [], []
    y.backward(cotangent(y))  # CommDebugMode does not count in torch.autograd.grad
    parameters = function.parameters() if isinstance(function, nn.Module) else ()
    return y.detach(), [x.grad for x in inputs], [each.grad for each in parameters]


def cotangent_of(y: Any) -> Tensor:
    return torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype)


def problem(expected: Any, found: Any, tolerance: float = 0) -> str:
    """What is wrong with this process's shard of a result; empty if nothing is."""
    if expected is None or found is None:
        return "" if found is expected else f"{found} instead of {expected}"
    if found.shape != expected.shape:
        return f"of shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    if any(each.is_partial() for each in found.placements):
        found, local = found.full_tensor(), expected
    else:
        local = distribute_tensor(
            expected, found.device_mesh, found.placements, src_data_rank=None
        ).to_local()
        found = found.to_local()
    if found.shape != local.shape:
        return f"a shard of shape {tuple(found.shape)} instead of {tuple(local.shape)}"
    if not found.equal(local) and (not tolerance or ulps(found, local) > tolerance):
        return f"differs in {int((found != local).sum())} of {local.numel()} elements"
    return ""


def problems(
    make: Callable[[], Call],
    mesh: DeviceMesh,
    placement: tuple[Placement, ...],
    expected: tuple[Any, list[Any], list[Any]],
    sums: bool = False,
) -> list[str]:
    """How a call with DTensors differs from one process's."""
    call = make()
    if isinstance(call[0], nn.Module):
        distribute_module(call[0], mesh)
    inputs = [place(x, mesh, placement) for x in call[1]]
    try:
        with CommDebugMode() as counted:
            y, grads, of_parameters = called(
                call, inputs, lambda y: place(cotangent_of(y), y.device_mesh, y.placements)
            )
    except Exception as error:
        return [f"raised {type(error).__name__}: {str(error).splitlines()[0]}"]
    found = [f"output: {problem(expected[0], y, ULPS * sums)}"]
    found += [f"gradient: {problem(*pair, ULPS * sums)}" for pair in zip(expected[1], grads, strict=True)]
    found += [
        f"parameter's gradient: {problem(*pair, ULPS)}"
        for pair in zip(expected[2], of_parameters, strict=True)
    ]
    if counted.get_total_counts():
        found.append(f"communicated: {dict(counted.get_comm_counts())}")
    return [each for each in found if not each.endswith(": ")]


def compare(calls: dict[str, Callable[[], Call]], sums: bool = False) -> list[tuple[str, str, list[str]]]:
    """For each call and placement: mesh, the case's name and problems."""
    results = []
    for name, make in calls.items():
        call = make()
        expected = called(call, call[1], cotangent_of)
        for mesh, placement in placements(call[1][0].dim()):
            shape = "x".join(map(str, mesh.shape))
            shown = ", ".join(map(str, placement))
            results.append((shape, f"{name}; {shown}", problems(make, mesh, placement, expected, sums)))
    return results
