"""The two halves of each field issue: what torch does, as recorded, and what thinned has to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

Outcome = Literal["reproduces", "no longer reproduces", "needs a GPU", "needs two GPUs"]
Test = Callable[..., None]

OLDEST = (2, 11)
VERSION = tuple(int(number) for number in torch.__version__.split(".")[:2])


def in_torch(outcome: Outcome, since: tuple[int, int] = OLDEST) -> Callable[[Test], Test]:
    """The half about torch itself, with what was seen of it from version ``since`` on, on a CPU.

    If it reproduces, the test asserts the wrong behaviour, so that it fails on the day on which torch mends
    it; if not, the right one. Before ``since`` it has to fail. What needs more than a CPU asserts what the
    issue reports.
    """
    gpus = torch.cuda.device_count()
    models = {torch.cuda.get_device_name(index) for index in range(gpus)}

    def mark(test: Test) -> Test:
        test.outcome, test.since = outcome, since  # type: ignore[attr-defined]
        before = f"the other way before torch {since[0]}.{since[1]}"
        test = pytest.mark.xfail(since > VERSION, reason=before, raises=AssertionError)(test)
        if outcome == "needs a GPU":
            return pytest.mark.skipif(not gpus, reason="torch finds no GPU")(test)
        if outcome == "needs two GPUs":
            return pytest.mark.skipif(len(models) < 2, reason="needs GPUs of two models")(test)
        return test

    return mark


def seeded(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 3) -> Tensor:
    """The function's value after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    return function(*inputs)


class Operations(TorchDispatchMode):
    """Records what comes to ATen: the operations and their results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls.append((function, result))
        return result


def wrong_gradients(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """The number of elements at which the backward pass has another mask than the forward pass.

    For functions that leave each element at its place and are zero only where they drop.
    """
    leaf = x.detach().clone().requires_grad_()
    y = function(leaf)
    y.sum().backward()
    assert leaf.grad is not None
    assert 0 < int((y == 0).sum()) < y.numel()
    return int(((y != 0) != (leaf.grad != 0)).sum())
