"""Dropout by Gaussian noise: GaussianDropout, VariationalDropout."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from scipy import integrate, stats
from torch import Tensor, nn

from thinned.compare.implementation import (
    Case,
    Example,
    Implementation,
    NotOfferedError,
    P,
    first,
    normal,
    ones,
)
from thinned.compare.laws.chance import DEVIATIONS, FALSE_ALARM, associate, neighbouring, strongest
from thinned.compare.laws.law import Finding, Law, Level, holds_if, nothing_wrong
from thinned.compare.laws.values import departure
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import Formula
from thinned.compare.settings import Settings
from thinned.layers.gaussian import GaussianDropout, VariationalDropout

__all__ = ["ENTRIES"]

ROWS, COLUMNS = 1_000, 300
SIGMA = math.sqrt(P / (1 - P))


class GaussianDropoutFormula(Formula):
    def drop(self, x: Tensor) -> Tensor:
        return x * (1 + math.sqrt(self.p / (1 - self.p)) * torch.randn_like(x))


class VariationalDropoutFormula(nn.Module):
    def __init__(self, p: float = 0.5, num_features: int | None = None) -> None:
        super().__init__()
        self.log_alpha = nn.Parameter(torch.full((num_features or 1,), math.log(p / (1 - p))))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * (1 + (0.5 * self.log_alpha.clamp(max=0)).exp() * torch.randn_like(x))

    def kl(self) -> Tensor:
        log_alpha = self.log_alpha.clamp(max=0)
        alpha = log_alpha.exp()
        return -(0.5 * log_alpha + 1.16145124 * alpha - 1.50204118 * alpha**2 + 0.58629921 * alpha**3)


def factors(layer: Case, settings: Settings) -> Tensor:
    """Normal, with mean 1 and variance ``p / (1 - p)``."""
    ones = settings.ones(ROWS, COLUMNS, dtype=torch.float32)
    return first(layer.make(p=P).to(settings.device)(ones)).detach()


def moments(layer: Case, settings: Settings) -> Finding:
    """A normal sample's mean and variance have the variances s²/N and 2 s⁴/N."""
    y, variance = factors(layer, settings).double(), SIGMA**2
    mean, spread = float(y.mean()), float(y.var())
    holds = abs(mean - 1) <= DEVIATIONS * math.sqrt(variance / y.numel()) and abs(
        spread - variance
    ) <= DEVIATIONS * variance * math.sqrt(2 / y.numel())
    measured = f"{mean:.4f}, {spread:.4f}"
    return holds_if(
        holds, measured if holds else f"{measured}, not 1, {variance:.4f}", mean=mean, variance=spread
    )


def distribution(layer: Case, settings: Settings) -> Finding:
    """Kolmogorov and Smirnov's test of all of it."""
    y = factors(layer, settings).double().flatten().cpu().numpy()
    found = stats.kstest(y, stats.norm(1, SIGMA).cdf)
    measured = f"D = {found.statistic:.4f}"
    return holds_if(bool(found.pvalue >= FALSE_ALARM), measured, statistic=float(found.statistic))


def independence(layer: Case, settings: Settings) -> Finding:
    """The sides of 1 on which neighbours and two calls are."""
    one, other = (factors(layer, settings) < 1 for _ in range(2))
    return strongest([associate(one, other, "two calls"), *neighbouring(one)])


def own_noise(layer: Case, settings: Settings) -> Finding:
    """At x = 1 the output is the factor, and so is dL/dx over dL/dy."""
    x = settings.ones(ROWS, dtype=torch.float32).requires_grad_()
    upstream = settings.normal(ROWS, dtype=torch.float32)
    y = first(layer.make(p=P).to(settings.device)(x))
    (downstream,) = torch.autograd.grad(y, x, upstream)
    return nothing_wrong(departure(downstream, upstream * y.detach(), scale=1.0), "forward's noise")


def infinite_variance(layer: Case, settings: Settings) -> Finding:
    """The constructor or the first call at p = 1 raises ValueError."""
    try:
        y = first(layer.make(p=1.0)(settings.ones(10, dtype=torch.float32)))
    except ValueError:
        return holds_if(True, "ValueError")
    except ZeroDivisionError as error:
        return holds_if(False, type(error).__name__)
    return holds_if(False, f"gives {float(y.flatten()[0])}")


def bound_of_alpha(layer: Case, settings: Settings) -> Finding:
    """A step too far: the noise keeps variance 1, and the loss can still bring alpha back."""
    module = layer.make(p=0.4).to(settings.device)
    parameter = module.get_parameter("log_alpha")
    parameter.data.fill_(1.0)
    y = first(module(settings.ones(ROWS, COLUMNS, dtype=torch.float32)))
    (gradient,) = torch.autograd.grad(y.square().mean(), parameter)
    variance = float(y.detach().double().var())
    if abs(variance - 1) > DEVIATIONS * math.sqrt(2 / y.numel()):
        return holds_if(False, f"variance {variance:.4f}")
    back = float(gradient.sum()) > 0
    return holds_if(back, "bounded, and goes back" if back else "bounded, and stays")


def divergence(layer: Case, settings: Settings) -> Finding:
    """Against the integral of the log-uniform prior; both are right up to a constant, hence the range."""
    errors = []
    for p in (0.001, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5):
        module = layer.make(p=p).to(settings.device)
        kl: Callable[[], Tensor] | None = getattr(module, "kl", None)
        if kl is None:
            raise NotOfferedError("no kl()")
        errors.append(float(kl().detach()) - true_divergence(p / (1 - p)))
    spread = max(errors) - min(errors)
    return holds_if(spread < 0.04, f"within {spread:.3f} nats", error=spread)


def true_divergence(alpha: float) -> float:
    """``E log|e| - log(alpha) / 2`` for e ~ N(1, alpha), by quadrature."""
    sigma = math.sqrt(alpha)
    density = stats.norm(1, sigma).pdf
    ends = sorted({1 - 12 * sigma, max(0.0, 1 - 12 * sigma), 1.0, 1 + 12 * sigma})
    parts = (
        integrate.quad(lambda e: math.log(abs(e)) * density(e) if e else 0.0, low, high, limit=200)[0]
        for low, high in pairwise(ends)
    )
    return float(sum(parts)) - 0.5 * math.log(alpha)


FAMILY = "noise"


NORMAL_LAWS = [
    Law(
        FAMILY,
        "mean, variance",
        "of ones: 1 and p/(1-p)",
        moments,
        why="The noise that regularises is larger or smaller than p says.",
    ),
    Law(
        FAMILY,
        "distribution",
        "of ones: normal, by Kolmogorov and Smirnov's test",
        distribution,
        why="Results do not compare with the paper's, whose noise is normal.",
    ),
    Law(
        FAMILY,
        "independence",
        "neighbours and calls are independent of each other",
        independence,
        why="Units learn to rely on each other, which dropout is there to prevent.",
    ),
    Law(
        FAMILY,
        "noise of gradient",
        "backward has the forward's noise",
        own_noise,
        why="Weights are changed for outputs that they did not make.",
    ),
]

ENTRIES = [
    Entry(
        GaussianDropout,
        mask="the input's, of normal numbers",
        source="Srivastava et al. 2014, section 10; Keras",
        peer=Implementation("formula", GaussianDropoutFormula),
        example=Example(normal(6, 20)),
        workload=Workload(ones(1_000_000)),
        special=[
            *NORMAL_LAWS,
            Law(
                FAMILY,
                "p = 1",
                "ValueError: the variance p/(1-p) is infinite",
                infinite_variance,
                level=Level.UNLIKE_TORCH,
                why="A search over p meets NaN or infinities where an error would stop it.",
            ),
        ],
    ),
    Entry(
        VariationalDropout,
        mask="the input's, of normal numbers",
        source="Kingma, Salimans and Welling 2015, sections 3.1 to 3.3",
        peer=Implementation("formula", VariationalDropoutFormula),
        example=Example(normal(6, 20), {"p": 0.4, "num_features": 20}, p_name=""),
        workload=Workload(ones(1_000_000)),
        special=[
            *NORMAL_LAWS,
            Law(
                FAMILY,
                "bound of alpha",
                "alpha stays at 1, and can come back",
                bound_of_alpha,
                level=Level.NICETY,
                why="One step too far makes the noise explode, or freezes alpha for good.",
            ),
            Law(
                FAMILY,
                "divergence",
                "within 0.04 nats of the integral, for alpha up to 1",
                divergence,
                why="The prior pulls alpha to another place than the evidence bound says.",
            ),
        ],
    ),
]
