"""Tensors that are no plain memory: each gives what its dense copy gives, or is refused in words.

Their kinds are ZeroTensors, sparse and mkldnn tensors, and those of the vmap behind batched gradients.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor

import oracle
from thinned import Key
from thinned import functional as F

KEY = Key(3)
ZERO = torch.zeros((), dtype=torch.float64)
LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "dropout": partial(F.dropout, key=KEY),
    "dropout of p": partial(F.dropout, p=0.3, key=KEY),
    "in place": lambda x: F.dropout(x * 1, inplace=True, key=KEY),
    "shared": partial(F.dropout, broadcast_dims=(1,), key=KEY),
    "keys for rows": partial(F.dropout, key=KEY.fold(torch.arange(3))),
    "dropout1d": partial(F.dropout1d, key=KEY),
    "alpha_dropout": partial(F.alpha_dropout, training=True, key=KEY),
    "feature_alpha_dropout": partial(F.feature_alpha_dropout, training=True, key=KEY),
    "drop_path": partial(F.drop_path, drop_prob=0.5, training=True, key=KEY),
    "locked_dropout": partial(F.locked_dropout, key=KEY),
    "token_dropout": partial(F.token_dropout, key=KEY),
    "token_dropout behind a prefix": partial(F.token_dropout, num_prefix_tokens=1, key=KEY),
    "drop_head": partial(F.drop_head, key=KEY),
    "drop_head expected": partial(F.drop_head, normalize="expected", key=KEY),
    "drop_key": partial(F.drop_key, key=KEY),
    "drop_key shared": partial(F.drop_key, broadcast_dims=(1,), key=KEY),
    "drop_block1d": partial(F.drop_block1d, p=0.3, block_size=2, key=KEY),
    "drop_connect": partial(F.drop_connect, key=KEY),
    "targeted_dropout": partial(F.targeted_dropout, key=KEY),
    "zoneout": lambda x: F.zoneout(x, torch.zeros_like(x), key=KEY),
    "gaussian_dropout": partial(F.gaussian_dropout, key=KEY),
    "variational_dropout": partial(F.variational_dropout, log_alpha=ZERO, key=KEY),
    "concrete_dropout": partial(F.concrete_dropout, p_logit=ZERO, key=KEY),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def example() -> Tensor:
    return torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@layers
def test_a_gradient_that_is_a_zero_tensor(layer: Callable[[Tensor], Tensor]) -> None:
    """torch.sgn has one: its data pointer is null."""
    x = example().requires_grad_()
    torch.sgn(layer(x)).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@layers
def test_a_zero_tensor_among_the_tangents(layer: Callable[[Tensor], Tensor]) -> None:
    x = example()
    _, tangent = torch.func.jvp(lambda x: layer(torch.sgn(x)), (x,), (torch.ones_like(x),))
    assert not tangent.any()


@layers
def test_batched_gradients(layer: Callable[[Tensor], Tensor]) -> None:
    x = example()

    def f(x: Tensor) -> Tensor:
        return layer(x).square()

    one_by_one = torch.autograd.functional.jacobian(f, x)
    oracle.assert_same(torch.autograd.functional.jacobian(f, x, vectorize=True), one_by_one)
    leaf = x.clone().requires_grad_()
    along = torch.eye(60, dtype=torch.float64).reshape(60, *x.shape)
    (batched,) = torch.autograd.grad(f(leaf), leaf, along, is_grads_batched=True)
    oracle.assert_same(batched.reshape(one_by_one.shape), one_by_one)


@pytest.mark.parametrize("p", [0.5, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("key", [KEY, KEY.fold(torch.arange(9))], ids=["one key", "keys for rows"])
def test_a_sparse_gradient(p: float, dtype: torch.dtype, key: Key) -> None:
    """It stays sparse, as with torch.nn.functional.dropout, and has the dense one's bits."""
    weight = torch.randn(9, 4, dtype=dtype).requires_grad_()
    index = torch.tensor([1, 2, 2, 8])
    along = torch.randn(4, 4, dtype=dtype)
    gradients = []
    for sparse in (False, True):
        y = torch_functional.embedding(index, F.dropout(weight, p, key=key), sparse=sparse)
        gradients += torch.autograd.grad(y, weight, along)
    assert gradients[1].layout is torch.sparse_coo
    oracle.assert_same(gradients[1].to_dense(), gradients[0])


# Some need three dimensions or rows, which no embedding has. The others end in torch.where or masked_fill,
# whose derivatives in torch take no sparse gradient.
NOT_OF_A_WEIGHT = {"keys for rows", "drop_block1d", "locked_dropout", "targeted_dropout", "zoneout"}


@pytest.mark.parametrize("name", sorted(set(LAYERS) - NOT_OF_A_WEIGHT))
def test_a_sparse_gradient_of_each_layer(name: str) -> None:
    weight = torch.randn(9, 4, dtype=torch.float64).requires_grad_()
    gradients = []
    for sparse in (False, True):
        y = torch_functional.embedding(torch.tensor([1, 2, 8]), LAYERS[name](weight), sparse=sparse)
        gradients += torch.autograd.grad(y.square().sum(), weight)
    assert gradients[1].to_dense().equal(gradients[0])


def test_a_sparse_gradient_twice() -> None:
    """The second derivative goes through the sparse one."""
    weight = torch.randn(9, 4).requires_grad_()

    def second(sparse: bool) -> Tensor:
        y = torch_functional.embedding(torch.tensor([1, 2, 8]), F.dropout(weight, key=KEY), sparse=sparse)
        (grad,) = torch.autograd.grad(y.pow(3).sum(), weight, create_graph=True)
        dense: Tensor = torch.autograd.grad(grad.to_dense().square().sum(), weight)[0]
        return dense.to_dense()

    torch.testing.assert_close(second(True), second(False))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "csr": Tensor.to_sparse_csr,
    "bsr": lambda x: x.to_sparse_bsr((1, 1)),
    "mkldnn": Tensor.to_mkldnn,
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_are_refused(layout: str) -> None:
    x = LAYOUTS[layout](torch.eye(4))
    for call in (F.dropout, partial(F.dropout, inplace=True), partial(F.gaussian_dropout), F.drop_key):
        with pytest.raises(NotImplementedError, match=f"strided tensor, got layout {x.layout} of shape"):
            call(x, 0.5, key=KEY)
    assert x.to_dense().equal(torch.eye(4))
    assert F.dropout(x, 0.5, training=False) is x


def test_a_coo_tensor_is_dropped_from_as_its_dense_copy_is() -> None:
    x = torch.randn(4, 6).relu().to_sparse()
    y = F.dropout(x, 0.3, key=KEY)
    assert y.layout is torch.sparse_coo
    oracle.assert_same(y.to_dense(), F.dropout(x.to_dense(), 0.3, key=KEY))
    for call in (partial(F.alpha_dropout, training=True), F.drop_key, F.gaussian_dropout, F.drop_head):
        with pytest.raises(NotImplementedError, match=r"torch.sparse_coo of shape \(4, 6\) and"):
            call(x, 0.5, key=KEY)


def test_a_zero_tensor_is_dropped_from() -> None:
    zeros = torch._efficientzerotensor(7)
    assert F.dropout(zeros, key=KEY).equal(torch.zeros(7))
    with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
        F.dropout(zeros, key=KEY, inplace=True)
