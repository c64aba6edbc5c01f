"""Without a key, torch's default generator decides, once a call; what governs it governs the masks."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import oracle
import thinned
from thinned.functional import dropout

X = torch.ones(1000)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("shape", [(), (5,), (300, 200), (0,)])
def test_one_draw_a_call(shape: tuple[int, ...], p: float, requires_grad: bool, inplace: bool) -> None:
    """The state moves as by one 64-bit number, whatever the size, and the backward pass draws nothing."""
    torch.manual_seed(3)
    torch.empty((), dtype=torch.int64).random_()
    expected = torch.get_rng_state()
    torch.manual_seed(3)
    y = dropout(torch.ones(shape, requires_grad=requires_grad) * 1, p, inplace=inplace)
    assert torch.get_rng_state().equal(expected)
    if requires_grad:
        y.sum().backward()
        assert torch.get_rng_state().equal(expected)


def test_a_key_draws_nothing() -> None:
    state = torch.get_rng_state()
    dropout(X, 0.5, key=thinned.Key(7))
    thinned.keep_mask(thinned.Key(7), (100,), 0.5)
    assert torch.get_rng_state().equal(state)


def test_fork_rng() -> None:
    torch.manual_seed(3)
    expected = dropout(X)
    torch.manual_seed(3)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        inside = dropout(X)
    assert dropout(X).equal(expected)
    torch.manual_seed(99)
    assert dropout(X).equal(inside)


def test_drawn_keys_differ_over_their_whole_range() -> None:
    """64 masks of 1000 elements are all different, and so are those of threads that draw at once."""
    torch.manual_seed(3)
    masks = [dropout(X) for _ in range(64)]

    def draw() -> None:
        masks.append(dropout(X))

    threads = [threading.Thread(target=draw) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({tuple(mask.tolist()) for mask in masks}) == 72


def model(inplace: bool) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(20, 50), thinned.Dropout(0.5, inplace), nn.ReLU(), nn.Linear(50, 5), thinned.Dropout(0.2)
    )


def gradients(run: Callable[[nn.Module, Tensor], Tensor], inplace: bool) -> list[Tensor]:
    layers = model(inplace)
    torch.manual_seed(5)
    run(layers, torch.linspace(-1, 1, 60).reshape(3, 20).requires_grad_()).square().sum().backward()
    return [parameter.grad for parameter in layers.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_recomputes_the_same_mask(reentrant: bool, inplace: bool) -> None:
    plain = gradients(lambda layers, x: layers(x), inplace)
    again = gradients(lambda layers, x: checkpoint(layers, x, use_reentrant=reentrant), inplace)
    assert len(plain) == 4
    for one, other in zip(plain, again, strict=True):
        oracle.assert_same(other, one)


def test_checkpoint_that_restores_no_state_is_another_mask() -> None:
    plain = gradients(lambda layers, x: layers(x), False)
    again = gradients(
        lambda layers, x: checkpoint(layers, x, use_reentrant=False, preserve_rng_state=False), False
    )
    assert any(not one.equal(other) for one, other in zip(plain, again, strict=True))
