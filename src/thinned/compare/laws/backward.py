"""Gradients, work in place, and repeating a mask."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from thinned.compare.figures import decimal
from thinned.compare.implementation import Case
from thinned.compare.laws.law import Finding, Law, Level, has_mask, holds_if, is_random, nothing_wrong
from thinned.compare.laws.values import departure, same, scale_of, under_seed
from thinned.compare.memory import saved_by_call
from thinned.compare.settings import Settings
from thinned.torch_state import version_of

__all__ = ["LAWS"]


def gradient(layer: Case, settings: Settings) -> Finding:
    """The gradient of every input and parameter, in float64."""
    call, x, others = layer.differentiable(settings, torch.float64)
    # gradcheck changes its inputs in place, so that the others reach the call by themselves.
    return _checked(
        partial(gradcheck, check_undefined_grad=False),
        lambda x, *_: under_seed(settings, call, x),
        x,
        *others,
    )


def second_derivative(layer: Case, settings: Settings) -> Finding:
    """Through exp, as a mask alone has none; its derivatives at 0 show a mask that differs from forward's."""
    call, x, _ = layer.differentiable(settings, torch.float64)
    return _checked(gradgradcheck, lambda x: under_seed(settings, call, x).exp(), x)


def _checked(check: Callable[..., bool], call: Callable[..., Tensor], *inputs: Tensor) -> Finding:
    try:
        check(call, inputs, fast_mode=True)
    except GradcheckError as error:
        return holds_if(False, str(error).splitlines()[0])
    return holds_if(True, "finite differences")


def mask_of_gradient(layer: Case, settings: Settings) -> Finding:
    """dL/dx = dL/dy * mask * scale, with the forward's mask and scale."""
    x, upstream = settings.normal().requires_grad_(), settings.normal().flip(0)
    y = layer.module(settings.p)(x)
    (downstream,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    y = y.detach()
    complaint = departure(downstream, upstream, kept=y != 0, scale=scale_of(y, x.detach()))
    return nothing_wrong(complaint, "forward's mask")


def in_place(layer: Case, settings: Settings) -> Finding:
    """The input's own memory holds the result, its version counter says so, and autograd stays right."""
    leaf = settings.normal().requires_grad_()
    x = leaf * 1
    memory, version = x.data_ptr(), version_of(x)
    y = _in_place(layer, settings)(x)
    if y.data_ptr() != memory or not torch.equal(x, y):
        return holds_if(False, "result elsewhere")
    if version_of(x) == version:
        return holds_if(False, "version counter unchanged")
    complaint = None
    if layer.mask.through is None:
        complaint = departure(y.detach(), leaf.detach())
        (downstream,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        complaint = complaint or departure(downstream, torch.ones_like(leaf), kept=y != 0)
    return nothing_wrong(complaint, "same memory")


def in_place_leaf(layer: Case, settings: Settings) -> Finding:
    """Autograd forbids writing to a leaf; the values a caller holds must survive the refusal."""
    x = settings.normal().requires_grad_()
    before = x.detach().clone()
    module = _in_place(layer, settings)
    try:
        module(x)
    except RuntimeError:
        written = not torch.equal(x, before)
        return holds_if(not written, "refused, but overwritten" if written else "refused")
    return holds_if(False, "accepted")


def _in_place(layer: Case, settings: Settings) -> Callable[[Tensor], Tensor]:
    arguments = {layer.example.p_name: settings.p, **layer.mask.arguments}
    module: Callable[[Tensor], Tensor] = layer.make(**arguments, inplace=True)
    return module


def same_seed(layer: Case, settings: Settings) -> Finding:
    """torch.manual_seed governs the mask; one of 20 other seeds gives another."""
    module, inputs = layer.called(settings)
    y, again, *others = (under_seed(settings, module, *inputs, offset=offset) for offset in (0, *range(21)))
    if not same(y, again):
        return holds_if(False, "another mask")
    if torch.initial_seed() != settings.seed + len(others):
        return holds_if(False, "seeds torch's generator")
    if all(same(y, other) for other in others):
        return holds_if(False, "one mask for all seeds")
    return holds_if(True, "same mask")


def checkpointed(layer: Case, settings: Settings) -> Finding:
    """Two calls in a region that is recomputed in backward, from a restored random state."""
    call, given, _ = layer.differentiable(settings)

    def region(x: Tensor) -> Tensor:
        return torch.sin(call(x)) * call(x)

    def gradient_of(recompute: bool) -> Tensor:
        torch.manual_seed(settings.seed)
        x = given.detach().clone().requires_grad_()
        y = checkpoint(region, x, use_reentrant=False) if recompute else region(x)
        (gradient,) = torch.autograd.grad(y.sum(), x)
        return gradient

    alike = same(gradient_of(recompute=True), gradient_of(recompute=False))
    return holds_if(alike, "equal" if alike else "another gradient")


def saved(layer: Case, settings: Settings) -> Finding:
    """Bytes for each element of the only input with a gradient, beside inputs, output and parameters."""
    call, x, others = layer.differentiable(settings)
    for other in others:
        other.requires_grad_(isinstance(other, nn.Parameter))
    kept = saved_by_call(call, x, others)
    allowed = layer.example.saved_bytes
    return holds_if(kept < allowed + 1, f"{decimal(kept)} bytes, allowed {decimal(allowed)}", bytes=kept)


def works_in_place(case: Case) -> bool:
    return case.masked is not None and case.offers("inplace")


FAMILY = "backward and in place"
law = partial(Law, FAMILY)
unlike_torch = partial(law, level=Level.UNLIKE_TORCH)
LAWS = [
    law(
        "gradient",
        "the gradient is that of finite differences under one mask",
        gradient,
        why="The optimiser follows the gradient of another function.",
    ),
    law(
        "mask of gradient",
        "backward has the forward's mask and scale",
        mask_of_gradient,
        has_mask,
        why="Weights are changed for outputs that they did not make.",
    ),
    unlike_torch(
        "second derivative",
        "the gradient can be differentiated again",
        second_derivative,
        why="Gradient penalties and meta-learning fail, or follow a wrong gradient.",
    ),
    unlike_torch(
        "in place",
        "inplace=True writes into the input's memory",
        in_place,
        works_in_place,
        why="The memory that inplace=True is meant to save is not saved, or autograd is not told.",
    ),
    unlike_torch(
        "in place on a leaf",
        "a leaf that needs grad is refused before it is written",
        in_place_leaf,
        works_in_place,
        why="A parameter is overwritten by a call that fails.",
    ),
    unlike_torch(
        "same seed",
        "one seed gives one mask, another seed another",
        same_seed,
        is_random,
        why="torch.manual_seed does not reproduce a run.",
    ),
    law(
        "checkpoint",
        "a checkpointed region's gradient equals the plain one",
        checkpointed,
        why="Recomputation draws another mask: the gradient belongs to another forward.",
    ),
    law(
        "saved",
        "keeps for backward what the formula has to, and less than a byte an element more",
        saved,
        level=Level.NICETY,
        why="Each layer holds a copy or a mask of its input until backward.",
    ),
]
