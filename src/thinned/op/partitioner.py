"""Compiled code draws a key once: a backward pass that computes masks again does so from the same key.

Under a memory budget, torch's partitioner lets the backward pass draw anew what the forward pass drew
(pytorch#190717, #190758), but not where a draw bears the mark of a checkpointed region: so draws get it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from thinned.torch_state import budget_of, node_of, on_proxies

__all__ = ["mark_draws"]


def mark_draws(draw: Any) -> None:
    """Mark the calls of an operation that draws, in every graph that is about to be partitioned."""

    def trace(mode: Any, *args: Tensor) -> Any:
        drawn, node = node_of(draw, mode, args)
        if budget_of(node) < 1 and _has_backward(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return drawn

    on_proxies(draw, trace)


def _has_backward(node: Node) -> bool:
    """Whether the graph is one of both passes, by what the partitioner itself goes by."""
    return any("tangents" in str(each.target) for each in node.graph.find_nodes(op="placeholder"))
