"""A residual branch that is computed for a whole batch, or not at all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import thinned

computed: list[int] = []


@torch.library.custom_op("thinned_tests::count_rows", mutates_args=())
def count_rows(x: Tensor) -> Tensor:
    """A copy of ``x``; Python sees each execution, in compiled code too."""
    computed.append(len(x))
    return x.clone()


count_rows.register_fake(lambda x: torch.empty_like(x))
count_rows.register_autograd(lambda ctx, grad: grad)  # noqa: ARG005


class Counted(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(count_rows(x)).tanh()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_computes_the_batch_or_nothing() -> None:
    x = torch.randn(5, 4)
    layer, masked = thinned.Residual(Counted(4, 4), 0.5, mode="batch"), thinned.StochasticDepth(0.5, "batch")
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=graphs, fullgraph=True)
    kept = set()
    for seed in range(6):
        key = thinned.Key(seed)
        keep = bool(thinned.keep_mask(key, (1,), 0.5))
        kept.add(keep)
        expected = x + masked(layer.branch(x), key=key)
        of_masked = torch.autograd.grad(expected.sum(), layer.branch.weight)
        for call in (layer, compiled):
            computed.clear()
            y = call(x, key=key)
            # Compiled code computes two rows of a dropped branch, so that it has one graph.
            assert sum(computed) == (5 if keep else 2 * (call is compiled))
            torch.testing.assert_close(y, expected)
            if keep:
                torch.testing.assert_close(torch.autograd.grad(y.sum(), layer.branch.weight), of_masked)
    assert kept == {False, True}
    assert graphs.frame_count == 1
