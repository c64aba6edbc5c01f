"""Output and gradient lie in memory as those of nn.Dropout do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import thinned

LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "contiguous": lambda: torch.randn(2, 3, 4, 5),
    "0-d": lambda: torch.randn(()),
    "empty": lambda: torch.randn(3, 0, 2),
    "empty permuted": lambda: torch.randn(3, 0, 2).permute(2, 0, 1),
    "transposed": lambda: torch.randn(4, 6).T,
    "permuted": lambda: torch.randn(2, 3, 4, 5).permute(2, 0, 3, 1),
    "channels_last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "channels_last, one channel": lambda: torch.randn(2, 1, 4, 5).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 2).to(memory_format=torch.channels_last_3d),
    "every other column": lambda: torch.randn(4, 10)[:, ::2],
    "every other row": lambda: torch.randn(10, 4)[::2],
    "every other column, transposed": lambda: torch.randn(4, 10)[:, ::2].T,
    "tail": lambda: torch.randn(10, 4)[-3:],
    "column": lambda: torch.randn(10, 4)[:, 1],
    "expanded rows": lambda: torch.randn(1, 4).expand(3, 4),
    "expanded columns": lambda: torch.randn(3, 1).expand(3, 4),
    "expanded scalar": lambda: torch.randn(()).expand(3, 4),
    "expanded, permuted": lambda: torch.randn(2, 1, 5).expand(2, 4, 5).permute(2, 0, 1),
    "size 1 with an odd stride": lambda: torch.randn(20).as_strided((3, 1, 4), (4, 7, 1)),
    "overlapping windows": lambda: torch.randn(20).unfold(0, 4, 2),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


def strides(x: Tensor) -> list[tuple[int, int]]:
    """Dimension and stride, where a step can be taken."""
    return [(d, x.stride(d)) for d in range(x.dim()) if x.numel() and x.shape[d] > 1]


@each_layout
@pytest.mark.parametrize("requires_grad", [False, True])
def test_output(layout: str, requires_grad: bool) -> None:
    x = LAYOUTS[layout]().detach().requires_grad_(requires_grad)
    assert strides(thinned.Dropout(0.5)(x)) == strides(nn.Dropout(0.5)(x))


def gradients(layer: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """The gradient of a leaf, which autograd may lay out again, and the gradient that a node returns."""
    leaf = x.detach().requires_grad_()
    loss(layer(leaf)).backward()
    assert leaf.grad is not None
    (handed,) = torch.autograd.grad(loss(layer(leaf)), leaf)
    return leaf.grad, handed


@each_layout
@pytest.mark.parametrize("weighted", [False, True])
def test_gradient_is_laid_out_as_torchs(layout: str, weighted: bool) -> None:
    """A plain sum's incoming gradient is an expanded number, which has no layout of its own."""
    x = LAYOUTS[layout]()
    weights = torch.randn(x.shape) if weighted else 1.0
    ours, torchs = (
        gradients(layer(0.5), x, lambda y: (y * weights).sum() if weighted else y.sum())
        for layer in (thinned.Dropout, nn.Dropout)
    )
    assert strides(ours[0]) == strides(torchs[0])
    if not weighted:
        assert strides(ours[1]) == strides(torchs[1])


@each_layout
@pytest.mark.parametrize("transposed", [False, True])
def test_gradient_of_another_layout(layout: str, transposed: bool) -> None:
    """The gradient keeps the input's memory format and the output's mask, whatever the incoming one's."""
    x = LAYOUTS[layout]().detach().requires_grad_()
    backwards = tuple(reversed(range(x.dim())))
    weights = torch.randn(x.shape[::-1]).permute(backwards) if transposed else torch.randn(x.shape)
    for key in (None, thinned.Key(7)):
        y = thinned.Dropout(0.5)(x, key=key)
        (grad,) = torch.autograd.grad(y, x, weights)
        assert strides(grad) == strides(torch.empty_like(x))
        assert grad.equal(torch.where(y == 0, 0.0, 2 * weights))
