"""Field issues about backward passes: recomputed with another random state, and of nested tensors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import thinned
from models.field.halves import in_torch
from thinned import Key


class Offloaded(torch.autograd.Function):
    """A checkpoint that does not restore the random state, with the code that a fast default makes of it."""

    @staticmethod
    def forward(ctx: Any, block: nn.Module, x: Tensor) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        with torch.no_grad():
            y: Tensor = block(x)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None]:
        leaf = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.block(leaf)
        torch.autograd.backward(y, grad)
        return None, leaf.grad


def gradients(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Gradients of a model with the same masks in every call, except where it recomputes others."""
    x = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(4, 16).requires_grad_()
    model.zero_grad()
    torch.manual_seed(3)
    with thinned.address(model, seed=7, step=1):
        loss = run(model, x).square().sum()
    loss.backward()
    grads = [each.grad for each in (x, *model.parameters()) if each.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


def residual(dropout: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), dropout(0.1), nn.Linear(16, 16), dropout(0.5)).double()


def recomputes_other_masks(model: nn.Module, run: Callable[[nn.Module, Tensor], Tensor]) -> bool:
    """Whether checkpointing, which is to change nothing, changes the gradients."""
    once, again = gradients(model, lambda model, x: model(x)), gradients(model, run)
    return any(not a.allclose(b) for a, b in zip(once, again, strict=True))


WITHOUT_STATE = {
    reentrant: partial(checkpoint, use_reentrant=reentrant, preserve_rng_state=False)
    for reentrant in (False, True)
}


@pytest.mark.parametrize("reentrant", WITHOUT_STATE)
@in_torch("reproduces")
def test_olmo_core_828_torch(reentrant: bool) -> None:
    assert recomputes_other_masks(residual(nn.Dropout), WITHOUT_STATE[reentrant])


@pytest.mark.parametrize("reentrant", WITHOUT_STATE)
def test_olmo_core_828_thinned(reentrant: bool) -> None:
    """A mask by address needs no random state."""
    assert not recomputes_other_masks(residual(thinned.Dropout), WITHOUT_STATE[reentrant])


@in_torch("reproduces")
def test_unsloth_10744_torch() -> None:
    assert recomputes_other_masks(residual(nn.Dropout), Offloaded.apply)


def test_unsloth_10744_thinned() -> None:
    assert not recomputes_other_masks(residual(thinned.Dropout), Offloaded.apply)


def components() -> list[Tensor]:
    return [torch.ones(2, 8, requires_grad=True), torch.ones(5, 8, requires_grad=True)]


def gradient_is_the_mask(dropout: Callable[[Tensor], Tensor]) -> bool:
    """Whether a strided nested tensor's gradient is 2 where elements are kept, and 0 elsewhere."""
    parts = components()
    y = dropout(torch.nested.as_nested_tensor(parts)).unbind()
    grads = torch.autograd.grad([each.sum() for each in y], parts)
    return all(grad.equal(each) for grad, each in zip(grads, y, strict=True))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@in_torch("no longer reproduces")
def test_pytorch_83338_torch() -> None:
    """A nested tensor's dropout once had no derivative."""
    assert gradient_is_the_mask(lambda x: F.dropout(x, 0.5))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_pytorch_83338_thinned() -> None:
    keys = Key(7).fold(torch.arange(2))
    for key in (Key(7), keys, None):
        assert gradient_is_the_mask(lambda x, key=key: thinned.functional.dropout(x, 0.5, key=key))  # type: ignore[misc]
    y = thinned.functional.dropout(torch.nested.as_nested_tensor(components()), 0.5, key=keys)
    for i, (part, row) in enumerate(zip(components(), y.unbind(), strict=True)):
        assert row.equal(thinned.functional.dropout(part, 0.5, key=Key(7).fold(i)))
