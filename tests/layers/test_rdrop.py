"""R-Drop's loss against its formula by hand and against torch's own losses."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.compare.layers import rdrop
from thinned.layers.rdrop import RDrop, r_drop_loss
from verdicts import verdict


def logits(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return first, second


def by_hand(a: Tensor, b: Tensor, target: Tensor, alpha: float, counts: Tensor, **arguments: Any) -> Tensor:
    """Position by position: torch's cross-entropy, and the two divergences from probabilities."""
    dim = 1 if a.dim() > 1 else 0
    entropy = sum(F.cross_entropy(x, target, reduction="none", **arguments) for x in (a, b)) / 2
    p, q = a.softmax(dim), b.softmax(dim)
    divergence = ((p * (p.log() - q.log())).sum(dim) + (q * (q.log() - p.log())).sum(dim)) / 2
    return (entropy + alpha * divergence) * counts


SHAPES = [((7, 5), (7,)), ((3, 5, 4), (3, 4)), ((2, 5, 3, 4), (2, 3, 4)), ((5,), ())]


@pytest.mark.parametrize(("shape", "positions"), SHAPES)
@pytest.mark.parametrize("arguments", [{}, {"label_smoothing": 0.2}], ids=str)
def test_formula(shape: tuple[int, ...], positions: tuple[int, ...], arguments: dict[str, Any]) -> None:
    a, b = (x.requires_grad_() for x in logits(*shape))
    target = torch.arange(math.prod(positions)).view(positions) % 5
    every = by_hand(a, b, target, 0.7, torch.ones(positions), **arguments)
    for reduction, expected in {"none": every, "sum": every.sum(), "mean": every.mean()}.items():
        loss = r_drop_loss(a, b, target, 0.7, reduction=reduction, **arguments)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
        got, wanted = (
            torch.autograd.grad(each.sum(), (a, b), retain_graph=True) for each in (loss, expected)
        )
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("how", ["index", "mask", "both"])
def test_what_is_ignored_counts_for_nothing(how: str, smoothing: float) -> None:
    a, b = (x.requires_grad_() for x in logits(4, 5, 6))
    target = torch.arange(24).view(4, 6) % 5
    ignored = torch.zeros(4, 6, dtype=torch.bool)
    ignored[:, 4:] = True
    ignored[0] = True
    marked = target.masked_fill(ignored, -1) if how != "mask" else target
    arguments: dict[str, Any] = {"ignore_index": -1, "label_smoothing": smoothing}
    arguments["padding_mask"] = None if how == "index" else ignored
    loss = r_drop_loss(a, b, marked, 2.0, **arguments)
    every = by_hand(a, b, target, 2.0, ~ignored, label_smoothing=smoothing)
    torch.testing.assert_close(loss, every.sum() / (~ignored).sum())
    for x in torch.autograd.grad(loss, (a, b)):
        assert not x.movedim(1, -1)[ignored].count_nonzero()
        assert x.movedim(1, -1)[~ignored].all()
    torch.testing.assert_close(r_drop_loss(a, b, marked, 2.0, reduction="none", **arguments), every)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_the_cross_entropys(smoothing: float) -> None:
    a, b = logits(20, 5)
    target, weight = torch.arange(20) % 5, torch.tensor([1.0, 0.5, 2.0, 3.0, 0.1], dtype=torch.float64)
    target[:3] = -100
    arguments: dict[str, Any] = {"weight": weight, "label_smoothing": smoothing}
    entropy = (F.cross_entropy(a, target, **arguments) + F.cross_entropy(b, target, **arguments)) / 2
    torch.testing.assert_close(r_drop_loss(a, b, target, 0.0, **arguments), entropy)
    difference = r_drop_loss(a, b, target, 1.0, **arguments) - entropy
    torch.testing.assert_close(difference, r_drop_loss(a, b, target, 1.0) - r_drop_loss(a, b, target, 0.0))


@pytest.mark.parametrize("shape", [(6, 5), (3, 5, 4)])
def test_class_probabilities(shape: tuple[int, ...]) -> None:
    a, b = logits(*shape)
    target = torch.rand(shape, dtype=torch.float64).softmax(1)
    every = by_hand(a, b, target, 0.7, torch.ones(()))
    torch.testing.assert_close(r_drop_loss(a, b, target, 0.7), every.mean())
    mask = torch.zeros(every.shape, dtype=torch.bool)
    mask[0] = True
    torch.testing.assert_close(r_drop_loss(a, b, target, 0.7, padding_mask=mask), every[1:].mean())


def test_agrees_with_the_authors_code() -> None:
    a, b = logits(50, 11, dtype=torch.float32)
    target = torch.arange(50) % 11
    loss = RDrop(3.0)(a, b, target)
    torch.testing.assert_close(loss, rdrop.RDropFormula(3.0)(a, b, target))
    assert loss.equal(RDrop(3.0)(b, a, target))
    assert RDrop(1e30)(a, a, target).equal(RDrop(0.0)(a, a, target))


def test_the_papers_sum_is_twice_this_at_half_its_alpha() -> None:
    a, b = logits(8, 5)
    target = torch.arange(8) % 5
    entropy = F.cross_entropy(a, target) + F.cross_entropy(b, target)
    divergence = by_hand(a, b, target, 1.0, torch.ones(8)).mean() - entropy / 2
    paper = entropy + 3.0 * divergence
    torch.testing.assert_close(2 * r_drop_loss(a, b, target, 1.5), paper)


def test_never_below_the_cross_entropy() -> None:
    a, b = logits(1000, 20, dtype=torch.float32)
    target = torch.arange(1000) % 20
    near = a + b * 1e-5
    entropy = r_drop_loss(a, near, target, 0.0, reduction="none")
    assert (r_drop_loss(a, near, target, 1e12, reduction="none") >= entropy).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    a, b = logits(3000, 9, dtype=dtype)
    target = torch.arange(3000) % 9
    exact = r_drop_loss(a.double() * 30, b.double() * 30, target, 5.0)
    loss = r_drop_loss(a * 30, b * 30, target, 5.0)
    assert loss.dtype == dtype
    assert abs(loss.double() - r_drop_loss((a * 30).double(), (b * 30).double(), target, 5.0)) <= (
        torch.finfo(dtype).eps * exact
    )


def test_far_logits_are_finite() -> None:
    a, b = torch.tensor([[0.0, 1000.0]]), torch.tensor([[1000.0, 0.0]])
    target = torch.tensor([1])
    assert r_drop_loss(a, b, target).item() == 500.0 + 1000.0


def test_a_class_ruled_out_in_one_pass() -> None:
    a, b = logits(8, 5)
    assert r_drop_loss(a.index_fill(1, torch.tensor([4]), -math.inf), b, torch.arange(8) % 4).isinf()


def test_vmap() -> None:
    a, b = logits(3, 8, 5)
    target = torch.arange(24).view(3, 8) % 5
    target[0, :3] = -100
    expected = torch.stack([r_drop_loss(*each) for each in zip(a, b, target, strict=True)])
    torch.testing.assert_close(torch.func.vmap(r_drop_loss)(a, b, target), expected)


def test_under_autocast_it_is_float32() -> None:
    a, b = logits(8, 5, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert r_drop_loss(a, b, torch.arange(8) % 5).dtype == torch.float32


def test_module_hands_on_its_arguments() -> None:
    a, b = logits(8, 5)
    target, weight = torch.arange(8) % 5, torch.rand(5, dtype=torch.float64)
    mask = torch.arange(8) < 2
    arguments: dict[str, Any] = {"reduction": "sum", "ignore_index": 3, "label_smoothing": 0.1}
    layer = RDrop(2.0, weight=weight, **arguments)
    expected = r_drop_loss(a, b, target, 2.0, weight=weight, padding_mask=mask, **arguments)
    for each in (layer, layer.eval()):
        assert each(a, b, target, padding_mask=mask).equal(expected)
    assert repr(layer) == "thinned.RDrop(alpha=2.0, reduction='sum')"


@pytest.mark.parametrize("alpha", [-0.5, math.nan])
def test_wrong_arguments(alpha: float) -> None:
    a, b = logits(8, 5)
    target = torch.arange(8) % 5
    with pytest.raises(ValueError, match=re.escape(f"alpha has to be at least 0, but got {alpha}")):
        RDrop(alpha)
    with pytest.raises(ValueError, match="average is not a valid value for reduction"):
        RDrop(reduction="average")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"one shape, but got \(8, 5\) and \(8, 4\)"):
        r_drop_loss(a, b[:, :4], target)


class Wrong(nn.Module):
    """R-Drop with one thing wrong."""

    def __init__(self, wrong: str, alpha: float = 1.0) -> None:
        super().__init__()
        self.wrong, self.alpha = wrong, alpha

    def forward(self, a: Tensor, b: Tensor, target: Tensor) -> Tensor:
        entropy = (F.cross_entropy(a, target) + F.cross_entropy(b, target)) / 2
        p, q = a.log_softmax(1), b.log_softmax(1)
        one_way = F.kl_div(
            p, q.detach() if self.wrong == "detached" else q, log_target=True, reduction="batchmean"
        )
        other_way = F.kl_div(q, p, log_target=True, reduction="batchmean")
        if self.wrong == "one way":
            return entropy + self.alpha * one_way
        factor = 1.02 if self.wrong == "biased" else 1.0
        return entropy + self.alpha * factor * (one_way + other_way) / 2


@pytest.mark.parametrize(
    ("wrong", "law"),
    [("one way", "formula"), ("one way", "symmetry"), ("biased", "formula"), ("detached", "formula")],
)
def test_a_wrong_loss_is_caught(wrong: str, law: str) -> None:
    assert verdict(rdrop.ENTRIES[0], law, partial(Wrong, wrong)).is_breach
