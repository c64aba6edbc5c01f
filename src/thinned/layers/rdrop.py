"""The loss that draws the outputs of two dropout samples together."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from thinned.functional.rdrop import check_r_drop, r_drop_loss

__all__ = ["RDrop"]


class RDrop(nn.Module):
    """:func:`thinned.functional.r_drop_loss` as a module, for the logits of two passes under dropout.

    A model that is called twice draws two masks, so that a step of training is ``loss = r_drop(model(x),
    model(x), target)``, or, in one pass over a batch twice as long, ``r_drop(*model(torch.cat([x,
    x])).chunk(2), target)``.

    Args:
        alpha: the weight of the divergence, at least 0.
        reduction: ``"mean"`` over what is not ignored, ``"sum"``, or ``"none"``.
        weight: a factor for each class in the cross-entropy.
        ignore_index: the class index at which neither term counts.
        label_smoothing: of the cross-entropy, in [0, 1].

    Shape:
        logits of ``(N, C)``, ``(N, C, *)`` or ``(C,)``, twice, and a target as
        :class:`torch.nn.CrossEntropyLoss` takes it; a scalar, or for ``"none"`` the shape without ``C``.

    Raises:
        ValueError: ``alpha`` below 0 or NaN, or another ``reduction``.

    Source: Liang et al., "R-Drop: regularized dropout for neural networks", NeurIPS 2021, section 2.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 3), thinned.Dropout(0.1))
    >>> x, target = torch.randn(4, 8), torch.tensor([0, 2, 1, 0])
    >>> loss = thinned.RDrop(alpha=5.0)(model(x), model(x), target)
    >>> loss.backward()
    """

    weight: Tensor | None

    def __init__(
        self,
        alpha: float = 1.0,
        reduction: Literal["mean", "sum", "none"] = "mean",
        *,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        check_r_drop(alpha, reduction)
        self.alpha = alpha
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(
        self, logits1: Tensor, logits2: Tensor, target: Tensor, *, padding_mask: Tensor | None = None
    ) -> Tensor:
        return r_drop_loss(
            logits1,
            logits2,
            target,
            self.alpha,
            self.reduction,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            padding_mask=padding_mask,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, reduction={self.reduction!r}"
