"""The loss that draws the outputs of two dropout samples together."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from thinned.nested import refuse

__all__ = ["RDrop", "check_r_drop", "r_drop_loss"]


def r_drop_loss(
    logits1: Tensor,
    logits2: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    padding_mask: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy of two passes under dropout, and how far their distributions are apart.

    .. math:: L = \tfrac{1}{2}\,(\mathrm{CE}_1 + \mathrm{CE}_2) + \alpha\,\tfrac{1}{2}\,
        (\mathrm{KL}(P_1 \| P_2) + \mathrm{KL}(P_2 \| P_1))

    The mean of the cross-entropies is what the authors' code takes. The paper's equation has their sum: it is
    twice this loss at half its ``alpha``. The divergence is computed as half of
    ``sum((P1 - P2) * (log P1 - log P2))``, whose terms are all at least 0, in float32 for half precision.

    Args:
        logits1: of shape ``(N, C)``, ``(N, C, *)`` or ``(C,)``, as for
            :func:`torch.nn.functional.cross_entropy`.
        logits2: another pass's, of the same shape.
        target: class indices of shape ``(N,)``, ``(N, *)`` or ``()``, or class probabilities of the logits'
            shape.
        alpha: the weight of the divergence, at least 0.
        reduction: ``"mean"`` over what is not ignored, ``"sum"``, or ``"none"``.
        weight: a factor for each class in the cross-entropy, ``(C,)``; it does not touch the divergence.
        ignore_index: where class indices have this value, neither term counts.
        label_smoothing: of the cross-entropy, in [0, 1].
        padding_mask: a bool tensor, True where neither term counts, of the shape of class indices.

    Returns:
        A scalar, or for ``"none"`` a tensor of the shape of class indices.

    Raises:
        ValueError: the logits differ in shape, ``alpha`` is below 0 or NaN, or another ``reduction``.
        RuntimeError, IndexError: as :func:`torch.nn.functional.cross_entropy`.

    Source: Liang et al., "R-Drop: regularized dropout for neural networks", NeurIPS 2021, section 2.

    >>> import torch, thinned
    >>> logits, target = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 1])
    >>> thinned.functional.r_drop_loss(logits, logits, target)  # the cross-entropy alone
    tensor(0.2201)
    >>> thinned.functional.r_drop_loss(logits, logits.flip(0), target)
    tensor(1.8879)
    """
    check_r_drop(alpha, reduction)
    for logits in (logits1, logits2):
        if logits.is_nested:
            refuse("r_drop_loss", logits, "plain tensors, such as the values() of a jagged one")
    if logits1.shape != logits2.shape:
        raise ValueError(
            f"both logits have to have one shape, but got {tuple(logits1.shape)} and {tuple(logits2.shape)}"
        )
    dtype = torch.promote_types(logits1.dtype, logits2.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    classes = min(1, logits1.dim() - 1)
    log1, log2 = (torch.log_softmax(logits, classes, dtype=wide) for logits in (logits1, logits2))
    ignored = padding_mask
    if not target.is_floating_point():
        if padding_mask is not None:
            target = target.masked_fill(padding_mask, ignore_index)
        ignored = target == ignore_index
    if weight is not None:
        weight = weight.to(wide)

    def cross_entropy(log: Tensor) -> Tensor:
        if label_smoothing == 0 and not target.is_floating_point():
            return functional.nll_loss(log, target, weight, ignore_index=ignore_index, reduction="none")
        return functional.cross_entropy(
            log,
            target.to(wide) if target.is_floating_point() else target,
            weight,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )

    entropy = (cross_entropy(log1) + cross_entropy(log2)) / 2
    divergence = _symmetric_divergence(log1, log2, classes)
    if ignored is not None:
        entropy, divergence = entropy.masked_fill(ignored, 0), divergence.masked_fill(ignored, 0)
    if reduction == "mean":
        count = divergence.numel() if ignored is None else (~ignored).sum()
        weights = count
        if weight is not None and ignored is not None and not target.is_floating_point():
            weights = weight[target.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()
        loss = entropy.sum() / weights + alpha * (divergence.sum() / count)
    else:
        loss = entropy + alpha * divergence
        loss = loss.sum() if reduction == "sum" else loss
    # Under autocast torch's own losses are float32.
    return loss if torch.is_autocast_enabled(logits1.device.type) else loss.to(dtype)


def check_r_drop(alpha: float, reduction: str) -> None:
    """ValueError for arguments that :func:`r_drop_loss` does not take."""
    if not alpha >= 0:
        raise ValueError(f"alpha has to be at least 0, but got {alpha}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction; accepted: mean, sum, none")


def _symmetric_divergence(log1: Tensor, log2: Tensor, classes: int) -> Tensor:
    """``(KL(P1 || P2) + KL(P2 || P1)) / 2``; a class that both rule out adds nothing."""
    both_ruled_out = (log1 == -torch.inf) & (log2 == -torch.inf)
    ratio = (log1 - log2).masked_fill(both_ruled_out, 0)
    return ((log1.exp() - log2.exp()) * ratio).sum(classes) / 2


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
