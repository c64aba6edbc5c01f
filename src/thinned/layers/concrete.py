"""Dropout whose probability is learned, by a mask that is almost binary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from thinned.functional.concrete import check_temperature, concrete_dropout, concrete_regularization
from thinned.keys import Key

__all__ = ["ConcreteDropout"]


class ConcreteDropout(nn.Module):
    """:func:`thinned.functional.concrete_dropout` with a learned probability.

    Add :meth:`regularization` of the layer that follows to the loss::

        drop, linear = thinned.ConcreteDropout(), torch.nn.Linear(128, 10)
        loss = criterion(linear(drop(x)), y) + drop.regularization(linear.parameters(), 128)

    In evaluation the layer is the identity, as any dropout of PyTorch. The authors' code keeps sampling
    there, for Monte Carlo estimates: for that, call ``drop.train()`` after ``model.eval()``.

    Args:
        p: the probability of dropping that learning starts from, above 0 and below 1.
        temperature: of the relaxed mask, above 0.
        weight_regularizer: ``l**2 / (tau * N)`` for the prior length scale ``l``, the model precision ``tau``
            and ``N`` examples.
        dropout_regularizer: ``2 / (tau * N)``.
        broadcast_dims: dimensions along which all elements share one mask; ``(2, 3)`` and ``temperature=2/3``
            is the authors' spatial concrete dropout.

    Attributes:
        p_logit: the parameter, of shape ``(1,)``.

    Shape:
        Any; the output has the input's shape and dtype.

    Raises:
        ValueError: ``p`` is not above 0 and below 1, or ``temperature`` not above 0.

    Source: Gal, Hron and Kendall, "Concrete dropout", NeurIPS 2017, section 3, and the authors' code at
    https://github.com/yaringal/ConcreteDropout.

    >>> import torch, thinned
    >>> drop = thinned.ConcreteDropout(0.5)
    >>> drop(torch.ones(2, 3), key=thinned.Key(7)).detach().round(decimals=3)
    tensor([[0., 0., 0.],
            [2., 2., 2.]])
    >>> drop.p.detach()
    tensor([0.5000])
    """

    def __init__(
        self,
        p: float = 0.1,
        temperature: float = 0.1,
        weight_regularizer: float = 1e-6,
        dropout_regularizer: float = 1e-5,
        broadcast_dims: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not 0 < p < 1:
            raise ValueError(
                f"the initial dropout probability has to be above 0 and below 1, but got {p}: "
                "its logit is learned"
            )
        check_temperature(temperature)
        self.temperature = temperature
        self.weight_regularizer = weight_regularizer
        self.dropout_regularizer = dropout_regularizer
        self.broadcast_dims = tuple(broadcast_dims)
        self.p_logit = nn.Parameter(torch.full((1,), math.log(p) - math.log1p(-p)))

    @property
    def p(self) -> Tensor:
        """The probability of dropping."""
        return torch.sigmoid(self.p_logit)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return concrete_dropout(
            input,
            self.p_logit,
            self.temperature,
            self.training,
            key=key,
            broadcast_dims=self.broadcast_dims,
        )

    def regularization(self, weights: Tensor | Iterable[Tensor], num_features: int | None = None) -> Tensor:
        """:func:`thinned.functional.concrete_regularization` with this layer's probability and factors.

        Args:
            weights: the parameters of the layer that follows.
            num_features: how many inputs it has; default: the size of the first weight's dimension 1.
        """
        return concrete_regularization(
            self.p_logit, weights, num_features, self.weight_regularizer, self.dropout_regularizer
        )

    def extra_repr(self) -> str:
        shared = f", broadcast_dims={self.broadcast_dims}" if self.broadcast_dims else ""
        return (
            f"temperature={self.temperature}, weight_regularizer={self.weight_regularizer}, "
            f"dropout_regularizer={self.dropout_regularizer}{shared}"
        )
