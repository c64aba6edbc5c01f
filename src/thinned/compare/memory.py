"""Memory that a layer keeps alive between forward and backward."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Implementation
from thinned.compare.settings import Settings

__all__ = ["bytes_saved", "saved_by_call"]

ELEMENTS = 100_000


def bytes_saved(implementation: Implementation, settings: Settings) -> float | None:
    """Bytes an element, apart from input and output, that a forward call leaves for its backward call.

    Counts each storage once, of tensors that autograd saves (its hooks see them) and of tensors that came to
    life in Python and are still there (the garbage collector sees them, in a context or an attribute). Memory
    that a C++ extension holds without telling autograd stays unseen. None if the layer cannot be run.
    """
    try:
        return saved_by_call(implementation.make(p=settings.p), settings.ones(ELEMENTS).requires_grad_())
    except Exception:  # the table of laws says what a layer cannot do
        return None


def saved_by_call(layer: Callable[[Tensor], Tensor], x: Tensor, not_counted: Iterable[Tensor] = ()) -> float:
    """Bytes an element of ``x`` that a call leaves for backward, beside ``x``, output and ``not_counted``."""
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    before = _living_storages()
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        y = layer(x)
    seen |= {address: size for address, size in _living_storages().items() if address not in before}
    for needed_anyway in (x, y, *not_counted):
        seen.pop(needed_anyway.untyped_storage().data_ptr(), None)
    return sum(seen.values()) / x.numel()


def _living_storages() -> dict[int, int]:
    gc.collect()
    storages = [
        tensor.untyped_storage()
        for tensor in gc.get_objects()
        if type(tensor) in (Tensor, nn.Parameter)  # other kinds, such as a compiler's, have no memory
    ]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
