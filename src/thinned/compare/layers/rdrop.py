"""The loss of two passes: RDrop."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.compare.figures import significant
from thinned.compare.implementation import Case, Example, Implementation
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.rdrop import RDrop

__all__ = ["ENTRIES"]


class RDropFormula(nn.Module):
    """The authors' code, with the mean over samples."""

    def __init__(self, alpha: float = 1.0) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, logits1: Tensor, logits2: Tensor, target: Tensor) -> Tensor:
        entropy = (F.cross_entropy(logits1, target) + F.cross_entropy(logits2, target)) / 2
        divergence = (_divergence(logits1, logits2) + _divergence(logits2, logits1)) / 2
        return entropy + self.alpha * divergence


def _divergence(a: Tensor, b: Tensor) -> Tensor:
    return F.kl_div(F.log_softmax(a, 1), F.softmax(b, 1), reduction="batchmean")


def _logits(dtype: torch.dtype, rows: int = 7, classes: int = 5) -> tuple[Tensor, ...]:
    first, second = torch.randn(2, rows, classes, dtype=dtype).unbind()
    return first, second, torch.arange(rows) % classes


def _on(settings: Settings, dtype: torch.dtype, rows: int = 7, classes: int = 5) -> tuple[Tensor, ...]:
    return tuple(x.to(settings.device) for x in _logits(dtype, rows, classes))


def formula(layer: Case, settings: Settings) -> Finding:
    """Value and both gradients against the paper's terms, from softmax and log in float64."""
    first, second, target = _on(settings, torch.float64)
    alpha = 0.7

    def by_hand(a: Tensor, b: Tensor) -> Tensor:
        p, q = a.softmax(1), b.softmax(1)
        at = torch.arange(len(target), device=target.device), target
        entropy = -(p[at].log() + q[at].log()) / 2
        divergence = (p * (p / q).log() + q * (q / p).log()).sum(1) / 2
        return (entropy + alpha * divergence).mean()

    results = []
    for loss in (by_hand, lambda a, b: layer.make(alpha=alpha)(a, b, target)):
        a, b = (x.clone().requires_grad_() for x in (first, second))
        value = loss(a, b)
        results.append((value.detach(), *torch.autograd.grad(value, (a, b))))
    off = max(float((x - y).abs().max()) for x, y in zip(*results, strict=True))
    return holds_if(off < 1e-12, "to the rounding" if off < 1e-12 else f"{significant(off)} off", off=off)


def equal_logits(layer: Case, settings: Settings) -> Finding:
    """With alpha = 1e6 and equal logits, the loss is the cross-entropy, and so is its gradient."""
    first, _, target = _on(settings, torch.float32)
    first.requires_grad_()
    loss = layer.make(alpha=1e6)(first, first.detach(), target)
    (slope,) = torch.autograd.grad(loss, first)
    expected = F.cross_entropy(first, target)
    (expected_slope,) = torch.autograd.grad(expected / 2, first)
    same = torch.allclose(loss, expected) and torch.allclose(slope, expected_slope, atol=1e-6)
    return holds_if(same, "0" if same else significant(float((loss - expected).detach())))


def symmetry(layer: Case, settings: Settings) -> Finding:
    """The loss of 1,000 samples, with the passes in one order and in the other."""
    first, second, target = _on(settings, torch.float32, 1000)
    module = layer.make(alpha=2.0)
    a, b = module(first, second, target), module(second, first, target)
    return holds_if(torch.allclose(a, b, rtol=1e-6), f"{significant(float(abs(a - b)))} apart")


def close_logits(layer: Case, settings: Settings) -> Finding:
    """In float32, for logits 1e-4 apart: KL is about 5e-9, far below the rounding of its terms."""
    first, second, target = _on(settings, torch.float32, 200, 50)
    second = first + second * 1e-4
    with_one = layer.make(alpha=1e9)(first, second, target).double()
    with_none = layer.make(alpha=0.0)(first, second, target).double()
    p, q = first.double().softmax(1), second.double().softmax(1)
    expected = ((p - q) * (p / q).log()).sum(1).mean() / 2
    ratio = float((with_one - with_none) / 1e9 / expected)
    return holds_if(abs(ratio - 1) < 0.01, f"{ratio:.4f} of it", ratio=ratio)


def ruled_out(layer: Case, settings: Settings) -> Finding:
    """A class with a logit of -inf in both passes, as a mask leaves it."""
    first, second, target = _on(settings, torch.float32)
    masked = [
        torch.cat([x[:, :4], torch.full_like(x[:, 4:], -torch.inf)], 1).requires_grad_()
        for x in (first, second)
    ]
    target = target % 4
    loss = layer.make(alpha=1.0)(*masked, target)
    expected = layer.make(alpha=1.0)(first[:, :4], second[:, :4], target)
    slope = torch.autograd.grad(loss, masked[0])[0]
    fine = torch.allclose(loss, expected) and bool(slope.isfinite().all())
    return holds_if(fine, "as without it" if fine else significant(float(loss.detach())))


FAMILY = "loss"
_law = partial(Law, FAMILY)

ENTRIES = [
    Entry(
        RDrop,
        mask="none",
        source="Liang et al. 2021, section 2",
        peer=Implementation("formula", RDropFormula, "the authors' code in plain torch"),
        example=Example(
            _logits,
            {"alpha": 2.0},
            p_name="",
            identity_in_evaluation=False,
            is_random=False,
            saved_bytes=25,  # six tensors for two passes, and a mask
        ),
        workload=Workload(lambda: _logits(torch.float32, 500, 1000), {"alpha": 1.0}),
        special=[
            _law(
                "formula",
                "value and gradients are the formula's in float64",
                formula,
                why="The optimiser follows the gradient of another loss.",
            ),
            _law(
                "equal logits",
                "the divergence and its gradient are 0",
                equal_logits,
                level=Level.NICETY,
                why="Two passes that agree are still pushed apart or together.",
            ),
            _law(
                "symmetry",
                "the order of the passes does not matter",
                symmetry,
                why="One of the two passes counts more than the other.",
            ),
            _law(
                "close logits",
                "a small divergence is right to 1 % in float32",
                close_logits,
                level=Level.NICETY,
                why="Rounding drowns the divergence late in training, when passes nearly agree.",
            ),
            _law(
                "ruled-out class",
                "a logit of -inf in both passes changes nothing",
                ruled_out,
                level=Level.UNLIKE_TORCH,
                why="A model that masks its classes trains on NaN.",
            ),
        ],
        functional="r_drop_loss",
    )
]
