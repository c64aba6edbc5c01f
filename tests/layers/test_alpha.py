"""Alpha dropout: its two values, the moments that it keeps, and what is shared."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
import thinned
from subject import Subject
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers import Entry
from thinned.compare.layers.alpha import ENTRIES, Affine
from thinned.compare.settings import Settings
from thinned.geometry import shared
from thinned.layers.alpha import AlphaDropout, FeatureAlphaDropout, alpha_dropout, feature_alpha_dropout

KEY = thinned.Key(7)
P = 0.3
SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
REAL = [dtype for dtype in oracle.DTYPES if not dtype.is_complex]
FUNCTIONS = [alpha_dropout, feature_alpha_dropout]
LAYERS = [AlphaDropout, FeatureAlphaDropout]

Function = Callable[..., Tensor]


def constants(p: float) -> tuple[float, float, float]:
    """``scale, shift, fill`` for the realised probability, rounded as the docstring's formula is read."""
    q = thinned.spec.threshold(p) / 2**32
    a = 1 / math.sqrt(q * (1 + 1.7580993408473766**2 * (1 - q)))
    return a, a * 1.7580993408473766 * (1 - q), -a * 1.7580993408473766 * q


@pytest.mark.parametrize("dims", [(), (2, 3)], ids=["alpha_dropout", "feature_alpha_dropout"])
@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
def test_every_backend_is_the_formula(
    subject: Subject, dims: tuple[int, ...], dtype: torch.dtype, p: float
) -> None:
    function = feature_alpha_dropout if dims else alpha_dropout
    T = thinned.spec.threshold(p)
    x = oracle.specials((6, 10, 4, 3), dtype)
    expected = oracle.masked_affine(x, KEY.bits, shared(x.shape, dims), T, *constants(p))
    for each in (x, x.contiguous(memory_format=torch.channels_last)):
        y = function(each.to(subject.device), p, training=True, key=KEY)
        oracle.assert_same(y.cpu(), expected)
        assert y.stride() == each.stride()
    keys = KEY.fold(torch.arange(6))
    y = function(x.to(subject.device), p, training=True, key=keys.to(subject.device))
    oracle.assert_same(
        y.cpu(), oracle.masked_affine(x, keys.bits, shared(x.shape, dims, 1), T, *constants(p))
    )


def test_the_dropped_value_is_where_selu_saturates() -> None:
    """Klambauer et al.'s map a(x d + α'(1-d)) + b, whose a and b their appendix gives for any α'."""
    x = torch.randn(1000, dtype=torch.float64)
    saturated = nn.functional.selu(torch.tensor(-1e9, dtype=torch.float64))
    for p in (0.1, 0.5, 0.9):
        keep = thinned.keep_mask(KEY, x.shape, p)
        q = thinned.spec.threshold(p) / 2**32
        a = (q + saturated**2 * q * (1 - q)) ** -0.5
        b = -a * (1 - q) * saturated
        y = alpha_dropout(x, p, training=True, key=KEY)
        torch.testing.assert_close(y, a * torch.where(keep, x, saturated) + b, rtol=1e-13, atol=1e-14)
        assert y.sub(a * torch.where(keep, x, -SELU_ALPHA) + b).abs().max() > 0.01


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_defaults_are_torchs(function: Function, p: float) -> None:
    """Evaluation, unlike the other functions."""
    x = torch.randn(3, 4, 5)
    assert function(x, p) is x
    assert function(x) is x
    assert function(x, p, inplace=True) is x


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
@pytest.mark.parametrize("layer", LAYERS)
def test_mean_and_variance_are_kept(layer: type[nn.Module], p: float) -> None:
    """Of 2**21 standard normal inputs; the bounds are those of the law's second and fourth moment."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2**11, 2**10, 1, generator=generator, dtype=torch.float64)
    y = layer(p)(x, key=KEY)
    n, spread = y.numel(), Affine(p).fourth_moment - 1
    assert chance.mean(y.numpy(), 0, 1) > chance.FALSE_ALARM
    assert chance.mean(y.square().numpy(), 1, spread) > chance.FALSE_ALARM
    assert 9 * math.sqrt(spread / n) < 0.02  # 2 % lie well beyond the bound


def test_fourth_moment_is_that_of_the_formula() -> None:
    """The bound's own law, by a quadrature that is exact for polynomials of this degree."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(3)
    a, b, fill = constants(P)
    kept = float((weights * (a * nodes + b) ** 4).sum() / math.sqrt(2 * math.pi))
    assert math.isclose((1 - P) * kept + P * fill**4, Affine(P).fourth_moment, rel_tol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_rate_and_independence(layer: type[nn.Module]) -> None:
    x = torch.zeros(1000, 200, 1)
    kept, other = (layer(P)(x, key=KEY.fold(i)).squeeze(-1).gt(0).numpy() for i in range(2))
    assert chance.rate(kept, P) > chance.FALSE_ALARM
    assert chance.independence(kept, other, p=P) > chance.FALSE_ALARM
    assert chance.independence(kept[::2], kept[1::2], p=P) > chance.FALSE_ALARM
    assert chance.independence(kept[:, ::2], kept[:, 1::2], p=P) > chance.FALSE_ALARM


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_as_many_decisions_a_sample_as_torch(entry: Entry) -> None:
    """How many of 8 channels of a sample are dropped: one law for both, by chi-squared of 20,000 samples."""
    samples, channels, most = 20_000, 8, 5
    counts = []
    for implementation in (entry.own, entry.peer):
        torch.manual_seed(11)
        dropped = (implementation.make(p=P)(torch.zeros(samples, channels, 1)) < 0).flatten(1).sum(1)
        counts.append(torch.bincount(dropped.clamp(max=most), minlength=most + 1).numpy())
    assert min(each.min() for each in counts) >= 100
    assert stats.chi2_contingency(counts).pvalue > chance.FALSE_ALARM
    expected = stats.binom.pmf(range(most + 1), channels, P)
    expected[most] = stats.binom.sf(most - 1, channels, P)
    assert stats.chisquare(counts[0], samples * expected).pvalue > chance.FALSE_ALARM


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 4), (6, 5, 4, 3), (6, 5, 2, 3, 4)], ids=str)
def test_features_share_a_decision(shape: tuple[int, ...]) -> None:
    """The first two dimensions are always samples and channels, as in PyTorch."""
    y = feature_alpha_dropout(torch.zeros(shape), 0.5, training=True, key=KEY)
    channels = thinned.keep_mask(KEY, shape[:2], 0.5)
    assert 0 < int(channels.sum()) < channels.numel()
    assert y.gt(0).equal(channels.reshape(*shape[:2], *(1,) * (len(shape) - 2)).expand(shape))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mask_of_a_row_is_that_of_its_key(function: Function) -> None:
    x, ids = torch.randn(6, 10, 3), torch.arange(10, 16)
    y = function(x, 0.5, training=True, key=KEY.fold(ids))
    order = torch.tensor([3, 1, 5, 0])
    assert function(x[order], 0.5, training=True, key=KEY.fold(ids[order])).equal(y[order])
    assert y[:1].equal(function(x[:1], 0.5, training=True, key=KEY.fold(10)))
    zeros = torch.zeros(6, 10, 3)
    rows = function(zeros, 0.5, training=True, key=KEY.fold(ids))
    assert not rows[0].equal(rows[1])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dropped_has_its_value_whatever_it_was(function: Function) -> None:
    x = torch.full((6, 10, 4), math.nan, requires_grad=True)
    y = function(x, P, training=True, key=KEY)
    a, _, fill = constants(P)
    dropped = ~y.isnan()
    assert 0 < int(dropped.sum()) < dropped.numel()
    assert y[dropped].eq(fill).all()
    (gradient,) = torch.autograd.grad(y, x, torch.full(x.shape, math.inf))
    oracle.assert_same(gradient, torch.where(dropped, 0.0, math.inf))
    (gradient,) = torch.autograd.grad(function(x, P, training=True, key=KEY).sum(), x)
    oracle.assert_same(gradient, torch.where(dropped, 0.0, a))


@pytest.mark.parametrize("p", [1.0, 1 - 2**-40])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_everything_dropped_is_plus_zero(dtype: torch.dtype, function: Function, p: float) -> None:
    """Where a has no finite value, and zero is its limit times the rest."""
    x = oracle.specials((20, 20), dtype).requires_grad_()
    y = function(x, p, training=True)
    oracle.assert_same(y, torch.zeros_like(x))
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, math.nan))
    oracle.assert_same(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("shape", [(), (5,)], ids=str)
def test_no_channels(shape: tuple[int, ...]) -> None:
    message = f"Feature dropout requires at least 2 dimensions in the input, got a tensor of shape {shape}"
    x = torch.ones(shape)
    with pytest.raises(RuntimeError, match=re.escape(message)):
        feature_alpha_dropout(x, 0.5, training=True)
    assert feature_alpha_dropout(x, 0.0, training=True) is x
    assert feature_alpha_dropout(x, 0.5) is x
    assert not feature_alpha_dropout(x, 1.0, training=True).any()
    assert alpha_dropout(x, 0.5, training=True).shape == shape


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("training", [True, False])
def test_wrong_arguments(function: Function, training: bool) -> None:
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"between 0 and 1, but got {p}"):
            function(torch.ones(2, 3), p, training)
    with pytest.raises(TypeError, match=r"write thinned\.Key\(7\)"):
        function(torch.ones(2, 3), 0.5, training, key=7)
    with pytest.raises(
        TypeError, match=rf"{function.__name__}\(\): argument 'input' must be Tensor, not list"
    ):
        function([1.0], 0.5, training)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_dtypes_that_only_pass(function: Function) -> None:
    """In evaluation anything comes back; PyTorch's samples ask for it."""
    for dtype, error in ((torch.int64, RuntimeError), (torch.complex64, NotImplementedError)):
        x = torch.ones(2, 3, dtype=dtype)
        assert function(x, 0.5) is x
        with pytest.raises(error, match=re.escape(f"{dtype} of shape (2, 3)")):
            function(x, 0.5, training=True)


@pytest.mark.parametrize("layer", LAYERS)
def test_layers_honour_inplace(layer: type[nn.Module]) -> None:
    x = torch.randn(6, 10, 4)
    before = x.clone()
    expected = layer(P)(x, key=KEY)
    assert x.equal(before)
    assert layer(P, inplace=True)(x, key=KEY) is x
    oracle.assert_same(x, expected)
    leaf = before.clone().requires_grad_()
    y = layer(P, inplace=True)(leaf * 1, key=KEY)
    (gradient,) = torch.autograd.grad(y.sum(), leaf)
    assert gradient.equal(torch.autograd.grad(layer(P)(leaf, key=KEY).sum(), leaf)[0])


@pytest.mark.parametrize("p", [0.5, 1.0])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_refused_call_has_changed_nothing(function: Function, p: float) -> None:
    for x in (torch.ones(2, 3, requires_grad=True), torch.ones(2, 1).expand(2, 3)):
        with pytest.raises(RuntimeError, match=r"leaf Variable|more than one element"):
            function(x, p, training=True, inplace=True)
        assert x.eq(1).all()
    x = torch.ones(2, 3)
    with pytest.raises(
        RuntimeError, match=re.escape("keys of shape (4,) do not fit a tensor of shape (2, 3)")
    ):
        function(x, p, training=True, inplace=True, key=KEY.fold(torch.arange(4)))
    assert x.eq(1).all()


@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (5, 4, 0)], ids=str)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty(function: Function, shape: tuple[int, ...]) -> None:
    for p in (0.0, 0.5, 1.0):
        assert function(torch.empty(shape), p, training=True).shape == shape


# What PyTorch's test/nn/test_dropout.py asks of its own layers.


@pytest.mark.parametrize("p", [0.2, 0.5, 0.8])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (AlphaDropout, (5000,)),
        (FeatureAlphaDropout, (1000, 3, 2, 4, 5)),
        (FeatureAlphaDropout, (50, 20, 64, 64)),
    ],
)
def test_moments_stay_near_and_backward_runs(
    layer: type[nn.Module], shape: tuple[int, ...], p: float
) -> None:
    """With PyTorch's own tolerances; of 50 · 20 decisions at p = 0.8 the deviation of the mean is 0.02."""
    torch.manual_seed(3)
    x = torch.randn(shape, requires_grad=True)
    y = layer(p)(x)
    assert abs(float((y.mean() - x.mean()).detach())) < 0.1
    assert abs(float((y.std() - x.std()).detach())) < 0.1
    y.backward(x.detach())
    assert x.grad is not None
    kept = x.grad != 0
    torch.testing.assert_close(x.grad[kept], (x.detach() * constants(p)[0])[kept])


# Implementations that break the law, each in one way, and the law that shows it.


class Mixed(nn.Module):
    """Constants and mask that can be another's."""

    def __init__(self, p: float, saturation: float = SELU_SCALE * SELU_ALPHA, affine: bool = True) -> None:
        super().__init__()
        self.p = p
        self.a = 1 / math.sqrt((1 - p) * (1 + saturation**2 * p)) if affine else 1.0
        self.b = self.a * saturation * p if affine else 0.0
        self.saturation = saturation

    def forward(self, x: Tensor) -> Tensor:
        keep = torch.rand(x.shape) < 1 - self.p
        return self.a * torch.where(keep, x, -self.saturation) + self.b


def biased(p: float) -> nn.Module:
    """Drops 2 % too rarely, with the constants of p."""
    layer = Mixed(p)
    layer.p = 0.98 * p
    return layer


CULPRITS = {
    "values": lambda p: Mixed(p, saturation=SELU_ALPHA),
    "mean, variance at p = 0.5": lambda p: Mixed(p, affine=False),
    "mean, variance at p = 0.8": lambda p: nn.Dropout(p),
    "drop rate at p = 0.3": biased,
    "mask of gradient": lambda p: nn.Dropout(p),
    "neighbours": nn.FeatureAlphaDropout,
}


@pytest.mark.parametrize("law", CULPRITS)
def test_a_wrong_law_is_caught(law: str) -> None:
    (check,) = [each for each in ENTRIES[0].laws if each.name == law]
    found = examine(check, Implementation("culprit", CULPRITS[law]), Settings(quick=True))
    assert found.verdict is Verdict.BROKEN, found.measured


def test_features_that_do_not_share_are_caught() -> None:
    (check,) = [each for each in ENTRIES[1].laws if each.name == "sharing"]
    found = examine(check, Implementation("culprit", nn.AlphaDropout), Settings(quick=True))
    assert found.verdict is Verdict.BROKEN
