"""A dropout and what stands beside it in one pass: ReLUDropout, GELUDropout, SiLUDropout, DropoutAdd."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, Masked, normal, ones
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.fused import DropoutAdd, GELUDropout, ReLUDropout, SiLUDropout

__all__ = ["ENTRIES"]

LARGE = 2**30  # all three activations of a number times this, but for zero, are the number itself, or zero


class DropoutAddOfTorch(nn.Dropout):
    def forward(self, input: Tensor, residual: Tensor) -> Tensor:  # type: ignore[override]
        return residual + super().forward(input)


def after(activation: Callable[..., nn.Module], p: float = 0.5, **arguments: Any) -> nn.Module:
    return nn.Sequential(activation(**arguments), nn.Dropout(p))


def of_magnitudes(layer: nn.Module, x: Tensor) -> Tensor:
    """Where the activation is the identity, so that the layer is dropout."""
    y: Tensor = layer(x.abs() * LARGE) / LARGE
    return torch.where(x < 0, -y, y)


def to_zeros(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x, torch.zeros_like(x))
    return y


def plain(layer: Case, settings: Settings, function: Callable[..., Tensor]) -> Finding:
    """After eval(), 10,000 normal numbers, to 1e-6."""
    module, inputs = layer.called(settings)
    inputs = tuple(settings.normal(100, 100, dtype=torch.float32) for _ in inputs)
    same = torch.allclose(module.eval()(*inputs), function(*inputs), rtol=1e-6, atol=1e-6)
    return holds_if(same, "without dropout" if same else "other values")


def in_evaluation(words: str, function: Callable[..., Tensor]) -> Law:
    return Law(
        "evaluation",
        "without dropout",
        f"in evaluation {words} alone",
        partial(plain, function=function),
        why="Predictions are random, or differ from what training prepared for.",
    )


def activated(
    layer: type[nn.Module], activation: type[nn.Module], source: str, arguments: dict[str, Any]
) -> Entry:
    name = f"torch.nn.{activation.__name__}"
    return Entry(
        layer,
        mask="the input's",
        source=source,
        peer=Implementation("torch", partial(after, activation), f"{name} and torch.nn.Dropout"),
        example=Example(
            # torch computes what is no multiple of 32 elements in another way.
            normal(6, 32),
            {"p": 0.5, **arguments},
            identity_in_evaluation=False,
            saved_bytes=4.0,
        ),
        workload=Workload(ones(1024, 1024)),
        masked=Masked((20_000, 3), through=lambda _: of_magnitudes),
        special=[in_evaluation("the activation", activation(**arguments))],
        exempt={"complex": "the activation is one of real numbers"},
        functional=f"{activation.__name__.lower()}_dropout",
    )


SOURCE = "Srivastava et al. 2014, section 4, after the activation"
ENTRIES = [
    activated(ReLUDropout, nn.ReLU, SOURCE, {}),
    activated(GELUDropout, nn.GELU, f"{SOURCE}; Hendrycks and Gimpel 2016", {"approximate": "tanh"}),
    activated(SiLUDropout, nn.SiLU, f"{SOURCE}; Elfwing et al. 2018", {}),
    Entry(
        DropoutAdd,
        mask="the input's",
        source="Vaswani et al. 2017, section 5.4",
        peer=Implementation("torch", DropoutAddOfTorch, "torch.nn.Dropout and a sum"),
        example=Example(normal(6, 20, count=2), identity_in_evaluation=False),
        workload=Workload(lambda: (torch.ones(1024, 1024), torch.ones(1024, 1024))),
        masked=Masked((20_000, 3), through=lambda _: to_zeros),
        special=[in_evaluation("the sum", torch.add)],
    ),
]
