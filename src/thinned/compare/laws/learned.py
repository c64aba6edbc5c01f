"""The gradient of a learned noise parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from thinned.compare.implementation import Case, first
from thinned.compare.laws.law import Finding, holds_if
from thinned.compare.settings import Settings

__all__ = ["parameter_gradient"]

STEP = 1e-5


def parameter_gradient(
    layer: Case, settings: Settings, *, name: str, arguments: Mapping[str, Any], rows: int
) -> Finding:
    """Against a finite difference in float64, under one noise."""
    module = layer.make(**arguments).double().to(settings.device)
    x, weight = (settings.normal(rows, dtype=torch.float64) for _ in range(2))
    parameter: Tensor = module.get_parameter(name)

    def loss() -> Tensor:
        torch.manual_seed(settings.seed)
        return (first(module(x)) * weight).sum()

    found = float(torch.autograd.grad(loss(), parameter)[0].sum())
    with torch.no_grad():
        parameter += STEP
        above = loss()
        parameter -= 2 * STEP
        below = loss()
    wanted = float(above - below) / (2 * STEP)
    holds = abs(found - wanted) <= 1e-6 * (1 + abs(wanted))
    return holds_if(holds, "finite differences" if holds else f"{found:.4f}, not {wanted:.4f}")
