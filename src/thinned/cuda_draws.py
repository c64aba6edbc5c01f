"""Keys for CUDA tensors: a number that the host computes, in place of a kernel that draws it.

``torch.empty((), dtype=torch.int64, device="cuda").random_()`` reads ``seed`` and ``offset`` of the device's
default generator, adds 4 to the offset, and writes::

    (w0 * 2**32 + w1) % 2**63

where ``w0`` and ``w1`` are the first words of ``philox4x32-10((lo32(n), hi32(n), 0, 0), seed)``, and ``n`` is
``offset / 4``.

The host knows seed and offset, so in eager code :func:`draw` does the same without the kernel. Compiled code
calls ``random_()``; so does eager code while the current stream captures a CUDA graph, since only a kernel
draws a new key at each replay. All three take their keys from one sequence.

PyTorch does not promise this rule. So the first draw on a device compares it with ``random_()`` on another
generator, which waits for the device once. Where the two differ, or a method of the generator is missing,
``random_()`` draws every key.

From PyTorch 2.15 on, a draw holds the generator's lock. Before, it holds a lock of this module: if another
thread calls a random operation of PyTorch on the same device at that moment, both may get the same offset.
"""

from __future__ import annotations

import threading
from functools import cache

import torch
from torch import Tensor

from thinned import keys
from thinned.devices import captures
from thinned.philox import high32, low32, philox4x32

__all__ = ["draw", "number"]


def _philox_in_python(key: int, counter: int, /) -> int:
    low, high, _, _ = philox4x32((low32(counter), high32(counter), 0, 0), key, rounds=10)
    return low | high << 32


try:
    from thinned.backends._native import philox as _philox  # 0.1 us in place of 8
except ImportError:
    _philox = _philox_in_python

_lock = threading.Lock()


def draw(device: torch.device) -> int | Tensor:
    """One key from the default generator of a device other than the CPU, as a number if the host knows it."""
    if device.type != "cuda" or captures(device) or not _is_known(device.index):
        return keys.draw(device)
    return number(*_reserve(torch.cuda.default_generators[device.index]))


def number(seed: int, offset: int) -> int:
    """The key that ``random_()`` writes on CUDA, from the state of the generator.

    >>> number(7, 4)
    7507094428659989523
    """
    words = _philox(seed, offset // 4)
    return (low32(words) << 32 | high32(words)) % 2**63


def _reserve(generator: torch.Generator) -> tuple[int, int]:
    """The seed and the offset of the next number, which nothing else gets."""
    if hasattr(generator, "philox_state"):  # from 2.15 on
        seed, offset, in_graph = (int(part.item()) for part in generator.philox_state(4))
        return seed % 2**64, offset + in_graph
    with _lock:
        # The same state by another generator: cuDNN's dropout starts anew after generator.set_offset().
        state = generator.graphsafe_get_state()
        offset = state.get_offset()
        state.set_offset(offset + 4)
        return state.initial_seed(), offset


@cache
def _is_known(index: int) -> bool:
    """Whether ``random_()`` of this PyTorch and this device follows the rule."""
    seed, offset = 2**64 - 3, 4 * (2**32 + 5)
    try:
        with torch.cuda.device(index):
            generator = torch.Generator(torch.device("cuda", index)).manual_seed(seed)
            generator.set_offset(offset)
            ours = number(*_reserve(generator)), generator.get_offset()
            generator.set_offset(offset)
            drawn = torch.empty((), dtype=torch.int64, device="cuda").random_(generator=generator)
            # Not .item(), which torch.cuda.set_sync_debug_mode may forbid.
            drawn = drawn.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            event.synchronize()
            return ours == (drawn.item(), generator.get_offset())
    except Exception:
        return False
