"""Multi-sample dropout: one head on several dropout samples of the same features."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary

from thinned.checks import check_integer, got
from thinned.keys import Key
from thinned.layers._arguments import apply, drops, key_for, refuse_nested, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.torch_state import compiling

__all__ = ["MultiSampleDropout", "multi_sample_dropout"]


def multi_sample_dropout(
    input: Tensor, p: float = 0.5, *, samples: int = 8, training: bool = True, key: Key | None = None
) -> Tensor:
    r"""``samples`` independent dropouts of the same features, stacked along a new first dimension.

    .. math:: y_{m,i} = \begin{cases} x_i / q & u_m(i) < T \\ +0 & \text{otherwise} \end{cases}

    Sample ``m`` is ``dropout(input, p, key=key.fold(m))``, for any number of samples. ``input`` is expanded
    without a copy, and only the keys are saved for backward.

    Args:
        input: a floating-point or complex tensor of any shape.
        p: the probability of dropping an element, in [0, 1].
        samples: the number of samples, at least 1.
        training: False returns a view, ``input.expand(samples, *input.shape)``, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of shape ``(samples, *input.shape)`` and ``input``'s dtype.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``samples`` below 1.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`.

    Source: Inoue, "Multi-sample dropout for accelerated training and better generalization", 2019, section 3.

    >>> import torch, thinned
    >>> thinned.functional.multi_sample_dropout(torch.ones(6), samples=3, key=thinned.Key(3))
    tensor([[0., 0., 0., 2., 2., 2.],
            [2., 2., 0., 2., 0., 0.],
            [0., 2., 0., 0., 2., 2.]])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(multi_sample_dropout, locals())
    T, scale = threshold_and_scale(p)
    _check_samples(samples)
    active = drops("multi_sample_dropout", input, p, training, key)
    refuse_nested("multi_sample_dropout", input)
    stacked = input.expand(samples, *input.shape)
    if not active:
        return stacked
    key = key_for(input, key)
    numbers = torch.arange(samples, device=key.bits.device)
    keys = key.fold(numbers.view(-1, *(1,) * key.bits.dim()))
    return apply(stacked, keys, (), False, T, scale)


class MultiSampleDropout(Layer):
    r"""One head on ``samples`` dropout samples of the same features: the mean of its outputs, or all of them.

    .. math:: y = \frac{1}{M} \sum_{m=1}^{M} \operatorname{head}(\operatorname{dropout}_m(x))

    Use this layer in place of the last dropout and linear layer of a classifier: ``M`` masks for one pass of
    what comes before, so that training takes fewer steps. The paper has 8 samples. For a dropout that is not
    before the head use :class:`RDrop`, which needs two passes.

    The samples are those of :func:`thinned.functional.multi_sample_dropout`. One call of the head gets all of
    them as a batch of ``M * N``, so batch normalization in the head normalizes over the samples too. The
    paper averages the samples' losses instead of their outputs; ``reduction="none"`` allows that::

        outputs = layer(features)                    # (M, N, classes)
        loss = cross_entropy(outputs.flatten(0, 1), target.repeat(layer.samples))

    Evaluation returns ``head(input)``, without the dimension of the samples.

    Args:
        head: the module that all samples share, from features to outputs.
        p, samples: as for the function.
        reduction: ``"mean"``, or ``"none"`` for the outputs of all samples.

    Shape:
        ``(N, *)`` to the shape of ``head``'s output, after a first dimension of size M for ``"none"``.

    Raises:
        ValueError: as the function, and for another ``reduction``.
        TypeError: ``head`` is no module.

    Source: Inoue, 2019, section 3.

    >>> import torch, thinned
    >>> layer = thinned.MultiSampleDropout(torch.nn.Flatten(), p=0.5, samples=4)
    >>> layer(torch.ones(2, 3), key=thinned.Key(3))
    tensor([[1.0000, 1.0000, 0.0000],
            [1.0000, 1.5000, 1.0000]])
    """

    def __init__(
        self,
        head: nn.Module,
        p: float = 0.5,
        *,
        samples: int = 8,
        reduction: Literal["mean", "none"] = "mean",
    ) -> None:
        super().__init__(p)
        if not callable(head):
            raise TypeError(f"head must be a torch.nn.Module, {got(head)}")
        _check_samples(samples)
        if reduction not in ("mean", "none"):
            raise ValueError(f"reduction has to be either 'mean' or 'none', but got {reduction!r}")
        self.head = head
        self.samples = samples
        self.reduction = reduction

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.head(input)  # type: ignore[no-any-return]
        features = torch.ops.thinned.multi_sample_dropout(input, float(self.p), samples=self.samples)
        outputs = self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return outputs.mean(0) if self.reduction == "mean" else outputs  # type: ignore[no-any-return]

    def forward(self, input: Tensor, *, key: Key | None = None) -> Any:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        if not self.training:
            return self.head(input)
        if isinstance(input, Tensor) and not input.is_nested and input.dim() < 2:
            raise RuntimeError(
                f"MultiSampleDropout needs a batch of features, got an input of shape {tuple(input.shape)}"
            )
        features = multi_sample_dropout(input, self.p, samples=self.samples, key=key)
        outputs = self.head(features.flatten(0, 1)).unflatten(0, features.shape[:2])
        return outputs.mean(0) if self.reduction == "mean" else outputs


def _check_samples(samples: int) -> None:
    check_integer("samples", samples, least=1)
