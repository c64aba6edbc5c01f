"""Dropout of edges and nodes: which are removed, and that they are what PyG's functions would return."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import chance
import thinned
from backend_under_test import BackendUnderTest
from thinned import Key, keep_mask, spec
from thinned.functional import dropout_edge, dropout_node

KEY = Key(7)
# Both directions, an edge twice, self-loops, one direction only, and a node without edges, 5.
ROWS = [0, 1, 1, 2, 2, 3, 1, 2, 3, 4, 4, 0, 6, 0]
COLS = [1, 0, 2, 1, 3, 2, 2, 1, 3, 4, 4, 6, 0, 4]
EDGES = torch.tensor([ROWS, COLS])
MANY = torch.randint(3000, (2, 200_000), generator=torch.Generator().manual_seed(0))
FUNCTIONS: list[Callable[..., Any]] = [dropout_edge, partial(dropout_edge, per="pair"), dropout_node]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=["edge", "pair", "node"])


def pair_mask(key: int, edges: Tensor, p: float) -> Tensor:
    """The decisions of pairs of nodes, edge by edge, from the specification."""
    kept = []
    for row, col in edges.T.tolist():
        pair = spec.fold(spec.fold(key, min(row, col)), max(row, col))
        kept.append(spec.uniform(pair, np.zeros(1, np.uint64))[0] < spec.threshold(p))
    return torch.tensor(kept, dtype=torch.bool)


def undirected(edges: Tensor, mask: Tensor) -> tuple[list[list[int]], list[int]]:
    """The loop that ``force_undirected`` stands for."""
    kept = [(i, *edges[:, i].tolist()) for i in mask.nonzero().flatten().tolist()]
    upper = [each for each in kept if each[1] <= each[2]]
    both = upper + [(i, col, row) for i, row, col in upper if row != col]
    return [[row for _, row, _ in both], [col for _, _, col in both]], [i for i, _, _ in both]


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("p", [1e-9, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("per", ["edge", "pair"])
def test_every_backend_removes_the_edges_of_the_specification(
    backend: BackendUnderTest, per: Any, p: float, dtype: torch.dtype
) -> None:
    edges = EDGES.to(backend.device, dtype)
    mask = keep_mask(KEY, (edges.shape[1],), p) if per == "edge" else pair_mask(7, EDGES, p)
    kept, found = dropout_edge(edges, p, per=per, key=KEY)
    assert found.cpu().equal(mask)
    assert kept.cpu().equal(EDGES[:, mask].to(dtype))
    kept, columns = dropout_edge(edges, p, True, per=per, key=KEY)
    assert kept.dtype == dtype
    assert (kept.tolist(), columns.tolist()) == undirected(EDGES, mask)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("p", [1e-9, 0.3, 0.5, 1.0])
def test_every_backend_removes_the_nodes_of_the_specification(
    backend: BackendUnderTest, p: float, dtype: torch.dtype
) -> None:
    edges = EDGES.to(backend.device, dtype)
    nodes = keep_mask(KEY, (9,), p)
    mask = nodes[EDGES[0]] & nodes[EDGES[1]]
    kept, edge_mask, node_mask = dropout_node(edges, p, 9, key=KEY)
    assert node_mask.cpu().equal(nodes)
    assert edge_mask.cpu().equal(mask)
    assert kept.cpu().equal(EDGES[:, mask].to(dtype))
    names = {old: new for new, old in enumerate(nodes.nonzero().flatten().tolist())}
    relabelled, *masks = dropout_node(edges, p, 9, True, True, key=KEY)
    assert relabelled.dtype == dtype
    assert relabelled.tolist() == [[names[i] for i in ends] for ends in EDGES[:, mask].tolist()]
    assert masks[0].equal(edge_mask)
    assert masks[1].equal(node_mask)


def test_a_pair_of_nodes_decides_wherever_its_edges_are() -> None:
    """Both directions, parallel edges, other orders, shards, and ids of any size."""
    for edges in (EDGES, MANY, EDGES + 2**32, 2**63 - 1 - EDGES):
        mask = dropout_edge(edges, 0.5, per="pair", key=KEY)[1]
        decisions = {}
        for (row, col), kept in zip(edges.T[:5000].tolist(), mask[:5000].tolist(), strict=True):
            assert decisions.setdefault(frozenset((row, col)), kept) is kept
        order = torch.randperm(edges.shape[1])
        assert dropout_edge(edges[:, order], 0.5, per="pair", key=KEY)[1].equal(mask[order])
        shards = [dropout_edge(shard, 0.5, per="pair", key=KEY)[1] for shard in edges.split(3, dim=1)[:20]]
        assert torch.cat(shards).equal(mask[: sum(map(len, shards))])
    high = pair_mask(7, EDGES + 2**32, 0.5)
    assert dropout_edge(EDGES + 2**32, 0.5, per="pair", key=KEY)[1].equal(high)
    assert not high.equal(pair_mask(7, EDGES, 0.5))


def test_a_node_decides_whatever_the_graph() -> None:
    nodes = dropout_node(MANY, 0.5, 3000, key=KEY)[2]
    assert dropout_node(MANY[:, :5], 0.5, 10_000, key=KEY)[2][:3000].equal(nodes)
    assert len(dropout_node(EDGES, 0.5, key=KEY)[2]) == 7


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("per", ["edge", "pair"])
def test_rate_and_independence_of_edges(per: Any, p: float) -> None:
    """Also of edges that share a node: the pairs of a row, of a column, and neighbours in both."""
    n = 400
    row, col = torch.triu_indices(n, n)
    mask = np.zeros((n, n), bool)
    one, other = (dropout_edge(torch.stack((row, col)), p, per=per, key=KEY.fold(i))[1] for i in range(2))
    mask[row, col] = one.numpy()
    assert chance.rate(one.numpy(), p) > chance.FALSE_ALARM
    assert chance.independence(one.numpy(), other.numpy(), p=p) > chance.FALSE_ALARM
    upper = np.triu(np.ones((n - 1, n - 1), bool), 1)
    for first, second in ((mask[:-1, :-1], mask[:-1, 1:]), (mask[:-1, 1:], mask[1:, 1:])):
        pairs = first[upper], second[upper]
        # Every second pair, so that no decision is in two of them.
        assert chance.independence(*(each[::2] for each in pairs), p=p) > chance.FALSE_ALARM


def test_rate_and_independence_of_nodes() -> None:
    one, other = (dropout_node(EDGES, 0.3, 200_000, key=KEY.fold(i))[2].numpy() for i in range(2))
    assert chance.rate(one, 0.3) > chance.FALSE_ALARM
    assert chance.independence(one, other, p=0.3) > chance.FALSE_ALARM
    assert chance.independence(one[::2], one[1::2], p=0.3) > chance.FALSE_ALARM


@each_function
@pytest.mark.parametrize("arguments", [{"training": False}, {"p": 0}, {"p": 0.0}], ids=str)
def test_the_identity(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    before = torch.get_rng_state()
    for edges in (EDGES, EDGES.float(), torch.empty(2, 0, dtype=torch.int64)):
        same, mask, *nodes = function(edges, **arguments)
        assert same is edges
        assert mask.equal(torch.ones(edges.shape[1], dtype=torch.bool))
        assert not nodes or nodes[0].equal(torch.ones(7 if edges.numel() else 0, dtype=torch.bool))
    assert before.equal(torch.get_rng_state())


@pytest.mark.parametrize(
    "function",
    [*FUNCTIONS, partial(dropout_edge, force_undirected=True), partial(dropout_node, relabel_nodes=True)],
    ids=["edge", "pair", "node", "undirected", "relabelled"],
)
def test_a_graph_without_edges(function: Callable[..., Any]) -> None:
    empty = torch.empty(2, 0, dtype=torch.int64)
    kept, selection, *nodes = function(empty, 0.5, key=KEY)
    assert (kept.shape, selection.shape) == ((2, 0), (0,))
    assert not nodes or nodes[0].shape == (0,)


@each_function
def test_a_call_draws_one_key(function: Callable[..., Any]) -> None:
    torch.manual_seed(1)
    drawn = function(MANY, 0.5)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    key = Key.from_bits(torch.empty((), dtype=torch.int64).random_())
    assert after.equal(torch.get_rng_state())
    assert all(x.equal(y) for x, y in zip(drawn, function(MANY, 0.5, key=key), strict=True))


class Network(nn.Module):
    """A dropout of edges as a GNN calls it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        row, col = self.function(edges, 0.5, training=self.training)[0]
        return torch.zeros_like(x).index_add(0, col, x[row])


@each_function
def test_an_address_gives_the_key(function: Callable[..., Any]) -> None:
    """One key for the graph: samples are rows of features, not of edges."""
    model, x = nn.Sequential(), torch.randn(7, 3)
    model.net = Network(function)
    address = partial(thinned.address, model, seed=7, step=3)
    with address(samples=torch.arange(7)):
        y = model.net(x, EDGES)
    row, col = function(EDGES, 0.5, key=address().key_of("net"))[0]
    assert y.equal(torch.zeros_like(x).index_add(0, col, x[row]))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "function",
    [*FUNCTIONS, partial(dropout_edge, force_undirected=True), partial(dropout_node, relabel_nodes=True)],
    ids=["edge", "pair", "node", "undirected", "relabelled"],
)
def test_compiled_without_a_break(function: Callable[..., Any]) -> None:
    """Dynamo captures shapes that depend on data, such as a mask's number of True."""
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        for edges in (EDGES, EDGES[:, 3:]):
            results = []
            for call in (function, compiled):
                torch.manual_seed(3)
                results.append(call(edges, 0.5))
            assert all(x.equal(y) for x, y in zip(*results, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
def test_another_number_of_nodes_takes_no_other_graph() -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(dropout_node, fullgraph=True, backend="aot_eager", dynamic=True)
        for stance, n in (("default", 7), ("fail_on_recompile", 9)):
            expected = dropout_node(EDGES, 0.5, n, key=KEY)
            with torch.compiler.set_stance(stance):
                found = compiled(EDGES, 0.5, n, key=KEY)
            assert all(x.equal(y) for x, y in zip(found, expected, strict=True))


@each_function
def test_exported_for_any_graph(function: Callable[..., Any]) -> None:
    def forward(x: Tensor, edges: Tensor) -> Any:
        return function(edges, 0.5, x.shape[0]) if function is dropout_node else function(edges, 0.5)

    model, dynamic = nn.Module(), torch.export.Dim.DYNAMIC
    model.forward = forward
    shapes = ({0: dynamic} if function is dropout_node else {}, {1: dynamic})
    program = torch.export.export(model, (torch.ones(9, 2), EDGES), dynamic_shapes=shapes, strict=False)
    x = torch.ones(11 if function is dropout_node else 9, 2)
    results = []
    for call in (program.module(), forward):
        torch.manual_seed(3)
        results.append(call(x, EDGES[:, 3:]))
    assert all(x.equal(y) for x, y in zip(*results, strict=True))


@each_function
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"p": 1.5}, ValueError, "probability has to be between 0 and 1, but got 1.5"),
        ({"p": float("nan")}, ValueError, "probability has to be between 0 and 1, but got nan"),
        ({"edge_index": [[0], [1]]}, TypeError, "argument 'edge_index' must be Tensor, not list"),
        ({"edge_index": EDGES.T}, RuntimeError, "got torch.int64 of shape (14, 2)"),
        ({"edge_index": EDGES[0]}, RuntimeError, "got torch.int64 of shape (14,)"),
        ({"edge_index": EDGES.float()}, RuntimeError, "got torch.float32 of shape (2, 14)"),
        ({"edge_index": EDGES.bool()}, RuntimeError, "got torch.bool of shape (2, 14)"),
        ({"key": 7}, TypeError, "key must be a thinned.Key, got 7"),
        ({"key": KEY.fold(torch.arange(2))}, RuntimeError, "one key of shape (), got keys of shape (2,)"),
    ],
)
def test_wrong_arguments(
    function: Callable[..., Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        function(**{"edge_index": EDGES, **arguments})


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (partial(dropout_edge, per="node"), ValueError, "per has to be 'edge' or 'pair', but got 'node'"),
        (partial(dropout_node, num_nodes=(3, 4)), TypeError, "must be an integer, got (3, 4) of type tuple"),
        (partial(dropout_node, num_nodes=-1), ValueError, "at least 0, but got -1"),
        (partial(dropout_node, num_nodes=3), IndexError, "out of bounds"),
    ],
)
def test_wrong_arguments_of_one(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call(EDGES)
