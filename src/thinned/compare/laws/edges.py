"""The ends of the range of p, evaluation, and inputs that are not numbers to scale."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.settings import Settings
from thinned.compare.subjects import Subject

__all__ = ["LAWS"]


def evaluation(subject: Subject, settings: Settings) -> Finding:
    return _returns_input(subject.make(settings.p).eval(), settings)


def p_zero(subject: Subject, settings: Settings) -> Finding:
    return _returns_input(subject.make(0.0), settings)


def _returns_input(layer: nn.Module, settings: Settings) -> Finding:
    x = settings.normal()
    y = layer(x)
    if y is x:
        return holds_if(True, "the input")
    if torch.equal(y, x):
        return holds_if(False, "a copy of the input")
    return holds_if(False, f"other values, {(y.double() / x.double()).median():.4g} x")


def p_one(subject: Subject, settings: Settings) -> Finding:
    """All y = 0 and all dy/dx = 0, without 0 * (1/0) on the way."""
    x = settings.normal().requires_grad_()
    y = subject.make(1.0)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    found = {"zeros": y.count_nonzero() == 0, "zero gradients": gradient.count_nonzero() == 0}
    if all(found.values()):
        return holds_if(True, "zeros")
    return holds_if(False, f"{_kinds(y.detach())}; gradients {_kinds(gradient)}")


def _kinds(values: Tensor) -> str:
    """What a tensor holds, in words: zeros, NaN, infinities, other numbers."""
    kinds = {
        "NaN": values.isnan(),
        "inf": values.isinf(),
        "0": values == 0,
        "numbers": values.isfinite() & (values != 0),
    }
    return ", ".join(name for name, where in kinds.items() if where.any())


def refuses_p(subject: Subject, settings: Settings, *, outside: tuple[float, ...]) -> Finding:
    """ValueError, from the constructor or at the latest from the first call."""
    answers = {p: _answer_to_p(subject, settings, p) for p in outside}
    wrong = {p: answer for p, answer in answers.items() if answer != "ValueError"}
    return holds_if(not wrong, ", ".join(f"{a} for {p}" for p, a in wrong.items()) or "ValueError")


def _answer_to_p(subject: Subject, settings: Settings, p: float) -> str:
    try:
        subject.make(p)(settings.ones(4))
    except Exception as error:
        return type(error).__name__
    return "accepted"


def integers(subject: Subject, settings: Settings) -> Finding:
    """An integer cannot hold x/(1-p); any exception counts as a refusal."""
    x = torch.ones(64, dtype=torch.int64, device=settings.device)
    try:
        y = subject.make(0.3)(x)
    except Exception as error:
        return holds_if(True, type(error).__name__)
    return holds_if(False, f"accepted, gives {y.dtype}".replace("torch.", ""))


def not_finite(subject: Subject, settings: Settings) -> Finding:
    """A dropped element is 0, whatever it was; of 256 at p = 0.9 at least one is dropped."""
    became = {}
    for value in (math.nan, math.inf, -math.inf):
        y = subject.make(0.9)(settings.ones(256) * value)
        zeros = y[y == 0]
        became[value] = "NaN" if not len(zeros) else "-0" if zeros.signbit().any() else "+0"
    holds = "NaN" not in became.values()
    if len(set(became.values())) == 1:
        return holds_if(holds, became[math.nan])
    return holds_if(holds, ", ".join(f"{value} → {zero}" for value, zero in became.items()))


FAMILY = "edge cases"
LAWS = [
    Law(FAMILY, "evaluation", "in evaluation the input itself comes back", evaluation),
    Law(FAMILY, "p = 0", "at p = 0 the input itself comes back", p_zero),
    Law(FAMILY, "p = 1", "at p = 1 all values and all gradients are zero", p_one),
    Law(
        FAMILY,
        "p outside [0, 1]",
        "p below 0 or above 1 raises ValueError",
        partial(refuses_p, outside=(-0.1, 1.5)),
    ),
    Law(FAMILY, "p = NaN", "p = NaN raises ValueError", partial(refuses_p, outside=(math.nan,))),
    Law(FAMILY, "integer input", "an integer tensor is refused", integers),
    Law(FAMILY, "dropped NaN or inf", "a dropped element is 0, NaN and infinity included", not_finite),
]
