"""Means and variances of draws that arrive in chunks, in memory that does not grow with their number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Accumulator", "Moments"]


@dataclass
class Moments:
    """Number, mean and sum of squared deviations; merged as in Chan, Golub & LeVeque 1979."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def of(cls, draws: Tensor) -> Moments:
        """The moments over dimension 0."""
        mean = draws.mean(0)
        return cls(len(draws), mean, (draws - mean).square_().sum(0))

    def merged(self, other: Moments) -> Moments:
        """The moments of both."""
        count = self.count + other.count
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        squares = self.squares + other.squares + apart.square() * (self.count * other.count / count)
        return Moments(count, mean, squares)


class Accumulator:
    r"""Mean, variance and standard error of draws that come in sets.

    The draws of one set may depend on each other, as those of a stratified set do; sets are independent. With
    ``size`` 1 all draws are independent.

    .. math:: \hat\sigma^2 = \frac1{RS}\sum_{r,s}(f_{rs} - \bar f_r)^2
        + \frac1{R-1}\sum_r(\bar f_r - \bar f)^2,
        \qquad \hat{se}^2 = \frac1R\,\frac1{R-1}\sum_r(\bar f_r - \bar f)^2

    over ``R`` whole sets of ``S`` draws. Both are unbiased, whatever the dependence within a set: a draw's
    variance is that within a set plus that of the set's mean. The ``k`` draws of a last set that is not whole
    count in the mean, and as independent draws in its error: with ``n = R S + k`` draws its square is
    :math:`(RS/n)^2\,\hat{se}^2 + (k/n)^2\,\hat\sigma^2/k`, an upper bound where draws repel. With one set,
    :attr:`variance` is ``sum (f - mean)^2 / S``, at most ``variance / S`` too small, and
    :attr:`standard_error` is that of independent draws, again an upper bound.
    """

    def __init__(self, size: int = 1) -> None:
        self.size = size
        self.all: Moments | None = None
        self._within: Tensor | float = 0.0
        self._sets: Moments | None = None
        self._set: Moments | None = None

    def add(self, draws: Tensor) -> None:
        """Take draws along dimension 0, the next of their sets."""
        draws = draws.to(torch.float64 if draws.device.type != "mps" else torch.float32)
        while len(draws):
            begun = 0 if self._set is None else self._set.count
            count = len(draws) if self.size == 1 else self.size - begun
            part, draws = Moments.of(draws[:count]), draws[count:]
            self.all = part if self.all is None else self.all.merged(part)
            if self.size == 1:
                continue
            self._set = part if self._set is None else self._set.merged(part)
            if self._set.count == self.size:
                self._within = self._within + self._set.squares
                mean = Moments.of(self._set.mean[None])
                self._sets = mean if self._sets is None else self._sets.merged(mean)
                self._set = None

    def select(self, chosen: Tensor) -> Accumulator:
        """The same draws of some of the rows."""
        return self._map(lambda tensor: tensor[chosen])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Accumulator:
        part = Accumulator(self.size)
        part.all, part._sets, part._set = (
            None if each is None else Moments(each.count, function(each.mean), function(each.squares))
            for each in (self.all, self._sets, self._set)
        )
        part._within = function(self._within) if isinstance(self._within, Tensor) else self._within
        return part

    def merged(self, other: Accumulator) -> Accumulator:
        """These draws and those of ``other``. At most one of the two ends within a set.

        >>> one, two = Accumulator(2), Accumulator(2)
        >>> one.add(torch.arange(4.0)[:, None]), two.add(torch.arange(4.0, 9.0)[:, None])
        (None, None)
        >>> one.merged(two).mean
        tensor([4.], dtype=torch.float64)
        """
        both = Accumulator(self.size)
        pairs = (self.all, other.all), (self._sets, other._sets), (self._set, other._set)
        both.all, both._sets, both._set = (
            one.merged(two) if one is not None and two is not None else one or two for one, two in pairs
        )
        both._within = self._within + other._within
        return both

    def to(self, device: torch.device | str) -> Accumulator:
        """The same on a device."""
        return self._map(lambda tensor: tensor.to(device))

    @property
    def count(self) -> int:
        """The number of draws."""
        return 0 if self.all is None else self.all.count

    @property
    def mean(self) -> Tensor:
        """The mean of all draws."""
        return self._total.mean

    @property
    def variance(self) -> Tensor:
        """The variance of one draw; NaN for a single draw."""
        if self._several_sets is not None:
            sets = self._several_sets
            return self._within / (sets.count * self.size) + sets.squares / (sets.count - 1)
        total = self._total
        if self.size > 1 and total.count > 1:
            return total.squares / total.count
        return (
            total.squares / (total.count - 1) if total.count > 1 else torch.full_like(total.mean, torch.nan)
        )

    @property
    def standard_error(self) -> Tensor:
        """The standard error of the mean; NaN for a single draw."""
        total = self._total
        if self._several_sets is not None:
            sets = self._several_sets
            whole = sets.count * self.size
            squares = sets.squares / (sets.count - 1) / sets.count * (whole / total.count) ** 2
            return (squares + self.variance * ((total.count - whole) / total.count**2)).sqrt()
        if total.count < 2:
            return torch.full_like(total.mean, torch.nan)
        return (total.squares / (total.count - 1) / total.count).sqrt()

    @property
    def _several_sets(self) -> Moments | None:
        return self._sets if self._sets is not None and self._sets.count > 1 else None

    @property
    def _total(self) -> Moments:
        if self.all is None:
            raise RuntimeError("no draw has been added")
        return self.all
