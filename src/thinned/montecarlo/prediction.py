"""Predictions of Monte-Carlo dropout: means, errors and uncertainties, an example in each row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

__all__ = ["Kind", "Prediction"]

Kind: TypeAlias = Literal["classification", "regression", "other"]


@dataclass(frozen=True)
class Prediction:
    """The predictive distribution of each example, from ``draws`` draws ``f_t`` of the model's output.

    Dimension 0 is the examples'. For a classification ``f_t`` is a draw's probabilities, with the classes in
    dimension 1.

    Attributes:
        kind: ``"classification"``, ``"regression"`` or ``"other"``.
        mean: ``1/T sum_t f_t``.
        variance: of one draw: the epistemic part. :class:`thinned.montecarlo.accumulate.Accumulator` has the
            formula for draws that repel each other.
        standard_error: of ``mean``.
        draws: the number of draws of each example, int64.
        ids: the example's id, int64.
        quantiles: by their probabilities, those that were asked for.
        aleatoric: for a regression model that predicts a variance too, its mean ``1/T sum_t s_t**2``.
        expected_entropy: of a classification, ``1/T sum_t H[f_t]`` in nats.
        expected_entropy_error: its standard error.
        votes: of a classification, the number of draws in which each class has the highest probability.
        outputs: all draws in dimension 1, if they were to be kept.
        targets: what the data loader gave beside the inputs: a tensor, or a tuple if there were several.
        sites: paths of the modules that dropped.
        route: how the draws were computed; see :class:`thinned.montecarlo.draws.Drawing`.
        notes: why faster routes were not taken.
    """

    kind: Kind
    mean: Tensor
    variance: Tensor
    standard_error: Tensor
    draws: Tensor
    ids: Tensor
    quantiles: Mapping[float, Tensor] = field(default_factory=dict)
    aleatoric: Tensor | None = None
    expected_entropy: Tensor | None = None
    expected_entropy_error: Tensor | None = None
    votes: Tensor | None = None
    outputs: Tensor | None = None
    targets: Any = None
    sites: tuple[str, ...] = ()
    route: str = ""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def std(self) -> Tensor:
        """The standard deviation of one draw."""
        return self.variance.sqrt()

    @property
    def epistemic(self) -> Tensor:
        """The model's part of the variance, which is ``variance``."""
        return self.variance

    @property
    def total_variance(self) -> Tensor:
        """``variance``, plus ``aleatoric`` if the model predicts it (Kendall & Gal 2017, section 3)."""
        return self.variance if self.aleatoric is None else self.variance + self.aleatoric

    @property
    def label(self) -> Tensor:
        """The class of the highest mean probability."""
        return self._probabilities("label").argmax(1)

    @property
    def max_probability(self) -> Tensor:
        """The highest mean probability."""
        return self._probabilities("max_probability").amax(1)

    @property
    def predictive_entropy(self) -> Tensor:
        """``H[mean]`` in nats: all of the uncertainty."""
        return entropy(self._probabilities("predictive_entropy"))

    @property
    def mutual_information(self) -> Tensor:
        """``H[mean] - 1/T sum_t H[f_t]`` in nats: the model's part (BALD, Houlsby et al. 2011, section 2)."""
        entropy_of_mean = entropy(self._probabilities("mutual_information"))
        assert self.expected_entropy is not None
        return (entropy_of_mean - self.expected_entropy).clamp_min(0)

    @property
    def variation_ratio(self) -> Tensor:
        """The part of the draws that do not vote for the class with most votes (Freeman 1965)."""
        self._probabilities("variation_ratio")
        assert self.votes is not None
        return 1 - self.votes.amax(1) / self.votes.sum(1)

    def _probabilities(self, name: str) -> Tensor:
        if self.kind != "classification":
            raise AttributeError(f"{name} is of a classification, and this is kind={self.kind!r}")
        return self.mean

    def select(self, chosen: Tensor) -> Prediction:
        """Some of the examples, by their numbers or by a bool for each."""

        def rows(value: Tensor | list[Any]) -> Any:
            if isinstance(value, Tensor):
                return value[chosen.to(value.device)]
            return [value[number] for number in torch.arange(len(value))[chosen.cpu()].tolist()]

        return self._map(rows)

    def to(self, device: torch.device | str) -> Prediction:
        """The same on a device."""
        return self._map(lambda value: value.to(device) if isinstance(value, Tensor) else value)

    def _map(self, function: Callable[[Tensor | list[Any]], Any]) -> Prediction:
        """``function`` of all that has an example in each row."""

        def each(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(each, value))
            if isinstance(value, Mapping):
                return {name: each(part) for name, part in value.items()}
            return function(value) if isinstance(value, Tensor | list) else value

        return replace(self, **{field.name: each(getattr(self, field.name)) for field in fields(self)})

    @classmethod
    def cat(cls, parts: Sequence[Prediction]) -> Prediction:
        """The examples of several predictions, one after the other."""
        if not parts:
            raise ValueError("there is no prediction to concatenate: the inputs have no example")
        last = parts[-1]
        rows: dict[str, Any] = {
            each.name: torch.cat([getattr(part, each.name) for part in parts])
            for each in fields(cls)
            if isinstance(getattr(last, each.name), Tensor)
        }
        targets = [part.targets for part in parts]
        if isinstance(last.targets, tuple):
            rows["targets"] = tuple(map(_cat, zip(*targets, strict=True)))
        elif last.targets is not None:
            rows["targets"] = _cat(targets)
        quantiles = {q: torch.cat([part.quantiles[q] for part in parts]) for q in last.quantiles}
        return replace(last, **rows, quantiles=quantiles)


def _cat(parts: Sequence[Any]) -> Any:
    """One tensor of tensors, one dictionary of dictionaries; of others, such as lists of names, one list."""
    if isinstance(parts[0], Mapping):
        return {name: _cat([part[name] for part in parts]) for name in parts[0]}
    return (
        torch.cat(list(parts)) if isinstance(parts[0], Tensor) else [each for part in parts for each in part]
    )


def entropy(probabilities: Tensor, dim: int = 1) -> Tensor:
    """``-sum p log p`` in nats, with ``0 log 0 = 0``."""
    return -torch.xlogy(probabilities, probabilities).sum(dim)
