"""All measurements on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, product
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from benchmarks.case import Case, Work
from benchmarks.gpu.peers import compiled, layers
from benchmarks.gpu.place import Place, captured
from benchmarks.gpu.targets import BOTH, FORWARD, GRAPH, LAUNCHES, LAUNCHES_BOTH
from thinned.compare.timing import host_clock

__all__ = ["DTYPES", "Buffers", "cases", "compilations", "in_turn", "peak_setting", "peaks", "turns"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
GRAPH_CALLS = 20

Layer: TypeAlias = Callable[[Tensor], Tensor]


class Buffers(NamedTuple):
    """What one call reads and writes."""

    x: Tensor
    upstream: Tensor
    y: Tensor


Step: TypeAlias = Callable[[Buffers], object]


def cases(place: Place) -> Iterator[Case]:
    """Every measurement, in the order of its run."""
    for dtype, elements in product(DTYPES, place.sizes):
        case = partial(_case, place=place, dtype=dtype, elements=elements)
        large, with_compiled = elements >= place.large, _is_compiled(place, dtype, elements)
        for group in (FORWARD, BOTH):
            yield case(group, with_compiled=with_compiled)
            if large:
                yield case(group, p=0.1)
        if place.has_graphs:
            yield case(GRAPH)
            if large:
                yield case(GRAPH, p=0.1)
        if not large and dtype == DTYPES[0]:
            yield case(LAUNCHES)
            yield case(LAUNCHES_BOTH)


def compilations(place: Place) -> int:
    """How many times torch.compile compiles: two layers, both directions, and for the peak of memory."""
    times = sum(_is_compiled(place, dtype, elements) for dtype, elements in product(DTYPES, place.sizes))
    return 2 * (2 * times + 1)


def _is_compiled(place: Place, dtype: torch.dtype, elements: int) -> bool:
    """One dtype in all sizes and one size in all dtypes: each compilation takes some seconds."""
    return dtype == DTYPES[0] or elements == place.large


def _setting(dtype: torch.dtype, elements: int, p: float) -> str:
    """A case in words."""
    return f"{str(dtype).removeprefix('torch.')}, {elements:,} elements, p = {p}"


def turns(place: Place, dtype: torch.dtype, elements: int) -> int:
    """How many buffers are used in turn, so that the cache does not hold the next one: two at least."""
    return max(2, -(-place.cache // (elements * dtype.itemsize)))


def _buffers(place: Place, dtype: torch.dtype, elements: int, requires_grad: bool) -> list[Buffers]:
    """Random numbers in as many buffers as take turns, each tensor ``elements`` long."""
    pools = torch.randn(3, turns(place, dtype, elements), elements, dtype=dtype, device=place.device)
    found = [Buffers(*tensors) for tensors in zip(*pools, strict=True)]
    for each in found:
        each.x.requires_grad_(requires_grad)
    return found


def in_turn(function: Step, chosen: Sequence[Buffers], kept: list[object]) -> Callable[[], object]:
    """``function`` of the next buffers at each call. ``kept`` holds a result until the buffers' next turn.

    So results take turns too: else the allocator would give the same memory again, which the cache holds.
    """
    numbers = cycle(range(len(chosen)))

    def call() -> None:
        number = next(numbers)
        kept[number] = function(chosen[number])

    return call


def _copy(at: Buffers) -> object:
    return at.y.copy_(at.x)


def _steps(place: Place, group: str, p: float, with_compiled: bool) -> dict[str, Step]:
    functions = layers(p) | (compiled(p, place.compiler) if with_compiled else {})
    if group in (BOTH, LAUNCHES_BOTH):
        return {name: partial(_gradient, layer) for name, layer in functions.items()}
    return {"copy": _copy, **{name: partial(_output, layer) for name, layer in functions.items()}}


def _output(layer: Layer, at: Buffers) -> object:
    return layer(at.x)


def _gradient(layer: Layer, at: Buffers) -> object:
    return torch.autograd.grad(layer(at.x), at.x, at.upstream)


def _case(
    group: str, place: Place, dtype: torch.dtype, elements: int, p: float = 0.5, with_compiled: bool = False
) -> Case:
    calls = min(GRAPH_CALLS, turns(place, dtype, elements))

    def make() -> Work:
        chosen = _buffers(place, dtype, elements, group in (BOTH, LAUNCHES_BOTH))
        steps = _steps(place, group, p, with_compiled)
        if group == GRAPH:
            return {
                name: captured([partial(step, at) for at in chosen[:calls]]) for name, step in steps.items()
            }
        kept: list[object] = [None] * len(chosen)
        work = {name: in_turn(step, chosen, kept) for name, step in steps.items()}
        for call in work.values():
            call()  # compiles
        return work

    def each(call: Callable[[], object], repeats: int) -> float:
        return place.clock(call, repeats) / calls

    clock = {GRAPH: each, LAUNCHES: host_clock(place.device), LAUNCHES_BOTH: host_clock(place.device)}
    return Case(
        group,
        _setting(dtype, elements, p),
        make,
        (),
        rounds=place.rounds,
        elements=elements,
        clock=clock.get(group, place.clock),
    )


PEAK_P = 0.5


def peaks(place: Place) -> dict[str, float]:
    """Bytes an element that each layer's forward call needs at its peak, beside its input."""
    x = torch.randn(place.large, dtype=DTYPES[0], device=place.device, requires_grad=True)
    functions = layers(PEAK_P) | compiled(PEAK_P, place.compiler)
    return {name: place.peak(layer, x) / place.large for name, layer in functions.items()}


def peak_setting(place: Place) -> str:
    """What :func:`peaks` measures, in words."""
    return _setting(DTYPES[0], place.large, PEAK_P)
