"""Keys under :func:`torch.vmap`: one for all calls (``randomness="same"``) or one each (``"different"``)."""

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

__all__ = ["key_per_call"]


def key_per_call(key: Key, *, is_random: bool = False) -> Key:
    """``key.fold(i)`` for call ``i`` of each vmap with randomness "different", the outermost first.

    Args:
        key: is returned as it is outside of vmap.
        is_random: whether the key was drawn, which a vmap with randomness "error" does not allow.

    Raises:
        RuntimeError: ``is_random`` within such a vmap.
    """
    if not (compiling() or transforming()):
        return key
    if is_random and "error" in _randomness():
        raise RuntimeError(
            "vmap: called random operation while in randomness error mode, a dropout without a key; give it "
            "a key, or use the 'same' or 'different' randomness flags on vmap"
        )
    for level, size in _different():
        key = key.fold(add_batch_dim(_numbers(size, key.bits.device), 0, level))
    return key


def _numbers(size: int, device: torch.device) -> Tensor:
    if compiling():  # Dynamo does not trace the context below
        return torch.arange(size, device=device)
    with without_transforms():  # else a transform inside the vmap would wrap the result
        return torch.arange(size, device=device)


# Dynamo calls the next two while it traces, within the vmaps; another size compiles once more.
@constant_when_compiled
def _randomness() -> tuple[str, ...]:
    """The randomness setting of every active vmap, outermost first."""
    return tuple(vmap.randomness() for vmap in vmaps())


@constant_when_compiled
def _different() -> tuple[tuple[int, int], ...]:
    """Level and size of every vmap with randomness "different"."""
    return tuple(
        (vmap.level(), int(vmap.batch_size())) for vmap in vmaps() if vmap.randomness() == "different"
    )
