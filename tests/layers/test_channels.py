"""Dropout of whole channels: the specification's mask, and the numbers of dimensions that PyTorch takes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from torch import Tensor, nn

import oracle
import thinned
from backend_under_test import BackendUnderTest
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers.channels import ENTRIES
from thinned.compare.settings import Settings
from thinned.functional import dropout1d, dropout2d, dropout3d, feature_alpha_dropout
from thinned.geometry import shared

KEY = thinned.Key(7)
P = 0.3
CASES = [
    pytest.param(function, shape, id=function.__name__)
    for function, shape in ((dropout1d, (6, 5, 7)), (dropout2d, (6, 5, 4, 3)), (dropout3d, (6, 5, 2, 3, 4)))
]

Function = Callable[..., Tensor]


@pytest.mark.parametrize(("function", "shape"), CASES)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_backend_is_the_specification(
    backend: BackendUnderTest, function: Function, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = oracle.specials(shape, dtype)
    expected = oracle.dropout(x, KEY.bits, P, tuple(range(2, len(shape))))
    for laid_out in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        y = function(laid_out.to(backend.device), P, key=KEY)
        oracle.assert_same(y.cpu(), expected)
    keys = KEY.fold(torch.arange(6))
    y = function(x.to(backend.device), P, key=keys.to(backend.device))
    geometry = shared(shape, range(2, len(shape)), 1)
    T = thinned.spec.threshold(P)
    oracle.assert_same(y.cpu(), oracle.masked_affine(x, keys.bits, geometry, T, thinned.spec.scale(T)))


@pytest.mark.parametrize(
    ("function", "shape", "own"),
    [
        *((dropout2d, shape, 2) for shape in [(6, 5), (6, 5, 4), (3, 5, 4, 2, 2)]),
        *((dropout3d, shape, 1) for shape in [(6,), (6, 5), (6, 5, 4), (3, 5, 4, 2, 2, 2)]),
    ],
)
def test_deprecated_ranks_drop_what_they_dropped(
    function: Function, shape: tuple[int, ...], own: int
) -> None:
    """``own`` leading dimensions have decisions, as in PyTorch: Dropout3d adds a dimension in front."""
    x = torch.ones(shape)
    with pytest.warns(UserWarning, match=rf"{function.__name__}: Received a {len(shape)}-?D input"):
        y = function(x, 0.5, key=KEY)
    decisions = thinned.keep_mask(KEY, shape[:own], 0.5)
    assert y.equal(2.0 * decisions.reshape(*shape[:own], *(1,) * (len(shape) - own)).expand(shape))


@pytest.mark.parametrize(("function", "shape"), [CASES[0], CASES[2]])
def test_vmap_over_samples_and_keys(function: Function, shape: tuple[int, ...]) -> None:
    x, keys = torch.randn(shape), KEY.fold(torch.arange(shape[0]))

    def one(x: Tensor, bits: Tensor) -> Tensor:
        return function(x, 0.5, key=thinned.Key.from_bits(bits))

    assert torch.func.vmap(one)(x, keys.bits).equal(function(x, 0.5, key=keys))


@pytest.mark.filterwarnings("ignore:dropout.d. Received a .-D input")
@pytest.mark.parametrize(
    ("function", "shape"),
    [
        *((dropout1d, shape) for shape in [(), (2,), (1, 2, 2, 2)]),
        *((dropout2d, shape) for shape in [(), (2,)]),
        *((feature_alpha_dropout, shape) for shape in [(), (2,)]),
        (dropout3d, ()),
    ],
)
def test_refused_ranks_are_named(function: Function, shape: tuple[int, ...]) -> None:
    """The rest of the message is PyTorch's: see test_opinfo.test_errors."""
    with pytest.raises(RuntimeError, match=rf"(Its shape is|a tensor of shape) {re.escape(str(shape))}"):
        function(torch.ones(shape), 0.5, True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("function", "shape", "words"),
    [
        (dropout2d, (1, 2), "Received a 2-D input to dropout2d"),
        (dropout2d, (1, 2, 2, 2, 2), "Received a 5-D input to dropout2d"),
        (dropout2d, (1, 2, 2), "assuming that channel-wise 1D dropout behavior is desired"),
        (dropout3d, (1, 2, 2), "Received a 3-D input to dropout3d"),
        (dropout3d, (1, 2, 2, 2, 2, 2), "Received a 6-D input to dropout3d"),
    ],
)
def test_warning_is_torchs_and_points_at_the_caller(
    function: Function, shape: tuple[int, ...], words: str, training: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(torch.ones(shape), 0.5, training)
        getattr(nn.functional, function.__name__)(torch.ones(shape), 0.5, training)
    warning, theirs = caught
    assert warning.category is UserWarning
    assert words in str(warning.message) == str(theirs.message)
    assert warning.filename == __file__


def test_a_compiled_call_warns_when_it_is_compiled(fresh_compiler: None) -> None:  # noqa: ARG001
    compiled = torch.compile(thinned.Dropout2d(0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(20, 5, 3)
    with pytest.warns(UserWarning, match=r"interpreted as shape \(N, C, L\)"):
        y = compiled(x, key=KEY)
    assert y.equal(dropout1d(x, 0.5, key=KEY))
    compiled(x, key=KEY)


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_order_of_the_strides_is_kept(order: tuple[int, ...]) -> None:
    """As PyTorch's test/nn/test_dropout.py asks, of slices too."""
    inverse = sorted(range(4), key=order.__getitem__)
    for shift in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x = torch.ones(3, 4, 5, 6).permute(order).contiguous().permute(inverse)[shift[0] :, shift[1] :]
        for p in (1e-10, 0.5):
            y = dropout2d(x, p, key=KEY)
            assert y.permute(order).is_contiguous()
            assert y.stride() == nn.functional.dropout2d(x, p).stride()
            assert y.equal(x) == (p < 0.1)


class Shared(nn.Module):
    """A mask that is shared along other dimensions than it should be."""

    def __init__(self, p: float, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.p, self.dims = p, dims

    def forward(self, x: Tensor) -> Tensor:
        return thinned.functional.dropout(
            x, self.p, broadcast_dims=[dim for dim in self.dims if dim < x.dim()]
        )


class ForgetsStrides(nn.Dropout2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous())


CULPRITS: dict[tuple[int, str], Callable[..., nn.Module]] = {
    (2, "sharing"): lambda p: Shared(p, dims=(3,)),
    (2, "3 dimensions"): lambda p: Shared(p, dims=(1, 2, 3)),
    (2, "other ranks"): lambda p: Shared(p, dims=()),
    (2, "channels_last"): ForgetsStrides,
    (1, "batch of one"): lambda p: Shared(p, dims=(2,)),
}


@pytest.mark.parametrize(("spatial", "law"), CULPRITS)
def test_a_wrong_layer_is_caught(spatial: int, law: str) -> None:
    (check,) = [one for one in ENTRIES[spatial - 1].laws if one.name == law]
    found = examine(check, Implementation("culprit", CULPRITS[spatial, law]), Settings(quick=True))
    assert found.verdict is Verdict.BROKEN, found.measured
