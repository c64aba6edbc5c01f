"""Calls with parts of a batch have the masks of one call with all of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils.checkpoint import checkpoint

import thinned
from thinned.key_source import active

IDS = torch.tensor([40, 7, 2**62, -1, 12, 13, 14])
Gradients = list[Tensor]


@pytest.fixture
def model() -> nn.Sequential:
    dropout = thinned.Dropout(0.3)
    layers = nn.Linear(6, 6), dropout, nn.Sequential(nn.Linear(6, 6), thinned.DropPath(0.5)), dropout
    return nn.Sequential(*layers).double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(len(IDS), 6, dtype=torch.float64)


def at(model: nn.Module, microbatches: Any = None, samples: Any = IDS) -> thinned.models.address.Address:
    return thinned.address(model, seed=7, step=3, samples=samples, microbatches=microbatches)


def run(model: nn.Module, parts: Sequence[Tensor], microbatches: int | None = None) -> Tensor:
    with at(model, microbatches):
        return torch.cat([*(model(part) for part in parts), torch.empty(0, 6)])


def gradients(model: nn.Module, x: Tensor, parts: int, call: Callable[..., Tensor], late: bool) -> Gradients:
    """Of a loop that runs each backward pass at once, or all of them late and in reverse."""
    x = x.detach().requires_grad_()
    pending = []
    with at(model, parts if parts > 1 else None):
        for part in x.tensor_split(parts):
            pending.append(call(part).square().sum())
            if not late:
                pending.pop().backward()
        for loss in reversed(pending):
            loss.backward()
    found = [each.grad for each in (x, *model.parameters()) if each.grad is not None]
    model.zero_grad()
    return found


@pytest.mark.parametrize("late", [False, True], ids=["at once", "late"])
@pytest.mark.parametrize("how", ["plain", "reentrant", "not reentrant"])
def test_uneven_parts(model: nn.Sequential, x: Tensor, how: str, late: bool) -> None:
    """Recomputed after other microbatches ran, each has its own ids, and its sites count from 0."""
    call: Any = model
    if how != "plain":
        options: Any = {"use_reentrant": how == "reentrant", "preserve_rng_state": False}
        call = partial(checkpoint, model, **options)
    expected = gradients(model, x, 1, model, late)
    for a, b in zip(gradients(model, x, 3, call, late), expected, strict=True):
        assert a.allclose(b, atol=1e-12)


def test_a_recomputation_without_masks_is_no_call(x: Tensor) -> None:
    model = nn.Linear(6, 6).double()
    call = partial(checkpoint, model, use_reentrant=True, preserve_rng_state=False)
    assert len(gradients(model, x, 3, call, late=True)) == 3


def test_a_wrapper_is_called_with_its_model(x: Tensor) -> None:
    """Both have the path of the model, and are one call of it."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._checkpoint_wrapped_module = thinned.Dropout(0.3)

        def forward(self, x: Tensor) -> Tensor:
            return thinned.functional.dropout(self._checkpoint_wrapped_module(x), 0.3)

    model = Wrapper()
    assert run(model, x.split(1), 7).equal(run(model, [x]))


def test_keys_and_masks_are_those_of_the_batch(model: nn.Sequential) -> None:
    whole, parts = at(model), at(model, 3)
    for call in (0, 1):
        assert parts.key_of("1", call) == whole.key_of("1", call)
        assert parts.mask_of("1", (7, 6), call=call).equal(whole.mask_of("1", (7, 6), call=call))


def test_models_by_turns(x: Tensor) -> None:
    """Each has its own microbatches, in the context that both share."""
    first, second = (nn.Sequential(thinned.Dropout(0.3)) for _ in range(2))
    with at(first):
        expected = first(x)
    with at(first, 7), at(second, 3):
        halves = [first(part) for part in x.tensor_split(7)[:4]]
        thirds = [second(part) for part in x.tensor_split(3)]
        halves += [first(part) for part in x.tensor_split(7)[4:]]
    assert torch.cat(halves).equal(expected)
    assert torch.cat(thirds).equal(expected)


def test_a_part_that_raises_leaves_no_trace(model: nn.Sequential, x: Tensor) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        run(model, [x[:1], x[:1, 1:]], 7)
    assert active.key_source is None
    assert run(model, x.split(1), 7).allclose(run(model, [x]), atol=1e-12)


@pytest.mark.parametrize(
    ("calls", "words"),
    [(0, "was called 0 times .* microbatches=2"), (1, "was called 1 times"), (3, "is called 3 times .*=2")],
)
def test_another_number_of_calls(model: nn.Sequential, x: Tensor, calls: int, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        run(model, [x[:4], x[4:], x][:calls], 2)
    assert active.key_source is None


@pytest.mark.parametrize(
    ("samples", "microbatches", "error", "words"),
    [
        (None, 2, ValueError, "microbatches=2 needs samples: without ids"),
        (IDS, 8, ValueError, "microbatches=8 is more than the 7 samples"),
        (IDS, 0, ValueError, "microbatches has to be at least 1"),
        (IDS, 2.0, TypeError, "microbatches must be an integer"),
    ],
)
def test_errors(model: nn.Module, samples: Any, microbatches: Any, error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        at(model, microbatches, samples)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["given", "not given", "in place"])
def test_compiled_once_for_all_microbatches(model: nn.Sequential, x: Tensor, how: str) -> None:
    """Only a compiled model that the address is given is one graph."""
    compiles = CompileCounter()
    with torch.no_grad():
        expected = run(model, [x])
        compiled: Any = torch.compile(model, backend=compiles, fullgraph=how == "given")
        if how == "in place":
            model.compile(backend=compiles)
        for _ in range(2):
            with at(compiled if how == "given" else model, 7):
                ys = [(model if how == "in place" else compiled)(part) for part in x.split(1)]
            assert torch.cat(ys).allclose(expected, atol=1e-12)
    assert compiles.frame_count == 1
