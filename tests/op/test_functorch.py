"""torch.func's transforms: derivatives, and vmap over tensors, keys and both."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import oracle
import thinned
from thinned import Key
from thinned.functional import dropout

KEY = Key(7)
X = torch.randn(5, 6, 20)
KEYS = KEY.fold(torch.arange(5)).bits
ROWS = KEY.fold(torch.arange(30).reshape(5, 6)).bits
SCALE = thinned.spec.scale(thinned.spec.threshold(0.4))


def thin(x: Tensor, bits: Tensor) -> Tensor:
    return dropout(x, 0.4, key=Key.from_bits(bits))


def loss(x: Tensor) -> Tensor:
    return dropout(x, 0.4, key=KEY).pow(3).sum()


def test_grad() -> None:
    y = dropout(X, 0.4, key=KEY)
    torch.testing.assert_close(grad(loss)(X), 3 * y.square() * SCALE)


LINEAR = {
    "dropout": lambda x: dropout(x, 0.4, key=KEY),
    "gaussian_dropout": lambda x: thinned.functional.gaussian_dropout(x, 0.4, key=KEY),
    "variational_dropout": lambda x: thinned.functional.variational_dropout(x, x.new_ones(()), key=KEY),
}


@pytest.mark.parametrize("function", LINEAR)
def test_grad_where_a_graph_is_made(function: str) -> None:
    """Within make_fx, within a mode, and compiled."""
    derivative = grad(lambda x: LINEAR[function](x).pow(3).sum())
    expected = derivative(X)
    oracle.assert_same(make_fx(derivative)(X)(X), expected)
    oracle.assert_same(torch.compile(derivative, fullgraph=True, backend="aot_eager")(X), expected)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = derivative(mode.from_tensor(X))
    assert (type(fake), fake.shape) == (FakeTensor, X.shape)


def test_grad_of_grad() -> None:
    x = X.double()
    second = grad(lambda x: grad(loss)(x).sum())(x)
    expected = torch.where(thinned.keep_mask(KEY, x.shape, 0.4), 6 * x * SCALE**3, 0.0)
    torch.testing.assert_close(second, expected)


def test_vjp_and_jvp() -> None:
    tangent = torch.randn_like(X)
    y, pull, *_ = vjp(lambda x: dropout(x, 0.4, key=KEY), X)
    oracle.assert_same(y, dropout(X, 0.4, key=KEY))
    oracle.assert_same(pull(tangent)[0], dropout(tangent, 0.4, key=KEY))
    y, pushed, *_ = jvp(lambda x: dropout(x, 0.4, key=KEY), (X,), (tangent,))
    oracle.assert_same(y, dropout(X, 0.4, key=KEY))
    oracle.assert_same(pushed, dropout(tangent, 0.4, key=KEY))


@pytest.mark.parametrize("jacobian", [jacrev, jacfwd])
@pytest.mark.parametrize("key", [KEY, Key.from_bits(KEYS)], ids=["one key", "a key for each row"])
def test_jacobian(jacobian: Callable[..., Callable[[Tensor], Tensor]], key: Key) -> None:
    x = X[:, 0, :4]
    matrix = jacobian(lambda x: dropout(x, 0.4, key=key))(x).reshape(20, 20)
    kept = thinned.keep_mask(key, x.shape, 0.4).flatten()
    assert matrix.equal(torch.diag(torch.where(kept, SCALE, 0.0)))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_vmap_over_the_tensor_shares_the_mask(dim: int) -> None:
    y = vmap(lambda x: dropout(x, 0.4, key=KEY), in_dims=dim, out_dims=dim)(X)
    oracle.assert_same(y, torch.stack([dropout(x, 0.4, key=KEY) for x in X.unbind(dim)], dim))


@pytest.mark.parametrize("keys", [KEYS, ROWS], ids=["one key a call", "a key for each row"])
@pytest.mark.parametrize(("x_dim", "key_dim"), [(0, 0), (0, None), (None, 0)])
def test_vmap_over_keys(keys: Tensor, x_dim: int | None, key_dim: int | None) -> None:
    x, bits = X if x_dim == 0 else X[0], keys if key_dim == 0 else keys[0]
    y = vmap(thin, in_dims=(x_dim, key_dim))(x, bits)
    rows = [thin(x[i] if x_dim == 0 else x, bits[i] if key_dim == 0 else bits) for i in range(5)]
    oracle.assert_same(y, torch.stack(rows))
    if keys is KEYS and x_dim == key_dim:
        oracle.assert_same(y, thin(X, keys))


def test_nested_vmaps() -> None:
    y = vmap(vmap(thin))(X, ROWS)
    expected = [[thin(X[i, j], ROWS[i, j]) for j in range(6)] for i in range(5)]
    oracle.assert_same(y, torch.stack([torch.stack(row) for row in expected]))
    over = vmap(vmap(thin, in_dims=(None, 0)), in_dims=(0, None))(X, KEYS)
    oracle.assert_same(over, torch.stack([torch.stack([thin(x, bits) for bits in KEYS]) for x in X]))


def test_vmap_folds_inside() -> None:
    y = vmap(lambda x, i: dropout(x, 0.4, key=KEY.fold(i)))(X, torch.arange(5))
    oracle.assert_same(y, torch.stack([dropout(x, 0.4, key=KEY.fold(i)) for i, x in enumerate(X)]))


def test_vmap_of_the_mask() -> None:
    masks = vmap(lambda bits: thinned.keep_mask(Key.from_bits(bits), (6, 20), 0.4))(KEYS)
    expected = [thinned.keep_mask(Key.from_bits(bits), (6, 20), 0.4) for bits in KEYS]
    assert masks.equal(torch.stack(expected))


def test_vmap_in_place() -> None:
    x = X.clone()
    y = vmap(lambda x, bits: dropout(x, 0.4, inplace=True, key=Key.from_bits(bits)))(x, KEYS)
    oracle.assert_same(y, thin(X, KEYS))
    oracle.assert_same(x, y)


def test_per_sample_gradients() -> None:
    layer = torch.nn.Sequential(torch.nn.Linear(20, 3), thinned.Dropout(0.4))
    parameters = dict(layer.named_parameters())

    def sample_loss(parameters: dict[str, Tensor], x: Tensor, bits: Tensor) -> Tensor:
        hidden = functional_call(layer[0], parameters, x)
        return dropout(hidden, 0.4, key=Key.from_bits(bits)).square().sum()

    short = {name.removeprefix("0."): value.detach() for name, value in parameters.items()}
    together = vmap(grad(sample_loss), in_dims=(None, 0, 0))(short, X[:, 0], KEYS)
    for i in range(5):
        alone = grad(sample_loss)(short, X[i, 0], KEYS[i])
        for name, value in alone.items():
            torch.testing.assert_close(together[name][i], value)


def test_randomness_error() -> None:
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: dropout(x, 0.5))(X)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_randomness_follows_the_seed(randomness: str) -> None:
    def run() -> Tensor:
        torch.manual_seed(3)
        return vmap(lambda x: dropout(x, 0.5), randomness=randomness)(torch.ones(5, 100))

    assert run().equal(run())


def test_randomness_in_a_map_of_gradients() -> None:
    def kept(x: Tensor) -> Tensor:
        return grad(lambda x: dropout(x, 0.5).sum())(x)

    assert len({tuple(row) for row in vmap(kept, randomness="different")(torch.ones(5, 100)).tolist()}) == 5


def test_drawn_key_is_the_same_within_a_transform() -> None:
    for seed in range(16):
        torch.manual_seed(seed)
        plain = dropout(torch.ones(100), 0.5)
        torch.manual_seed(seed)
        assert vjp(lambda x: dropout(x, 0.5), torch.ones(100))[0].equal(plain)


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
def test_linearize() -> None:
    y, push = torch.func.linearize(lambda x: dropout(x, 0.4, key=KEY), X)
    oracle.assert_same(y, dropout(X, 0.4, key=KEY))
    oracle.assert_same(push(X), y)


def test_functionalize() -> None:
    def f(x: Tensor) -> Tensor:
        return dropout(x * 1, 0.4, inplace=True, key=KEY)

    oracle.assert_same(torch.func.functionalize(f)(X), dropout(X, 0.4, key=KEY))
