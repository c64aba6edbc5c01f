"""Where the measurements run: on a GPU, or without one on tiny sizes."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from thinned.compare.memory import saved_by_call
from thinned.compare.timing import Clock, host_clock

__all__ = ["DRY_RUN", "GPU", "Place", "captured"]


@dataclass(frozen=True)
class Place:
    """A device, the sizes it is given, and how time and memory are measured there.

    - ``sizes``: numbers of elements, ascending.
    - ``large``: the size from which memory bandwidth decides.
    - ``cache``: bytes that buffers in turn have to exceed.
    - ``clock``: the device's own clock.
    - ``peak``: bytes that a layer's forward call needs at its peak, beside its input.
    - ``compiler``: the backend of :func:`torch.compile`.
    """

    device: str
    sizes: tuple[int, ...]
    large: int
    cache: int
    rounds: int
    clock: Clock
    peak: Callable[[Callable[[Tensor], Tensor], Tensor], float]
    compiler: str
    has_graphs: bool


def _events(call: Callable[[], object], repeats: int) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3 / repeats


def _peak(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    layer(x)  # compiles
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = layer(x)  # noqa: F841  it holds what the backward pass needs
    return torch.cuda.max_memory_allocated() - before


def _what_stays(layer: Callable[[Tensor], Tensor], x: Tensor) -> float:
    return (x.element_size() + saved_by_call(layer, x)) * x.numel()


def captured(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """The replay of a CUDA graph of the calls, whose results it keeps in different memory."""
    for call in calls:
        call()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [call() for call in calls]

    def replay(_: object = results) -> None:
        graph.replay()

    return replay


GPU = Place(
    device="cuda",
    sizes=(2**12, 2**16, 2**20, 2**24, 2**28),
    large=2**24,
    cache=100_000_000,  # an H100's L2 cache holds 50 MB, an H200's 60
    rounds=15,
    clock=_events,
    peak=_peak,
    compiler="inductor",
    has_graphs=True,
)
DRY_RUN = Place(
    device="cpu",
    sizes=(100, 300),
    large=300,
    cache=0,
    rounds=1,
    clock=host_clock("cpu"),
    peak=_what_stays,
    compiler="aot_eager",
    has_graphs=False,
)
