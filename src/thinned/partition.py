"""Compiled code draws a key once: a backward pass that computes masks again does so from the same key.

Under a memory budget, torch's partitioner lets the backward pass draw anew what the forward pass drew
(pytorch#190717, #190758), but not where a draw bears the mark of a checkpointed region: so draws get it.
"""

from __future__ import annotations

import sys
from typing import Any

import torch.fx.traceback as traceback
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_slot, proxy_call
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["mark_draws"]


def mark_draws(draw: Any) -> None:
    """Mark the calls of an operation that draws, in every graph that is about to be partitioned."""

    def trace(mode: ProxyTorchDispatchMode, *args: Tensor) -> Any:
        drawn: Any = proxy_call(mode, draw, mode.pre_dispatch, args, {})
        node: Node = get_proxy_slot(drawn, mode.tracer).proxy.node
        if _budget(node) < 1 and _has_backward(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return drawn

    draw.py_impl(ProxyTorchDispatchMode)(trace)


def _budget(node: Node) -> float:
    """What part of the activations the partitioner may keep."""
    of_region = getattr(traceback, "_get_memory_budget_annotation", lambda _: None)(node)
    if of_region is not None:
        return float(of_region)
    config = sys.modules.get("torch._functorch.config")
    return 1.0 if config is None else float(config.activation_memory_budget)


def _has_backward(node: Node) -> bool:
    """Whether the graph is one of both passes, by what the partitioner itself goes by."""
    return any("tangents" in str(each.target) for each in node.graph.find_nodes(op="placeholder"))
