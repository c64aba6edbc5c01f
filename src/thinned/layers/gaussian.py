"""Dropout by Gaussian noise, of a given variance or of one that is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from thinned.functional.gaussian import (
    check_gaussian_p,
    gaussian_dropout,
    variational_dropout,
    variational_kl,
)
from thinned.keys import Key

__all__ = ["GaussianDropout", "VariationalDropout"]


class GaussianDropout(nn.Module):
    """:func:`thinned.functional.gaussian_dropout` as a module.

    Args:
        p: the probability of dropping in the dropout that the noise stands for, in [0, 1); Keras's ``rate``.

    Shape:
        Any; the output has the input's shape and dtype.

    Raises:
        ValueError: ``p`` outside [0, 1) or NaN: at 1 the noise's variance ``p / (1 - p)`` is infinite.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15
    (2014), section 10.

    >>> import torch, thinned
    >>> thinned.GaussianDropout(0.2)(torch.ones(2, 3), key=thinned.Key(7))
    tensor([[1.4069, 1.4040, 1.8044],
            [0.6572, 0.1779, 0.5731]])
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        check_gaussian_p(p)
        self.p = p

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return gaussian_dropout(input, self.p, self.training, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class VariationalDropout(nn.Module):
    r""":func:`thinned.functional.variational_dropout` with a learned variance.

    Add :meth:`kl` to the loss: it is the divergence, in nats, of one noise variable from its prior. A layer
    of ``K`` inputs and one ``alpha`` has ``K`` such variables (each scales one row of the weights that
    follow), and a loss that is the mean over ``N`` training examples takes the sum over ``N``::

        loss = criterion(model(x), y) + K * drop.kl().sum() / N    # one alpha
        loss = criterion(model(x), y) + drop.kl().sum() / N        # one for each of K features

    ``alpha`` is held at or below ``max_alpha``: above 1, which is p = 0.5, the authors found the gradients
    too noisy. There the gradient of ``log_alpha`` is that of the bound itself: it passes where it leads back.

    Args:
        p: what ``alpha`` starts from, as ``p / (1 - p)``.
        num_features: the shape of ``log_alpha``, which has to broadcast to the input's: ``None`` for one
            ``alpha``, a number for one for each place in the last dimension, or several sizes, such as
            ``(C, 1, 1)`` for one for each channel.
        max_alpha: the largest ``alpha``; ``inf`` for none, with ``kl("sigmoid")``.

    Attributes:
        log_alpha: the parameter, of shape ``(1,)`` or of ``num_features``.

    Shape:
        Any that ``num_features`` fits; the output has the input's shape and dtype.

    Raises:
        ValueError: ``p`` is not above 0 and below 1, or its ``alpha`` is above ``max_alpha``.

    Source: Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, sections 3.1 to 3.3.

    >>> import torch, thinned
    >>> drop = thinned.VariationalDropout(0.2)
    >>> drop(torch.ones(2, 3), key=thinned.Key(7)).detach()
    tensor([[1.4069, 1.4040, 1.8044],
            [0.6572, 0.1779, 0.5731]])
    >>> drop.kl().detach()
    tensor([1.1227])
    """

    def __init__(
        self, p: float = 0.5, num_features: int | Sequence[int] | None = None, max_alpha: float = 1.0
    ) -> None:
        super().__init__()
        if not 0 < p < 1:
            raise ValueError(
                f"the initial dropout probability has to be above 0 and below 1, but got {p}: the "
                "logarithm of alpha = p / (1 - p) is learned"
            )
        alpha = p / (1 - p)
        if not alpha <= max_alpha:
            raise ValueError(
                f"alpha = p / (1 - p) has to be at most max_alpha={max_alpha}, but p={p} gives {alpha}"
            )
        shape = (1,) if num_features is None else num_features
        self.log_alpha = nn.Parameter(
            torch.full((shape,) if isinstance(shape, int) else tuple(shape), math.log(alpha))
        )
        self.max_alpha = max_alpha

    @property
    def alpha(self) -> Tensor:
        """The variance of the noise."""
        return self._bounded().exp()

    @property
    def p(self) -> Tensor:
        """The probability of dropping in a dropout of this variance."""
        return torch.sigmoid(self._bounded())

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return variational_dropout(input, self._bounded(), self.training, key=key)

    def kl(self, approximation: Literal["polynomial", "sigmoid"] = "polynomial") -> Tensor:
        """:func:`thinned.functional.variational_kl` of one variable for each ``alpha``.

        Raises:
            ValueError: another ``approximation``, or ``"polynomial"`` with a ``max_alpha`` above 1.
        """
        if approximation == "polynomial" and self.max_alpha > 1:
            raise ValueError(
                f"the polynomial approximation is for alpha up to 1, but max_alpha is {self.max_alpha}; "
                'take kl("sigmoid")'
            )
        return variational_kl(self._bounded(), approximation)

    def _bounded(self) -> Tensor:
        if self.max_alpha == math.inf:
            return self.log_alpha
        return _AtMost.apply(self.log_alpha, math.log(self.max_alpha))  # type: ignore[no-any-return,no-untyped-call]

    def extra_repr(self) -> str:
        shape = tuple(self.log_alpha.shape)
        features = "" if shape == (1,) else f"num_features={shape if len(shape) > 1 else shape[0]}, "
        return f"{features}max_alpha={self.max_alpha}"


class _AtMost(torch.autograd.Function):
    """The smaller of a number and a bound, without a gradient that would lead (further) beyond the bound.

    That of ``torch.clamp`` is zero beyond, so that a parameter that a step took there would stay.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp(max=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ARG004
        x, ctx.bound = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.bound) & (grad < 0), 0, grad), None
