"""Field issues about torch.func: vmap's randomness, and pure functions that are called again and again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, jacfwd, jacrev, vmap

import thinned
from models.field.halves import in_torch
from thinned import Key

Dropout = Callable[[Tensor, float], Tensor]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


def map_over_another(dropout: Dropout, randomness: str, device: str) -> Tensor:
    """The issue's program: what is dropped from has no mapped dimension."""
    y = torch.ones(1, 64, device=device)

    def function(x: Tensor) -> Tensor:
        return x + dropout(y, 0.5)

    return vmap(function, randomness=randomness)(torch.zeros(5, 64, device=device))


def check_92283(dropout: Dropout, device: str) -> None:
    for randomness, masks in (("different", 5), ("same", 1)):
        y = map_over_another(dropout, randomness, device)
        assert y.shape == (5, 1, 64)
        assert len({tuple(row) for row in y.flatten(1).tolist()}) == masks
        weight = torch.eye(3, device=device)

        def loss(weight: Tensor) -> Tensor:
            return dropout(weight.new_ones(2, 3) @ weight, 0.5).square().sum()

        assert jacfwd(jacrev(loss), randomness=randomness)(weight).shape == (3, 3, 3, 3)


@pytest.mark.parametrize("device", DEVICES)
@in_torch("no longer reproduces")
def test_pytorch_92283_torch(device: str) -> None:
    """The result once lacked a dimension on GPUs, with randomness "different"."""
    check_92283(F.dropout, device)


@pytest.mark.parametrize("device", DEVICES)
def test_pytorch_92283_thinned(device: str) -> None:
    check_92283(thinned.functional.dropout, device)


def test_pytorch_92283_thinned_error() -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        map_over_another(thinned.functional.dropout, "error", "cpu")


def directional(dropout: Dropout) -> Callable[[Tensor], Tensor]:
    """A loss along a line, as a line search evaluates it."""
    x = torch.linspace(-1, 1, 200, dtype=torch.float64)

    def loss(step: Tensor) -> Tensor:
        return dropout((x + step).square(), 0.5).sum()

    return loss


@in_torch("reproduces")
def test_functorch_408_torch() -> None:
    """Evaluated twice at one point, the loss is two numbers, so a line search cannot end."""
    loss = directional(F.dropout)
    at = torch.tensor(0.1, dtype=torch.float64)
    assert loss(at) != loss(at)
    twice = vmap(loss, randomness="same")
    assert not twice(at.expand(2)).equal(twice(at.expand(2)))  # "same" holds within a call alone


def test_functorch_408_thinned() -> None:
    """A dropout with a key is a pure function: finite differences agree with its gradient."""
    loss = directional(lambda x, p: thinned.functional.dropout(x, p, key=Key(7)))
    at, h = torch.tensor(0.1, dtype=torch.float64), 1e-3
    assert loss(at) == loss(at)
    slope = (loss(at + h) - loss(at - h)) / (2 * h)
    torch.testing.assert_close(grad(loss)(at), slope, rtol=1e-6, atol=0.0)
    steps = torch.linspace(0, 1, 4, dtype=torch.float64)
    torch.testing.assert_close(vmap(loss)(steps), torch.stack([loss(step) for step in steps]))
