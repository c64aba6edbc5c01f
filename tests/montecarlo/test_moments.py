"""The moments of Monte-Carlo dropout: closed forms, stock torch's draws, and what is refused."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import thinned
from chance import FALSE_ALARM
from thinned import spec
from thinned.montecarlo.moments import Moments, expected_softmax, moments

Draws = tuple[Tensor, Tensor, Tensor]


@torch.no_grad()
def sampled(model: nn.Module, x: Tensor, draws: int, chunk: int) -> Draws:
    """Mean, variance and fourth central moment of draws with the dropouts of ``model`` on."""
    model.eval()
    for module in model.modules():
        module.training = bool(re.search("Drop|Depth|Functional", type(module).__name__))
    parts = []
    for _ in range(draws // chunk):
        parts.append(model(x.repeat_interleave(chunk, 0)).unflatten(0, (len(x), chunk)))
    y = torch.cat(parts, 1).double()
    model.eval()
    return y.mean(1), y.var(1), (y - y.mean(1, keepdim=True)).pow(4).mean(1)


def assert_exact(model: nn.Module, x: Tensor, draws: int = 40_000) -> None:
    """z-tests of all means and variances at once; the variance of a sample variance is (m4 - v^2) / n."""
    found = moments(model, x)
    mean, variance, fourth = sampled(model, x, draws, 4000)
    bound = stats.norm.isf(FALSE_ALARM / 2 / (2 * mean.numel()))
    constant = found.variance == 0
    assert (variance[constant] < 1e-20).all()
    z_mean = (mean - found.mean) / (found.variance / draws).sqrt()
    z_variance = (variance - found.variance) / ((fourth - variance**2) / draws).sqrt()
    for z in (z_mean, z_variance):
        assert (z[~constant].abs() < bound).all()


class Functional(nn.Module):
    """Functions where others have modules."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.head = nn.Linear(9, 2)
        self.other = nn.Linear(9, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = F.relu(self.conv(x) * scale, inplace=True)
        x = F.dropout(x, 0.3, training=self.training)
        x = F.dropout(x, 0.3, training=False)
        x = F.avg_pool2d(x, 2)
        x = F.adaptive_avg_pool2d(input=x, output_size=(3, 1))
        x = torch.flatten(x, 1)
        x = x.view(x.size(0), -1)
        return self.head(x.reshape(x.shape[0], 9).flatten(1)) + self.bias() + 0.5

    def bias(self) -> Tensor:
        return self.head.bias


def batch_norm(norm: Any) -> Any:
    for each in (norm.running_mean, norm.weight, norm.bias):
        each.data.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


def maps(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


EXACT: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 4)), maps(3, 6)),
    "tokens": lambda: (nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 4)), maps(3, 2, 6)),
    "two layers": lambda: (nn.Sequential(nn.Dropout(0.3), nn.Linear(6, 9), nn.Linear(9, 4)), maps(3, 6)),
    "two layers, wide": lambda: (
        nn.Sequential(nn.Dropout(0.3), nn.Linear(4, 9), nn.Linear(9, 7)),
        maps(3, 4),
    ),
    "three dropouts": lambda: (
        nn.Sequential(
            nn.Dropout(0.3),
            nn.Linear(6, 9),
            nn.Dropout(0.5),
            nn.Linear(9, 12),
            nn.Dropout(0.1),
            nn.Linear(12, 5),
        ),
        maps(3, 6),
    ),
    "one hidden layer": lambda: (
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Dropout(0.3), nn.Linear(5, 4)),
        maps(3, 6),
    ),
    "any features": lambda: (
        nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.GELU(), nn.MaxPool2d(2), nn.Flatten(), nn.Dropout(), nn.Linear(12, 4)
        ),
        maps(3, 1, 6, 6),
    ),
    "dropout last": lambda: (nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.3)), maps(3, 6)),
    "convolution": lambda: (
        nn.Sequential(
            nn.Dropout(0.3),
            nn.Conv2d(2, 4, 3, padding="same", dilation=2, groups=2),
            batch_norm(nn.BatchNorm2d(4)),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * 4 * 3, 4),
        ),
        maps(3, 2, 8, 6),
    ),
    "channels, pool": lambda: (
        nn.Sequential(nn.Dropout2d(0.3), nn.AvgPool2d((3, 2), 2, padding=(1, 0), divisor_override=5)),
        maps(3, 2, 8, 6),
    ),
    "channels, convolution": lambda: (
        nn.Sequential(nn.Dropout2d(0.3), nn.Conv2d(4, 3, 3, stride=2), nn.AdaptiveAvgPool2d((2, None))),
        maps(3, 4, 8, 7),
    ),
    "channels, elements": lambda: (
        nn.Sequential(nn.Dropout2d(0.3), nn.Dropout(0.2), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(48, 3)),
        maps(3, 4, 6, 5),
    ),
    "elements, channels": lambda: (
        nn.Sequential(nn.Dropout(0.3), nn.Dropout2d(0.2), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d((3, 2))),
        maps(3, 4, 8, 7),
    ),
    "1d": lambda: (
        nn.Sequential(nn.Dropout1d(0.3), nn.Conv1d(2, 3, 3), batch_norm(nn.BatchNorm1d(3)), nn.AvgPool1d(3)),
        maps(3, 2, 8),
    ),
    "3d": lambda: (
        nn.Sequential(
            nn.Dropout3d(0.3), nn.Conv3d(2, 3, 2), batch_norm(nn.BatchNorm3d(3)), nn.AdaptiveAvgPool3d(2)
        ),
        maps(3, 2, 4, 4, 4),
    ),
    "adaptive, overlapping": lambda: (nn.Sequential(nn.Dropout(0.3), nn.AdaptiveAvgPool1d(3)), maps(3, 2, 8)),
    "thinned's": lambda: (
        nn.Sequential(thinned.Dropout(0.3, broadcast_dims=(-1,)), thinned.Dropout(0.1), nn.Linear(4, 3)),
        maps(3, 5, 4),
    ),
    "locked": lambda: (
        nn.Sequential(thinned.LockedDropout(0.3, batch_first=True), nn.Linear(4, 3), nn.AvgPool1d(3)),
        maps(3, 5, 4),
    ),
    "rows": lambda: (
        nn.Sequential(
            nn.Dropout(0.3),
            nn.Linear(6, 5),
            thinned.DropPath(0.2),
            thinned.StochasticDepth(0.1, "row"),
            nn.Linear(5, 4),
        ),
        maps(3, 6),
    ),
    "rows, unscaled": lambda: (
        nn.Sequential(
            nn.Linear(6, 5), thinned.DropPath(0.2, scale_by_keep=False), nn.Dropout(0.3), nn.Linear(5, 4)
        ),
        maps(3, 6),
    ),
    "functions": lambda: (Functional(), maps(3, 2, 9, 6)),
    "p = 1": lambda: (nn.Sequential(nn.Dropout(1.0), nn.Linear(6, 4)), maps(3, 6)),
}


@pytest.mark.parametrize("name", EXACT)
def test_agrees_with_draws_of_torch(name: str) -> None:
    model, x = EXACT[name]()
    assert_exact(model.double(), x)


class Mean(nn.Module):
    """A module of the tests' own, which is no leaf of the trace."""

    def __init__(self) -> None:
        super().__init__()
        self.drop, self.norm = nn.Dropout2d(0.4), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.drop(x)).mean((2, 3)) + torch.mean(x, dim=[2, 3])


def test_a_mask_that_rows_share() -> None:
    """It makes rows depend on each other, but each has the moments that it has alone."""
    x = maps(3, 5, 4)
    for dims, others in (((0,), ()), ((0, 1), (1,))):
        found, expected = (
            moments(nn.Sequential(thinned.Dropout(0.3, broadcast_dims=each), nn.Flatten()), x)
            for each in (dims, others)
        )
        assert found.variance.equal(expected.variance)


def test_mean_over_dimensions() -> None:
    model = Mean().double()
    batch_norm(model.norm)
    assert_exact(model, maps(2, 4, 3, 3))


class Branches(nn.Module):
    def __init__(self, same: bool) -> None:
        super().__init__()
        self.stem = nn.Dropout(0.2) if same else nn.Identity()
        self.left = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))
        self.right = nn.Sequential(nn.Linear(4, 3), thinned.DropPath(0.3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.left(x) + self.right(x)


def test_sum_of_independent_branches() -> None:
    assert_exact(Branches(same=False).double(), maps(3, 4))
    with pytest.raises(NotImplementedError, match="both sides depend on 'stem'"):
        moments(Branches(same=True), torch.ones(3, 4))


ps = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 1e-12, 2.0**-32, 1e-6, 1 - 1e-6, 1 - 2.0**-32, 1 - 1e-12])


@given(ps, ps, st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 99))
def test_closed_form(p: float, p2: float, shape: list[int], seed: int) -> None:
    """Two dropouts: y = m m' x / (q q'), and E m^2 = q."""
    x = torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found = moments(nn.Sequential(nn.Dropout(p), thinned.Dropout(p2)), x)
    kept = spec.threshold(p) * spec.threshold(p2) / 2**64
    mean = x if kept else torch.zeros_like(x)
    variance = x.square() * (1 / kept - 1) if kept else mean
    torch.testing.assert_close(found, Moments(mean, variance), rtol=1e-9, atol=0)


@given(ps, st.integers(0, 4), st.integers(1, 5), st.integers(1, 5), st.integers(1, 5))
def test_closed_form_of_linear_layers(p: float, rows: int, a: int, b: int, c: int) -> None:
    """The variance of W' W m x / q is (1/q - 1) sum_j (W'W)_ij^2 x_j^2."""
    torch.manual_seed(a + 5 * b)
    model = nn.Sequential(nn.Dropout(p), nn.Linear(a, b), nn.Linear(b, c)).double()
    x = maps(rows, a)
    found = moments(model, x)
    q = spec.threshold(p) / 2**32
    product = model[2].weight @ model[1].weight
    mean = model.eval()(x if q else torch.zeros_like(x))
    variance = (x.square() @ product.square().T) * (1 / q - 1) if q else torch.zeros_like(mean)
    torch.testing.assert_close(found, Moments(mean.detach(), variance.detach()), rtol=1e-9, atol=1e-12)


def test_relu_of_a_normal_input() -> None:
    """Against integrals, far into both tails, where the moments would cancel."""
    from thinned.montecarlo.moments import _relu
    from thinned.montecarlo.noise import Random, Term

    means = torch.tensor([-30.0, -8, -5, -1, -0.1, 0, 0.1, 1, 5, 8, 30, 1e6]).double()
    y = _relu(None, Random(means * 2, (Term(torch.full_like(means, 4)),), (Term(torch.full_like(means, 4)),)))
    z = np.linspace(-12, 12, 400_001)
    density = stats.norm.pdf(z)
    for mean, found, variance in zip(means.tolist(), y.mean.tolist(), y.variance().tolist(), strict=True):
        values = np.maximum(2 * (mean + z), 0)
        expected = np.trapezoid(values * density, z)
        assert found == pytest.approx(expected, rel=1e-8, abs=1e-14)
        assert variance == pytest.approx(
            np.trapezoid((values - expected) ** 2 * density, z), rel=1e-6, abs=1e-14
        )


def test_relu_of_constants_and_of_noise() -> None:
    """Dropout of zeros has no noise; beside it, noise that is far from 0 passes or stops."""
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3), nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(3))
        model[1].bias.copy_(torch.tensor([0.0, 100.0, -100.0]))
    found = moments(model, torch.tensor([[0.0, 1.0, 1.0]]))
    torch.testing.assert_close(found.mean, torch.tensor([[0.0, 101.0, 0.0]]))
    torch.testing.assert_close(found.variance, torch.tensor([[0.0, 1.0, 0.0]]))


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    return torch.tensor(data.data / 16, dtype=torch.float32)[order], torch.tensor(data.target)[order]


def trained(model: nn.Module) -> nn.Module:
    x, target = digits()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for _ in range(10):
        for i in range(0, 1400, 100):
            loss = F.cross_entropy(model(x[i : i + 100]), target[i : i + 100])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def perceptron() -> nn.Module:
    hidden = [nn.Linear(64, 100), nn.ReLU(), nn.Dropout(0.5), nn.Linear(100, 100), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(nn.Dropout(0.2), *hidden, nn.Linear(100, 10))


def convolutional(dropout: type[nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        dropout(0.3),
        nn.Conv2d(16, 32, 3),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


@pytest.mark.parametrize(
    ("build", "of_mean", "of_deviation"),
    [
        pytest.param(perceptron, 0.05, 0.05, id="perceptron"),
        pytest.param(lambda: convolutional(nn.Dropout), 0.05, 0.05, id="elements"),
        pytest.param(lambda: convolutional(nn.Dropout2d), 0.05, 0.08, id="channels"),
    ],
)
def test_trained_networks(build: Callable[[], nn.Module], of_mean: float, of_deviation: float) -> None:
    """Root mean squares over five digits and ten outputs, in deviations: twice the worst of five seeds.

    With units that count as independent after a ReLU, the deviations would be 30 to 60 % too small.
    """
    model = trained(build())
    x = digits()[0][1400:1405]
    found = moments(model, x)
    mean, variance, _ = sampled(model, x, 10_000, 2000)
    assert ((found.mean - mean) / variance.sqrt()).square().mean().sqrt() < of_mean
    assert ((found.variance / variance).sqrt() - 1).square().mean().sqrt() < of_deviation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("build", [perceptron, lambda: convolutional(nn.Dropout2d)])
def test_dtypes(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """Moments are computed in float32 from what a short type holds, and in float64 for float64."""
    model = build().to(dtype)
    x = torch.rand(4, 64).to(dtype)
    found = moments(model, x)
    expected = moments(copy.deepcopy(model).double(), x.double())
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.mean.dtype == found.variance.dtype == wide
    # Layers before the first dropout have the rounding of their dtype; the perceptron has nothing before it.
    relative = 1e-4 if wide == dtype or build is perceptron else 0.05
    for each, wanted in zip(found, expected, strict=True):
        assert (each - wanted).abs().max() < relative * wanted.abs().max()


def test_the_model_stays_as_it_was() -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x, inplace=True)

    norm = nn.BatchNorm2d(4)
    model = nn.Sequential(
        Counted(), nn.Conv2d(1, 4, 3), norm, nn.Dropout2d(0.5), nn.Flatten(), nn.Linear(64, 2)
    )
    model.train()
    model[3].eval()
    x = torch.randn(3, 1, 6, 6)
    before = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], x.clone()
    state = torch.get_rng_state()
    keys = [set(vars(module)) for module in model.modules()]
    trained = moments(model, x)
    assert [m.training for m in model.modules()] == before[1]
    evaluated = moments(model.eval(), x)
    assert not any(m.training for m in model.modules())
    assert trained.mean.equal(evaluated.mean)
    assert trained.variance.equal(evaluated.variance)
    assert trained.variance.min() > 0
    assert not trained.mean.requires_grad
    assert x.equal(before[2])
    assert all(value.equal(before[0][name]) for name, value in model.state_dict().items())
    assert torch.get_rng_state().equal(state)
    assert keys == [set(vars(module)) for module in model.modules()]


def test_within_inference_mode_and_autocast() -> None:
    model, x = perceptron(), torch.rand(4, 64)
    expected = moments(model, x)
    with torch.inference_mode():
        found = moments(model, x.clone())
    with torch.autocast("cpu", torch.bfloat16):
        cast = moments(model, x)
    for a, b, c in zip(expected, found, cast, strict=True):
        assert a.equal(b)
        assert a.equal(c)


def test_without_noise() -> None:
    for model in (nn.Linear(4, 2), nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 2), nn.Tanh())):
        x = torch.randn(3, 4)
        found = moments(model, x)
        assert found.mean.equal(model(x))
        assert not found.variance.any()


def test_a_single_dropout_is_a_model() -> None:
    torch.testing.assert_close(
        moments(nn.Dropout(0.5), torch.tensor([[2.0]])).variance, torch.tensor([[4.0]])
    )


class Applied(nn.Module):
    """A dropout, and a function of its output and its input."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.drop(x), x)


def hooked(x: nn.Module) -> nn.Module:
    x.register_forward_hook(lambda *_: None)
    return x


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def path_of(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Dropout(0.5), nn.Sequential(*layers))


class Undecided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x, 0.5))


class Overwritten(nn.Module):
    def __init__(self, through: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.drop, self.relu, self.through = nn.Dropout(0.5), nn.ReLU(inplace=True), through

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(x)
        return self.relu(self.through(x)) + self.through(x).sum()


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drops = [nn.Dropout(0.5)]

    def forward(self, x: Tensor) -> Tensor:
        return self.drops[0](x)


class Skipping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.layerdrop = nn.Linear(6, 6), 0.5

    def forward(self, x: Tensor) -> Tensor:
        if self.training and random.random() < self.layerdrop:
            return x
        return self.layer(x)


IMAGE = (2, 4, 6, 6)
REFUSED: dict[str, tuple[nn.Module, tuple[int, ...], str]] = {
    "module": (
        path_of(nn.ReLU(), nn.MaxPool2d(2)),
        IMAGE,
        "no rule for torch.nn.MaxPool2d at '1.1'; accepted: torch.nn.Linear",
    ),
    "function": (
        Applied(lambda _, x, __: F.max_pool2d(x, 2)),
        IMAGE,
        "no rule for torch.nn.functional.max_pool2d at the model itself",
    ),
    "function in a child": (
        nn.Sequential(Applied(lambda _, x, __: torch.tanh(x))),
        IMAGE,
        "no rule for torch.tanh at '0'",
    ),
    "method": (Applied(lambda _, x, __: x.tanh()), IMAGE, "no rule for torch.Tensor.tanh"),
    "operator": (Applied(lambda _, x, y: x * y), IMAGE, "no rule for operator.mul"),
    "cat": (Applied(lambda _, x, y: torch.cat([x, y])), IMAGE, "no rule for torch.cat"),
    "softmax": (path_of(nn.Softmax(-1)), IMAGE, "no rule for torch.nn.Softmax"),
    "alpha dropout": (nn.Sequential(nn.AlphaDropout(0.5)), IMAGE, "no rule for torch.nn.AlphaDropout at '0'"),
    "thinned's": (
        nn.Sequential(thinned.DropBlock2d(0.5, 3)),
        IMAGE,
        "no rule for thinned.DropBlock2d at '0'",
    ),
    "attention": (
        nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8)),
        (2, 4, 6),
        "no rule for torch.nn.TransformerEncoderLayer at '0'",
    ),
    "recurrent": (nn.Sequential(nn.GRU(6, 6, 2, dropout=0.5)), (2, 4, 6), "no rule for torch.nn.GRU at '0'"),
    "drawn by hand": (nn.Sequential(Noise()), IMAGE, "no rule for torch.bernoulli at '0'"),
    "drawn at the trace": (
        nn.Sequential(Applied(lambda _, x, y: x if torch.rand(()) < 0.5 else y)),
        IMAGE,
        "draws random numbers",
    ),
    "alpha function": (
        Applied(lambda *a: F.alpha_dropout(a[2], training=True)),
        IMAGE,
        "no rule for torch.nn.functional.alpha_dropout",
    ),
    "not traced": (Undecided(), IMAGE, "cannot trace .*Undecided with torch.fx"),
    "two results": (Pair(), IMAGE, "returns one floating-point tensor"),
    "in a list": (Listed(), IMAGE, r"drops\[0\]"),
    "padding": (
        path_of(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
        IMAGE,
        "padding_mode='circular'",
    ),
    "no batch": (path_of(nn.Conv2d(4, 4, 3)), IMAGE[1:], "no batch dimension"),
    "pool without batch": (path_of(nn.AdaptiveAvgPool2d(1)), (4, 6), "no batch dimension"),
    "features alone": (path_of(nn.Linear(4, 4)), (4,), "no dimension but that of the features"),
    "border": (path_of(nn.AvgPool2d(4, ceil_mode=True)), IMAGE, "ceil_mode"),
    "border, padded": (
        path_of(nn.AvgPool2d(2, padding=1, count_include_pad=False)),
        IMAGE,
        "count_include_pad",
    ),
    "statistics of the batch": (
        path_of(nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
        "track_running_stats",
    ),
    "rank": (path_of(nn.BatchNorm2d(4)), (2, 4, 6), r"an input of shape \(2, 4, 6\)"),
    "flattened batch": (path_of(nn.Flatten(0)), IMAGE, "dimension 0"),
    "viewed batch": (Applied(lambda _, x, __: x.view(-1, 4)), IMAGE, "dimension 0"),
    "mean of the batch": (Applied(lambda _, x, __: x.mean((0, 1))), IMAGE, "dimension 0"),
    "channels after a convolution": (
        path_of(nn.Conv2d(4, 4, 3), nn.Dropout2d(0.5)),
        IMAGE,
        "at '1.1' .*depend on each other",
    ),
    "channels twice": (path_of(nn.Dropout2d(0.5), nn.Dropout2d(0.5)), IMAGE, "depend on each other"),
    "broadcast sum": (
        Applied(lambda _, x, __: x + torch.ones(3, 1, 1, 1, 1)),
        IMAGE,
        "repeats random elements",
    ),
    "alpha of a sum": (Applied(lambda _, x, y: torch.add(x, y, alpha=2)), IMAGE, "no rule for torch.add"),
    "hooks": (path_of(hooked(nn.Linear(6, 6))), IMAGE, "hooks"),
    "a key": (
        Applied(lambda m, x, _: m.other(x, key=thinned.Key(1)), other=thinned.Dropout()),
        IMAGE,
        "besides its input",
    ),
    "a function with a key": (
        Applied(lambda _, x, __: thinned.functional.dropout(x, key=thinned.Key(1))),
        IMAGE,
        "no rule for thinned.layers.dropout.dropout",
    ),
    "own forward": (
        path_of(OwnForward(6, 6)),
        IMAGE,
        "no rule for torch.nn.functional.linear|no rule for torch.nn.OwnForward",
    ),
    "overwritten": (Overwritten(lambda x: x), IMAGE, "overwrites what is used again"),
    "overwritten view": (Overwritten(lambda x: x.flatten(1)), IMAGE, "overwrites what is used again"),
    "skipped by Python": (nn.Sequential(nn.Dropout(), Skipping()), IMAGE, "at '1'"),
    "layerdrop": (
        nn.Sequential(nn.Dropout(), thinned.LayerDrop([nn.Linear(6, 6)] * 2, 0.5)),
        IMAGE,
        "LayerDrop",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    model, shape, message = REFUSED[name]
    state = torch.get_rng_state()
    with pytest.raises(NotImplementedError, match=message):
        moments(model, torch.randn(*shape, generator=torch.Generator().manual_seed(0)))
    assert torch.get_rng_state().equal(state)


def test_errors_of_arguments() -> None:
    with pytest.raises(
        TypeError, match=re.escape("model must be a torch.nn.Module, got the class torch.nn.Dropout")
    ):
        moments(nn.Dropout, torch.ones(2, 2))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="input must be a tensor, got"):
        moments(nn.Dropout(), [1.0])  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match=r"an input of torch\.int64"):
        moments(nn.Dropout(), torch.ones(2, 2, dtype=torch.int64))


def test_expected_softmax() -> None:
    """Two classes against integrals: MacKay's approximation is at most 0.02 off."""
    z = np.linspace(-12, 12, 20_001)
    density = stats.norm.pdf(z)
    worst = 0.0
    for mean in np.linspace(-6, 6, 13):
        for deviation in (0.0, 0.5, 1.0, 2.0, 5.0, 10.0):
            logits = torch.tensor([mean, 0.0]), torch.tensor([deviation**2, 0.0])
            (found, other) = expected_softmax(*logits).tolist()
            assert found + other == pytest.approx(1)
            expected = np.trapezoid(density / (1 + np.exp(-(mean + deviation * z))), z)
            worst = max(worst, abs(found - expected))
    assert 0.01 < worst < 0.02
