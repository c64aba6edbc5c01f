"""Dropout: its arguments, shared dimensions and mask, and tensors that are not plain."""

from __future__ import annotations

import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import oracle
import thinned
from thinned.functional import dropout

KEY = thinned.Key(7)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("p", "training"), [(0.0, True), (0.5, False), (1.0, False), (0, True)])
def test_the_identity_returns_the_input_and_draws_nothing(p: float, training: bool, inplace: bool) -> None:
    x = torch.randn(5, requires_grad=not inplace)
    before, state = x.clone(), torch.get_rng_state()
    assert dropout(x, p, training, inplace) is x
    assert dropout(x, p, training, inplace, key=KEY) is x
    assert x.equal(before)
    assert torch.get_rng_state().equal(state)


@pytest.mark.parametrize("p", [1, True, np.float32(1), np.int64(1)], ids=repr)
def test_p_of_another_type(p: float) -> None:
    assert dropout(torch.ones(3), p).equal(torch.zeros(3))


def test_p_is_taken_at_its_own_precision() -> None:
    p, x = np.float32(0.1), torch.ones(3, dtype=torch.float64)
    assert dropout(x, p, key=KEY).equal(dropout(x, float(p), key=KEY))
    assert dropout(x, torch.tensor(0.5), key=KEY).equal(dropout(x, 0.5, key=KEY))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn], ids=str)
def test_other_dtypes(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 3).to(dtype)
    with pytest.raises(RuntimeError, match=re.escape(f"got {dtype} of shape (2, 3)")):
        dropout(x, 0.5)


def keys(*shape: int) -> thinned.Key:
    return KEY.fold(torch.zeros(shape, dtype=torch.int64))


@pytest.mark.parametrize(
    ("shape", "arguments", "error", "message"),
    [
        *(((3,), {"p": p}, ValueError, f"but got {p}") for p in (-0.1, 1.5, math.nan, -math.inf, 1 + 2**-52)),
        ((3,), {"key": 7}, TypeError, "write thinned.Key(7)"),
        ((3,), {"key": "seven"}, TypeError, "must be a thinned.Key, got 'seven' of type str"),
        ((3, 4), {"key": keys(4)}, RuntimeError, "keys of shape (4,) do not fit a tensor of shape (3, 4)"),
        ((3, 4), {"key": keys(3, 4)}, RuntimeError, "keys of shape (3, 4) do not fit"),
        ((3, 4), {"key": keys(1)}, RuntimeError, "keys of shape (1,) do not fit"),
        (
            (),
            {"key": keys(1)},
            RuntimeError,
            "do not fit a tensor of shape (); accepted: one key of shape ()",
        ),
        ((3, 4), {"broadcast_dims": (2,)}, IndexError, "names dimension 2, but for shape (3, 4)"),
        ((3, 4), {"broadcast_dims": (0, -3)}, IndexError, "names dimension -3, but for shape (3, 4)"),
        ((3, 4), {"broadcast_dims": (0.5,)}, TypeError, "must be integers, got (0.5,)"),
        ((), {"broadcast_dims": (0,)}, IndexError, "names dimension 0, but for shape ()"),
        ((), {"broadcast_dims": (-1,)}, IndexError, "names dimension -1, but for shape ()"),
    ],
    ids=str,
)
def test_keep_mask_refuses_what_dropout_refuses(
    shape: tuple[int, ...], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    arguments = {"p": 0.5, "key": KEY, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        dropout(torch.ones(shape), **arguments)
    with pytest.raises(error, match=re.escape(message)):
        thinned.keep_mask(shape=shape, **arguments)


@pytest.mark.parametrize("size", [2.5, "3", None])
def test_sizes_of_keep_mask_are_integers(size: Any) -> None:
    with pytest.raises(TypeError, match=rf"a size of shape must be an integer, got '?{size}"):
        thinned.keep_mask(KEY, (2, size), 0.5)


def test_keep_mask_needs_a_key() -> None:
    with pytest.raises(TypeError, match="key"):
        thinned.keep_mask(None, (3,), 0.5)  # type: ignore[arg-type]


def test_device_of_the_keys() -> None:
    batch = KEY.fold(torch.arange(3)).to("meta")
    with pytest.raises(RuntimeError, match=r"keys are on meta and the tensor is on cpu.*key\.to\('cpu'\)"):
        dropout(torch.ones(3, 4), key=batch)


@pytest.mark.parametrize("dims", [(0,), (2, 3), (-1, -2), [1, 3], (0, 1, 2, 3), (1, 1, -3)], ids=str)
def test_broadcast_dims_share_one_decision(dims: tuple[int, ...]) -> None:
    shape = (3, 4, 5, 6)
    small = [1 if dim in dims or dim - 4 in dims else size for dim, size in enumerate(shape)]
    mask = thinned.keep_mask(KEY, shape, 0.5, broadcast_dims=dims)
    assert mask.equal(thinned.keep_mask(KEY, small, 0.5).expand(shape))
    assert dropout(torch.ones(shape), 0.5, key=KEY, broadcast_dims=dims).equal(2.0 * mask)
    for kind in (thinned.Dropout, thinned.AlphaDropout, thinned.GaussianDropout):
        layer = kind(0.5, broadcast_dims=dims)
        y = kind(0.5)(torch.ones(small), key=KEY).expand(shape)
        assert layer(torch.ones(shape), key=KEY).equal(y)
        assert pickle.loads(pickle.dumps(layer))(torch.ones(shape), key=KEY).equal(y)
        assert f"broadcast_dims={tuple(dims)})" in repr(layer)


@pytest.mark.parametrize("name", ["Dropout", "AlphaDropout"])
def test_a_layer_without_broadcast_dims_has_the_state_of_torchs(name: str) -> None:
    """So have layers that were pickled before there were any."""
    ours, theirs = (getattr(module, name)(0.3, True) for module in (thinned, nn))
    assert vars(ours).keys() == vars(theirs).keys()
    assert repr(ours) == f"thinned.{name}(p=0.3, inplace=True)"


def test_mask_of_a_batch_of_keys() -> None:
    batch = KEY.fold(torch.arange(4))
    mask = thinned.keep_mask(batch, (4, 50), 0.5)
    rows = [thinned.keep_mask(KEY.fold(i), (50,), 0.5) for i in range(4)]
    assert mask.equal(torch.stack(rows))
    assert dropout(torch.ones(4, 50), 0.5, key=batch).equal(2.0 * mask)


def test_subclass_and_parameter() -> None:
    x = nn.Parameter(torch.ones(100))
    y = dropout(x, 0.5, key=KEY)
    assert type(y) is torch.Tensor
    assert y.requires_grad
    assert dropout(nn.Buffer(torch.ones(100)), 0.5, key=KEY).equal(y)


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


def test_in_a_transformer_layer_of_torch() -> None:
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    for name in ("dropout", "dropout1", "dropout2"):
        setattr(block, name, thinned.Dropout(0.1))
    x = torch.randn(2, 5, 16)
    torch.manual_seed(3)
    y = block(x)
    torch.manual_seed(3)
    assert block(x).equal(y)
    block.eval()
    assert block(x).equal(block(x))
