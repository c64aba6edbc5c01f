"""A compiled backward pass that draws again must get the forward pass's key.

Under a memory budget, torch's partitioner may re-run a random draw in the backward pass, which then advances
the generator once more and gives another mask (pytorch#190717, #190758). Only for draws tagged
``MUST_RECOMPUTE``, as in a checkpointed region, does it save the generator's state in the forward pass and
restore it for the second run. We want the state and not the recomputation: the tag makes a run that may
happen anyway repeat the first one's key.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node
from torch.utils.checkpoint import CheckpointPolicy

from thinned.torch_state import budget_of, node_of, on_proxies

__all__ = ["repeat_draws"]


def repeat_draws(draw: Any) -> None:
    """Tag the calls of an operation that draws, in every graph that is about to be partitioned."""

    def trace(mode: Any, *args: Tensor) -> Any:
        result, node = node_of(draw, mode, args)
        if budget_of(node) < 1 and _has_backward(node):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return result

    on_proxies(draw, trace)


def _has_backward(node: Node) -> bool:
    """Whether the graph holds both passes, by the names that the partitioner itself looks for."""
    return any("tangents" in str(input.target) for input in node.graph.find_nodes(op="placeholder"))
