"""docs/migration.md: each layer and call of ours in its tables can be made as it is written there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thinned

PAGE = Path(__file__).parent.parent / "docs" / "migration.md"
VALUES: dict[str, Any] = {
    "p": 0.1,
    "drop_prob": 0.1,
    "max_rate": 0.1,
    "depth": 3,
    "block_size": 3,
    "mode": "row",
    "scale_by_keep": True,
    "num_prefix_tokens": 1,
    "ordered": True,
    "batch_first": True,
    "x": torch.ones(2, 5, 4, 4),
    "embedding": nn.Embedding(5, 3),
    "module": nn.Linear(2, 2),
    "modules": [nn.Linear(2, 2)],
    "weights": ["weight"],
    "edge_index": torch.tensor([[0, 1], [1, 0]]),
    "num_nodes": 2,
    "channels": 16,
    "n": 4,
    "scale": 2.0,
}
NOT_EVALUATED = {
    "key=thinned.Key(seed)": "an argument, not a call",
    "training": "an argument, not a call",
}


def codes() -> list[tuple[str, str]]:
    """The row and each code in backticks of the column that is headed `thinned`."""
    found, column = [], None
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            column = None
        elif column is None:
            column = cells.index("thinned")
        elif not set(line) <= set("|- "):
            found += [(cells[0], code) for code in re.findall(r"`([^`]+)`", cells[column])]
    return found


@pytest.mark.parametrize(("theirs", "ours"), [each for each in codes() if each[1] not in NOT_EVALUATED])
def test_the_right_column_is_code_that_runs(theirs: str, ours: str) -> None:
    names = {**vars(thinned.functional), **vars(thinned), **VALUES, "thinned": thinned}
    made = eval(ours, names)
    assert made is not None, theirs


def test_every_table_is_read() -> None:
    found = [code for _, code in codes()]
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    assert set(NOT_EVALUATED) <= set(found)
    assert len({theirs for theirs, _ in codes()}) == len(rows) - 2 * 4  # a heading and a rule for each table
