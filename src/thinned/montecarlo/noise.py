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

ROWS = 1024  # that go through maps at once, while their coefficients are found


@dataclass(frozen=True)
class Map:
    """A linear map of the rows of dimension 0, each by itself.

    Attributes:
        apply: the map, for any number of rows; with ``by_row``, for any multiple of their number.
        square: the map with each of its coefficients squared.
        mixes: whether an output depends on more than one input. A product of maps of which at most one mixes
            has the products of their squares.
        by_row: whether rows have maps of their own.
    """

    apply: Callable[[Tensor], Tensor]
    square: Callable[[Tensor], Tensor]
    mixes: bool = True
    by_row: bool = False


def scaled(factor: Tensor | float) -> Map:
    """Multiplication by ``factor``, which broadcasts."""
    return Map(lambda x: x * factor, lambda x: x * factor**2, mixes=False)


def scaled_by_row(factors: Tensor) -> Map:
    """Multiplication of each row by its own ``factors``."""

    def times(x: Tensor, factors: Tensor) -> Tensor:
        return (x.reshape(len(x) // max(1, len(factors)), *factors.shape) * factors).reshape(x.shape)

    return Map(lambda x: times(x, factors), lambda x: times(x, factors.square()), mixes=False, by_row=True)


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

        count, *inside = self.variance.shape
        _, *outside = chain(self.variance).shape
        inputs, outputs = math.prod(inside), math.prod(outside)
        variance = self.variance.reshape(count, inputs)
        rows = count if any(each.by_row for each in self.maps) else 1  # with coefficients of their own
        size, chunk = min(inputs, outputs), max(1, ROWS // max(1, rows))
        total = variance.new_zeros(count, outputs)
        for start in range(0, size, chunk):
            numbers = torch.arange(start, min(start + chunk, size), device=variance.device)
            picked = F.one_hot(numbers, size).to(variance).repeat_interleave(rows, 0)
            if inputs <= outputs:
                columns = chain(picked.reshape(-1, *inside)).reshape(len(numbers), rows, outputs)
                total += torch.einsum(
                    "nk,kro->no" if rows == 1 else "nk,kno->no", variance[:, numbers], columns**2
                )
            else:
                with torch.enable_grad():
                    zeros = variance.new_zeros(len(picked), *inside, requires_grad=True)
                    (found,) = torch.autograd.grad(chain(zeros), zeros, picked.reshape(-1, *outside))
                found = found.reshape(len(numbers), rows, inputs).square()
                total[:, numbers] = torch.einsum("ni,kri->nk" if rows == 1 else "ni,kni->nk", variance, found)
        return total.reshape(count, *outside)


@dataclass(frozen=True)
class Random:
    """A mean plus noise, which is a sum of uncorrelated parts.

    Attributes:
        mean: float32 or float64, of shape ``(N, *)``.
        terms: noise with elements of its own, such as that of dropout.
        recent: as ``terms``, with one term in place of all that came before the last ReLU, as if its outputs
            were uncorrelated. Its variance needs no coefficients of single rows.
        factors: noise that elements share, of shape ``(K, N, *)``: the sum over ``K`` of each factor times a
            number with mean 0 and variance 1; None for ``K = 0``.
        masks: the calls of dropouts that the noise comes from.
    """

    mean: Tensor
    terms: tuple[Term, ...] = ()
    recent: tuple[Term, ...] = ()
    factors: Tensor | None = None
    masks: frozenset[fx.Node] = frozenset()

    def shared(self) -> Tensor:
        """The variance of the noise that elements share."""
        return torch.zeros_like(self.mean) if self.factors is None else self.factors.square().sum(0)

    def variance(self, of_recent: bool = False) -> Tensor:
        """The variance of each element."""
        return sum((term.total() for term in (self.recent if of_recent else self.terms)), self.shared())

    def through(self, each: Map, mean: Tensor) -> Random:
        """The noise after a linear map, on the ``mean`` after it."""
        factors = self.factors
        if factors is not None:
            factors = each.apply(factors.flatten(0, 1)).unflatten(0, factors.shape[:2])
        terms, recent = (
            tuple(Term(term.variance, (*term.maps, each)) for term in terms)
            for terms in (self.terms, self.recent)
        )
        return replace(self, mean=mean, terms=terms, recent=recent, factors=factors)

    def plus(
        self, variance: Tensor | None, masks: frozenset[fx.Node], factors: Tensor | None = None
    ) -> Random:
        """With further noise that is uncorrelated with its own."""
        if self.factors is not None:
            factors = self.factors if factors is None else torch.cat([self.factors, factors])
        terms, recent = (_joined(terms, variance) for terms in (self.terms, self.recent))
        return Random(self.mean, terms, recent, factors, self.masks | masks)


def _joined(terms: tuple[Term, ...], variance: Tensor | None) -> tuple[Term, ...]:
    if variance is None:
        return terms
    if terms and not terms[-1].maps:
        *terms_before, last = terms
        return (*terms_before, Term(last.variance + variance))
    return (*terms, Term(variance))
