"""A random tensor as its mean and the noise on it, and the linear maps that both go through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor, fx
from torch.nn import functional as F

__all__ = ["Map", "Random", "Term", "scaled"]

CHUNK = 256  # columns of a matrix of coefficients that are in memory at once


@dataclass(frozen=True)
class Map:
    """A linear map of the rows of dimension 0, each by itself.

    Attributes:
        apply: the map, for any number of rows.
        square: the map with each of its coefficients squared.
        mixes: whether an output depends on more than one input; if not, two maps in a row have the squares
            of their coefficients in a row.
    """

    apply: Callable[[Tensor], Tensor]
    square: Callable[[Tensor], Tensor]
    mixes: bool = True


def scaled(factor: Tensor | float) -> Map:
    """Multiplication by ``factor``, which broadcasts."""
    return Map(lambda x: x * factor, lambda x: x * factor**2, mixes=False)


@dataclass(frozen=True)
class Term:
    """Noise whose elements are uncorrelated and have a ``variance``, after ``maps``."""

    variance: Tensor
    maps: tuple[Map, ...] = ()

    @property
    def mixed(self) -> int:
        """The number of maps that mix elements."""
        return sum(each.mixes for each in self.maps)

    def total(self) -> Tensor:
        r"""The variance behind the maps, :math:`\sum_j A_{ij}^2 v_j` for their product ``A``."""
        if self.mixed < 2:
            return reduce(lambda v, each: each.square(v), self.maps, self.variance)
        return self._by_coefficients()

    def _by_coefficients(self) -> Tensor:
        """Rows of ``A`` by backward passes or columns by forward passes, whichever are fewer."""

        def chain(x: Tensor) -> Tensor:
            return reduce(lambda x, each: each.apply(x), self.maps, x)

        def one_hot(start: int, size: int) -> Tensor:
            rows = torch.arange(start, min(start + CHUNK, size), device=self.variance.device)
            return F.one_hot(rows, size).to(self.variance)

        count, *inside = self.variance.shape
        _, *outside = chain(self.variance[:1]).shape
        inputs, outputs = math.prod(inside), math.prod(outside)
        variance = self.variance.reshape(count, inputs)
        if inputs <= outputs:
            total = variance.new_zeros(count, outputs)
            for start in range(0, inputs, CHUNK):
                picked = one_hot(start, inputs)
                columns = chain(picked.reshape(len(picked), *inside)).reshape(len(picked), outputs)
                total += variance[:, start : start + CHUNK] @ columns.square()
            return total.reshape(count, *outside)
        parts = [variance[:, :0]]
        for start in range(0, outputs, CHUNK):
            picked = one_hot(start, outputs)
            with torch.enable_grad():
                zeros = variance.new_zeros(len(picked), *inside, requires_grad=True)
                (rows,) = torch.autograd.grad(chain(zeros), zeros, picked.reshape(len(picked), *outside))
            parts.append(variance @ rows.reshape(len(picked), inputs).square().T)
        return torch.cat(parts, 1).reshape(count, *outside)


@dataclass(frozen=True)
class Random:
    """A mean plus noise, which is a sum of uncorrelated parts.

    Attributes:
        mean: float32 or float64, of shape ``(N, *)``.
        terms: noise with elements of its own, such as that of dropout.
        factors: noise that elements share, of shape ``(K, N, *)``: the sum over ``K`` of each factor times a
            number with mean 0 and variance 1; None for ``K = 0``.
        masks: the calls of dropouts that the noise comes from.
    """

    mean: Tensor
    terms: tuple[Term, ...] = ()
    factors: Tensor | None = None
    masks: frozenset[fx.Node] = frozenset()

    def shared(self) -> Tensor:
        """The variance of the noise that elements share."""
        return torch.zeros_like(self.mean) if self.factors is None else self.factors.square().sum(0)

    def variance(self) -> Tensor:
        """The variance of each element."""
        return sum((term.total() for term in self.terms), self.shared())

    def through(self, each: Map, mean: Tensor) -> Random:
        """The noise after a linear map, on the ``mean`` after it."""
        terms = tuple(Term(term.variance, (*term.maps, each)) for term in self.terms)
        factors = self.factors
        if factors is not None:
            factors = each.apply(factors.flatten(0, 1)).unflatten(0, factors.shape[:2])
        return replace(self, mean=mean, terms=terms, factors=factors)

    def plus(self, *terms: Term, factors: Tensor | None = None, masks: frozenset[fx.Node]) -> Random:
        """With further noise that is uncorrelated with its own."""
        if self.factors is not None:
            factors = self.factors if factors is None else torch.cat([self.factors, factors])
        return Random(self.mean, (*self.terms, *terms), factors, self.masks | masks)
