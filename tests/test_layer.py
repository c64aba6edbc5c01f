"""The module: everything that nn.Dropout is."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import thinned

KEY = thinned.Key(7)


def test_is_a_dropout_of_torch() -> None:
    layer = thinned.Dropout(0.3, inplace=True)
    assert isinstance(layer, nn.Dropout)
    assert (layer.p, layer.inplace, layer.training) == (0.3, True, True)
    assert thinned.Dropout().p == 0.5
    assert not thinned.Dropout().inplace


def test_repr() -> None:
    layer = thinned.Dropout(0.3, inplace=True)
    assert repr(layer) == repr(nn.Dropout(0.3, inplace=True)) == "Dropout(p=0.3, inplace=True)"
    assert layer.extra_repr() == "p=0.3, inplace=True"


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan, math.inf])
def test_p_outside_0_to_1(p: float) -> None:
    with pytest.raises(ValueError, match="dropout probability has to be between 0 and 1"):
        thinned.Dropout(p)


def test_p_set_later_is_checked_and_used() -> None:
    layer = thinned.Dropout(0.5)
    layer.p = 1.0
    assert not layer(torch.ones(100)).any()
    layer.p = 1.5
    with pytest.raises(ValueError, match=r"but got 1\.5"):
        layer(torch.ones(100))


def test_forward_is_the_function() -> None:
    x = torch.randn(300)
    assert thinned.Dropout(0.3)(x, key=KEY).equal(thinned.functional.dropout(x, 0.3, key=KEY))
    torch.manual_seed(3)
    y = thinned.Dropout(0.3)(x)
    torch.manual_seed(3)
    assert y.equal(thinned.functional.dropout(x, 0.3))


def test_key_is_keyword_only() -> None:
    with pytest.raises(TypeError):
        thinned.Dropout()(torch.ones(3), KEY)


def test_eval_returns_the_input_itself() -> None:
    x = torch.ones(100)
    layer = thinned.Dropout(0.5).eval()
    assert layer(x) is x
    assert layer.train()(x, key=KEY) is not x


def test_inplace() -> None:
    x = torch.ones(100)
    assert thinned.Dropout(0.5, inplace=True)(x, key=KEY) is x
    assert x.equal(thinned.Dropout(0.5)(torch.ones(100), key=KEY))


def saved(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


@pytest.mark.parametrize(
    "through",
    [copy.copy, copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), saved],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_copies(through: Callable[[nn.Module], nn.Module]) -> None:
    layer = through(thinned.Dropout(0.3, inplace=True).eval())
    assert type(layer) is thinned.Dropout
    assert (layer.p, layer.inplace, layer.training) == (0.3, True, False)
    x = torch.randn(100)
    y = thinned.functional.dropout(x, 0.3, key=KEY)
    assert layer.train()(x, key=KEY).equal(y)


def test_state_dict_is_that_of_torch() -> None:
    layers = nn.Sequential(nn.Linear(3, 4), thinned.Dropout(0.3))
    torchs = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3))
    assert layers.state_dict().keys() == torchs.state_dict().keys()
    layers.load_state_dict(torchs.state_dict())
    assert not list(thinned.Dropout().parameters()) + list(thinned.Dropout().buffers())


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


def test_public_names() -> None:
    assert set(thinned.__all__) >= {"Dropout", "Key", "backends", "functional", "keep_mask", "spec"}
    for name in thinned.__all__:
        assert getattr(thinned, name) is not None
