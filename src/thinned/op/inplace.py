"""In-place checks with torch's own messages, made before any element changes."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.torch_state import base_of, is_odd_view

__all__ = ["count_write", "refuse_leaf", "refuse_overlap"]


def refuse_leaf(x: Tensor) -> None:
    """Raise RuntimeError if autograd forbids overwriting ``x``, which requires grad."""
    if x.is_leaf:
        raise RuntimeError(
            "a leaf Variable that requires grad is being used in an in-place operation: "
            f"{tuple(x.shape)} {x.dtype}; use inplace=False"
        )
    base = base_of(x)
    if base is not None and base.is_leaf and base.requires_grad:
        raise RuntimeError(
            "a view of a leaf Variable that requires grad is being used in an in-place operation: "
            f"{tuple(x.shape)} of {tuple(base.shape)} {x.dtype}; use inplace=False"
        )
    if is_odd_view(x):
        x.mul_(1)  # raises torch's own error, before any element changes


def refuse_overlap(x: Tensor) -> None:
    """Raise RuntimeError if two elements of ``x`` share one memory location."""
    if any(stride == 0 and size > 1 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise RuntimeError(
            "unsupported operation: more than one element of the written-to tensor refers to a single memory "
            f"location: shape {tuple(x.shape)}, strides {x.stride()}. Please clone() the tensor first"
        )


def count_write(x: Tensor) -> None:
    """Bump ``x``'s version, which a backward pass that saved ``x`` checks; RuntimeError if x is read-only."""
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)
    elif not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Inplace update to inference tensor outside InferenceMode is not allowed: "
            f"{tuple(x.shape)} {x.dtype}. Please clone() the tensor first"
        )
