"""Nested tensors, which torch's dropout takes too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import thinned
from thinned import Key
from thinned.functional import dropout

KEY = Key(7)


def jagged() -> Tensor:
    return torch.nested.nested_tensor([torch.ones(3, 8), torch.ones(5, 8)], layout=torch.jagged)


def test_values_are_those_of_the_packed_tensor() -> None:
    x = jagged()
    y = thinned.Dropout(0.5)(x, key=KEY)
    assert y.is_nested
    assert y.offsets().equal(x.offsets())
    assert y.values().equal(dropout(x.values(), 0.5, key=KEY))


def test_gradient() -> None:
    x = jagged().requires_grad_()
    y = dropout(x, 0.5, key=KEY)
    (grad,) = torch.autograd.grad(y.values().sum(), x)
    assert grad.values().equal(y.values())


def test_a_key_is_drawn() -> None:
    torch.manual_seed(0)
    packed = dropout(torch.ones(8, 8), 0.5)
    torch.manual_seed(0)
    assert dropout(jagged(), 0.5).values().equal(packed)


def test_shared_dimensions_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="no shared dimensions"):
        dropout(jagged(), 0.5, key=KEY, broadcast_dims=(2,))
