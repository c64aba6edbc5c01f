"""The measurements run; what they find is for `make bench`."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import thinned
from benchmarks import record
from benchmarks.case import Bound, Case, Result
from benchmarks.cases import cases
from benchmarks.residual import convnext, vit
from thinned.backends import _native
from thinned.compare.memory import saved_by_call


def test_every_case_has_a_name_of_its_own() -> None:
    names = [(case.group, case.setting, case.threads, case.isa) for case in cases()]
    assert len(names) == len(set(names))


def test_a_case_leaves_threads_and_instruction_set_as_they_were() -> None:
    x, layer, before = torch.ones(100), thinned.Dropout(0.5), (torch.get_num_threads(), _native.isa())
    seen: set[tuple[int, str]] = set()

    def call() -> None:
        seen.add((torch.get_num_threads(), _native.isa()))
        layer(x)

    case = Case("a", "b", lambda: {"thinned": call}, (), threads=2, isa="baseline", rounds=2, elements=100)
    result = case.run()
    assert seen == {(2, "baseline")}
    assert (torch.get_num_threads(), _native.isa()) == before
    assert result.nanoseconds("thinned") > 0
    assert result.ratio("thinned", "thinned") == 1


def test_a_bound_says_what_it_promises() -> None:
    assert str(Bound("x * 2", 1.2)) == "at most 1.2x of x * 2"
    assert str(Bound("nn.Dropout", 1 / 60)) == "60x faster than nn.Dropout"
    assert str(Bound("nn.Dropout", 1 / 1.5)) == "1.5x faster than nn.Dropout"


def test_the_saved_rows_have_all_fields() -> None:
    with record.FILE.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == record.FIELDS
    assert rows
    assert {len(row) for row in rows} == {len(header)}


def test_a_row_fits_its_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(record, "FILE", tmp_path / "results.csv")
    case = Case("a", "b", dict, (), threads=2, isa="baseline", elements=100)
    result = Result(case, {"thinned": [1e-6], "x * 2": [4e-6]})
    for _ in range(2):
        record.append(record.timed(result, record.on_cpu(case)))
    with record.FILE.open(newline="") as file:
        rows = list(csv.DictReader(file, record.FIELDS))
    assert [(row["subject"], row["ns an element"], row["thinned takes"]) for row in rows] == [
        ("thinned", "10", "1"), ("x * 2", "40", "0.25"),
    ] * 2  # fmt: skip
    assert {(row["threads"], row["instruction set"], row["torch"], row["triton"]) for row in rows} == {
        ("2", "baseline", torch.__version__, "")
    }


@pytest.mark.parametrize(
    ("branches", "shape", "layout"),
    [
        (vit, (5, 192), torch.contiguous_format),
        (convnext, (96, 5, 5), torch.contiguous_format),
        (convnext, (96, 5, 5), torch.channels_last),
    ],
)
def test_a_branch_saves_its_kept_rows_for_backward(
    branches: Callable[[], tuple[nn.Module, ...]], shape: tuple[int, ...], layout: torch.memory_format
) -> None:
    """All that the masked form saves, and the branch's input, for these rows; and a key and an index."""
    key, p, batch = thinned.Key(5), 0.4, 20
    x = torch.randn(batch, *shape).to(memory_format=layout).requires_grad_()
    kept = float(thinned.keep_mask(key, (batch,), p).sum()) / batch
    assert 0.5 < kept < 0.7
    for branch in branches():
        saved = partial(saved_by_call, x=x, not_counted=list(branch.parameters()))
        masked = saved(lambda x, f=branch: x + thinned.functional.drop_path(f(x), p, True, key=key))
        gathered = saved(lambda x, f=branch: thinned.functional.residual(x, f, p, key=key))
        assert gathered <= kept * (masked + 4) + 200 / x.numel()
        assert gathered > 0.9 * kept * masked
