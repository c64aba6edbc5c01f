"""Arguments that would be read or written beside memory, or that have no mask: every backend refuses them."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import oracle
import thinned
from backend_under_test import BackendUnderTest
from thinned import spec
from thinned.backends import _native, native
from thinned.functional import dropout
from thinned.geometry import Geometry

SHAPE = (1000, 3)
STRIDES, BASE, T = (3, 1), 0, spec.threshold(0.3)
FAR = 2**63 - 1
ops = torch.ops.thinned

CALLS: dict[str, Callable[..., Tensor]] = {
    "masked_affine": lambda key, strides=STRIDES, base=BASE, T=T: ops.masked_affine(
        torch.ones(SHAPE), key, strides, base, T, 2.0, 0.0, 0.0
    ),
    "keep_mask": lambda key, strides=STRIDES, base=BASE, T=T: ops.keep_mask(key, SHAPE, strides, base, T),
    "uniform": lambda key, strides=STRIDES, base=BASE: ops.uniform(key, SHAPE, strides, base),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=list(CALLS))


@every_call
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    "keys", [(3,), (1,), (999,), (1001,), (3, 1000), (1000, 1), (1000, 3, 1), (0,)], ids=str
)
def test_keys_of_another_shape(call: Callable[..., Tensor], keys: tuple[int, ...]) -> None:
    with pytest.raises(RuntimeError, match=re.escape(f"keys of shape {keys} do not fit")) as raised:
        call(torch.zeros(keys, dtype=torch.int64))
    assert "of shape (1000, 3); accepted: " in str(raised.value)
    assert str(raised.value).endswith("(), (1000,), (1000, 3)")


@every_call
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("keys", [(), (1000,), (1000, 3)], ids=str)
def test_keys_of_leading_dimensions(call: Callable[..., Tensor], keys: tuple[int, ...]) -> None:
    assert call(torch.zeros(keys, dtype=torch.int64)).equal(call(torch.tensor(0)))


@every_call
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float64, torch.bool], ids=str)
def test_keys_of_another_dtype(call: Callable[..., Tensor], dtype: torch.dtype) -> None:
    for keys in ((), (1000,)):
        with pytest.raises(RuntimeError, match=f"keys must be int64, got {dtype}"):
            call(torch.zeros(keys, dtype=dtype))


def test_keys_on_another_device(backend: BackendUnderTest) -> None:
    for keys in ((), (1000,)):
        with pytest.raises(RuntimeError, match=f"the keys are on meta and the tensor is on {backend.device}"):
            backend.module.masked_affine(
                torch.ones(SHAPE),
                torch.zeros(keys, dtype=torch.int64, device="meta"),
                Geometry(STRIDES),
                T,
                *(2.0, 0.0, 0.0),
            )


@every_call
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strides": ()}, r"mask strides \(\) do not fit a tensor of shape \(1000, 3\); accepted: 2 strides"),
        ({"strides": (1,)}, r"mask strides \(1,\) do not fit"),
        ({"strides": (3, 1, 1)}, r"mask strides \(3, 1, 1\) do not fit"),
        ({"strides": (3, -1)}, r"must be 0 or more, got strides \(3, -1\) and base 0"),
        ({"base": -1}, r"must be 0 or more, got strides \(3, 1\) and base -1"),
        ({"strides": (2**60, 1)}, "reach too far"),
        ({"strides": (FAR, FAR)}, "reach too far"),
        ({"base": FAR - 2999}, "reach too far"),
    ],
    ids=str,
)
def test_geometries(call: Callable[..., Tensor], changed: dict[str, Any], message: str) -> None:
    for key in (torch.tensor(7), torch.arange(1000)):
        with pytest.raises(RuntimeError, match=message):
            call(key, **changed)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("call", ["masked_affine", "keep_mask"])
@pytest.mark.parametrize("T", [-1, 2**32 + 1])
def test_thresholds(call: str, T: int) -> None:
    for key in (torch.tensor(7), torch.arange(1000)):
        with pytest.raises(RuntimeError, match=f"T must be in 0 .. 2[*][*]32, got {T}"):
            CALLS[call](key, T=T)


@every_call
@pytest.mark.usefixtures("backend")
def test_the_last_mask_index(call: Callable[..., Tensor]) -> None:
    assert call(torch.tensor(7), base=FAR - 3000).shape == SHAPE


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.uint8, torch.float8_e5m2], ids=str)
def test_dtypes(backend: BackendUnderTest, dtype: torch.dtype) -> None:
    x = torch.zeros(SHAPE, dtype=dtype)
    with pytest.raises(
        RuntimeError, match=f"needs a floating-point or complex tensor, got {dtype}; accepted: "
    ):
        ops.masked_affine(x, torch.tensor(7), STRIDES, BASE, T, 2.0, 0.0, 0.0)
    with pytest.raises(RuntimeError, match=f"got {dtype}"):
        backend.module.masked_affine(x, 7, None, T, 2.0, 0.0, 0.0)


@pytest.mark.parametrize("out", [torch.ones(999, 3), torch.ones(SHAPE[::-1]), torch.ones(SHAPE).half()])
def test_another_place_for_the_result(backend: BackendUnderTest, out: Tensor) -> None:
    for geometry in (None, Geometry(STRIDES)):
        with pytest.raises(RuntimeError, match=r"does not fit x of shape \(1000, 3\), torch.float32"):
            backend.module.masked_affine(torch.zeros(SHAPE), 7, geometry, T, 2.0, 0.0, 0.0, out)
    assert out.eq(1).all()


def test_rows_that_overlap_the_result() -> None:
    memory = torch.ones(1001, 3)
    for geometry in (None, Geometry(STRIDES)):
        with pytest.raises(ValueError, match="y overlaps x: 12000 bytes from address"):
            native.masked_affine(memory[:-1], 7, geometry, T, 2.0, 0.0, 0.0, memory[1:])
    assert memory.eq(1).all()


@pytest.mark.parametrize("key", [None, thinned.Key(7), thinned.Key(7).fold(torch.arange(1000))], ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_a_tensor_whose_memory_was_freed(key: thinned.Key | None, inplace: bool) -> None:
    x = torch.ones(SHAPE)
    x.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"has no memory \(address 0\) for its 12000 bytes"):
        dropout(x, key=key, inplace=inplace)


@pytest.mark.parametrize("key", [None, thinned.Key(7), thinned.Key(7).fold(torch.arange(9))], ids=str)
def test_a_tensor_between_addresses(key: thinned.Key | None) -> None:
    x = torch.frombuffer(bytearray(37), dtype=torch.float32, offset=1).fill_(1)
    for inplace in (False, True):
        with pytest.raises(ValueError, match=r"must be a multiple of 4; clone\(\) the tensor"):
            dropout(x, key=key, inplace=inplace)
    assert x.eq(1).all()
    oracle.assert_same(dropout(x.clone(), key=thinned.Key(7)), dropout(torch.ones(9), key=thinned.Key(7)))


def test_fold_of_other_than_one_key() -> None:
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit a tensor of shape \(\)"):
        native.fold(torch.arange(3), 1)
    with pytest.raises(RuntimeError, match=r"keys must be int64, got torch.int32"):
        native.fold(torch.tensor(7, dtype=torch.int32), 1)
    for keys, ids in ((torch.int32, torch.int64), (torch.int64, torch.int32)):
        with pytest.raises(RuntimeError, match=f"must be int64, got {keys} and {ids}"):
            native.fold(torch.arange(3).to(keys), torch.arange(3).to(ids))


@pytest.mark.parametrize(
    "call",
    [
        lambda: _native.flat(0, 0, 2, 5, T, 2.0, 0.0, 0.0, 7),
        lambda: _native.strided(0, 0, 2, (5,), (1,), (1,), (1,), 0, T, 2.0, 0.0, 0.0, 7, 0, (), ()),
        lambda: _native.numbers(0, 0, 0, 1, 1),
        lambda: _native.fold(0, 0, 1),
        lambda: _native.fold_many(0, 0, 1, 0, 1, 1),
    ],
    ids=["flat", "strided", "numbers", "fold", "fold_many"],
)
def test_address_0(call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=r"has no memory \(address 0\) for its \d+ bytes"):
        call()
