"""Several dropout samples of the same features before one head."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, nn

from thinned.functional.arguments import threshold_and_scale
from thinned.functional.multi_sample import check_samples, multi_sample_dropout
from thinned.keys import Key

__all__ = ["MultiSampleDropout"]

FEATURE_DIMS = 2


class MultiSampleDropout(nn.Module):
    r"""One head on ``samples`` dropout samples of the same features: the mean of its outputs, or all of them.

    .. math:: y = \frac{1}{M} \sum_{m=1}^{M} \operatorname{head}(\operatorname{dropout}_m(x))

    The samples are :func:`thinned.functional.multi_sample_dropout`'s, and the head is called once, on all of
    them as one batch of ``M * N``: so one with batch normalization normalizes over the samples too. The paper
    averages the losses of the samples and not their outputs; with ``reduction="none"`` that is::

        outputs = layer(features)                    # (M, N, classes)
        loss = cross_entropy(outputs.flatten(0, 1), target.repeat(layer.samples))

    In evaluation all samples would be alike, and ``head(input)`` comes back, without their dimension.

    Args:
        head: what the samples share, from features to outputs.
        p: the probability of dropping a feature, in [0, 1].
        samples: how many, M; at least 1.
        reduction: ``"mean"``, or ``"none"`` for the outputs of all samples.

    Shape:
        ``(N, *)`` to what ``head`` makes of it, with ``"none"`` after a first dimension of size M.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, ``samples`` below 1, or another ``reduction``.

    Source: Inoue, "Multi-sample dropout for accelerated training and better generalization", 2019, section 3.

    >>> import torch, thinned
    >>> layer = thinned.MultiSampleDropout(torch.nn.Flatten(), p=0.5, samples=4)
    >>> layer(torch.ones(2, 3), key=thinned.Key(3))
    tensor([[1.0000, 1.0000, 0.0000],
            [1.0000, 1.5000, 1.0000]])
    >>> layer.eval()(torch.ones(2, 3))
    tensor([[1., 1., 1.],
            [1., 1., 1.]])
    """

    def __init__(
        self,
        head: nn.Module,
        p: float = 0.5,
        samples: int = 8,
        reduction: Literal["mean", "none"] = "mean",
    ) -> None:
        super().__init__()
        threshold_and_scale(p)
        check_samples(samples)
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction has to be either 'mean' or 'none', but got {reduction!r}")
        self.head = head
        self.p = p
        self.samples = samples
        self.reduction = reduction

    def forward(self, input: Tensor, *, key: Key | None = None) -> Any:  # noqa: A002
        if not self.training:
            return self.head(input)
        features = multi_sample_dropout(input, self.p, self.samples, key=key)
        if input.dim() < FEATURE_DIMS:
            raise RuntimeError(
                f"MultiSampleDropout needs a batch of features, got shape {tuple(input.shape)}"
            )
        outputs = self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return outputs.mean(0) if self.reduction == "mean" else outputs

    def extra_repr(self) -> str:
        return f"p={self.p}, samples={self.samples}, reduction={self.reduction!r}"
