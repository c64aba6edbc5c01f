"""Dropout of residual branches: the specification's mask, and timm's and torchvision's arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import thinned
from backend_under_test import BackendUnderTest
from thinned import spec
from thinned.compare.layers import Entry
from thinned.compare.layers.path import ENTRIES, MaskedResidual
from thinned.functional import drop_path, drop_path_rates, stochastic_depth
from thinned.geometry import shared
from verdicts import breaks

KEY = thinned.Key(7)
CALLS: dict[str, Callable[..., Tensor]] = {
    "drop_path": partial(drop_path, training=True),
    "drop_path without scale": partial(drop_path, training=True, scale_by_keep=False),
    "stochastic_depth by row": partial(stochastic_depth, mode="row"),
    "stochastic_depth by batch": partial(stochastic_depth, mode="batch"),
}
each_call = pytest.mark.parametrize("name", CALLS)


def call(name: str, x: Tensor, p: float, key: thinned.Key) -> Tensor:
    return CALLS[name](x, **{"drop_prob" if "path" in name else "p": p}, key=key)


@each_call
@pytest.mark.parametrize("p", [0.3, 0.9])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_backend_is_the_specification(
    backend: BackendUnderTest, name: str, p: float, dtype: torch.dtype
) -> None:
    x, T = oracle.specials((40, 3, 7), dtype), spec.threshold(p)
    scale = 1.0 if "without" in name else spec.scale(T)
    for key in (KEY, KEY.fold(torch.arange(40))):
        geometry = shared(x.shape, range("batch" not in name, 3), key.bits.dim())
        y = call(name, x.to(backend.device), p, key.to(backend.device))
        oracle.assert_same(y.cpu(), oracle.masked_affine(x, key.bits, geometry, T, scale))


@each_call
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 1.0])
def test_arithmetic_is_that_of_timm_and_torchvision(name: str, p: float) -> None:
    """Their Bernoulli noise, of shape (N, 1, ...) or (1, 1, ...), replaced by the mask."""
    x = torch.randn(40, 3, 7, dtype=torch.float64)
    noise = thinned.keep_mask(KEY, (1 if "batch" in name else 40, 1, 1), p).double()
    if p < 1 and "without" not in name:
        noise.div_(1 - p)
    torch.testing.assert_close(call(name, x, p, KEY), x * noise)


@each_call
def test_an_input_without_samples(name: str) -> None:
    with pytest.raises(RuntimeError, match=r"needs a batch dimension, got an input of shape \(\)"):
        call(name, torch.ones(()), 0.5, KEY)


@pytest.mark.parametrize("mode", ["rows", "", None])
def test_another_mode(mode: str) -> None:
    message = f"mode has to be either 'batch' or 'row', but got {mode!r}"
    with pytest.raises(ValueError, match=message):
        stochastic_depth(torch.ones(2, 3), 0.0, mode, training=False)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        thinned.StochasticDepth(0.5, mode)  # type: ignore[arg-type]


def test_arguments_of_layers() -> None:
    assert (
        repr(thinned.DropPath(0.2, scale_by_keep=False))
        == "thinned.DropPath(drop_prob=0.2, scale_by_keep=False)"
    )
    assert repr(thinned.StochasticDepth(0.2, "batch")) == "thinned.StochasticDepth(p=0.2, mode='batch')"
    x = torch.randn(40, 3)
    for layer, name in (
        (thinned.DropPath(0.5, scale_by_keep=False), "drop_path without scale"),
        (thinned.StochasticDepth(0.5, "batch"), "stochastic_depth by batch"),
    ):
        assert layer(x, key=KEY).equal(call(name, x, 0.5, KEY))


def test_rates() -> None:
    assert drop_path_rates(1, 0.3) == [0.0]
    assert drop_path_rates(4, 1) == [0, 1 / 3, 2 / 3, 1]
    for rate in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"between 0 and 1, but got {rate}"):
            drop_path_rates(3, rate)
    with pytest.raises(ValueError, match="depth has to be at least 1, but got 0"):
        drop_path_rates(0, 0.5)


CULPRITS: dict[str, Callable[..., nn.Module]] = {
    "sharing": lambda mode=None, **p: nn.Dropout(*p.values()),  # noqa: ARG005
    "kept values": lambda mode=None, **p: thinned.DropPath(*p.values(), scale_by_keep=False),  # noqa: ARG005
}


@pytest.mark.parametrize("law", CULPRITS)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_a_wrong_layer_is_caught(law: str, entry: Entry) -> None:
    def make(**arguments: Any) -> nn.Module:
        layer = CULPRITS[law](**arguments)
        return MaskedResidual(nn.Identity(), layer) if entry.name == "Residual" else layer

    assert breaks(entry, law, make)


def test_repr_of_a_subclass_with_a_constructor_of_its_own() -> None:
    class Fixed(thinned.StochasticDepth):
        def __init__(self) -> None:
            super().__init__(0.2, "row")

    assert repr(Fixed()) == "Fixed(p=0.2, mode='row')"
