"""Copies to a device, and what it is doing."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.torch_state import compiling

__all__ = ["captures", "to_device"]


def captures(device: torch.device) -> bool:
    """Whether the device's current stream captures a CUDA graph."""
    if compiling() or device.type != "cuda":
        return False
    if device.index in (None, torch.cuda.current_device()):
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on a device. A copy from the CPU does not block, unless it would read ``x`` after the call.

    MPS does so (pytorch#189690), and so does each replay of a CUDA graph, whose capture refuses copies that
    block.
    """
    return x.to(device, non_blocking=x.is_cpu and device.type != "mps" and not captures(device))
