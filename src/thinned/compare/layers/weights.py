"""Dropout of weights: DropConnect, WeightDrop."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinned.compare.laws import Finding
from thinned.compare.laws.adapt import seen_through
from thinned.compare.laws.chance import DEVIATIONS
from thinned.compare.laws.every_layer import general_laws
from thinned.compare.laws.law import holds_if
from thinned.compare.laws.mask import Masked, masked_laws
from thinned.compare.layers.entry import Entry, Example, Implementation, LayerLaw, Workload
from thinned.compare.settings import Settings
from thinned.layers.weights import DropConnect, WeightDrop

__all__ = ["ENTRIES"]

P = 0.3
INPUTS, OUTPUTS, MASKS = 500, 400, 5


class DropConnectFormula(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, self.p, self.training)


class WeightDropFormula(nn.Module):
    """That of the code of AWD-LSTM: the parameter gets another name, and its dropout takes its place."""

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


def mean_product(layer: Implementation, settings: Settings) -> Finding:
    """The products of all rows and masks, as one sum of independent Bernoulli variables of known variance."""
    w = settings.uniform(OUTPUTS, INPUTS, dtype=torch.float32)
    x = settings.uniform(INPUTS, dtype=torch.float32)
    drop = layer.make(p=P)
    total = sum(float((drop(w) @ x).double().sum()) for _ in range(MASKS))
    terms = w.double() * x.double()
    expected = MASKS * float(terms.sum())
    deviation = math.sqrt(MASKS * float(terms.square().sum()) * P / (1 - P))
    bound = DEVIATIONS * deviation + 1e-6 * expected  # and the rounding of float32
    bias = (total - expected) / expected
    measured = f"{bias:+.3%} off"
    holds = abs(total - expected) <= bound
    return holds_if(holds, measured if holds else f"{measured}, beyond {bound / expected:.3%}", bias=bias)


def plain_product(layer: Implementation, settings: Settings) -> Finding:
    w, x = settings.normal(30, 20, dtype=torch.float32), settings.normal(20, dtype=torch.float32)
    same = torch.allclose(layer.make(p=0.5).eval()(w) @ x, w @ x, rtol=1e-5, atol=1e-6)
    return holds_if(same, "W x" if same else "other values")


OWN_LAWS = (
    LayerLaw(
        "weight", "mean of products", "the mean of outputs over masks is the plain output", mean_product
    ),
    LayerLaw("weight", "plain product", "evaluation multiplies by the weight itself", plain_product),
)


def _weight(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(12, 10, dtype=dtype),)


def _batch(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return (torch.randn(64, 6, dtype=dtype),)


def make(p: float = 0.5, inputs: int = 6, outputs: int = 5) -> nn.Module:
    return WeightDrop(nn.Linear(inputs, outputs, bias=False), ["weight"], p)


def make_formula(p: float = 0.5, inputs: int = 6, outputs: int = 5) -> nn.Module:
    return WeightDropFormula(nn.Linear(inputs, outputs, bias=False), ["weight"], p)


_connect = Example(_weight, {"p": 0.5})
_drop = Example(_batch, {"p": 0.5}, identity_in_evaluation=False)
# A product with a unit matrix spreads a NaN over its row.
_of_weight = [law for law in masked_laws(Masked((400, 300))) if law.name != "dropped NaN"]

ENTRIES = [
    Entry(
        DropConnect,
        functional="drop_connect",
        mask="the weight's",
        source="Wan et al. 2013, section 3",
        peer=Implementation("formula", DropConnectFormula),
        laws=(*general_laws(_connect), *masked_laws(Masked((400, 300))), *OWN_LAWS),
        example=_connect,
        workload=Workload(lambda: (torch.ones(1024, 1024),), {"p": 0.5}),
    ),
    Entry(
        WeightDrop,
        functional="drop_connect",
        mask="the weight's, one a call",
        source="Wan et al. 2013, section 3; Merity et al. 2018, section 3; AWD-LSTM",
        peer=Implementation("formula", make_formula),
        laws=(*general_laws(_drop), *seen_through(multiply, (*_of_weight, *OWN_LAWS))),
        example=_drop,
        workload=Workload(lambda: (torch.ones(64, 1024),), {"p": 0.5, "inputs": 1024, "outputs": 1024}),
        make=make,
    ),
]
