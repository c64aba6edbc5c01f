"""The progress bar, and predict's."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from thinned.montecarlo import predict, stream
from thinned.progress import progress_bar

MODEL = nn.Sequential(nn.Dropout(), nn.Linear(4, 3))
OPTIONS: dict[str, Any] = {"samples": 4, "progress": True}
X = torch.ones(5, 4)


def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """Standard error, as if it were one."""
    text = io.StringIO()
    monkeypatch.setattr(text, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", text)
    monkeypatch.setenv("TERM", "xterm")
    return text


class Endless(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        return iter(X)


@pytest.mark.parametrize(
    ("inputs", "options", "last"),
    [
        (X, {"batch_size": 2}, "3/3"),
        ((X,), {}, "1/1"),
        ({"input": X}, {}, "1/1"),
        (DataLoader(TensorDataset(X), 2), {}, "3/3"),
        (DataLoader(Endless(), 2), {}, "3/?"),
    ],
    ids=["tensor", "tuple", "dictionary", "loader", "loader of unknown length"],
)
def test_predict_counts_batches(
    inputs: Any, options: dict[str, Any], last: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = terminal(monkeypatch)
    predict(MODEL, inputs, **OPTIONS, **options)
    assert last in text.getvalue()


def test_nothing_is_written_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    predict(MODEL, X, **OPTIONS)
    assert capsys.readouterr() == ("", "")


def test_the_bar_vanishes_when_the_stream_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    text = terminal(monkeypatch)
    parts = stream(MODEL, X, batch_size=1, **OPTIONS)
    next(parts)
    assert "\x1b[?25h" not in text.getvalue()
    parts.close()  # type: ignore[attr-defined]
    assert "\x1b[?25h" in text.getvalue()  # the cursor is shown again
    assert "batches" in text.getvalue()
    assert "batches" not in text.getvalue().rpartition("\x1b[2K")[2]  # nothing follows the last erased line


def test_without_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    with pytest.raises(ImportError, match=r"pip install 'thinned\[uncertainty\]'"):
        predict(MODEL, X, **OPTIONS)


def test_a_console_of_ones_own() -> None:
    text = io.StringIO()
    with progress_bar("laws", 2, Console(file=text, force_terminal=True)) as tick:
        tick("first")
        tick("second")
    assert "laws" in text.getvalue()
    assert "second" in text.getvalue()
