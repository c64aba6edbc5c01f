"""Field issues about where the randomness comes from: generators, devices, batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import oracle
import thinned
from backend_under_test import BackendUnderTest
from benchmarks.case import Bound
from benchmarks.cases import cases
from models.field.halves import Operations, in_torch, seeded
from thinned import Key

X = torch.ones(2, 10, 12)
LAYERS = {
    "Dropout": (60,),
    "Dropout1d": (2, 30, 3),
    "Dropout2d": (2, 30, 3, 3),
    "Dropout3d": (2, 30, 2, 2, 2),
    "AlphaDropout": (60,),
    "FeatureAlphaDropout": (2, 30, 3),
}


@pytest.mark.parametrize("layer", LAYERS)
@in_torch("reproduces")
def test_pytorch_25104_torch(layer: str) -> None:
    """A dropout takes no generator, neither when it is made nor when it is called."""
    generator = torch.Generator()
    with pytest.raises(TypeError, match="unexpected keyword argument 'generator'"):
        getattr(nn, layer)(0.5, generator=generator)
    with pytest.raises(TypeError, match="unexpected keyword argument 'generator'"):
        getattr(nn, layer)(0.5)(X, generator=generator)


@pytest.mark.parametrize("layer", LAYERS)
def test_pytorch_25104_thinned(layer: str) -> None:
    """Each takes a key, for which a generator is good too, and then leaves the default generator alone."""
    dropout = getattr(thinned, layer)(0.5)
    x = torch.ones(LAYERS[layer])
    draw = torch.Generator().manual_seed(5)
    keys = [Key.from_bits(torch.randint(2**63 - 1, (), generator=draw)) for _ in range(2)]
    state = torch.get_rng_state()
    first, again, other = dropout(x, key=keys[0]), dropout(x, key=keys[0]), dropout(x, key=keys[1])
    assert first.equal(again)
    assert not first.equal(other)
    assert torch.get_rng_state().equal(state)


def between(dropout: Callable[[Tensor], Tensor], draws: int) -> tuple[Tensor, Tensor]:
    """A mask and a number drawn after it, with other draws before."""
    torch.manual_seed(3)
    torch.rand(draws)
    return dropout(X), torch.rand(())


@in_torch("reproduces")
def test_pytorch_76580_torch() -> None:
    """A number drawn elsewhere is another mask, and a mask is other numbers elsewhere."""
    assert not between(F.dropout, 1)[0].equal(between(F.dropout, 0)[0])
    assert not between(F.dropout, 0)[1].equal(between(lambda x: x, 0)[1])


def test_pytorch_76580_thinned() -> None:
    def dropout(x: Tensor) -> Tensor:
        return thinned.functional.dropout(x, key=Key(7))

    assert between(dropout, 1)[0].equal(between(dropout, 0)[0])
    assert between(dropout, 0)[1].equal(between(lambda x: x, 0)[1])


@in_torch("needs a GPU")
def test_pytorch_2976_torch() -> None:
    """The same seed is one mask on a CPU and another on a GPU."""
    assert not seeded(F.dropout, X).equal(seeded(F.dropout, X.cuda()).cpu())


def test_pytorch_2976_thinned(backend: BackendUnderTest) -> None:
    """Every backend, on every device there is, has the mask of the specification."""
    x = oracle.specials((40, 60), torch.float32)
    y = thinned.functional.dropout(x.to(backend.device), 0.3, key=Key(7))
    oracle.assert_same(y.cpu(), oracle.dropout(x, Key(7).bits, 0.3))


@in_torch("needs two GPUs")
def test_pytorch_25690_torch() -> None:
    """The issue's program: the sum of 10**6 ones under one seed differs from one model of GPU to another."""
    sums = {
        float(seeded(F.dropout, torch.ones(1000, 1000, device=f"cuda:{index}")).sum()) for index in (0, 1)
    }
    assert len(sums) == 2


def test_pytorch_25690_thinned(backend: BackendUnderTest) -> None:
    """The issue's program has one answer, whatever it runs on."""
    y = thinned.functional.dropout(torch.ones(1000, 1000, device=backend.device), 0.5, key=Key(0))
    assert float(y.double().sum()) == 1000612


class SeededDropout(nn.Module):
    """The layer of the pull request to baal: each call draws its mask from the same seed."""

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.empty_like(x).bernoulli_(0.5, generator=torch.Generator().manual_seed(7))
        return x * kept * 2


IDS = torch.tensor([3, 8, 1, 4])
SAMPLES = torch.ones(9, 50)


@in_torch("reproduces")
def test_baal_15_torch() -> None:
    """One seed for the batch makes a sample's mask depend on its place in the batch."""
    dropout = SeededDropout()
    alone = [dropout(SAMPLES[i : i + 1])[0] for i in IDS.tolist()]
    together = dropout(SAMPLES[IDS])
    assert alone[0].equal(alone[1])  # all samples share a mask where each comes alone
    assert not torch.stack(alone).equal(together)


def test_baal_15_thinned() -> None:
    """A key for each sample gives it one mask in any batch and at any place."""
    keys = Key(7).fold(torch.arange(9))
    everything = thinned.functional.dropout(SAMPLES, 0.5, key=keys)
    assert len({tuple(row) for row in everything.tolist()}) == 9
    some = thinned.functional.dropout(SAMPLES[IDS], 0.5, key=Key(7).fold(IDS))
    assert some.equal(everything[IDS])
    for i in range(9):
        alone = thinned.functional.dropout(SAMPLES[i : i + 1], 0.5, key=Key(7).fold(torch.tensor([i])))
        assert alone.equal(everything[i : i + 1])


def test_baal_15_thinned_cost() -> None:
    """The review's other concern, what it costs: a key for each sample is no call for each sample.

    `make bench` holds it to the time of a plain dropout. (It takes about a tenth.)
    """
    layer = thinned.Dropout(0.5)

    def operations(key: Key) -> list[str]:
        with Operations() as seen:
            layer(torch.ones(200, 50), key=key)
        return [operation.name() for operation, _ in seen.calls]

    assert operations(Key(7).fold(torch.arange(200))) == operations(Key(7))
    benchmarks = [case for case in cases() if case.setting.endswith("a key for each row")]
    assert benchmarks
    assert all(case.bounds == (Bound("nn.Dropout", 1),) for case in benchmarks)


def draws_at_zero(dropout: Callable[..., Tensor]) -> bool:
    """Whether a nested tensor's dropout with p = 0 moves the generator."""
    x = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)], layout=torch.jagged)
    before = torch.get_rng_state()
    dropout(x, 0.0)
    return not torch.get_rng_state().equal(before)


@in_torch("reproduces")
def test_pytorch_136656_torch() -> None:
    assert draws_at_zero(F.dropout)


def test_pytorch_136656_thinned() -> None:
    assert not draws_at_zero(thinned.functional.dropout)
