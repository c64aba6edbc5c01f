"""PyTorch's own samples of dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import settings
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import SampleInput

import oracle
import thinned

settings.load_profile("thinned")  # PyTorch's module of samples has loaded a profile of its own

(DROPOUT,) = [info for info in op_db if info.name == "nn.functional.dropout"]
DTYPES = sorted(DROPOUT.dtypes, key=str)


def samples(dtype: torch.dtype, requires_grad: bool, inplace: bool) -> Iterator[SampleInput]:
    """PyTorch's, and each of them as it lies in memory, transposed and with every other element."""
    for sample in DROPOUT.sample_inputs("cpu", dtype):
        x: Tensor = sample.input
        for view in (x, x.t(), x[..., ::2] if x.dim() else x):
            leaf = view.detach().clone(memory_format=torch.preserve_format) if view is not x else view
            kwargs = {**sample.kwargs, "inplace": inplace}
            yield SampleInput(leaf.requires_grad_(requires_grad), args=sample.args, kwargs=kwargs)


def run(function: Callable[..., Tensor], sample: SampleInput) -> tuple[Tensor, Tensor]:
    """The output and the very tensor that went in, which is no leaf."""
    x = sample.input * 1
    return function(x, *sample.args, **sample.kwargs), x


def test_samples_cover_the_arguments() -> None:
    kwargs = [sample.kwargs for sample in samples(torch.float32, False, False)]
    assert {(each["p"], each["training"]) for each in kwargs if "p" in each} == {
        (p, training) for p in (0.0, 0.5, 1.0) for training in (False, True)
    }
    assert {torch.float16, torch.bfloat16, torch.float32, torch.float64} == set(DTYPES)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_samples(dtype: torch.dtype, requires_grad: bool, inplace: bool) -> None:
    for sample in samples(dtype, requires_grad, inplace):
        (y, x), (torchs, _) = (
            run(function, sample) for function in (thinned.functional.dropout, torch.nn.functional.dropout)
        )
        assert (y.shape, y.dtype, y.stride()) == (torchs.shape, torchs.dtype, torchs.stride())
        assert y.requires_grad == torchs.requires_grad
        p = sample.kwargs.get("p", 0.5) if sample.kwargs.get("training", True) else 0.0
        assert (y is x) == (inplace or p == 0)
        T = thinned.spec.threshold(p)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        mask = torch.full_like(y, T > 0, dtype=torch.bool) if T in (0, 2**32) else y != 0
        scaled = (sample.input.to(wide) * thinned.spec.scale(T)).to(dtype)
        oracle.assert_same(y, torch.where(mask, scaled, 0.0))
        if requires_grad:
            (grad,) = torch.autograd.grad(y, sample.input, torch.ones_like(y))
            oracle.assert_same(grad, (mask.to(wide) * thinned.spec.scale(T)).to(dtype))
