"""R-Drop: a loss that pulls the outputs of two passes under dropout towards each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import has_torch_function

from thinned.checks import check_integer, check_real, got
from thinned.layers._arguments import autocasts, broadcasts, check_device, check_tensor
from thinned.layers._overrides import module_node, overridden
from thinned.layers._torchscript import Scriptable
from thinned.nested import refuse
from thinned.torch_state import compiling

__all__ = ["RDrop", "r_drop_loss"]


def r_drop_loss(
    logits1: Tensor,
    logits2: Tensor,
    target: Tensor,
    alpha: float = 1.0,
    *,
    reduction: Literal["mean", "sum", "none"] = "mean",
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    padding_mask: Tensor | None = None,
) -> Tensor:
    r"""Cross-entropy of two passes under dropout, plus the divergence of their two distributions.

    .. math:: L = \tfrac{1}{2}\,(\mathrm{CE}_1 + \mathrm{CE}_2) + \alpha\,\tfrac{1}{2}\,
        (\mathrm{KL}(P_1 \| P_2) + \mathrm{KL}(P_2 \| P_1))

    This takes the mean of the cross-entropies, as the authors' code does. The paper's equation takes their
    sum: it is twice this loss at half its ``alpha``. The divergence is half of
    ``sum((P1 - P2) * (log P1 - log P2))``, whose terms are all at least 0, in float32 for half precision.

    Args:
        logits1: of shape ``(N, C)``, ``(N, C, *)`` or ``(C,)``, as for
            :func:`torch.nn.functional.cross_entropy`.
        logits2: the other pass's, of the same shape.
        target: class indices of shape ``(N,)``, ``(N, *)`` or ``()``, or class probabilities of the logits'
            shape.
        alpha: the weight of the divergence, at least 0.
        reduction: ``"mean"`` over the positions that are not ignored, ``"sum"``, or ``"none"``.
        weight: a factor for each class in the cross-entropy, ``(C,)``; the divergence ignores it.
        ignore_index: a position with this class index adds to neither term.
        label_smoothing: of the cross-entropy, in [0, 1].
        padding_mask: a bool tensor of the shape of class indices; a True position adds to neither term.

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
    if has_torch_function((logits1, logits2, target, weight, padding_mask)) and not compiling():
        return overridden(r_drop_loss, locals())
    _check(alpha, reduction, ignore_index, label_smoothing)
    check_tensor("r_drop_loss", "logits1", logits1)
    given = {"logits2": logits2, "target": target, "weight": weight, "padding_mask": padding_mask}
    for name, value in given.items():
        if value is not None or name in ("logits2", "target"):
            check_tensor("r_drop_loss", name, value)
            check_device(name, value, logits1, "logits1")  # type: ignore[arg-type]  # a tensor
    for logits in (logits1, logits2):
        if logits.is_nested:
            refuse("r_drop_loss", logits, "plain tensors, such as the values() of a jagged one")
    if logits1.shape != logits2.shape:
        raise ValueError(
            f"logits1 and logits2 have to have one shape, but got {tuple(logits1.shape)} and "
            f"{tuple(logits2.shape)}"
        )
    dtype = torch.promote_types(logits1.dtype, logits2.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    classes = min(1, logits1.dim() - 1)
    samples = (*logits1.shape[:classes], *logits1.shape[classes + 1 :])
    if padding_mask is not None and (
        padding_mask.dtype != torch.bool or not broadcasts(padding_mask.shape, samples)
    ):
        raise RuntimeError(f"padding_mask has to be a bool tensor of shape {samples}, {got(padding_mask)}")
    log1, log2 = (torch.log_softmax(logits, classes, dtype=wide) for logits in (logits1, logits2))
    weight = None if weight is None else weight.to(wide)
    is_index = not target.is_floating_point()
    if not is_index:
        target = target.to(wide)
    elif padding_mask is not None:
        target = target.masked_fill(padding_mask, ignore_index)
    of_log: Callable[..., Tensor] = partial(F.cross_entropy, label_smoothing=label_smoothing)
    if is_index and label_smoothing == 0:
        of_log = F.nll_loss  # cross_entropy would take the log_softmax of a log_softmax
    cross_entropy = partial(of_log, target=target, weight=weight, ignore_index=ignore_index, reduction="none")
    entropy = (cross_entropy(log1) + cross_entropy(log2)) / 2
    # A class with probability 0 in both passes has log1 - log2 = NaN and adds nothing.
    ratio = (log1 - log2).masked_fill((log1 == -torch.inf) & (log2 == -torch.inf), 0)
    divergence = ((log1.exp() - log2.exp()) * ratio).sum(classes) / 2
    ignored = torch.zeros_like(divergence, dtype=torch.bool) if padding_mask is None else padding_mask
    if is_index:
        ignored = target == ignore_index
    entropy, divergence = entropy.masked_fill(ignored, 0), divergence.masked_fill(ignored, 0)
    if reduction == "mean":
        total = count = (~ignored).sum()
        if weight is not None and is_index:
            total = weight[target.masked_fill(ignored, 0)].masked_fill(ignored, 0).sum()
        loss = entropy.sum() / total + alpha * (divergence.sum() / count)
    else:
        loss = entropy + alpha * divergence
        loss = loss.sum() if reduction == "sum" else loss
    # Under autocast torch's own losses are float32.
    return loss if autocasts(logits1.device.type) else loss.to(dtype)


def _check(alpha: float, reduction: str, ignore_index: int, label_smoothing: float) -> None:
    check_integer("ignore_index", ignore_index)
    check_real("label_smoothing", label_smoothing)
    check_real("alpha", alpha)
    if not alpha >= 0:
        raise ValueError(f"alpha has to be at least 0, but got {alpha}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{reduction} is not a valid value for reduction; accepted: mean, sum, none")


class RDrop(Scriptable):
    """A loss that makes two passes under dropout agree.

    Use this loss to train or fine-tune a classifier or a translator that has dropouts, if a step may cost two
    passes. The paper's ``alpha`` is 5 for translation and 0.1 to 1 for fine-tuning. If the only dropout is
    before the head, :class:`MultiSampleDropout` costs less.

    :func:`thinned.functional.r_drop_loss` has the formula.

    Two calls of a model have two masks, so a training step computes ``loss = r_drop(model(x), model(x),
    target)``. One pass over a doubled batch does the same: ``r_drop(*model(torch.cat([x, x])).chunk(2),
    target)``.

    Source: Liang et al., NeurIPS 2021, section 2.

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
        *,
        reduction: Literal["mean", "sum", "none"] = "mean",
        weight: Tensor | None = None,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        _check(alpha, reduction, ignore_index, label_smoothing)
        if weight is not None:
            check_tensor("RDrop", "weight", weight)
        self.alpha = alpha
        self.reduction = reduction
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.label_smoothing = label_smoothing

    def forward(
        self, logits1: Tensor, logits2: Tensor, target: Tensor, *, padding_mask: Tensor | None = None
    ) -> Tensor:
        node = module_node(self, logits1, logits2, target, padding_mask=padding_mask)
        if node is not None:
            return node
        return r_drop_loss(
            logits1,
            logits2,
            target,
            self.alpha,
            reduction=self.reduction,
            weight=self.weight,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            padding_mask=padding_mask,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, reduction={self.reduction!r}"
