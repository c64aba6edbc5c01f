"""Field issues about graphs and attention: what is dropped is an edge, a node, or an attention weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import thinned
from models.field.halves import in_torch, seeded
from thinned import Key
from thinned.models.intercept import intercept

EDGES = torch.arange(60).reshape(2, 30) % 12
X = torch.randn(12, 4)


def dropout_edge(edge_index: Tensor, p: float = 0.5) -> Tensor:
    """torch_geometric.utils has it so since the issue; dropout_adj was the same."""
    return edge_index[:, torch.rand(edge_index.size(1), device=edge_index.device) >= p]


def drop_nodes(x: Tensor, p: float = 0.5) -> Tensor:
    """The answer to the issue: torch's dropout of a column of ones."""
    return x * F.dropout(x.new_ones(len(x), 1), p)


@in_torch("reproduces")
def test_pyg_1115_torch() -> None:
    """The edges that are dropped depend on every number drawn before, as of any dropout of torch."""

    def after_a_draw(edges: Tensor) -> Tensor:
        torch.rand(1)
        return dropout_edge(edges)

    assert not seeded(dropout_edge, EDGES).equal(seeded(after_a_draw, EDGES))


def test_pyg_1115_thinned() -> None:
    """The library's own function drops the edges of a key, within intercept."""

    def dropped(seed: int) -> Tensor:
        with intercept(key=Key(7)):
            return seeded(dropout_edge, EDGES, seed=seed)

    kept = thinned.keep_mask(Key(7).fold(0), (30,), 0.5)
    assert dropped(3).equal(dropped(4))
    assert dropped(3).equal(EDGES[:, kept])


@in_torch("reproduces")
def test_pyg_1201_torch() -> None:
    """So do the nodes; and those that stay are scaled."""
    assert not seeded(drop_nodes, X, seed=3).equal(seeded(drop_nodes, X, seed=4))
    kept = seeded(drop_nodes, X)
    assert kept[kept != 0].equal(2 * X[kept != 0])


def test_pyg_1201_thinned() -> None:
    """The same program drops the nodes of a key; a mask alone does not scale."""
    keep = thinned.keep_mask(Key(7).fold(0), (12, 1), 0.5)
    with intercept(key=Key(7)):
        assert drop_nodes(X).equal(X * keep * 2)
    assert 0 < keep.sum() < 12


LOGITS = torch.randn(2, 8, 8)


@in_torch("reproduces")
def test_transformers_31468_torch() -> None:
    """Rows of attention weights sum to 1, and no longer do so after a dropout."""
    rows = seeded(lambda logits: F.dropout(logits.softmax(-1), 0.1), LOGITS).sum(-1)
    assert not torch.allclose(rows, torch.ones_like(rows), atol=0.05)


def test_transformers_31468_thinned() -> None:
    """DropKey drops keys before the softmax, whose rows then sum to 1."""
    logits = thinned.functional.drop_key(LOGITS, 0.1, key=Key(7))
    assert not logits.equal(LOGITS)
    rows = logits.softmax(-1).sum(-1)
    torch.testing.assert_close(rows, torch.ones_like(rows))
