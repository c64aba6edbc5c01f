"""The operations on a DTensor: each process computes its shard by the whole tensor's mask indices.

Only the first mask on a mesh communicates, to compare the processes' keys. No later one does, in the forward
and in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from thinned.distributed.same_key import check_same_generators, check_same_key
from thinned.distributed.shards import Part, Run, Runs, is_dtensor, length, parts_of, runs_of
from thinned.geometry import Geometry, shared
from thinned.op.registered import call_backend, library
from thinned.torch_state import (
    compiling,
    computes_values,
    constant_when_compiled,
    graph_task_is_running,
    is_eager,
    local_of,
    unwrapped,
    with_local,
)

__all__ = ["accept", "locally", "shard_like", "uniform_for", "unsharded", "whole"]


def accept(x: Tensor, key: int | Tensor | None) -> None:
    """Teach a DTensor's class the operations, and check that ``x`` can have a mask.

    Args:
        x: a DTensor, also within transforms of torch.func. For any other tensor this does nothing.
        key: its mask's bits, or None where each process draws them from its default generator.

    Raises:
        RuntimeError: ``x`` is Partial, except in a backward pass: a gradient's mask may precede its sum. Or
            the processes have different keys.
    """
    if not is_dtensor(x := unwrapped(x)):
        return
    _register()
    if not compiling() and graph_task_is_running():
        return
    mesh, placements = x.device_mesh, x.placements  # type: ignore[attr-defined]
    if any(each.is_partial() for each in placements):
        raise RuntimeError(
            f"a dropout needs the elements of a DTensor, and one of shape {tuple(x.shape)} with placements "
            f"{tuple(placements)} holds summands of them; accepted: Replicate and Shard, as from "
            "input.redistribute(placements=...)"
        )
    if key is None and (compiling() or computes_values()):
        check_same_generators(mesh)
    elif type(key) is Tensor and unwrapped(key) is key and computes_values():
        check_same_key(mesh, key)


def uniform_for(
    x: Tensor, key: Tensor, shape: Sequence[int], geometry: Geometry, draw: Tensor | None, strata: int
) -> Tensor:
    """:func:`thinned.op.uniform` in a DTensor that broadcasts to the DTensor ``x``, sharded as ``x`` is."""
    return torch.ops.thinned.uniform_for(x, key, shape, *geometry, draw, strata)  # type: ignore[no-any-return]


def shard_like(whole: Tensor, x: Tensor) -> Tensor:
    """``whole``, which each process has, in a DTensor that is sharded as the DTensor ``x`` it broadcasts to.

    ``whole`` itself for an ``x`` that is no DTensor.
    """
    if not is_dtensor(x):
        return whole
    _register()
    return torch.ops.thinned.shard_like(whole, x)  # type: ignore[no-any-return]


def unsharded(x: Any, dim: int) -> Any:
    """The DTensor ``x`` with all of its dimension ``dim`` in each process, which may move data."""
    from torch.distributed.tensor import Replicate

    placements = [Replicate() if getattr(each, "dim", None) == dim else each for each in x.placements]
    return x.redistribute(placements=placements)


def locally(function: Callable[..., Tensor], x: Any, *others: Any, shape: Sequence[int]) -> Any:
    """``function`` of the shards of DTensors, in a DTensor of ``shape`` that is sharded as ``x`` is."""
    return _from_local(function(*(each.to_local() for each in (x, *others))), x, x.placements, shape)


def whole(x: Tensor) -> Tensor:
    """A plain tensor of all elements of a DTensor, gathered from where they are; ``x`` if it is plain."""
    return x.full_tensor() if is_dtensor(x) else x  # type: ignore[attr-defined]


def _masked_affine(operation: Any, x: Any, key: Tensor, strides: Sequence[int], base: int, *rest: Any) -> Any:
    runs = runs_of(x.shape, x.device_mesh, x.placements)
    local, geometry = local_of(x), Geometry(tuple(strides), base)

    def of_part(part: Part, x: Tensor) -> Tensor:
        rows, of_shard = _rows(key, part), geometry.shard(part.offsets)
        if is_eager(x):
            return call_backend(x, rows, of_shard, *rest)
        return operation(x, rows, *of_shard, *rest)  # type: ignore[no-any-return]

    sizes = tuple(map(length, runs))
    if is_eager(local) and local.shape != sizes and local.numel():
        raise RuntimeError(
            f"a DTensor of shape {tuple(x.shape)} with placements {tuple(x.placements)} has a shard of shape "
            f"{sizes} in this process, got one of {tuple(local.shape)}: its elements have no known position"
        )
    parts = list(parts_of(runs))
    if len(parts) == 1:
        return with_local(x, of_part(parts[0], local))
    y = torch.empty_like(local)
    for part in parts:
        y[part.place] = of_part(part, local[part.place])
    return with_local(x, y)


def _uniform_for(
    operation: Any,  # noqa: ARG001
    x: Any,
    key: Tensor,
    shape: Sequence[int],
    strides: Sequence[int],
    base: int,
    draw: Tensor | None = None,
    strata: int = 1,
) -> Any:
    runs, geometry = _runs_like(x, shape), Geometry(tuple(strides), base)
    u = torch.empty([*map(length, runs)], dtype=torch.int32, device=x.device)
    for part in parts_of(runs):
        sizes = [place.stop - place.start for place in part.place]
        drawn = None if draw is None else _rows(draw, part)
        rows, shifted = _rows(key, part), geometry.shard(part.offsets)
        u[part.place] = torch.ops.thinned.uniform(rows, sizes, *shifted, drawn, strata)
    return _placed_like(x, u, shape)


def _shard_like(operation: Any, whole: Tensor, x: Any) -> Any:  # noqa: ARG001
    shape = (*(1,) * (x.dim() - whole.dim()), *whole.shape)
    whole = whole.reshape(shape)
    for dim, runs in enumerate(_runs_like(x, shape)):
        kept = [whole.narrow(dim, run.start, length([run])) for run in runs] or [whole.narrow(dim, 0, 0)]
        whole = kept[0] if len(kept) == 1 else torch.cat(kept, dim)
    return _placed_like(x, whole.clone(), shape)


def _rows(keys: Tensor, part: Part) -> Tensor:
    """The keys of a part's rows, out of those of all rows."""
    for dim in range(keys.dim()):
        place = part.place[dim]
        keys = keys.narrow(dim, part.offsets[dim], place.stop - place.start)
    return keys


def _runs_like(x: Any, shape: Sequence[int]) -> Runs:
    """The runs of a tensor of ``shape`` that broadcasts to ``x``: all of it along its own dimensions of 1."""
    runs = runs_of(x.shape, x.device_mesh, x.placements)
    return [
        dim if size == whole else [Run(0, size)]
        for dim, size, whole in zip(runs, shape, x.shape, strict=True)
    ]


def _placed_like(x: Any, local: Tensor, shape: Sequence[int]) -> Any:
    """A DTensor of ``shape`` from this process's shard, which :func:`_runs_like` describes."""
    from torch.distributed.tensor import Replicate

    placements = [
        each if hasattr(each, "dim") and shape[each.dim] == x.shape[each.dim] else Replicate()
        for each in x.placements
    ]
    return _from_local(local, x, placements, shape)


def _from_local(local: Tensor, x: Any, placements: Sequence[Any], shape: Sequence[int]) -> Any:
    from torch.distributed.tensor import DTensor

    strides = shared(shape).strides
    return DTensor.from_local(
        local, x.device_mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


for _schema in (
    "uniform_for(Tensor x, Tensor key, SymInt[] shape, SymInt[] strides, SymInt base, Tensor? draw=None, "
    "int strata=1) -> Tensor",
    "shard_like(Tensor whole, Tensor x) -> Tensor",
):
    library.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


@constant_when_compiled
def _register() -> None:
    """Give the class DTensor its rules, once: to import it takes 0.5 s, so this waits for the first one."""
    if _registered:
        return
    from torch.distributed.tensor import DTensor

    for name, rule in (
        ("masked_affine", _masked_affine),
        ("uniform_for", _uniform_for),
        ("shard_like", _shard_like),
    ):

        def dispatch(*call: Any, rule: Callable[..., Any] = rule) -> Any:
            _, operation, _, args, kwargs = call
            return rule(operation, *args, **kwargs)

        torch.library.register_torch_dispatch(f"thinned::{name}", DTensor, dispatch, lib=library)
    _registered.append(DTensor)


_registered: list[type] = []
