"""Derivatives in both modes and of any order, and what is kept for them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import oracle
import thinned
from thinned import op, spec
from thinned.functional import dropout
from thinned.geometry import Geometry

KEY = thinned.Key(7)
ROWS = KEY.fold(torch.arange(3))
INPUTS = {
    "real": torch.randn(3, 4, dtype=torch.float64),
    "complex": torch.randn(3, 4, dtype=torch.complex128),
    "permuted": torch.randn(2, 3, 2, dtype=torch.float64).permute(1, 2, 0),
}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "one key": lambda x: dropout(x, 0.4, key=KEY),
    "a key for each row": lambda x: dropout(x, 0.4, key=ROWS),
    "shared": lambda x: dropout(x, 0.4, key=KEY, broadcast_dims=(-1,)),
    "all dropped": lambda x: dropout(x, 1.0, key=KEY),
    "in place": lambda x: dropout(x * 1, 0.4, inplace=True, key=KEY),
    "shift and fill": lambda x: op.masked_affine(
        x, KEY.bits, Geometry(tuple(range(x.dim())), 9), spec.threshold(0.4), 1.5, 0.5, -2.0
    ),
}


@pytest.mark.parametrize("x", INPUTS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_first_and_second_derivatives(function: str, x: str) -> None:
    leaf = INPUTS[x].detach().requires_grad_()
    forward = function != "in place"  # torch refuses to write over a value whose tangent it carries
    assert torch.autograd.gradcheck(FUNCTIONS[function], leaf, check_forward_ad=forward)
    assert torch.autograd.gradgradcheck(FUNCTIONS[function], leaf)


def test_undefined_gradients() -> None:
    x = INPUTS["real"].detach().requires_grad_()
    assert torch.autograd.gradcheck(FUNCTIONS["one key"], x, check_undefined_grad=True, fast_mode=True)


def test_third_derivative() -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = dropout(x, 0.4, key=KEY).pow(4).sum()
    for _ in range(3):
        (y,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    scale = spec.scale(spec.threshold(0.4))
    expected = torch.where(thinned.keep_mask(KEY, (50,), 0.4), 24 * scale**4 * x, 0.0)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_gradient_is_the_specification_of_the_incoming_one(dtype: torch.dtype) -> None:
    x = torch.ones(7, 90, dtype=dtype, requires_grad=True)
    incoming = oracle.specials((7, 90), dtype)
    (grad,) = torch.autograd.grad(dropout(x, 0.1, key=KEY), x, incoming)
    oracle.assert_same(grad, oracle.dropout(incoming, KEY.bits, 0.1))


def test_backward_twice_through_a_kept_graph() -> None:
    x = torch.ones(1000, requires_grad=True)
    y = dropout(x)
    first, second = (torch.autograd.grad(y.sum(), x, retain_graph=True)[0] for _ in range(2))
    assert first.equal(second)


@pytest.mark.parametrize("shape", [(), (4,)], ids=["one key", "a key for each row"])
def test_writing_the_key_does_not_change_the_gradient_silently(shape: tuple[int, ...]) -> None:
    """Either the old key is used, or autograd says that what it needs was written."""
    bits = torch.full(shape, 7)
    x = torch.ones(4, 1000, requires_grad=True)
    y = dropout(x, 0.5, key=thinned.Key.from_bits(bits))
    bits.fill_(8)
    with contextlib.suppress(RuntimeError):
        assert torch.autograd.grad(y.sum(), x)[0].equal(y.detach())


def saved_bytes(function: Callable[[Tensor], Tensor], x: Tensor) -> int:
    sizes: list[int] = []

    def pack(saved: Tensor) -> Tensor:
        sizes.append(saved.untyped_storage().nbytes())
        return saved

    with saved_tensors_hooks(pack, lambda saved: saved):
        function(x)
    return sum(sizes)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("key", [None, KEY])
def test_at_most_the_key_is_saved(key: thinned.Key | None, inplace: bool) -> None:
    x = torch.randn(300, 300, requires_grad=True) * 1
    assert saved_bytes(lambda x: x.square(), x) == 4 * 300 * 300
    assert saved_bytes(lambda x: dropout(x, 0.5, inplace=inplace, key=key), x) <= 8


def test_no_tensor_of_its_size_is_held_by_the_graph() -> None:
    """Neither as a saved tensor nor in any other attribute of the node."""
    x = torch.randn(300, 300, requires_grad=True) * 1
    y = dropout(x, 0.5)
    node = y.grad_fn
    assert node is not None
    held = [value for value in vars(node).values() if isinstance(value, Tensor)]
    held += list(getattr(node, "saved_tensors", ()))
    assert sum(tensor.numel() for tensor in held) <= 1


class Subclass(Tensor):
    pass


@pytest.mark.parametrize("kind", [Tensor, Subclass])
def test_both_modes_keep_the_class(kind: type[Tensor]) -> None:
    x, tangent = torch.randn(2, 30, 40).as_subclass(kind)
    with forward_ad.dual_level():
        y = dropout(forward_ad.make_dual(x, tangent), 0.4, key=KEY)
        assert type(y) is kind
        primal, derivative = forward_ad.unpack_dual(y)
    assert derivative is not None
    oracle.assert_same(primal, dropout(x, 0.4, key=KEY))
    oracle.assert_same(derivative, dropout(tangent, 0.4, key=KEY))
    leaf = x.detach().requires_grad_()
    y = dropout(leaf, 0.4, key=KEY)
    assert type(y) is kind
    oracle.assert_same(torch.autograd.grad(y.sum(), leaf)[0], dropout(torch.ones(30, 40), 0.4, key=KEY))


def test_vectorised_jacobian_in_forward_mode() -> None:
    x = torch.randn(30)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: dropout(x, 0.4, key=KEY), x, vectorize=True, strategy="forward-mode"
    )
    assert jacobian.equal(torch.diag(dropout(torch.ones(30), 0.4, key=KEY)))


def test_forward_over_reverse() -> None:
    x = torch.randn(30, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        return dropout(x, 0.4, key=KEY).pow(3).sum()

    hessian = torch.autograd.functional.hessian(loss, x)
    scale = spec.scale(spec.threshold(0.4))
    kept = thinned.keep_mask(KEY, (30,), 0.4)
    torch.testing.assert_close(hessian, torch.diag(torch.where(kept, 6 * scale**3 * x, 0.0)))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_anomaly_mode_finds_nothing() -> None:
    x = torch.randn(100, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        dropout(x, 0.5).sum().backward()


def test_deterministic_algorithms() -> None:
    x = torch.randn(100, 3, requires_grad=True)
    y = dropout(x, 0.5, key=KEY)
    torch.use_deterministic_algorithms(True)
    try:
        again = dropout(x, 0.5, key=KEY)
        again.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    oracle.assert_same(again, y)
