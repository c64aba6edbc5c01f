"""Predictions as columns of numbers, and as rows of a CSV file that are there as soon as they are known."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from thinned.montecarlo.prediction import Prediction

__all__ = ["StoppedError", "columns", "write"]


class StoppedError(Exception):
    """An exception, the ``__cause__``, that left a file with the first ``rows``."""

    def __init__(self, rows: int) -> None:
        super().__init__(f"stopped after {rows} rows")
        self.rows = rows


def columns(prediction: Prediction, targets: Tensor | None) -> dict[str, Tensor]:
    """The attributes of ``prediction`` by the names of their columns, each of shape ``(n,)``."""
    found = {"id": prediction.ids} | ({} if targets is None else _numbered("target", targets))
    classes = prediction.kind == "classification"
    if prediction.mean.dim() > 2:
        raise ValueError(
            "a row has room for a list of numbers, but the model gives each example those of shape "
            f"{tuple(prediction.mean.shape[1:])}"
        )
    if classes:
        best = prediction.label
        found |= {"label": best, "max_probability": prediction.max_probability}
        found["standard_error"] = prediction.standard_error.gather(1, best[:, None])[:, 0]
        for name in ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio"):
            found[name] = getattr(prediction, name)
        found |= _numbered("probability", prediction.mean, always=True)
    else:
        for name in ("mean", "std", "standard_error", "aleatoric"):
            if (values := getattr(prediction, name)) is not None:
                found |= _numbered(name, values)
    return found | {"draws": prediction.draws}


def _numbered(name: str, values: Tensor, always: bool = False) -> dict[str, Tensor]:
    """One column, or one for each output."""
    values = values.reshape(len(values), -1)
    if values.shape[1] == 1 and not always:
        return {name: values[:, 0]}
    return {f"{name}_{i}": column for i, column in enumerate(values.unbind(1))}


def write(path: Path, parts: Iterable[Prediction], targets: Tensor | None) -> Iterator[Prediction]:
    """Write the rows of each of ``parts``, then yield it.

    Raises:
        StoppedError: from whatever ends ``parts`` or the writing early, KeyboardInterrupt included.
    """
    rows = 0
    try:
        with path.open("w", newline="", encoding="utf-8") as file:
            for part in parts:
                text = io.StringIO()
                writer = csv.writer(text, lineterminator="\n")
                table = columns(part, None if targets is None else targets[rows : rows + len(part)])
                if not rows:
                    writer.writerow(table)
                writer.writerows(zip(*map(_texts, table.values()), strict=True))
                file.write(text.getvalue())
                file.flush()
                rows += len(part)
                yield part
    except (Exception, KeyboardInterrupt) as error:
        raise StoppedError(rows) from error


def _texts(column: Tensor) -> list[str]:
    return [f"{number:.9g}" if isinstance(number, float) else str(number) for number in column.tolist()]
