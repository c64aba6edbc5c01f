"""DropConnect and WeightDrop: dropout of weights, one mask for each call."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import chance
import oracle
import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers.weights import ENTRIES, DropConnectFormula
from thinned.functional import drop_connect
from verdicts import verdict

KEY = thinned.Key(7)
MODULES = {
    "Linear": (lambda: nn.Linear(6, 5), ["weight", "bias"], (3, 6)),
    "Conv2d": (lambda: nn.Conv2d(2, 3, 3), ["weight"], (3, 2, 5, 5)),
    "LSTM": (lambda: nn.LSTM(6, 5, 2), ["weight_hh_l0", "weight_hh_l1"], (4, 3, 6)),
    "GRU": (lambda: nn.GRU(6, 5, bidirectional=True), ["weight_hh_l0", "weight_hh_l0_reverse"], (4, 3, 6)),
    "Sequential": (lambda: nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), ["1.weight"], (3, 6)),
    "VariationalLSTM": (lambda: thinned.VariationalLSTM(6, 5), ["weight_hh_l0"], (4, 3, 6)),
}
each_module = pytest.mark.parametrize("name", MODULES)


def made(name: str) -> tuple[nn.Module, list[str], Tensor]:
    torch.manual_seed(0)
    make, weights, shape = MODULES[name]
    return make(), weights, torch.randn(shape)


def output(module: nn.Module, *args: Tensor, **kwargs: thinned.Key) -> Tensor:
    y = module(*args, **kwargs)
    return y if isinstance(y, Tensor) else y[0]


def by_hand(module: nn.Module, weights: list[str], p: float, key: thinned.Key) -> nn.Module:
    """The module with weights multiplied by their masks."""
    module = copy.deepcopy(module)
    with torch.no_grad():
        for name in weights:
            weight = module.get_parameter(name)
            weight.mul_(thinned.keep_mask(key.fold(name), weight.shape, p)).div_(1 - p)
    return module


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("key", [KEY, KEY.fold(torch.arange(40))], ids=["one key", "a key for each row"])
def test_specification(dtype: torch.dtype, key: thinned.Key) -> None:
    weight = oracle.specials((40, 30), dtype)
    oracle.assert_same(drop_connect(weight, 0.3, key=key), oracle.dropout(weight, key.bits, 0.3))


def test_as_the_formula_in_distribution() -> None:
    """How many of a row's 5 connections are dropped."""
    layers = thinned.DropConnect(0.3), DropConnectFormula(0.3)
    dropped = [(layer(torch.ones(50_000, 5)) == 0).sum(1).numpy() for layer in layers]
    assert chance.homogeneity(*dropped) > chance.FALSE_ALARM


class Unscaled(DropConnectFormula):
    """As in the paper's training."""

    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) * (1 - self.p)


class Biased(DropConnectFormula):
    def forward(self, weight: Tensor) -> Tensor:
        return super().forward(weight) * 1.02


class Rows(DropConnectFormula):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * super().forward(torch.ones_like(weight[:, :1]))


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("drop rate at p = 0.3", lambda p: DropConnectFormula(p * 1.02)),
        ("mean of products", Unscaled),
        ("mean of products", Biased),
        ("plain product", Biased),
        ("neighbours", Rows),
        ("kept values", Biased),
    ],
)
def test_wrong_laws_are_seen(law: str, wrong: Callable[..., nn.Module]) -> None:
    assert verdict(ENTRIES[0], law, wrong) is Verdict.BROKEN


def test_a_mask_for_each_example() -> None:
    """The paper's, by vmap over the keys of the examples."""
    weight, x = torch.randn(5, 6), torch.randn(4, 6)

    def example(x: Tensor, bits: Tensor) -> Tensor:
        return drop_connect(weight, key=thinned.Key.from_bits(bits)).mv(x)

    y = torch.vmap(example)(x, KEY.fold(torch.arange(4)).bits)
    for n in range(4):
        torch.testing.assert_close(y[n], drop_connect(weight, key=KEY.fold(n)).mv(x[n]))


# DropConnect as a parametrization


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["Linear", "Conv2d", "LSTM", "GRU"])
def test_parametrization(name: str) -> None:
    """One mask a call, another in the next, and none in evaluation."""
    module, weights, x = made(name)
    plain = output(module, x)
    for weight in weights:
        parametrize.register_parametrization(module, weight, thinned.DropConnect(0.5))
    torch.manual_seed(1)
    y = output(module, x)
    assert not y.equal(output(module, x))
    torch.manual_seed(1)
    assert y.equal(output(module, x))
    y.sum().backward()
    original = module.parametrizations[weights[0]].original
    dropped = (original.grad == 0).double().mean().item()
    assert 0.1 < dropped < 0.9
    torch.manual_seed(1)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager") if name == "Linear" else module
    torch.testing.assert_close(output(compiled, x), y)
    assert output(module.eval(), x).equal(plain)


def test_cached_keeps_one_mask() -> None:
    linear = parametrize.register_parametrization(nn.Linear(6, 5), "weight", thinned.DropConnect(0.5))
    x = torch.randn(3, 6)
    with parametrize.cached():
        assert linear(x).equal(linear(x))
    assert not linear(x).equal(linear(x))


def test_what_torch_allows_of_a_parametrized_module() -> None:
    linear = parametrize.register_parametrization(nn.Linear(6, 5), "weight", thinned.DropConnect(0.5))
    weight = linear.parametrizations.weight.original
    twin = copy.deepcopy(linear)
    torch.manual_seed(0)
    y = linear(torch.ones(3, 6))
    torch.manual_seed(0)
    assert twin(torch.ones(3, 6)).equal(y)
    with torch.no_grad():
        twin.weight = torch.ones(5, 6)
    assert twin.eval().weight.equal(torch.ones(5, 6))
    twin.load_state_dict(linear.state_dict())
    assert twin.weight.equal(weight)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(linear)
    parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
    assert linear.weight is weight


# WeightDrop


@each_module
def test_weight_drop_multiplies_the_weights(name: str) -> None:
    module, weights, x = made(name)
    y = output(thinned.WeightDrop(module, weights, 0.3), x, key=KEY)
    torch.testing.assert_close(y, output(by_hand(module, weights, 0.3, KEY), x))
    assert not torch.allclose(y, output(module, x))


@each_module
def test_weight_drop_leaves_the_module_as_it_was(name: str) -> None:
    module, weights, x = made(name)
    parameters, plain, keys = list(module.parameters()), output(module, x), list(module.state_dict())
    layer = thinned.WeightDrop(module, weights, 0.5)
    first, second = output(layer, x), output(layer, x)
    assert not first.equal(second)
    assert output(module, x).equal(plain)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert list(layer.state_dict()) == [f"module.{key}" for key in keys]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert output(twin, x, key=KEY).equal(output(layer, x, key=KEY))
    state = torch.get_rng_state()
    assert output(layer.eval(), x).equal(plain)
    assert output(thinned.WeightDrop(module, weights, 0.0), x).equal(plain)
    assert torch.get_rng_state().equal(state)


@each_module
def test_weight_drop_gradient(name: str) -> None:
    """Two calls before one backward call, each with its own masks."""
    module, weights, x = made(name)
    layer = thinned.WeightDrop(module, weights, 0.3)
    keys = [KEY.fold(i) for i in range(2)]
    sum(output(layer, x, key=key).square().sum() for key in keys).backward()
    for weight in weights:
        expected = 0
        for key in keys:
            twin = by_hand(module, weights, 0.3, key)
            twin.zero_grad()
            output(twin, x).square().sum().backward()
            parameter = twin.get_parameter(weight)
            expected += parameter.grad * thinned.keep_mask(key.fold(weight), parameter.shape, 0.3) / 0.7
        torch.testing.assert_close(module.get_parameter(weight).grad, expected)


def test_one_mask_for_all_steps_of_an_lstm() -> None:
    module, weights, _ = made("LSTM")
    layer = thinned.WeightDrop(module, weights, 0.5)
    x = torch.randn(50, 3, 6)
    whole, state = layer(x, key=KEY)
    first, middle = layer(x[:20], key=KEY)
    second, last = layer(x[20:], middle, key=KEY)
    torch.testing.assert_close(whole, torch.cat([first, second]))
    torch.testing.assert_close(state, last)


def test_no_weight_is_moved_and_no_warning_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mocks cuDNN's move and warning, since not every machine has cuDNN."""
    module, weights, x = made("LSTM")
    layer = thinned.WeightDrop(module, weights, 0.5)
    moved = []
    monkeypatch.setattr(nn.LSTM, "flatten_parameters", lambda module: moved.append(module))
    warn = "RNN module weights are not part of single contiguous chunk of memory."
    module.register_forward_hook(lambda *_: warnings.warn(warn, stacklevel=1))
    output(layer, x)
    assert not moved
    assert "flatten_parameters" not in vars(module)
    with pytest.warns(UserWarning, match="single contiguous chunk"):
        output(layer.eval(), x)
    assert moved  # back to the parameters, which are laid out for cuDNN again


def test_tied_weights_are_dropped_only_where_named() -> None:
    first, second = nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False)
    second.weight = first.weight
    module, x = nn.Sequential(first, second), torch.randn(3, 5)
    y = thinned.WeightDrop(module, "0.weight", 0.5)(x, key=KEY)
    dropped = drop_connect(first.weight, 0.5, key=KEY.fold("0.weight"))
    torch.testing.assert_close(y, x @ dropped.t() @ first.weight.t())


# Weights that are computed from other parameters

COMPUTED = {
    "weight norm": parametrizations.weight_norm,
    "spectral norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "of one's own": lambda module, name: parametrize.register_parametrization(module, name, nn.Tanh()),
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.3),
}
REMOVED = {
    "weight norm by a hook": nn.utils.remove_weight_norm,
    "spectral norm by a hook": nn.utils.remove_spectral_norm,
    "pruned": prune.remove,
}
each_way = pytest.mark.parametrize("way", COMPUTED)


@each_way
@pytest.mark.parametrize("name", ["Linear", "LSTM"])
@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_computed_weights(way: str, name: str, wrapped_first: bool) -> None:
    """The computed weight is dropped from, and the parameters that it is computed from get the gradient."""
    weight, x = ("weight", torch.randn(3, 6)) if name == "Linear" else ("weight_hh_l0", torch.randn(4, 3, 6))

    def twin() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(6, 5) if name == "Linear" else nn.LSTM(6, 5)

    module, like = twin(), COMPUTED[way](twin(), weight)
    layer = thinned.WeightDrop(module, weight, 0.3) if wrapped_first else None
    torch.manual_seed(0)
    module = COMPUTED[way](module, weight)
    layer, names = layer or thinned.WeightDrop(module, weight, 0.3), list(module.state_dict())
    # A spectral norm iterates in each lookup, of which torch makes several in a call of an LSTM.
    like.train(name == "Linear" or "spectral" not in way)
    like.load_state_dict(module.state_dict())
    module.train(like.training)
    if way in REMOVED:
        output(like, x)  # the hook computes the weight
    dropped = drop_connect(getattr(like, weight), 0.3, key=KEY.fold(weight))
    y = output(layer, x, key=KEY)
    parameters = {
        key: dropped if key == weight else getattr(like, key) for key in dict(twin().named_parameters())
    }
    expected = torch.func.functional_call(twin(), parameters, x)
    expected = expected if name == "Linear" else expected[0]
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(module.state_dict(), like.state_dict())
    grads = [
        torch.autograd.grad(result.square().sum(), list(each.parameters()))
        for result, each in ((y, module), (expected, like))
    ]
    torch.testing.assert_close(*grads)
    assert all(bool(grad.any()) for grad in grads[0])
    assert list(module.state_dict()) == names
    assert getattr(module, weight).ne(0).all() or way == "pruned"
    plain = output(module.eval(), x)
    assert output(layer.eval(), x).equal(plain)
    if way in REMOVED:
        REMOVED[way](module, weight)
    else:
        parametrize.remove_parametrizations(module, weight)
    torch.testing.assert_close(output(layer, x), plain)
    y = output(layer.train(), x, key=KEY)
    torch.testing.assert_close(y, output(by_hand(module, [weight], 0.3, KEY), x))


def test_copy_of_a_parametrized_module() -> None:
    layer, x = thinned.WeightDrop(parametrizations.weight_norm(nn.Linear(6, 5)), "weight"), torch.randn(3, 6)
    twin = copy.deepcopy(layer)
    assert twin(x, key=KEY).equal(layer(x, key=KEY))
    with torch.no_grad():
        twin.module.parametrizations.weight.original0.mul_(2)
    assert not twin(x, key=KEY).equal(layer(x, key=KEY))


def test_parametrized_weight_within_cached() -> None:
    """The cache keeps the computed weight, and each call its own mask."""
    linear = parametrizations.weight_norm(nn.Linear(6, 5))
    layer, x = thinned.WeightDrop(linear, "weight"), torch.randn(3, 6)
    expected = [layer(x, key=KEY.fold(i)) for i in range(2)]
    with parametrize.cached():
        for before in (False, True):
            weight = linear.weight if before else None
            assert [layer(x, key=KEY.fold(i)).equal(expected[i]) for i in range(2)] == [True, True]
            assert weight is None or linear.weight is weight
            assert linear.weight.equal(linear.parametrizations.weight())


@pytest.mark.usefixtures("fresh_compiler")
def test_parametrized_weight_compiled() -> None:
    layer, x = thinned.WeightDrop(parametrizations.weight_norm(nn.Linear(6, 5)), "weight"), torch.randn(3, 6)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, key=KEY), layer(x, key=KEY))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_module_called_twice_drops_once() -> None:
    """A hook that computes the weight in the first call only leaves the dropped one in the second."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.utils.weight_norm(nn.Linear(6, 6, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    module, x = Twice(), torch.randn(3, 6)
    layer = thinned.WeightDrop(module, "linear.weight", 0.3)
    dropped = drop_connect(module.linear.weight, 0.3, key=KEY.fold("linear.weight"))
    torch.testing.assert_close(layer(x, key=KEY), x @ dropped.t() @ dropped.t())
    for hook in (*module.linear._forward_pre_hooks,):
        del module.linear._forward_pre_hooks[hook]
    module.linear.register_forward_pre_hook(lambda *_: None)
    torch.testing.assert_close(layer(x, key=KEY), x @ dropped.t() @ dropped.t())
    assert len(module.linear._forward_pre_hooks) == 1


def test_weights_in_other_places() -> None:
    """The weight of a replica is no Parameter, functional_call swaps one, and a meta weight has no values."""
    linear, x = nn.Linear(6, 5, bias=False), torch.randn(3, 6)
    layer = thinned.WeightDrop(linear, "weight", 0.3)
    weight, other = linear.weight.detach() * 1, torch.randn(5, 6)
    expected = layer(x, key=KEY)
    swapped = torch.func.functional_call(layer, {"module.weight": other}, x, {"key": KEY})
    torch.testing.assert_close(swapped, x @ drop_connect(other, 0.3, key=KEY.fold("weight")).t())
    del linear.weight
    linear.weight = weight
    assert layer(x, key=KEY).equal(expected)
    assert linear.weight is weight
    meta = thinned.WeightDrop(nn.Linear(6, 5, device="meta"), "weight")
    assert meta(torch.ones(3, 6, device="meta"), key=KEY).shape == (3, 5)
    attention = thinned.WeightDrop(
        nn.MultiheadAttention(6, 2, batch_first=True), ["in_proj_weight", "out_proj.weight"]
    )
    y, _ = attention(*[x[None]] * 3, key=KEY)
    twin = by_hand(attention.module, list(attention.weights), 0.5, KEY)
    torch.testing.assert_close(y, twin(*[x[None]] * 3)[0])


def test_weight_that_is_gone() -> None:
    """A library for low-rank adaptation wraps modules so."""

    class Adapted(nn.Module):
        def __init__(self, base_layer: nn.Module) -> None:
            super().__init__()
            self.base_layer = base_layer

        @property
        def weight(self) -> Tensor:
            return self.base_layer.weight

    layer = thinned.WeightDrop(nn.Linear(6, 5), "weight")
    layer.module = Adapted(layer.module)
    with pytest.raises(
        RuntimeError, match=r"Adapted no longer has the weight 'weight'; accepted: base_layer.weight"
    ):
        layer(torch.ones(3, 6))


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"Linear has no parameter 'weights'; accepted: weight, bias"):
        thinned.WeightDrop(nn.Linear(2, 3), ["weights"])
    layer = thinned.WeightDrop(nn.Linear(2, 3), ["weight"])
    with pytest.raises(
        RuntimeError, match=r"keys of shape \(4,\) do not fit a weight that all samples share"
    ):
        layer(torch.ones(4, 2), key=KEY.fold(torch.arange(4)))
