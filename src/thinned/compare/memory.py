"""What a layer keeps alive between forward and backward."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from thinned.compare.settings import Settings
from thinned.compare.subjects import Subject

__all__ = ["bytes_saved"]

ELEMENTS = 100_000


def bytes_saved(subject: Subject, settings: Settings) -> float | None:
    """Bytes an element, apart from input and output, that a forward call leaves for its backward call.

    Counts each storage once, of tensors that autograd saves (its hooks see them) and of tensors that came to
    life in Python and are still there (the garbage collector sees them, in a context or an attribute). Memory
    that a C++ extension holds without telling autograd stays unseen. None if the layer cannot be run.
    """
    x = settings.ones(ELEMENTS).requires_grad_()
    seen: dict[int, int] = {}

    def count(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    before = _living_storages()
    try:
        layer = subject.make(settings.p)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            y = layer(x)
    except Exception:  # the table of laws says what a layer cannot do
        return None
    seen |= {address: size for address, size in _living_storages().items() if address not in before}
    for needed_anyway in (x, y):
        seen.pop(needed_anyway.untyped_storage().data_ptr(), None)
    return sum(seen.values()) / ELEMENTS


def _living_storages() -> dict[int, int]:
    gc.collect()
    storages = [
        tensor.untyped_storage()
        for tensor in gc.get_objects()
        if type(tensor) in (Tensor, nn.Parameter)  # other kinds, such as a compiler's, have no memory
    ]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
