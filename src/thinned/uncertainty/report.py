"""A summary of all predictions: scores, the most and the least certain examples, what dropped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Any

from torch import Tensor, nn

from thinned.compare.figures import significant
from thinned.compare.report import machine
from thinned.models.inspect import inspect
from thinned.models.text import format_p
from thinned.montecarlo.calibration import (
    brier_score,
    expected_calibration_error,
    gaussian_negative_log_likelihood,
    interval_coverage,
    negative_log_likelihood,
    root_mean_squared_error,
    sharpness,
)
from thinned.montecarlo.prediction import Prediction
from thinned.uncertainty.rows import columns

__all__ = ["Report", "Score", "Site", "sites_of"]

SHOWN = 10  # examples at each end
LEVELS = (0.5, 0.9, 0.95)


@dataclass(frozen=True)
class Score:
    """One number about all examples, or why there is none."""

    name: str
    value: float | None
    meaning: str
    why_not: str = ""

    def __str__(self) -> str:
        return "none" if self.value is None else significant(self.value)


@dataclass(frozen=True)
class Site:
    """A module that dropped."""

    path: str
    type: str
    p: str


@dataclass
class Report:
    """Everything that ``thinned uncertainty`` found.

    Attributes:
        command: as it was typed.
        model, data: as they were named.
        prediction: of all examples.
        x: the inputs.
        targets: ``(n,)`` labels or ``(n, k)`` numbers, where they are known.
        sites: the modules that dropped.
        settings: the options of :func:`thinned.montecarlo.predict`.
        warnings: what else is to be said.
    """

    command: str
    model: str
    data: str
    prediction: Prediction
    x: Tensor
    targets: Tensor | None
    sites: Sequence[Site]
    settings: Mapping[str, Any]
    warnings: Sequence[str] = ()
    scores: list[Score] = field(init=False)

    def __post_init__(self) -> None:
        self.scores = [] if self.targets is None else list(_scores(self.prediction, self.targets))

    @property
    def is_classification(self) -> bool:
        """Else it is a regression."""
        return self.prediction.kind == "classification"

    @property
    def uncertainty(self) -> Tensor:
        """(n,); predictive entropy, or the deviation, of several outputs the mean over these."""
        if self.is_classification:
            return self.prediction.predictive_entropy
        std = self.prediction.total_variance.sqrt()
        return std.reshape(len(std), -1).mean(1)

    @property
    def uncertainty_name(self) -> str:
        """The name of :attr:`uncertainty`, with its unit."""
        return "predictive entropy, nats" if self.is_classification else "deviation"

    @property
    def has_draws(self) -> bool:
        """Else mean and variance were propagated."""
        return self.prediction.route != "moments"

    @property
    def draws(self) -> str:
        """The number of draws of an example, or the range of these numbers."""
        least, most = (int(each) for each in self.prediction.draws.aminmax())
        return str(most) if least == most else f"{least} to {most}"

    def examples(self, most_certain: bool) -> list[dict[str, float]]:
        """The rows of the ten most or least certain examples, the extreme one first."""
        order = self.uncertainty.argsort(descending=not most_certain, stable=True)[:SHOWN]
        table = columns(self.prediction, self.targets)
        shown = {name: column[order].tolist() for name, column in table.items() if self._is_shown(name)}
        return [dict(zip(shown, row, strict=True)) for row in zip(*shown.values(), strict=True)]

    def _is_shown(self, column: str) -> bool:
        if column == "draws":
            return self.settings["until"] is not None
        return not column.startswith(("probability_", "expected_"))

    def sentences(self) -> list[str]:
        """The lines that the command prints."""
        p = self.prediction
        n = len(p)
        where = ", ".join(f"{site.path} (p = {site.p})" if site.p else site.path for site in self.sites)
        how = (
            f"{self.draws} draws each, computed by {p.route!r}"
            if self.has_draws
            else "computed without draws"
        )
        said = [
            f"{n:,} example{'s' * (n != 1)} of {self.data}, {how}",
            f"dropout at {where}",
            *p.notes,
        ]
        if self.scores:
            said.append(", ".join(f"{score.name} {score}" for score in self.scores))
            said += [f"no {score.name}: {score.why_not}" for score in self.scores if score.why_not]
        for name, is_certain in {"least": False, "most": True}.items():
            ids = ", ".join(f"{row['id']}" for row in self.examples(is_certain))
            said.append(f"{name} certain: {ids}")
        return said

    def to_json(self) -> str:
        """All but the predictions, which are in the CSV file."""
        return json.dumps(
            {
                "command": self.command,
                "model": self.model,
                "data": self.data,
                "examples": len(self.prediction),
                "draws": self.draws,
                "settings": {name: value for name, value in self.settings.items() if value is not None},
                "sites": [vars(site) for site in self.sites],
                "route": self.prediction.route,
                "notes": [*self.prediction.notes, *self.warnings],
                "scores": {score.name: score.value for score in self.scores},
                "least certain": self.examples(False),
                "most certain": self.examples(True),
                "versions": machine(),
            },
            indent=2,
            ensure_ascii=False,
        )


def sites_of(model: nn.Module, paths: Sequence[str], injected: Mapping[str, float]) -> list[Site]:
    """The modules at ``paths``, with the types and probabilities of their dropouts."""
    found = [
        Site(site.path or "(model)", site.type, format_p(site.p))
        for site in inspect(model)
        if site.path in paths and site.status != "off" and site.p != 0
    ]
    modules = dict(model.named_modules())
    found += [
        Site(path or "(model)", f"put before {type(modules[path]).__name__}", format_p(p))
        for path, p in injected.items()
    ]
    return found


def _scores(prediction: Prediction, targets: Tensor) -> list[Score]:
    mean, variance = prediction.mean, prediction.total_variance
    if prediction.kind == "classification":
        return [
            _score("accuracy", "of the label of the highest mean probability", _accuracy, mean, targets),
            _score("NLL", "negative log-likelihood, nats", negative_log_likelihood, mean, targets),
            _score("ECE", "expected calibration error, 15 bins", expected_calibration_error, mean, targets),
            _score("Brier", "squared distance of the probabilities, 0 to 2", brier_score, mean, targets),
        ]
    mean, variance = mean.reshape(targets.shape), variance.reshape(targets.shape)
    scores = [
        _score("RMSE", "root of the mean squared error", root_mean_squared_error, mean, targets),
        _score("log-likelihood", "of the target, nats", _log_likelihood, mean, variance, targets),
        _score("sharpness", "the mean deviation", sharpness, variance),
    ]
    return scores + [
        _score(
            f"coverage {level:.0%}",
            f"fraction of targets in the central {level:.0%} interval",
            partial(_coverage, level),
            mean,
            variance,
            targets,
        )
        for level in LEVELS
    ]


def _score(name: str, meaning: str, compute: Callable[..., float], *arguments: Tensor) -> Score:
    try:
        value = compute(*arguments)
    except ValueError as error:
        return Score(name, None, meaning, str(error))
    return Score(name, value, meaning) if isfinite(value) else Score(name, None, meaning, f"it is {value}")


def _accuracy(probabilities: Tensor, labels: Tensor) -> float:
    return float((probabilities.argmax(1) == labels).double().mean())


def _log_likelihood(mean: Tensor, variance: Tensor, targets: Tensor) -> float:
    return -gaussian_negative_log_likelihood(mean, variance, targets)


def _coverage(level: float, mean: Tensor, variance: Tensor, targets: Tensor) -> float:
    return float(interval_coverage(mean, variance, targets, levels=[level]).observed)
