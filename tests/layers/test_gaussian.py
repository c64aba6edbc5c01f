"""Gaussian and variational dropout: the law of their noise, their gradients, and the divergence."""

from __future__ import annotations

import copy
import math
import pickle
import re
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import thinned
from subject import Subject
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers.entry import Implementation
from thinned.compare.layers.gaussian import (
    ENTRIES,
    GaussianDropoutFormula,
    VariationalDropoutFormula,
    true_divergence,
)
from thinned.compare.settings import Settings
from thinned.layers.gaussian import (
    GaussianDropout,
    VariationalDropout,
    gaussian_dropout,
    variational_dropout,
    variational_kl,
)
from thinned.op.noise import normal

KEY = thinned.Key(7)
QUICK = Settings(quick=True)
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOG_ALPHA = torch.tensor(-0.7)
N = 300_000

variational = partial(variational_dropout, log_alpha=LOG_ALPHA)
gaussian = partial(gaussian_dropout, p=0.3)
FUNCTIONS = [pytest.param(gaussian, id="gaussian"), pytest.param(variational, id="variational")]
LAYERS = [
    pytest.param(GaussianDropout, id="gaussian"),
    pytest.param(VariationalDropout, id="variational"),
    pytest.param(partial(VariationalDropout, num_features=5), id="variational of features"),
]

Function = Callable[..., Tensor]


class Wrong(nn.Module):
    """A multiplication by noise that ``make`` makes for the input's shape."""

    def __init__(self, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.make = make

    def forward(self, x: Tensor) -> Tensor:
        return x * self.make(x)


SIGMA = math.sqrt(0.3 / 0.7)
WRONG = {
    "mean, variance": lambda x: 1 + 1.02 * SIGMA * torch.randn_like(x),
    "distribution": lambda x: 1 + SIGMA * math.sqrt(3) * (2 * torch.rand_like(x) - 1),
    "independence": lambda x: 1 + SIGMA * torch.randn(len(x), 1).expand_as(x),
    "noise of gradient": lambda x: (1 + SIGMA * torch.randn_like(x)) * x,
}


@pytest.mark.parametrize("name", WRONG)
def test_law_catches(name: str) -> None:
    law = next(law for law in ENTRIES[0].laws if law.name == name)
    wrong = Implementation("wrong", lambda p: Wrong(WRONG[name]))  # noqa: ARG005
    assert examine(law, wrong, QUICK).verdict is Verdict.BROKEN


@pytest.mark.parametrize("name", ["gradient of alpha", "divergence"])
def test_law_of_alpha_catches(name: str) -> None:
    class Half(VariationalDropoutFormula):
        """The noise's variance is ``alpha**2``, and no gradient knows."""

        def forward(self, x: Tensor) -> Tensor:
            sigma = self.log_alpha.exp().detach() + 0 * self.log_alpha
            return x * (1 + sigma * torch.randn_like(x))

        def kl(self) -> Tensor:
            return 1.05 * super().kl()

    law = next(law for law in ENTRIES[1].laws if law.name == name)
    assert examine(law, Implementation("wrong", Half), QUICK).verdict is Verdict.BROKEN


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.9])
def test_mean_and_variance_of_ones(p: float) -> None:
    factor = gaussian_dropout(torch.ones(N), p, key=KEY).double().numpy()
    variance = p / (1 - p)
    assert chance.mean(factor, 1, variance) > chance.FALSE_ALARM
    # The square of a normal number has twice the variance of its mean, squared.
    assert chance.mean((factor - 1) ** 2, variance, 2 * variance**2) > chance.FALSE_ALARM
    assert chance.mean((1.02 * (factor - 1)) ** 2, variance, 2 * variance**2) < chance.FALSE_ALARM


def test_agrees_with_the_formula_in_distribution() -> None:
    torch.manual_seed(3)
    ours = gaussian(torch.ones(N), key=KEY)
    formula = GaussianDropoutFormula(0.3)(torch.ones(N))
    assert stats.ks_2samp(ours, formula).pvalue > chance.FALSE_ALARM
    assert stats.ks_2samp(ours, 1 + 1.03 * (formula - 1)).pvalue < chance.FALSE_ALARM


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_factor_is_that_of_the_noise_and_rounded_once(subject: Subject, dtype: torch.dtype) -> None:
    x = torch.randn(6, 50, dtype=torch.float64).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    z = normal(KEY, (6, 50), dtype=wide)
    for p in (0.3, 0.5):
        expected = (x.to(wide) * (1 + z * math.sqrt(p / (1 - p)))).to(dtype)
        y = gaussian_dropout(x.to(subject.device), p, key=KEY)
        log_alpha = torch.tensor(p / (1 - p), dtype=torch.float64).log()
        learned = variational_dropout(x.to(subject.device), log_alpha.to(subject.device), key=KEY)
        assert y.dtype == learned.dtype == dtype
        if subject.device == "cpu":
            assert y.equal(expected)
        torch.testing.assert_close(y.cpu(), expected, rtol=4 * torch.finfo(dtype).eps, atol=1e-6)
        # Its sigma goes through exp, in float32.
        torch.testing.assert_close(learned.cpu(), expected, rtol=4 * torch.finfo(dtype).eps, atol=2e-6)


def test_complex_numbers_have_one_factor_for_both_parts() -> None:
    factor = gaussian(torch.ones(50), key=KEY)
    z = torch.randn(50, dtype=torch.complex64)
    torch.testing.assert_close(gaussian(z, key=KEY), z * factor)
    assert gaussian(z, key=KEY).equal(torch.complex(z.real * factor, z.imag * factor))
    assert variational(z, key=KEY).dtype == torch.complex64
    z, log_alpha = z.to(torch.complex128).requires_grad_(), LOG_ALPHA.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda z, a: variational_dropout(z, a, key=KEY), (z, log_alpha))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_strides(function: Function) -> None:
    x = torch.randn(4, 5, 6)
    expected = function(x, key=KEY)
    for view in (x.transpose(0, 2).contiguous().transpose(0, 2), torch.cat([x, x], 2)[..., :6]):
        assert not view.is_contiguous()
        assert function(view, key=KEY).equal(expected)
    assert function(torch.tensor(2.0), key=KEY).shape == ()
    assert function(torch.ones(0, 3), key=KEY).shape == (0, 3)
    before = x.clone()
    function(x, key=KEY)
    assert x.equal(before)


@pytest.mark.parametrize("dims", [(0,), (1, 2), (-1,)], ids=str)
def test_broadcast_dims_share_one_factor(dims: tuple[int, ...]) -> None:
    shape = (3, 4, 5)
    small = [1 if dim in dims or dim - 3 in dims else size for dim, size in enumerate(shape)]
    y = gaussian_dropout(torch.ones(shape), 0.3, key=KEY, broadcast_dims=dims)
    assert y.equal(gaussian(torch.ones(small), key=KEY).expand(shape))
    assert len(y.unique()) == math.prod(small)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_keys(function: Function) -> None:
    x = torch.randn(4, 37)
    assert function(x, key=KEY).equal(function(x, key=KEY))
    assert not function(x, key=KEY).equal(function(x, key=thinned.Key(8)))
    torch.manual_seed(3)
    drawn = function(x)
    torch.manual_seed(3)
    assert function(x).equal(drawn)
    assert not function(x).equal(drawn)
    batch = KEY.fold(torch.arange(4))
    rows = function(x, key=batch)
    for place in range(4):
        assert rows[place].equal(function(x[place], key=KEY.fold(place)))
    assert function(x.flip(0), key=KEY.fold(torch.arange(4).flip(0))).equal(rows.flip(0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_derivatives_in_the_input(function: Function) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    for key in (KEY, KEY.fold(torch.arange(4))):
        call = partial(function, key=key)
        assert torch.autograd.gradcheck(call, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, x)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (4, 5)], ids=str)
def test_derivatives_in_log_alpha(shape: tuple[int, ...]) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    log_alpha = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    call = partial(variational_dropout, key=KEY)
    check = partial(torch.autograd.gradcheck, check_forward_ad=True, check_batched_grad=True)
    assert check(lambda x, a: call(x, a), (x, log_alpha))
    assert torch.autograd.gradgradcheck(lambda x, a: call(x, a), (x, log_alpha))
    assert check(lambda a: call(x.detach(), a), (log_alpha,))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_are_in_the_dtypes_of_what_they_are_for(dtype: torch.dtype) -> None:
    x = torch.randn(200, 50, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    gradients = []
    for each in (x.to(dtype), x.to(dtype).to(wide)):
        inputs = each.clone().requires_grad_(), LOG_ALPHA.clone().requires_grad_()
        y = variational_dropout(*inputs, key=KEY)
        gradients.append(torch.autograd.grad(y.square().sum(), inputs))
        assert [gradient.dtype for gradient in gradients[-1]] == [each.dtype, torch.float32]
    tolerance = 8 * torch.finfo(dtype).eps + 1e-5
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_nothing_but_inputs_and_key_is_saved(function: Function, dtype: torch.dtype) -> None:
    x = torch.randn(1000, dtype=dtype, requires_grad=True)
    function = (
        partial(function, log_alpha=LOG_ALPHA.clone().requires_grad_())
        if function is variational
        else function
    )
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
    ):
        function(x)
    large = {tensor.data_ptr() for tensor in kept if tensor.numel() > 1} - {x.data_ptr()}
    assert kept
    assert not large


@pytest.mark.parametrize("make", LAYERS)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_gradients_for_each_example(make: Callable[[], nn.Module], randomness: str) -> None:
    layer = make()
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, parameters, (x,), {"key": KEY}).square().sum()

    x = torch.randn(3, 4, 5)
    found = torch.func.vmap(torch.func.grad(loss, (0, 1)), (None, 0), randomness=randomness)(parameters, x)
    for place, each in enumerate(x):
        wanted = torch.func.grad(loss, (0, 1))(parameters, each)
        torch.testing.assert_close(found[1][place], wanted[1])
        for name in parameters:
            torch.testing.assert_close(found[0][name][place], wanted[0][name])


# torch warns of itself: Dynamo makes an object of a class that it asks others not to make one of.
@pytest.mark.parametrize("make", LAYERS)
def test_compiles_to_the_same_gradients(make: Callable[[], nn.Module], fresh_compiler: None) -> None:  # noqa: ARG001
    layer, x = make(), torch.randn(4, 5, requires_grad=True)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    inputs = (x, *layer.parameters())
    wanted = torch.autograd.grad(layer(x, key=KEY).square().sum(), inputs)
    found = torch.autograd.grad(compiled(x, key=KEY).square().sum(), inputs)
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other)


@pytest.mark.parametrize("make", LAYERS)
def test_layer_is_the_function(make: Callable[..., nn.Module]) -> None:
    x, layer = torch.randn(4, 5), make(p=0.3)
    expected = gaussian_dropout(x, 0.3, key=KEY)
    torch.testing.assert_close(layer(x, key=KEY), expected)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin(x, key=KEY).equal(layer(x, key=KEY))
    with pytest.raises(TypeError):
        layer(x, KEY)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("training", [True, False])
def test_p_of_gaussian_dropout(training: bool) -> None:
    x = torch.ones(5)
    assert gaussian_dropout(x, 0.0) is x
    assert gaussian_dropout(x, 0.3, training=False) is x
    for p in (-0.1, 1.5, math.nan, math.inf):
        message = re.escape(f"dropout probability has to be between 0 and 1, but got {p}")
        with pytest.raises(ValueError, match=message):
            gaussian_dropout(x, p, training=training)
        with pytest.raises(ValueError, match=message):
            GaussianDropout(p)
    for p in (1, 1.0):
        with pytest.raises(ValueError, match=r"below 1, but got 1\.0: the variance .* infinite"):
            gaussian_dropout(x, p, training=training)
        with pytest.raises(ValueError, match="infinite"):
            GaussianDropout(p)
    assert gaussian_dropout(x, 1 - 2**-53, key=KEY).isfinite().all()


def test_wrong_arguments() -> None:
    x = torch.ones(3, 4)
    with pytest.raises(TypeError, match=r"gaussian_dropout.*must be Tensor, not list"):
        gaussian_dropout([1.0])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"variational_dropout.*got torch\.int64 of shape \(3, 4\)"):
        variational_dropout(x.long(), LOG_ALPHA)
    with pytest.raises(TypeError, match=r"write thinned\.Key\(7\)"):
        gaussian_dropout(x, key=7)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"keys of shape \(2,\) do not fit"):
        variational_dropout(x, LOG_ALPHA, key=KEY.fold(torch.arange(2)))
    with pytest.raises(IndexError, match="names dimension 2"):
        gaussian_dropout(x, key=KEY, broadcast_dims=(2,))
    with pytest.raises(TypeError, match="'log_alpha' must be Tensor, not float"):
        variational_dropout(x, 0.5)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"floating-point tensor, got torch\.int64"):
        variational_dropout(x, torch.tensor(1))
    for shape in ((3,), (3, 3), (1, 3, 4)):
        with pytest.raises(RuntimeError, match=re.escape(f"log_alpha of shape {shape} does not broadcast")):
            variational_dropout(x, torch.zeros(shape))


def test_arguments_of_variational_dropout() -> None:
    for p in (0.0, 1.0, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=re.escape(f"above 0 and below 1, but got {p}")):
            VariationalDropout(p)
    with pytest.raises(ValueError, match=r"at most max_alpha=1\.0, but p=0\.6 gives 1\.49"):
        VariationalDropout(0.6)
    assert VariationalDropout(0.6, max_alpha=2).alpha.item() == pytest.approx(1.5)
    assert VariationalDropout(0.2, num_features=7).log_alpha.shape == (7,)
    assert VariationalDropout(0.2, num_features=(3, 1, 1)).log_alpha.shape == (3, 1, 1)
    layer = VariationalDropout(0.2)
    assert list(layer.state_dict()) == ["log_alpha"]
    assert (layer.p.item(), layer.alpha.item()) == (pytest.approx(0.2), pytest.approx(0.25))
    assert repr(layer) == "VariationalDropout(max_alpha=1.0)"
    assert (
        repr(VariationalDropout(0.2, num_features=7)) == "VariationalDropout(num_features=7, max_alpha=1.0)"
    )
    assert repr(GaussianDropout(0.2)) == "GaussianDropout(p=0.2)"


def test_every_feature_has_its_variance() -> None:
    log_alpha = torch.tensor([0.01, 0.25, 1.0]).log()
    y = variational_dropout(torch.ones(N // 3, 3), log_alpha, key=KEY).double().numpy()
    for feature, alpha in zip(y.T, log_alpha.exp().tolist(), strict=True):
        assert chance.mean(feature, 1, alpha) > chance.FALSE_ALARM
        assert chance.mean((feature - 1) ** 2, alpha, 2 * alpha**2) > chance.FALSE_ALARM


@pytest.mark.parametrize(
    ("approximation", "alphas", "bound"),
    [
        ("polynomial", [1e-4, 1e-3, 0.01, 0.1, 0.3, 0.5, 0.8, 1.0], 0.04),
        ("sigmoid", [1e-4, 1e-3, 0.01, 0.05, 0.1, 0.5, 1.0, 3.0, 10.0, 100.0], 0.01),
    ],
)
def test_divergence_is_that_of_the_integral(approximation: str, alphas: list[float], bound: float) -> None:
    log_alpha = torch.tensor(alphas, dtype=torch.float64).log().requires_grad_()
    found = variational_kl(log_alpha, approximation)  # type: ignore[arg-type]
    constant = (np.euler_gamma + math.log(2)) / 2
    exact = torch.tensor([true_divergence(alpha) + constant for alpha in alphas])
    assert (found.detach() - exact).abs().max() < bound
    assert (found > 0).all()
    assert torch.autograd.gradcheck(lambda a: variational_kl(a, approximation), (log_alpha,))  # type: ignore[arg-type]
    # More noise is always nearer to the prior.
    assert (torch.autograd.grad(found.sum(), log_alpha)[0] < 0).all()


def test_divergence_in_the_words_of_the_papers() -> None:
    """Up to the constant, at one alpha by hand; and the two at their common limit."""
    log_alpha = torch.tensor([0.5, 1.0], dtype=torch.float64).log()
    kl = variational_kl(log_alpha)
    by_hand = -0.5 * math.log(0.5) + 1.16145124 * 0.5 - 1.50204118 * 0.75 + 0.58629921 * 0.875
    assert (kl[0] - kl[1]).item() == pytest.approx(by_hand)
    sigmoid = variational_kl(log_alpha, "sigmoid")[1].item()
    assert sigmoid == pytest.approx(0.63576 * (1 - 1 / (1 + math.exp(-1.8732))) + 0.5 * math.log(2))
    assert variational_kl(torch.tensor(60.0), "sigmoid").item() == pytest.approx(0, abs=1e-6)
    small = torch.tensor(-20.0)
    assert variational_kl(small).item() == pytest.approx(variational_kl(small, "sigmoid").item(), abs=1e-3)


def test_which_divergence() -> None:
    layer = VariationalDropout(0.2, num_features=3)
    assert layer.kl().equal(variational_kl(layer.log_alpha))
    assert layer.kl("sigmoid").equal(variational_kl(layer.log_alpha, "sigmoid"))
    with pytest.raises(ValueError, match="either 'polynomial' or 'sigmoid', but got 'exact'"):
        layer.kl("exact")  # type: ignore[arg-type]
    free = VariationalDropout(0.9, max_alpha=math.inf)
    with pytest.raises(ValueError, match=r"max_alpha is inf; take kl\(\"sigmoid\"\)"):
        free.kl()
    assert free.kl("sigmoid").item() > 0
    assert free.alpha.item() == pytest.approx(9, rel=1e-5)


def test_alpha_is_held_at_its_bound_and_comes_back() -> None:
    layer = VariationalDropout(0.5, num_features=3)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    for _ in range(5):  # the divergence alone asks for more noise
        optimizer.zero_grad()
        layer.kl().sum().backward()
        optimizer.step()
    assert layer.log_alpha.tolist() == [0, 0, 0]
    layer.log_alpha.data.fill_(0.2)
    assert layer.alpha.tolist() == [1, 1, 1]
    x = torch.ones(10_000, 3)
    optimizer.zero_grad()
    layer(x, key=KEY).square().mean().backward()
    optimizer.step()
    assert (layer.log_alpha < 0.2).all()
    jacobian = torch.func.jacrev(lambda a: torch.func.functional_call(layer, {"log_alpha": a}, (x[:1],)))
    assert jacobian(layer.log_alpha.detach()).shape == (1, 3, 3)


def test_noise_that_hurts_is_learned_away() -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    target = x @ torch.ones(8, 1)
    drop, linear = VariationalDropout(0.4, num_features=8), nn.Linear(8, 1)
    optimizer = torch.optim.Adam([*drop.parameters(), *linear.parameters()], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (linear(drop(x)) - target).square().mean() * 50 + drop.kl().sum() / len(x)
        loss.backward()
        optimizer.step()
    assert (drop.alpha < 0.05).all()
