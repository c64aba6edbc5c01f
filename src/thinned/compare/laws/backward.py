"""Gradients, work in place, and repeating a mask."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from thinned.compare.laws.law import HALF, Finding, Law, holds_if, nothing_wrong
from thinned.compare.laws.values import departure, scale_of
from thinned.compare.settings import Settings
from thinned.compare.subjects import Subject
from thinned.torch_state import version_of

__all__ = ["LAWS"]


def gradient(subject: Subject, settings: Settings) -> Finding:
    """dL/dx = dL/dy * mask * scale, with the forward's mask and scale."""
    x, upstream = settings.normal().requires_grad_(), settings.normal().flip(0)
    y = subject.make(settings.p)(x)
    (downstream,) = torch.autograd.grad(y, x, upstream.to(y.dtype))
    y = y.detach()
    complaint = departure(downstream, upstream, kept=y != 0, scale=scale_of(y, x.detach()))
    return nothing_wrong(complaint, "forward's mask")


def second_derivative(subject: Subject, settings: Settings) -> Finding:
    """d²(y²)/dx² = 2 mask scale², by differentiating the first derivative."""
    x = settings.normal(100, 100, dtype=torch.float64).requires_grad_()
    y = subject.make(HALF)(x)
    (first,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    if not first.requires_grad:
        return holds_if(False, "the gradient is cut off")
    (second,) = torch.autograd.grad(first.sum(), x)
    y = y.detach()
    expected = torch.where(y != 0, 2 * scale_of(y, x.detach()) ** 2, 0.0)
    error = float((second - expected).abs().max() / expected.max())
    return holds_if(error <= 1e-12, f"error {error:.1g}")


def in_place(subject: Subject, settings: Settings) -> Finding:
    """The input's own memory holds the result, its version counter says so, and autograd stays right."""
    leaf = settings.normal().requires_grad_()
    x = leaf * 1
    memory, version = x.data_ptr(), version_of(x)
    y = subject.make(settings.p, inplace=True)(x)
    if y.data_ptr() != memory or not torch.equal(x, y):
        return holds_if(False, "result elsewhere")
    if version_of(x) == version:
        return holds_if(False, "version counter unchanged")
    complaint = departure(y.detach(), leaf.detach())
    if complaint is None:
        (downstream,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
        complaint = departure(downstream, torch.ones_like(leaf), kept=y != 0)
    return nothing_wrong(complaint, "same memory")


def in_place_leaf(subject: Subject, settings: Settings) -> Finding:
    """Autograd forbids writing to a leaf; the values a caller holds must survive the refusal."""
    x = settings.normal().requires_grad_()
    before = x.detach().clone()
    layer = subject.make(settings.p, inplace=True)
    try:
        layer(x)
    except RuntimeError:
        written = not torch.equal(x, before)
        return holds_if(not written, "refused, but overwritten" if written else "refused")
    return holds_if(False, "accepted")


def same_seed(subject: Subject, settings: Settings) -> Finding:
    """torch.manual_seed governs the mask: equal for one seed, different for another."""
    layer, x = subject.make(HALF), settings.ones(1000)

    def mask(seed: int) -> Tensor:
        torch.manual_seed(seed)
        kept: Tensor = layer(x) != 0
        return kept

    first = mask(settings.seed)
    if not torch.equal(first, mask(settings.seed)):
        return holds_if(False, "another mask")
    if torch.equal(first, mask(settings.seed + 1)):
        return holds_if(False, "one mask for all seeds")
    return holds_if(True, "same mask")


def checkpointed(subject: Subject, settings: Settings) -> Finding:
    """A region recomputed in backward, from a restored random state, has the plain region's gradient."""
    layer = subject.make(settings.p)

    def region(x: Tensor) -> Tensor:
        y: Tensor = layer(torch.sin(layer(x))).square()
        return y

    def gradient_of(recompute: bool) -> Tensor:
        torch.manual_seed(settings.seed)
        x = settings.normal().requires_grad_()
        y = checkpoint(region, x, use_reentrant=False) if recompute else region(x)
        y.sum().backward()
        assert x.grad is not None
        return x.grad

    same = torch.equal(gradient_of(recompute=True), gradient_of(recompute=False))
    return holds_if(same, "equal" if same else "another gradient")


FAMILY = "backward and in place"
LAWS = [
    Law(FAMILY, "gradient", "the backward pass uses the forward's mask and scale", gradient),
    Law(FAMILY, "second derivative", "the gradient can be differentiated again", second_derivative),
    Law(FAMILY, "in place", "inplace=True writes into the input's memory", in_place),
    Law(
        FAMILY, "in place on a leaf", "a leaf that needs grad is refused before it is written", in_place_leaf
    ),
    Law(FAMILY, "same seed", "one seed gives one mask, another seed another", same_seed),
    Law(FAMILY, "checkpoint", "a checkpointed region's gradient equals the plain one", checkpointed),
]
