"""Dropout of weights: DropConnect, WeightDrop."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, Masked, P, normal, ones
from thinned.compare.laws.chance import DEVIATIONS
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import Formula
from thinned.compare.settings import Settings
from thinned.layers.weights import DropConnect, WeightDrop

__all__ = ["ENTRIES"]

INPUTS, OUTPUTS, MASKS = 500, 400, 5


class DropConnectFormula(Formula):
    def drop(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, self.p)


class WeightDropFormula(nn.Module):
    """AWD-LSTM's code: the parameter gets another name, and its dropout takes its place."""

    def __init__(self, module: nn.Module, weights: list[str], p: float = 0.5) -> None:
        super().__init__()
        self.module, self.weights, self.p = module, weights, p
        for name in weights:
            weight = getattr(module, name)
            delattr(module, name)
            module.register_parameter(f"{name}_raw", weight)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.weights:
            raw = getattr(self.module, f"{name}_raw")
            setattr(self.module, name, F.dropout(raw, self.p, self.training))
        y: Tensor = self.module(x)
        return y


def multiply(weight: nn.Module, w: Tensor) -> Tensor:
    """The weight itself, as the product with a unit matrix."""
    name, _ = next(weight.named_parameters())
    unit = torch.eye(w.shape[1], device=w.device, dtype=w.dtype)
    y: Tensor = torch.func.functional_call(weight, {name: w}, unit)
    return y.t()


def mean_product(layer: Case, settings: Settings) -> Finding:
    """The sum over rows and masks: independent Bernoulli variables, whose variance the law gives."""
    w = settings.uniform(OUTPUTS, INPUTS, dtype=torch.float32)
    x = settings.uniform(INPUTS, dtype=torch.float32)
    drop = layer.module(P)
    total = sum(float((drop(w) @ x).double().sum()) for _ in range(MASKS))
    terms = w.double() * x.double()
    expected = MASKS * float(terms.sum())
    deviation = math.sqrt(MASKS * float(terms.square().sum()) * P / (1 - P))
    bound = DEVIATIONS * deviation + 1e-6 * expected  # and the rounding of float32
    bias = (total - expected) / expected
    measured = f"{bias:+.3%} off"
    holds = abs(total - expected) <= bound
    return holds_if(holds, measured if holds else f"{measured}, beyond {bound / expected:.3%}", bias=bias)


def plain_product(layer: Case, settings: Settings) -> Finding:
    """The product of a 30x20 weight after eval(), against the plain one."""
    w, x = settings.normal(30, 20, dtype=torch.float32), settings.normal(20, dtype=torch.float32)
    same = torch.allclose(layer.module(0.5).eval()(w) @ x, w @ x, rtol=1e-5, atol=1e-6)
    return holds_if(same, "W x" if same else "other values")


OWN_LAWS = [
    Law(
        "weight",
        "mean of products",
        "the mean of outputs over masks is the plain output",
        mean_product,
        why="The layer computes something else on average in training than in evaluation.",
    ),
    Law(
        "weight",
        "plain product",
        "evaluation multiplies by the weight itself",
        plain_product,
        why="Predictions come from another weight than the one that was trained and saved.",
    ),
]


def make(p: float = 0.5, inputs: int = 6, outputs: int = 5) -> nn.Module:
    return WeightDrop(nn.Linear(inputs, outputs, bias=False), ["weight"], p)


def make_formula(p: float = 0.5, inputs: int = 6, outputs: int = 5) -> nn.Module:
    return WeightDropFormula(nn.Linear(inputs, outputs, bias=False), ["weight"], p)


ENTRIES = [
    Entry(
        DropConnect,
        mask="the weight's",
        source="Wan et al. 2013, section 3",
        peer=Implementation("formula", DropConnectFormula),
        example=Example(normal(12, 10)),
        workload=Workload(ones(1024, 1024), {"p": 0.5}),
        masked=Masked((400, 300)),
        special=OWN_LAWS,
    ),
    Entry(
        WeightDrop,
        mask="the weight's, one a call",
        source="Wan et al. 2013, section 3; Merity et al. 2018, section 3; AWD-LSTM",
        peer=Implementation("formula", make_formula),
        example=Example(normal(64, 6), identity_in_evaluation=False),
        workload=Workload(ones(64, 1024), {"p": 0.5, "inputs": 1024, "outputs": 1024}),
        masked=Masked((400, 300), through=lambda _: multiply),
        special=OWN_LAWS,
        exempt={
            "dropped NaN or inf": "a product with a unit matrix spreads a NaN over its row",
            "0-d input": "its weight is a matrix",
        },
        make=make,
        functional="drop_connect",
    ),
]
