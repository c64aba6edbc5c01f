"""``thinned uncertainty``: a model by its name, data from a file, predictions to a file."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from torch import Tensor

from thinned.compare.loading import model_of
from thinned.montecarlo.dropping import Inject, injected
from thinned.montecarlo.predict import Settings, Until, stream
from thinned.montecarlo.prediction import Prediction
from thinned.uncertainty.data import Examples, load_weights
from thinned.uncertainty.report import Report, sites_of
from thinned.uncertainty.rows import write

__all__ = ["parse_inject", "parse_until", "prepare"]


def parse_inject(texts: Iterable[str]) -> Inject | None:
    """The argument of :func:`thinned.montecarlo.predict`, from ``head`` or texts ``PATTERN=P``.

    >>> parse_inject(["encoder.*=0.1", "head.fc=0.5"])
    {'encoder.*': 0.1, 'head.fc': 0.5}
    """
    texts = list(texts)
    return "head" if texts == ["head"] else _numbers("inject", texts, "head or PATTERN=P") or None


def parse_until(texts: Iterable[str]) -> Until | None:
    """The argument of :func:`thinned.montecarlo.predict`, from ``0.01`` or ``STATISTIC=0.01``.

    >>> parse_until(["0.01"])
    {'mean': 0.01}
    """
    return _numbers("until", texts, "a number or STATISTIC=NUMBER", name="mean") or None


def _numbers(option: str, texts: Iterable[str], accepted: str, name: str = "") -> dict[str, float]:
    """From ``NAME=NUMBER``, in which ``name`` stands for a missing one."""
    found = {}
    for text in texts:
        given, equals, number = text.rpartition("=")
        try:
            found[given if equals else name] = float(number)
        except ValueError:
            number = ""
        if not number or "" in found:
            raise ValueError(f"--{option} {text!r} is not understood; accepted: {accepted}")
    return found


def prepare(
    model_name: str,
    weights: Path | None,
    data: Path,
    read: Callable[[], Examples],
    command: str,
    options: Mapping[str, Any],
) -> Callable[[Path], Report]:
    """Load everything, and return a function that predicts into a CSV file.

    Args:
        model_name: as :func:`thinned.compare.loading.model_of` takes it.
        weights: a file with the model's state_dict.
        data: the file of the examples, by its name.
        read: reads it.
        command: as it was typed.
        options: of :func:`thinned.montecarlo.predict`.

    Raises:
        ValueError: with one line, for whatever is wrong before the first prediction.
    """
    Settings(**options)
    model = model_of(model_name)
    if weights is not None:
        load_weights(model, weights)
    examples = read().prepared(model, options["task"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        parts = stream(model, examples.x, **options, progress=True)
        put_in = {} if options["inject"] is None else injected(model, options["inject"])

    def predict(output: Path) -> Report:
        with closing(parts), warnings.catch_warnings(record=True) as later:  # type: ignore[type-var]
            warnings.simplefilter("always")
            prediction = Prediction.cat(list(write(output, _checked(parts, examples.y), examples.y)))
        return Report(
            command,
            model_name,
            data.name,
            prediction,
            examples.x,
            examples.y,
            sites_of(model, prediction.sites, put_in),
            options,
            [str(each.message) for each in (*caught, *later)],
        )

    return predict


def _checked(parts: Iterator[Prediction], targets: Tensor | None) -> Iterator[Prediction]:
    """``parts`` on the CPU, after a look whether the targets fit the first."""
    for i, part in enumerate(parts):
        if not i and targets is not None:
            _check_targets(part, targets)
        yield part.to("cpu")


def _check_targets(part: Prediction, targets: Tensor) -> None:
    if part.kind == "classification":
        classes = part.mean.shape[1]
        if (wrong := targets >= classes).any():
            row = int(wrong.nonzero()[0])
            raise ValueError(
                f"the model has {classes} classes, 0..{classes - 1}, but the target of example {row} is "
                f"{int(targets[row])}"
            )
    elif (outputs := part.mean[0].numel()) != targets.shape[1]:
        raise ValueError(
            f"the model gives an example {outputs} numbers, but the data have {targets.shape[1]} targets"
        )
