"""What functional.dropout accepts, refuses and returns in eager mode."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

import oracle
import thinned
from thinned.functional import dropout

KEY = thinned.Key(7)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (1.0, False), (0, True)])
def test_nothing_to_do_returns_the_input_itself(p: float, training: bool, inplace: bool) -> None:
    x = torch.randn(5, requires_grad=not inplace)
    before, state = x.clone(), torch.get_rng_state()
    assert dropout(x, p, training, inplace) is x
    assert dropout(x, p, training, inplace, key=KEY) is x
    assert x.equal(before)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_everything_dropped_is_plus_zero(dtype: torch.dtype) -> None:
    x = oracle.specials((400,), dtype).requires_grad_()
    y = dropout(x, 1.0)
    oracle.assert_same(y, torch.zeros_like(x))
    (grad,) = torch.autograd.grad(y, x, torch.full_like(y, float("nan")))
    oracle.assert_same(grad, torch.zeros_like(x))


def test_defaults() -> None:
    y = dropout(torch.ones(1000))
    assert set(y.tolist()) == {0, 2}


def test_the_input_is_not_written() -> None:
    x = torch.randn(1000)
    before, version = x.clone(), x._version
    y = dropout(x, 0.5)
    assert x.equal(before)
    assert x._version == version
    assert y.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan, math.inf, -math.inf, 1 + 2**-52])
@pytest.mark.parametrize("training", [True, False])
def test_p_outside_0_to_1(p: float, training: bool) -> None:
    message = re.escape(f"dropout probability has to be between 0 and 1, but got {p}")
    with pytest.raises(ValueError, match=message):
        dropout(torch.ones(3), p, training)
    with pytest.raises(ValueError, match=message):
        thinned.keep_mask(KEY, (3,), p)


@pytest.mark.parametrize("p", [1, True, np.float32(1), np.int64(1)], ids=repr)
def test_p_of_another_type(p: float) -> None:
    assert dropout(torch.ones(3), p).equal(torch.zeros(3))


def test_p_counts_as_the_number_that_it_is() -> None:
    p, x = np.float32(0.1), torch.ones(3, dtype=torch.float64)
    assert dropout(x, p, key=KEY).equal(dropout(x, float(p), key=KEY))
    assert dropout(x, torch.tensor(0.5), key=KEY).equal(dropout(x, 0.5, key=KEY))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_other_dtypes(dtype: torch.dtype, training: bool) -> None:
    x = torch.zeros(2, 3).to(dtype)
    with pytest.raises(RuntimeError, match=re.escape(f"got {dtype} of shape (2, 3)")):
        dropout(x, 0.5, training)


def test_no_tensor() -> None:
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        dropout([1.0, 2.0])  # type: ignore[arg-type]


def test_key_of_another_type_says_what_to_write() -> None:
    with pytest.raises(TypeError, match=r"write thinned\.Key\(7\)"):
        dropout(torch.ones(3), key=7)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be a thinned\.Key.* got 'seven' of type str"):
        dropout(torch.ones(3), key="seven")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="key"):
        thinned.keep_mask(None, (3,), 0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("keys", "shape"), [((4,), (3, 4)), ((3, 4), (3, 4)), ((1,), (3, 4)), ((1,), ())])
def test_shape_of_the_keys(keys: tuple[int, ...], shape: tuple[int, ...]) -> None:
    key = KEY.fold(torch.zeros(keys, dtype=torch.int64))
    message = re.escape(f"keys of shape {keys} do not fit a tensor of shape {shape}")
    with pytest.raises(RuntimeError, match=message):
        dropout(torch.ones(shape), key=key)
    with pytest.raises(RuntimeError, match=message):
        thinned.keep_mask(key, shape, 0.5)


def test_device_of_the_keys() -> None:
    batch = KEY.fold(torch.arange(3)).to("meta")
    with pytest.raises(RuntimeError, match=r"keys are on meta and the tensor is on cpu.*key\.to\('cpu'\)"):
        dropout(torch.ones(3, 4), key=batch)


@pytest.mark.parametrize(("dims", "shape"), [((2,), (3, 4)), ((0, -3), (3, 4)), ((0,), ()), ((-1,), ())])
def test_broadcast_dims_out_of_range(dims: tuple[int, ...], shape: tuple[int, ...]) -> None:
    bad = dims[-1]
    with pytest.raises(IndexError, match=re.escape(f"names dimension {bad}, but for shape {shape}")):
        dropout(torch.ones(shape), key=KEY, broadcast_dims=dims)
    with pytest.raises(IndexError, match=re.escape(f"names dimension {bad}, but for shape {shape}")):
        thinned.keep_mask(KEY, shape, 0.5, broadcast_dims=dims)


@pytest.mark.parametrize("dims", [(0,), (2, 3), (-1, -2), [1, 3], (0, 1, 2, 3), (1, 1, -3)], ids=str)
def test_broadcast_dims_share_one_decision(dims: tuple[int, ...]) -> None:
    shape = (3, 4, 5, 6)
    small = [1 if dim in dims or dim - 4 in dims else size for dim, size in enumerate(shape)]
    mask = thinned.keep_mask(KEY, shape, 0.5, broadcast_dims=dims)
    assert mask.equal(thinned.keep_mask(KEY, small, 0.5).expand(shape))
    assert dropout(torch.ones(shape), 0.5, key=KEY, broadcast_dims=dims).equal(2.0 * mask)


def test_mask_of_a_batch_of_keys() -> None:
    batch = KEY.fold(torch.arange(4))
    mask = thinned.keep_mask(batch, (4, 50), 0.5)
    rows = [thinned.keep_mask(KEY.fold(i), (50,), 0.5) for i in range(4)]
    assert mask.equal(torch.stack(rows))
    assert dropout(torch.ones(4, 50), 0.5, key=batch).equal(2.0 * mask)


def test_expectation_is_the_input() -> None:
    """Kept values are x / q for the realised probability q, not for the nominal 1 - p."""
    for p in (0.1, 0.3, 0.7):
        y = dropout(torch.ones(100, dtype=torch.float64), p, key=KEY)
        q = round((1 - p) * 2**32) / 2**32
        assert set(y.tolist()) == {0, 1 / q}


def test_subclass_and_parameter() -> None:
    x = torch.nn.Parameter(torch.ones(100))
    y = dropout(x, 0.5, key=KEY)
    assert type(y) is torch.Tensor
    assert y.requires_grad
    buffer = torch.nn.Buffer(torch.ones(100))
    assert dropout(buffer, 0.5, key=KEY).equal(y)


def test_meta_tensor() -> None:
    x = torch.empty(3, 4, 5, device="meta").transpose(0, 2)
    y = dropout(x, 0.5, key=KEY)
    assert y.is_meta
    assert y.shape == x.shape
    assert y.stride() == torch.empty_like(x).stride()
    assert dropout(x, 0.5).is_meta


@pytest.mark.parametrize("view", ["conj", "neg"])
@pytest.mark.parametrize("inplace", [False, True])
def test_conjugated_and_negated_views(view: str, inplace: bool) -> None:
    z = torch.randn(50, dtype=torch.complex64)
    x = z.conj() if view == "conj" else z.conj().imag
    assert x.is_conj() or x.is_neg()
    expected = dropout(x.resolve_conj().resolve_neg(), 0.5, key=KEY)
    y = dropout(x, 0.5, inplace=inplace, key=KEY)
    oracle.assert_same(y, expected)
    if inplace:
        assert y is x
        oracle.assert_same(z.conj() if view == "conj" else z.conj().imag, expected)


def test_inference_mode() -> None:
    with torch.inference_mode():
        y = dropout(torch.ones(100), 0.5, key=KEY)
        assert y.is_inference()
        drawn = dropout(torch.ones(100), 0.5)
    assert y.equal(dropout(torch.ones(100), 0.5, key=KEY))
    assert set(drawn.tolist()) == {0, 2}
    x = torch.ones(100, requires_grad=True)
    assert dropout(x, 0.5).requires_grad  # after a first draw within inference mode
