"""Examples from a ``.npz`` or ``.csv`` file. Each error is a ValueError of one line."""

from __future__ import annotations

import csv
import zipfile
import zlib
from array import array
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thinned.checks import did_you_mean
from thinned.compare.errors import one_line

__all__ = ["Examples", "load_weights", "read"]


@dataclass(frozen=True)
class Examples:
    """Inputs ``x`` with an example in each row, and targets ``y`` where they are known."""

    x: Tensor
    y: Tensor | None

    def __len__(self) -> int:
        return len(self.x)

    def prepared(self, model: nn.Module, task: str) -> Examples:
        """Inputs in the dtype of ``model``, and targets as ``task`` has them: ``(n,)`` labels or ``(n, k)``.

        Integers stay integers for a model with an embedding.
        """
        kinds = [each.dtype for each in model.parameters() if each.is_floating_point()]
        embeds = any(isinstance(each, nn.Embedding | nn.EmbeddingBag) for each in model.modules())
        is_index = embeds and not self.x.is_floating_point()
        dtype = torch.int64 if is_index else next(iter(kinds), torch.get_default_dtype())
        y = self.y
        if y is not None and task == "regression":
            y = y.double().reshape(len(y), -1)
        elif y is not None:
            y = _labels(y)
        return replace(self, x=self.x.to(dtype), y=y)


def _labels(y: Tensor) -> Tensor:
    if y.numel() != len(y):
        raise ValueError(f"labels must be one for each example, got targets of shape {tuple(y.shape)}")
    labels = y.flatten().long()
    wrong = (labels < 0) | (labels != y.flatten())
    if wrong.any():
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must be classes 0, 1, .., but that of example {row} is {y.flatten()[row].item():g}; for "
            "other targets give --task regression"
        )
    return labels


def read(path: Path, *, x: str = "x", y: str | None = None, target: str | None = None) -> Examples:
    """The examples in ``path``.

    Args:
        path: a ``.npz`` file of arrays, or a ``.csv`` file with names of columns in its first line.
        x: of a ``.npz`` file, the name of the array of inputs.
        y: of a ``.npz`` file, the name of the array of targets; by default ``"y"`` if there is one.
        target: of a ``.csv`` file, the column of targets; the others are features.
    """
    readers = {".npz": lambda: _read_npz(path, x, y), ".csv": lambda: _read_csv(path, target)}
    if path.suffix.lower() not in readers:
        raise ValueError(f"cannot read {path}: accepted are .npz and .csv")
    try:
        examples = readers[path.suffix.lower()]()
    except FileNotFoundError:
        raise ValueError(f"cannot read {path}: there is no such file") from None
    except (OSError, zipfile.BadZipFile, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {path}: {one_line(error)}") from error
    if not examples.x.numel():
        raise ValueError(f"{path} has no examples: its inputs have shape {tuple(examples.x.shape)}")
    return examples


def _read_npz(path: Path, x: str, y: str | None) -> Examples:
    # np.load leaves the file of a path open if it raises, and reads others than archives.
    with path.open("rb") as file:
        if not zipfile.is_zipfile(file):
            raise ValueError(f"cannot read {path}: it is no archive of arrays, as numpy.savez writes")
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        wanted = {"x": x, "y": y or ("y" if "y" in arrays else None)}
        found = {part: _array(path, arrays, name) for part, name in wanted.items() if name is not None}
    if not found["x"].dim():
        raise ValueError(f"{path}: array {x!r} must have an example in each row, but has no dimension")
    if "y" in found and found["y"].shape[:1] != found["x"].shape[:1]:
        raise ValueError(
            f"{path}: {len(found['x'])} examples in {x!r}, but targets of shape {tuple(found['y'].shape)}"
        )
    return Examples(found["x"], found.get("y"))


def _array(path: Path, arrays: Any, name: str) -> Tensor:
    if name not in arrays:
        nearest = did_you_mean(name, arrays.files, f"; it has {', '.join(arrays.files) or 'none'}")
        raise ValueError(f"{path} has no array {name!r}{nearest}")
    try:
        values = arrays[name]
    except ValueError:  # an array of objects, which takes pickle
        values = np.empty(0, object)
    if values.dtype.kind not in "biuf":
        raise ValueError(f"{path}: array {name!r} must hold numbers, but has dtype {values.dtype}")
    _check_finite(f"{path}: array {name!r}", values)
    floating = np.float32 if values.dtype.itemsize <= 4 else np.float64
    return torch.from_numpy(values.astype(floating if values.dtype.kind == "f" else np.int64))


def _check_finite(what: str, values: NDArray[Any]) -> None:
    wrong = ~np.isfinite(values)
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0].tolist())
        raise ValueError(
            f"{what} has {values[place]} at {place}, and {int(wrong.sum())} such in all; fill or remove them"
        )


def _read_csv(path: Path, target: str | None) -> Examples:
    cells = array("d")
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        names = [name.strip() for name in next(reader, [])]
        _check_names(path, names)
        for row in filter(None, reader):
            if len(row) != len(names):
                raise ValueError(
                    f"{path}, line {reader.line_num}: {len(row)} cells, but {len(names)} columns"
                )
            try:
                cells.extend(map(float, row))
            except ValueError:
                column = next(name for name, cell in zip(names, row, strict=True) if not _is_number(cell))
                cell = row[names.index(column)]
                said = f"{cell!r} is no number" if cell.strip() else "the cell is empty"
                raise ValueError(f"{path}, line {reader.line_num}, column {column!r}: {said}") from None
    table = np.frombuffer(cells).reshape(-1, len(names))
    wrong = np.argwhere(~np.isfinite(table))
    if len(wrong):
        row, column_number = wrong[0].tolist()
        raise ValueError(
            f"{path}, column {names[column_number]!r}: example {row} is {table[row, column_number]}, and "
            f"{len(wrong)} such cells in all; fill or remove them"
        )
    if target is not None and target not in names:
        raise ValueError(
            f"{path} has no column {target!r}{did_you_mean(target, names, f'; it has {names_of(names)}')}"
        )
    values = torch.tensor(table)
    if target is None:
        return Examples(_whole(values), None)
    at = names.index(target)
    return Examples(_whole(torch.cat([values[:, :at], values[:, at + 1 :]], 1)), values[:, at])


def names_of(names: list[str]) -> str:
    """The first ten names."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def _check_names(path: Path, names: list[str]) -> None:
    if not names:
        raise ValueError(f"{path} is empty")
    if all(map(_is_number, names)):
        raise ValueError(f"{path}: the first line must name the columns, but has numbers")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{path} has more than one column {twice[0]!r}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _whole(values: Tensor) -> Tensor:
    """As integers, if all are: an embedding takes these."""
    is_whole = values.equal(values.round()) and bool((values.abs() < 2**53).all())
    return values.long() if is_whole else values


def load_weights(model: nn.Module, path: Path) -> None:
    """Give ``model`` the state_dict that ``path`` holds."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"cannot read {path}: there is no such file") from None
    except Exception as error:  # torch.load raises of many types
        raise ValueError(f"{path} holds no state_dict that torch.load reads: {one_line(error)}") from error
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError) as error:
        words = " ".join(str(error).split())
        raise ValueError(f"the weights in {path} do not fit the model: {words[:300]}") from error
