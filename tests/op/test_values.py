"""Every backend computes the values of the specification, in every type and memory layout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracle
import strategies
import thinned
from backend_under_test import BackendUnderTest
from thinned import spec
from thinned.functional import dropout
from thinned.geometry import Geometry, shared

PROBABILITIES = (0.001, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0, 1e-12)
each_dtype = pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)


@each_dtype
@pytest.mark.parametrize("p", PROBABILITIES)
def test_special_numbers(backend: BackendUnderTest, dtype: torch.dtype, p: float) -> None:
    x = oracle.specials((3, 333), dtype)
    T, geometry = spec.threshold(p), Geometry((333, 1))
    y = backend.masked_affine(x, torch.tensor(7), geometry, T, spec.scale(T))
    oracle.assert_same(y, oracle.masked_affine(x, torch.tensor(7), geometry, T, spec.scale(T)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [1.0, 1 / 0.9, 0.3, 2.0**-12])
def test_all_half_precision_numbers(backend: BackendUnderTest, dtype: torch.dtype, scale: float) -> None:
    x = torch.arange(2**16).to(torch.int16).view(dtype)
    geometry = Geometry((0,))
    y = backend.masked_affine(x, torch.tensor(7), geometry, 2**32 - 1, scale)
    oracle.assert_same(y, oracle.masked_affine(x, torch.tensor(7), geometry, 2**32 - 1, scale))
    assert y.isnan().equal(x.isnan())


@each_dtype
@pytest.mark.parametrize(("shift", "fill"), [(0.25, 0.0), (0.0, -1.5), (-0.1, 0.7), (0.0, 0.0), (0.0, -0.0)])
def test_shift_and_fill(backend: BackendUnderTest, dtype: torch.dtype, shift: float, fill: float) -> None:
    x = oracle.specials((7, 101), dtype)
    arguments = torch.tensor(7), Geometry((101, 1)), spec.threshold(0.3), 1.1, shift, fill
    oracle.assert_same(backend.masked_affine(x, *arguments), oracle.masked_affine(x, *arguments))


def test_product_and_sum_are_rounded_one_after_the_other(backend: BackendUnderTest) -> None:
    x = torch.linspace(1, 2, 1001)
    fused = (x.double() * 1.1 + 0.1).float()
    y = backend.masked_affine(x, torch.tensor(7), Geometry((1,)), 2**32, 1.1, 0.1)
    assert y.equal(x * 1.1 + 0.1)
    assert not y.equal(fused)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128"])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_public_function_is_the_specification(dtype: str, p: float) -> None:
    x = oracle.specials((11, 57), getattr(torch, dtype))
    y = torch.from_numpy(spec.dropout(x.numpy(), 2**64 - 9, p))
    oracle.assert_same(dropout(x, p, key=thinned.Key(2**64 - 9)), y)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "rows transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "every third row": lambda x: x.repeat_interleave(3, 0)[2::3],
    "tail": lambda x: torch.cat([x, x], 2)[:, :, -x.shape[2] :],
    "expanded": lambda x: x[:, :1].expand_as(x),
    "expanded rows": lambda x: x[:1].expand_as(x),
    "expanded inside": lambda x: x[..., :1].expand_as(x),
}


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (3, 70, 8, 9), (65, 2, 3, 90)], ids=str)
def test_layouts(layout: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = LAYOUTS[layout](oracle.specials(shape, dtype))
    before = oracle.bits(x)
    y = dropout(x, 0.1, key=thinned.Key(7))
    oracle.assert_same(y, oracle.dropout(x, torch.tensor(7), 0.1))
    torch.manual_seed(3)
    drawn = torch.empty((), dtype=torch.int64).random_()
    torch.manual_seed(3)
    oracle.assert_same(dropout(x, 0.1), oracle.dropout(x, drawn, 0.1))
    assert oracle.bits(x).equal(before)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("broadcast_dims", [(0,), (1,), (-1,), (2, 3), (0, 1, 2, 3)])
@pytest.mark.parametrize("rows", [False, True], ids=["one key", "a key for each row"])
def test_shared_dimensions(broadcast_dims: tuple[int, ...], rows: bool) -> None:
    x = torch.randn(4, 6, 9, 11)
    key = thinned.Key(7).fold(torch.arange(4)) if rows else thinned.Key(7)
    y = dropout(x, 0.4, key=key, broadcast_dims=broadcast_dims)
    oracle.assert_same(y, oracle.dropout(x, key.bits, 0.4, broadcast_dims))


@pytest.mark.usefixtures("backend")
@each_dtype
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (), (1,)], ids=str)
def test_zero_size_and_zero_dimensions(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 3.0, dtype=dtype)
    for seed in range(4):
        y = dropout(x, 0.5, key=thinned.Key(seed))
        oracle.assert_same(y, oracle.dropout(x, torch.tensor(seed), 0.5))


@st.composite
def tasks(draw: st.DrawFn) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Input and output of any layout, which may be the same memory, and all that decides the values."""
    shape = draw(strategies.shapes())
    dtype, T = draw(st.sampled_from(oracle.DTYPES)), draw(strategies.thresholds)
    key = draw(strategies.batches(shape))
    geometry = draw(strategies.geometries(shape, key.dim()))
    shift, fill = draw(st.sampled_from([(0.0, 0.0), (0.0, 0.0), (0.25, -1.5)]))
    same = draw(st.booleans())
    x = draw(strategies.layouts(shape, expanding=not same))(oracle.specials(shape, dtype))
    out = x if same else draw(strategies.layouts(shape, expanding=False))(torch.zeros_like(x))
    return x, out, (key, geometry, T, spec.scale(T) or 1.0, shift, fill)


def assert_values(backend: BackendUnderTest, task: tuple[Tensor, Tensor, tuple[Any, ...]]) -> None:
    x, out, arguments = task
    if not backend.enough():
        expected = oracle.masked_affine(x, *arguments)
        oracle.assert_same(backend.masked_affine(x, *arguments, out=out), expected)


test_any_value = settings(max_examples=200)(given(tasks())(assert_values))
test_any_value_at_length = pytest.mark.slow(settings(max_examples=3000)(given(tasks())(assert_values)))


def test_neighbours_in_memory_are_not_written(backend: BackendUnderTest) -> None:
    for n in (1, 63, 64, 65, 200):
        memory = torch.full((3, n + 8), 5.0)
        window = memory[:, 4 : 4 + n]
        geometry = shared((3, n), ())
        backend.masked_affine(window, torch.tensor(7), geometry, 2**31, 2.0, out=window)
        assert (memory[:, :4] == 5).all()
        assert (memory[:, 4 + n :] == 5).all()
