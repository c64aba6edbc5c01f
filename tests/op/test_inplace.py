"""Writing over the input: what it does to autograd, and what is refused before anything is written."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import oracle
import thinned
from thinned.functional import dropout

KEY = thinned.Key(7)


def over(x: Tensor) -> Tensor:
    return dropout(x, 0.5, inplace=True, key=KEY)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_same_object_memory_and_values(dtype: torch.dtype) -> None:
    x = oracle.specials((17, 33), dtype)
    expected, address, version = dropout(x, 0.5, key=KEY), x.data_ptr(), x._version
    y = over(x)
    assert y is x
    assert x.data_ptr() == address
    assert x._version == version + 1
    oracle.assert_same(x, expected)


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.T,
        lambda x: x[:, ::2],
        lambda x: x[3:],
        lambda x: x[:, 5],
        lambda x: x[2:2],
        lambda x: x[0, 0],
    ],
    ids=["transposed", "every other", "tail", "column", "nothing", "number"],
)
def test_views_write_into_their_base(view: Callable[[Tensor], Tensor]) -> None:
    base = torch.randn(20, 31)
    expected = base.clone()
    view(expected).copy_(dropout(view(base), 0.5, key=KEY))
    version = base._version
    over(view(base))
    oracle.assert_same(base, expected)
    assert base._version == version + 1


def gradients(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    leaf = x.clone().requires_grad_()
    f(leaf).cos().sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_gradient_is_that_of_the_plain_call() -> None:
    x = torch.randn(20, 30)
    plain = gradients(lambda leaf: dropout(leaf * 2, 0.5, key=KEY), x)
    oracle.assert_same(gradients(lambda leaf: over(leaf * 2), x), plain)


def test_gradient_through_a_view_of_the_base() -> None:
    x = torch.randn(20, 30)

    def inplace(leaf: Tensor) -> Tensor:
        base = leaf * 2
        over(base[3:9, ::2])
        return base

    def plain(leaf: Tensor) -> Tensor:
        base = leaf * 2
        written = dropout(base[3:9, ::2], 0.5, key=KEY)
        return base.slice_scatter(base[3:9].slice_scatter(written, 1, step=2), 0, 3, 9)

    oracle.assert_same(gradients(inplace, x), gradients(plain, x))


def test_a_value_that_backward_needs_is_guarded() -> None:
    base = torch.ones(5, requires_grad=True) * 2
    y = base * base
    over(base)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(8)


LEAF, VIEW = "a leaf Variable that requires grad", "a view of a leaf Variable that requires grad"
REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "leaf": (lambda leaf: leaf, LEAF),
    "parameter": (nn.Parameter, LEAF),
    "view of a leaf": (lambda leaf: leaf[1:], VIEW),
    "view of a view of a leaf": (lambda leaf: leaf.T[1:][:2], VIEW),
    "one of several views": (lambda leaf: (leaf * 1).split(2)[0], "a function that returns multiple views"),
    "expanded": (lambda _: torch.ones(1, 3).expand(4, 3), "single memory location"),
    "expanded, with a gradient": (lambda leaf: (leaf[:, :1] * 1).expand(4, 8), "single memory location"),
    "inference": (lambda _: inference(), "Inplace update to inference tensor outside InferenceMode"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_writing(case: str) -> None:
    make, message = REFUSED[case]
    x = make(torch.ones(4, 8, requires_grad=True))
    before, version = x.detach().clone(), None if x.is_inference() else x._version
    with pytest.raises(RuntimeError, match=message):
        over(x)
    oracle.assert_same(x.detach(), before)
    assert (None if x.is_inference() else x._version) == version
    if x.grad_fn is not None:
        x.sum().backward()  # the graph is as it was


def test_inference_tensor_in_inference_mode() -> None:
    x = inference()
    with torch.inference_mode():
        assert over(x) is x
    assert set(x.tolist()) == {0, 2}


def test_wrong_arguments_are_refused_before_writing() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout(x, 2.0, inplace=True, key=KEY)
    with pytest.raises(RuntimeError, match="do not fit"):
        dropout(x, 0.5, inplace=True, key=KEY.fold(torch.arange(2)))
    with pytest.raises(IndexError, match="names dimension 5"):
        dropout(x, 0.5, inplace=True, key=KEY, broadcast_dims=(5,))
    assert x.equal(torch.ones(3, 4))


def test_leaf_may_be_written_without_grad() -> None:
    leaf = torch.ones(100, requires_grad=True)
    version = leaf._version
    with torch.no_grad():
        assert over(leaf) is leaf
    assert leaf._version == version + 1
    assert leaf.is_leaf
    assert leaf.requires_grad
    assert leaf.detach().equal(dropout(torch.ones(100), 0.5, key=KEY))


def test_written_leaf_without_requires_grad_stays_plain() -> None:
    x = torch.ones(100)
    over(x)
    assert x.grad_fn is None
    assert not x.requires_grad
