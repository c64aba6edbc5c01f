"""The ends of the range of p, evaluation, and inputs that are not numbers to scale."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from thinned.compare.figures import significant
from thinned.compare.implementation import Case, first
from thinned.compare.laws.law import Finding, Law, Level, has_mask, holds_if, is_random
from thinned.compare.settings import Settings

__all__ = ["LAWS"]

CALLS_IN_TRAINING = 64  # even one decision at p = 0.5 is not kept in all of them, but for one case in 2^64


def evaluation(layer: Case, settings: Settings) -> Finding:
    """After a call in training and eval() the first output equals the first input bit for bit.

    After train() one of 64 does not. Those are without gradients, as those of Monte-Carlo dropout are.
    """
    module, inputs = layer.called(settings)
    module(*inputs)
    found = _has_values_of_input(first(module.eval()(*inputs)), inputs[0])
    if found.verdict.is_breach or not is_random(layer):
        return found
    module.train()
    with torch.no_grad():
        drops = any(not torch.equal(first(module(*inputs)), inputs[0]) for _ in range(CALLS_IN_TRAINING))
    return found if drops else holds_if(False, "nothing dropped after train(), without gradients")


def p_zero(layer: Case, settings: Settings) -> Finding:
    """In training at p = 0 the first output equals the first input bit for bit."""
    return _has_values_of_input(*_at_p_zero(layer, settings))


def no_copy(layer: Case, settings: Settings) -> Finding:
    """The output is the input's own tensor object, after eval() and at p = 0."""
    module, inputs = layer.called(settings)
    outputs = {"in evaluation": (first(module.eval()(*inputs)), inputs[0])}
    if has_p(layer):
        outputs["at p = 0"] = _at_p_zero(layer, settings)
    copies = [when for when, (y, x) in outputs.items() if y is not x]
    return holds_if(not copies, f"a copy {' and '.join(copies)}" if copies else "the input")


def _at_p_zero(layer: Case, settings: Settings) -> tuple[Tensor, Tensor]:
    module, inputs = layer.called(settings, torch.float32, **{layer.example.p_name: 0.0})
    return first(module(*inputs)), inputs[0]


def _has_values_of_input(y: Tensor, x: Tensor) -> Finding:
    if torch.equal(y, x):
        return holds_if(True, "the input's values")
    if ((y == 0) & (x != 0)).any():
        return holds_if(False, "drops")
    return holds_if(False, f"other values, {significant(float((y.double() / x.double()).median()), 4)} x")


def p_one(layer: Case, settings: Settings) -> Finding:
    """All y = 0 and all dy/dx = 0, without 0 * (1/0) in between."""
    x = settings.normal().requires_grad_()
    y = layer.module(1.0)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    if not y.count_nonzero() and not gradient.count_nonzero():
        return holds_if(True, "zeros")
    return holds_if(False, f"{_kinds(y.detach())}; gradients {_kinds(gradient)}")


def _kinds(values: Tensor) -> str:
    """The kinds of numbers in a tensor, in words."""
    kinds = {
        "NaN": values.isnan(),
        "inf": values.isinf(),
        "0": values == 0,
        "numbers": values.isfinite() & (values != 0),
    }
    return ", ".join(name for name, where in kinds.items() if where.any())


def refuses_p(layer: Case, settings: Settings, *, outside: tuple[float, ...]) -> Finding:
    """ValueError that names the value, from the constructor or at the latest from the first call."""
    answers = {p: _answer_to_p(layer, settings, p) for p in outside}
    wrong = {p: answer for p, answer in answers.items() if answer != "ValueError"}
    return holds_if(not wrong, ", ".join(f"{a} for {p}" for p, a in wrong.items()) or "ValueError")


def _answer_to_p(layer: Case, settings: Settings, p: float) -> str:
    try:
        module, inputs = layer.called(settings, torch.float32, **{layer.example.p_name: p})
        module(*inputs)
    except ValueError as error:
        named = any(str(value) in str(error) for value in (p, 1 - p))  # 1-p for a layer that takes that
        return "ValueError" if named else "a message without the value"
    except Exception as error:
        return type(error).__name__
    return "accepted"


def integers(layer: Case, settings: Settings) -> Finding:
    """An integer cannot hold x/(1-p); any exception counts as a refusal."""
    x = torch.ones(layer.sized(64), dtype=torch.int64, device=settings.device)
    try:
        y = layer.module(0.3)(x)
    except Exception as error:
        return holds_if(True, type(error).__name__)
    return holds_if(False, f"accepted, gives {y.dtype}".replace("torch.", ""))


def not_finite(layer: Case, settings: Settings) -> Finding:
    """A dropped element is 0, whatever it was; of 256 at p = 0.9 at least one is dropped."""
    became = {}
    for value in (math.nan, math.inf, -math.inf):
        y = layer.module(0.9)(settings.ones(*layer.sized(256)) * value)
        zeros = y[y == 0]
        became[value] = "NaN" if not len(zeros) else "-0" if zeros.signbit().any() else "+0"
    holds = "NaN" not in became.values()
    if len(set(became.values())) == 1:
        return holds_if(holds, became[math.nan])
    return holds_if(holds, ", ".join(f"{value} → {zero}" for value, zero in became.items()))


def has_p(case: Case) -> bool:
    return bool(case.example.p_name)


def is_identity(case: Case) -> bool:
    return case.example.identity_in_evaluation


def keeps_at_zero(case: Case) -> bool:
    return has_p(case) and is_identity(case)


FAMILY = "edge cases"
law = partial(Law, FAMILY)
LAWS = [
    law(
        "evaluation",
        "in evaluation the input comes back unchanged, and in training again not",
        evaluation,
        is_identity,
        why="Predictions are random, or differ from what training prepared for.",
    ),
    law(
        "p = 0",
        "at p = 0 the input comes back unchanged",
        p_zero,
        keeps_at_zero,
        why="Training without dropout is changed by the layer.",
    ),
    law(
        "no copy",
        "in evaluation and at p = 0 the input itself comes back",
        no_copy,
        is_identity,
        level=Level.NICETY,
        why="Each copy costs memory and time for nothing.",
    ),
    law(
        "p = 1",
        "at p = 1 all values and all gradients are zero",
        p_one,
        has_mask,
        level=Level.UNLIKE_TORCH,
        why="One NaN at the end of a schedule or search ruins the weights.",
    ),
    law(
        "p outside [0, 1]",
        "p below 0 or above 1 raises ValueError that names it",
        partial(refuses_p, outside=(-0.1, 1.5)),
        has_p,
        level=Level.UNLIKE_TORCH,
        why="A mistaken p, such as a percentage, is not noticed.",
    ),
    law(
        "p = NaN",
        "p = NaN raises ValueError",
        partial(refuses_p, outside=(math.nan,)),
        has_p,
        level=Level.NICETY,
        why="A p that was computed wrongly goes unnoticed.",
    ),
    law(
        "integer input",
        "an integer tensor is refused where something is dropped",
        integers,
        has_mask,
        level=Level.UNLIKE_TORCH,
        why="Integers cannot hold scaled values: they are rounded, or change their dtype.",
    ),
    law(
        "dropped NaN or inf",
        "a dropped element is 0, NaN and infinity included",
        not_finite,
        has_mask,
        level=Level.NICETY,
        why="An infinity in a masked-out place becomes NaN: 0 * inf.",
    ),
]
