"""Field issues about torch.compile: compiled masks are the eager ones, backward masks the forward ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor, nn
from torch._functorch import config as partitioner
from torch._inductor import config as inductor
from torch.utils.checkpoint import checkpoint

import oracle
import thinned
from models.field.halves import in_torch, seeded, wrong_gradients
from thinned import Key

pytestmark = pytest.mark.usefixtures("fresh_compiler")

Dropout = Callable[[Tensor], Tensor]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def plain(x: Tensor) -> Tensor:
    return F.dropout(x, 0.5)


def drawn(x: Tensor) -> Tensor:
    return thinned.functional.dropout(x, 0.5)


def keyed(x: Tensor) -> Tensor:
    return thinned.functional.dropout(x, 0.5, key=Key(7))


def compiled(function: Callable[..., Tensor], backend: str = "inductor") -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, backend=backend)  # type: ignore[no-any-return]


@in_torch("reproduces")
def test_pytorch_113169_torch() -> None:
    """Compiled code has another mask than eager code under the same seed."""
    x = torch.ones(10, 9, 8, 6)
    assert not seeded(compiled(plain), x).equal(seeded(plain, x))


@pytest.mark.parametrize("dropout", [drawn, keyed])
def test_pytorch_113169_thinned(dropout: Dropout) -> None:
    x = torch.randn(10, 9, 8, 6)
    oracle.assert_same(seeded(compiled(dropout), x), seeded(dropout, x))


def branches(dropout: Dropout) -> Callable[[Tensor, Tensor], Tensor]:
    """Two branches that are independent until the end; the second one needs less memory."""

    def function(encoder: Tensor, decoder: Tensor) -> Tensor:
        first = dropout(encoder) @ torch.ones(64, 512)
        second = dropout(decoder) @ torch.ones(64, 1)
        return torch.stack([first.sum(), second.sum()])

    return function


def check_192635(dropout: Dropout) -> None:
    function = branches(dropout)
    inputs = torch.ones(64, 64), torch.ones(16, 64)
    assert seeded(compiled(function), *inputs).equal(seeded(function, *inputs))


@in_torch("no longer reproduces", since=(2, 13))
def test_pytorch_192635_torch() -> None:
    """Reordering for less memory once changed which dropout has which mask, in 2.12."""
    with inductor.patch(fallback_random=True, reorder_for_peak_memory=True):
        check_192635(plain)


@pytest.mark.parametrize("dropout", [drawn, keyed])
def test_pytorch_192635_thinned(dropout: Dropout) -> None:
    with inductor.patch(reorder_for_peak_memory=True):
        check_192635(dropout)


def check_174078(dropout: Dropout) -> None:
    """The issue's program: the layout changes inside of what is compiled."""
    x = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(3, 3)

    def function(x: Tensor) -> Tensor:
        return dropout(x.t().contiguous())

    assert seeded(compiled(function), x).equal(seeded(function, x))


@in_torch("no longer reproduces", since=(2, 13))
def test_pytorch_174078_torch() -> None:
    with inductor.patch(fallback_random=True):
        check_174078(plain)


@pytest.mark.parametrize("dropout", [drawn, keyed])
def test_pytorch_174078_thinned(dropout: Dropout) -> None:
    """Compiled or not, and in whatever layout the numbers lie."""
    check_174078(dropout)
    x = torch.randn(30, 40)
    assert seeded(dropout, x.t()).equal(seeded(dropout, x.t().contiguous()))


def transposed(dropout: Dropout) -> Dropout:
    return lambda x: dropout(x.transpose(1, 2).contiguous())


def agreement(mask: Tensor) -> float:
    """How probable it is that so many neighbouring channels agree if each decides by itself at p = 0.5."""
    same = mask[..., :-1] == mask[..., 1:]
    return float(stats.binomtest(int(same.sum()), same.numel(), 0.5).pvalue)


def in_checkpoint(dropout: Dropout) -> Dropout:
    """Each element at its place, and a dropout of a transposed copy between."""
    block = transposed(dropout)
    return lambda x: checkpoint(block, x, use_reentrant=False).transpose(1, 2)


@in_torch("needs a GPU")
def test_pytorch_198333_torch() -> None:
    """Four neighbouring channels share their masks, and a checkpointed backward pass has other masks."""
    x = torch.ones(8, 64, 4096, device="cuda")
    y = seeded(compiled(transposed(plain)), x)
    assert agreement((y != 0).cpu()) < 1e-6
    assert wrong_gradients(compiled(in_checkpoint(plain)), x) > 0


@pytest.mark.parametrize("device", DEVICES)
def test_pytorch_198333_thinned(device: str) -> None:
    x = torch.ones(2, 64, 512, device=device)
    y = seeded(compiled(transposed(drawn)), x)
    oracle.assert_same(y.cpu(), seeded(transposed(drawn), x).cpu())
    assert agreement((y != 0).cpu()) > 1e-6
    torch.compiler.reset()
    torch.manual_seed(3)
    assert wrong_gradients(compiled(in_checkpoint(drawn)), x) == 0


def chain(*dropouts: Dropout) -> Dropout:
    """Dropouts with work between that is worth recomputing; the gradient is 0 where the value is 0."""

    def function(x: Tensor) -> Tensor:
        for dropout in dropouts:
            x = dropout(x * x.detach().sin().cos())
        return x

    return function


def wrong_under_budget(budget: float, function: Dropout) -> int:
    torch.manual_seed(3)
    with partitioner.patch(activation_memory_budget=budget):
        return wrong_gradients(compiled(function, "aot_eager"), torch.ones(64, 64))


def with_key(number: int) -> Dropout:
    key = Key(7).fold(number)
    return lambda x: thinned.functional.dropout(x, 0.2, key=key)


KEYED = chain(*(with_key(number) for number in range(2)))
DRAWN = chain(*(lambda x: thinned.functional.dropout(x, 0.2),) * 2)


class Addressed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([thinned.Dropout(0.2) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        return chain(*self.layers)(x)


def wrong_in_thinned(keys: str, budget: float) -> int:
    model = Addressed()
    function = {"keyed": KEYED, "drawn": DRAWN, "addressed": model}[keys]
    with thinned.models.address(model, seed=7, step=1) if keys == "addressed" else nullcontext():
        return wrong_under_budget(budget, function)


every_kind_of_key = pytest.mark.parametrize("keys", ["keyed", "drawn", "addressed"])


@in_torch("reproduces")
def test_pytorch_190717_torch() -> None:
    """The backward pass draws another mask if the memory budget is 0."""
    assert wrong_under_budget(0.0, chain(plain)) > 1000


@every_kind_of_key
def test_pytorch_190717_thinned(keys: str) -> None:
    assert wrong_in_thinned(keys, 0.0) == 0


@pytest.mark.parametrize("budget", [0.005, 0.5])
@in_torch("reproduces")
def test_pytorch_190758_torch(budget: float) -> None:
    """The backward pass draws other masks at any memory budget below 1."""
    assert wrong_under_budget(budget, chain(*(lambda x: F.dropout(x, 0.2),) * 2)) > 100


@pytest.mark.parametrize("budget", [0.005, 0.5])
@every_kind_of_key
def test_pytorch_190758_thinned(keys: str, budget: float) -> None:
    assert wrong_in_thinned(keys, budget) == 0


@pytest.mark.skipif(
    not hasattr(torch.autograd.graph, "region_activation_memory_budget"),
    reason="this torch has no such context",
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_pytorch_190758_thinned_by_region(backend: str) -> None:
    """The budget as a context around a part of the program, and one pass alone under a budget."""

    def function(x: Tensor) -> Tensor:
        with torch.autograd.graph.region_activation_memory_budget(0.5):
            return DRAWN(x)

    torch.manual_seed(3)
    assert wrong_gradients(compiled(function, backend), torch.ones(64, 64)) == 0
    x = torch.ones(64, 64)
    with partitioner.patch(activation_memory_budget=0.0):
        alone = seeded(compiled(DRAWN, backend), x)
    oracle.assert_same(alone, seeded(DRAWN, x))


def test_pytorch_190758_thinned_in_checkpoint() -> None:
    """A checkpointed region, which has such marks of its own, within a memory budget."""

    def function(x: Tensor) -> Tensor:
        return checkpoint(DRAWN, DRAWN(x), use_reentrant=False)  # type: ignore[no-any-return]

    assert wrong_under_budget(0.5, chain(function, drawn)) == 0


def check_107942(layer: nn.Module, backend: str) -> None:
    x = torch.randn(50, requires_grad=True)
    y = compiled(layer, backend)(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert not y.any()
    assert not grad.any()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@in_torch("no longer reproduces")
def test_pytorch_107942_torch(backend: str) -> None:
    """To compile a dropout of everything once was a ZeroDivisionError."""
    check_107942(nn.Dropout(1.0), backend)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_pytorch_107942_thinned(backend: str) -> None:
    check_107942(thinned.Dropout(1.0), backend)


@in_torch("reproduces")
def test_pytorch_107942_torch_sign() -> None:
    """Eager code still has zeros with a sign and NaN for infinity; compiled code has not."""
    x = torch.tensor([-1.0, float("inf")])
    eager, fast = nn.Dropout(1.0)(x), compiled(nn.Dropout(1.0))(x)
    assert eager.signbit()[0]
    assert eager.isnan()[1]
    assert not fast.isnan().any()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_pytorch_107942_thinned_sign(backend: str) -> None:
    x = torch.tensor([-1.0, float("inf"), float("nan")])
    oracle.assert_same(compiled(thinned.Dropout(1.0), backend)(x), torch.zeros(3))
