"""Keys within :func:`torch.vmap`: the mapped calls share one, or each has its own, as its randomness says."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.keys import Key
from thinned.torch_state import (
    add_batch_dim,
    compiling,
    constant_when_compiled,
    transforming,
    vmaps,
    without_transforms,
)

__all__ = ["for_each_member"]


def for_each_member(key: Key, *, drawn: bool = False) -> Key:
    """``key.fold(i)`` for call ``i`` of each map with randomness "different", the outermost first.

    Args:
        key: outside of a map it stays as it is.
        drawn: whether it is a random number, which a map with randomness "error" does not allow.

    Raises:
        RuntimeError: ``drawn`` within such a map.
    """
    if not (compiling() or transforming()):
        return key
    if drawn and "error" in _randomness():
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode, a dropout without a key; give it "
            "a key, or use the 'same' or 'different' randomness flags on vmap"
        )
    for level, size in _different():
        key = key.fold(add_batch_dim(_numbers(size, key.bits.device), 0, level))
    return key


def _numbers(size: int, device: torch.device) -> Tensor:
    if compiling():  # which does not trace what follows
        return torch.arange(size, device=device)
    with without_transforms():  # a plain tensor, which a transform within the map would wrap
        return torch.arange(size, device=device)


# Dynamo calls the next two while it traces, within the vmaps; another size compiles once more.
@constant_when_compiled
def _randomness() -> tuple[str, ...]:
    """The randomness of every active vmap, outermost first."""
    return tuple(each.randomness() for each in vmaps())


@constant_when_compiled
def _different() -> tuple[tuple[int, int], ...]:
    """Level and size of each map with randomness "different"."""
    return tuple(
        (each.level(), int(each.batch_size())) for each in vmaps() if each.randomness() == "different"
    )
