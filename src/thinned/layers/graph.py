"""Dropout of a graph's edges and nodes, which are columns of an ``edge_index`` as PyG has it."""

from __future__ import annotations

from operator import index
from typing import Literal

import torch
from torch import Tensor
from torch.overrides import has_torch_function_unary

from thinned import op
from thinned.checks import check_integer
from thinned.distributed.shards import is_dtensor
from thinned.geometry import shared
from thinned.keys import Key, as_key
from thinned.layers._arguments import check_tensor, key_for, threshold_and_scale
from thinned.layers._overrides import overridden
from thinned.torch_state import compiling

__all__ = ["dropout_edge", "dropout_node"]


def dropout_edge(
    edge_index: Tensor,
    p: float = 0.5,
    force_undirected: bool = False,
    training: bool = True,
    *,
    per: Literal["edge", "pair"] = "edge",
    key: Key | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Remove each edge of a graph with probability ``p``.

    .. math:: E' = \{e \in E : u(e) < T\}

    With ``per="edge"``, ``e`` is the edge's column in ``edge_index``, and the mask is
    ``thinned.keep_mask(key, (E,), p)``. With ``per="pair"``, the two nodes decide:

    .. math:: E' = \{(i, j) \in E : u_{ij}(0) < T\}, \qquad
        u_{ij} \text{ under } \mathtt{key.fold}(\min(i, j))\mathtt{.fold}(\max(i, j))

    Then both directions of an undirected edge have one decision, and so have parallel edges. It depends
    neither on the edge's place nor on the graph's size: a reordered, batched or sharded ``edge_index`` loses
    the same edges if its nodes keep their ids. It takes 0.15 us an edge on one thread, against 0.02.
    Do not use it for a bipartite graph, where ``(i, j)`` and ``(j, i)`` are other edges.

    Args:
        edge_index: an int64 or int32 tensor of shape ``(2, E)``, in which a column is an edge.
        p: the probability of removing an edge, in [0, 1].
        force_undirected: return an undirected graph as PyG does: the edges with ``row <= col`` that are kept,
            then the mirror of each. Other edges are left out, so ``edge_index`` has to hold both directions.
        training: False returns ``edge_index`` itself with a mask that is all True, and so does ``p = 0``.
        per: ``"edge"`` or ``"pair"``.
        key: one :class:`~thinned.Key`; without one, a key is drawn from torch's default generator of
            ``edge_index``'s device.

    Returns:
        The remaining edges, and what selects their attributes as ``edge_attr[selection]``: the bool mask over
        columns, or with ``force_undirected`` the columns that the edges come from. In PyG, the mirror of a
        self-loop is a second self-loop; here a self-loop has no mirror.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or another ``per``.
        TypeError: ``edge_index`` is no tensor, or ``key`` no :class:`~thinned.Key`.
        RuntimeError: ``edge_index`` is of another shape or dtype, or ``key`` is a batch of keys.

    Source: Rong et al., "DropEdge: towards deep graph convolutional networks on node classification", ICLR
    2020, section 4.1, who remove a fixed number of edges; the signature is PyG's.

    >>> import torch, thinned
    >>> edges = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    >>> thinned.functional.dropout_edge(edges, 0.5, key=thinned.Key(3))
    (tensor([[1, 2, 2, 3],
            [2, 1, 3, 2]]), tensor([False, False,  True,  True,  True,  True]))
    >>> thinned.functional.dropout_edge(edges, 0.5, per="pair", key=thinned.Key(3))
    (tensor([[1, 2],
            [2, 1]]), tensor([False, False,  True,  True, False, False]))
    """
    if has_torch_function_unary(edge_index) and not compiling():
        return overridden(dropout_edge, locals())
    T, _ = threshold_and_scale(p)
    if per not in ("edge", "pair"):
        raise ValueError(f"per has to be 'edge' or 'pair', but got {per!r}")
    active = training and p != 0
    _check("dropout_edge", edge_index, key, active)
    if not active:
        return edge_index, edge_index.new_ones(edge_index.shape[1], dtype=torch.bool)
    key = key_for(edge_index, key, sample_dim=None)
    if per == "pair":
        row, col = edge_index.to(torch.int64)
        key = key.fold(torch.minimum(row, col)).fold(torch.maximum(row, col))  # amin takes 0.2 us an edge
    mask = _keep_mask(key, edge_index.shape[1], T)
    if not force_undirected:
        return edge_index[:, mask], mask
    columns = (mask & (edge_index[0] <= edge_index[1])).nonzero().flatten()
    kept = edge_index[:, columns]
    has_mirror = kept[0] != kept[1]
    undirected = torch.cat((kept, kept[:, has_mirror].flip(0)), dim=1)
    return undirected, torch.cat((columns, columns[has_mirror]))


def dropout_node(
    edge_index: Tensor,
    p: float = 0.5,
    num_nodes: int | None = None,
    training: bool = True,
    relabel_nodes: bool = False,
    *,
    key: Key | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Remove each node of a graph with probability ``p``, and with it all its edges.

    .. math:: V' = \{i \in V : u(i) < T\}, \qquad E' = \{(i, j) \in E : i \in V', j \in V'\}

    A node's id decides, so ``num_nodes`` and the order of the edges do not. To zero the features of nodes
    instead, and keep the graph, take ``dropout(x, p, broadcast_dims=(1,))``, the DropNode of GRAND.

    Args:
        edge_index: as for :func:`dropout_edge`.
        p: the probability of removing a node, in [0, 1].
        num_nodes: the number of nodes; by default one more than the largest id in ``edge_index``, for which
            a GPU is waited for.
        training: False returns ``edge_index`` itself with masks that are all True, and so does ``p = 0``.
        relabel_nodes: number the remaining nodes from 0, in their order.
        key: as for :func:`dropout_edge`.

    Returns:
        The remaining edges, the bool mask of edges, and the bool mask of nodes, which is
        ``thinned.keep_mask(key, (num_nodes,), p)``.

    Raises:
        TypeError: ``num_nodes`` is no integer, or as :func:`dropout_edge`.
        ValueError, RuntimeError: as :func:`dropout_edge`; ``num_nodes`` is negative.
        IndexError: a node's id is not below ``num_nodes``.

    Source: Do et al., "Graph convolutional neural networks with node transition probability-based message
    passing and DropNode regularization", Expert Systems with Applications 174 (2021); for features, Feng et
    al., "Graph random neural networks for semi-supervised learning on graphs", NeurIPS 2020, section 3.1; the
    signature is PyG's.

    >>> import torch, thinned
    >>> edges = torch.tensor([[0, 1, 1, 2, 2, 3], [1, 0, 2, 1, 3, 2]])
    >>> remaining, edge_mask, node_mask = thinned.functional.dropout_node(edges, 0.5, key=thinned.Key(3))
    >>> remaining, node_mask
    (tensor([[2, 3],
            [3, 2]]), tensor([False, False,  True,  True]))
    """
    if has_torch_function_unary(edge_index) and not compiling():
        return overridden(dropout_node, locals())
    T, _ = threshold_and_scale(p)
    active = training and p != 0
    _check("dropout_node", edge_index, key, active)
    num_nodes = _num_nodes(edge_index, num_nodes)
    if not active:
        nodes = edge_index.new_ones(num_nodes, dtype=torch.bool)
        return edge_index, edge_index.new_ones(edge_index.shape[1], dtype=torch.bool), nodes
    node_mask = _keep_mask(key_for(edge_index, key, sample_dim=None), num_nodes, T)
    edge_mask = node_mask[edge_index[0]] & node_mask[edge_index[1]]
    edge_index = edge_index[:, edge_mask]
    if relabel_nodes:
        edge_index = (node_mask.cumsum(0) - 1).to(edge_index.dtype)[edge_index]
    return edge_index, edge_mask, node_mask


def _keep_mask(key: Key, size: int, T: int) -> Tensor:
    return op.keep_mask(key.bits, (size,), shared((size,), (), key.bits.dim()), T)


def _num_nodes(edge_index: Tensor, num_nodes: int | None) -> int:
    if num_nodes is None:
        return int(edge_index.max()) + 1 if edge_index.numel() else 0
    check_integer("num_nodes", num_nodes, least=0)
    # index() would make a constant of a symbolic number.
    return num_nodes if isinstance(num_nodes, int | torch.SymInt) else index(num_nodes)


def _check(name: str, edge_index: Tensor, key: Key | None, active: bool) -> None:
    check_tensor(name, "edge_index", edge_index)
    if active and (
        edge_index.dim() != 2
        or edge_index.shape[0] != 2
        or edge_index.dtype not in (torch.int64, torch.int32)
    ):
        raise RuntimeError(
            f"{name} needs an edge_index of shape (2, E) and dtype torch.int64 or torch.int32, got "
            f"{edge_index.dtype} of shape {tuple(edge_index.shape)}"
        )
    if active and is_dtensor(edge_index):
        raise NotImplementedError(
            f"{name} takes no DTensor, since the number of edges that it keeps depends on the mask; got one "
            f"of shape {tuple(edge_index.shape)}; write edge_index.full_tensor()"
        )
    if key is None:
        return
    if (key := as_key(key)).shape:
        raise RuntimeError(f"{name} takes one key of shape (), got keys of shape {tuple(key.shape)}")
