"""Dropout with a learned probability: ConcreteDropout."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, first, normal, ones
from thinned.compare.laws.chance import associate, binomial_bounds, neighbouring, strongest
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import DTYPES, Settings
from thinned.layers.concrete import ConcreteDropout

__all__ = ["ENTRIES"]

ROWS, COLUMNS = 1_000, 300
P, TEMPERATURE = 0.3, 0.1
LEVELS = (0.01, 0.1, 0.5, 0.9, 0.99)


class ConcreteDropoutFormula(nn.Module):
    """As in the authors' code, with its ``eps``."""

    def __init__(self, p: float = 0.1, temperature: float = 0.1) -> None:
        super().__init__()
        self.temperature = temperature
        self.p_logit = nn.Parameter(torch.full((1,), math.log(p) - math.log(1 - p)))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        eps = 1e-7
        p, u = torch.sigmoid(self.p_logit), torch.rand_like(x)
        logit = (p + eps).log() - (1 - p + eps).log() + (u + eps).log() - (1 - u + eps).log()
        return x * (1 - torch.sigmoid(logit / self.temperature)) / (1 - p)


def distribution(layer: Case, settings: Settings) -> Finding:
    """P(z <= c) = sigmoid(t logit(c) - logit(p)), each count within its binomial bounds.

    At c = 1/2 that is 1 - p, whatever the temperature.
    """
    z = _masks(layer, settings)
    for level in LEVELS:
        expected = _sigmoid(TEMPERATURE * _logit(level) - _logit(P))
        count = int((z <= level).sum())
        low, high = binomial_bounds(z.numel(), expected)
        if not low <= count <= high:
            return holds_if(False, f"P(z <= {level}) = {count / z.numel():.4f}, not {expected:.4f}")
    return holds_if(True, "the Concrete law")


def cold(layer: Case, settings: Settings) -> Finding:
    """At t = 0.001 the mask is binary but for 1 in 100, and drops Binomial(N, p) elements."""
    z = _masks(layer, settings, temperature=0.001)
    dropped, between = int((z > 0.5).sum()), int(((z > 0.01) & (z < 0.99)).sum())
    low, high = binomial_bounds(z.numel(), P)
    holds = low <= dropped <= high and between < 0.01 * z.numel()
    return holds_if(holds, f"{dropped / z.numel():.4f} dropped", rate=dropped / z.numel())


def independence(layer: Case, settings: Settings) -> Finding:
    """The decisions of neighbours and of two calls."""
    one, other = (_masks(layer, settings) > 0.5 for _ in range(2))
    return strongest([associate(one, other, "two calls"), *neighbouring(one)])


def extremes(layer: Case, settings: Settings) -> Finding:
    """Values and gradients are finite in every dtype, with p as near to 0 and 1 as training may bring it."""
    wrong = []
    for name, dtype in DTYPES.items():
        for logit in (-40.0, 0.0, 40.0):
            module = layer.make(p=P, temperature=TEMPERATURE).to(settings.device, dtype)
            module.get_parameter("p_logit").data.fill_(logit)
            x = settings.ones(ROWS, COLUMNS, dtype=dtype).requires_grad_()
            y = first(module(x))
            gradients = torch.autograd.grad(y.sum(), (x, module.get_parameter("p_logit")))
            if not all(bool(tensor.isfinite().all()) for tensor in (y, *gradients)):
                wrong.append(f"{name} at logit(p) = {logit:g}")
    return holds_if(not wrong, ", ".join(wrong) or "finite")


def _masks(layer: Case, settings: Settings, temperature: float = TEMPERATURE) -> Tensor:
    """``z``, of ones."""
    module = layer.make(p=P, temperature=temperature).to(settings.device)
    y = first(module(settings.ones(ROWS, COLUMNS, dtype=torch.float32))).detach()
    return 1 - y.double() * (1 - P)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


FAMILY = "noise"

ENTRIES = [
    Entry(
        ConcreteDropout,
        mask="the input's, almost binary",
        source="Gal, Hron and Kendall 2017, section 3",
        peer=Implementation("formula", ConcreteDropoutFormula),
        example=Example(normal(6, 20), {"p": 0.5, "temperature": 0.5}, p_name=""),
        workload=Workload(ones(1_000_000)),
        special=[
            Law(
                FAMILY,
                "distribution",
                "P(z <= c) = sigmoid(t logit(c) - logit(p))",
                distribution,
                why="The p that is learned is not the share that is dropped.",
            ),
            Law(
                FAMILY,
                "t near 0",
                "the mask is binary, and p of it dropped",
                cold,
                why="Annealing the temperature does not end in dropout with the learned p.",
            ),
            Law(
                FAMILY,
                "independence",
                "neighbours and calls are independent",
                independence,
                why="Units learn to rely on each other, which dropout is there to prevent.",
            ),
            Law(
                FAMILY,
                "extremes",
                "finite for p near 0 and 1, in every dtype",
                extremes,
                level=Level.UNLIKE_TORCH,
                why="Training ends in NaN once p comes near 0 or 1.",
            ),
        ],
    )
]
