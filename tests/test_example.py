"""The example of training without the dropped rows runs; the times of its short run mean nothing."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_losses_of_masked_and_gathered_are_equal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(ROOT / "examples" / "faster_training.py"))["main"](tmp_path, quick=True)
    told = capsys.readouterr().out
    masked, gathered = re.findall(r"^(?:all|kept) rows.*: .* loss (\S+)$", told, re.MULTILINE)
    assert masked == gathered
    (apart,) = re.findall(r"losses at most (\S+) apart", told)
    assert float(apart) < 1e-12
    (picture,) = tmp_path.iterdir()
    assert f"(pictures/{picture.name})" in (ROOT / "docs" / "faster.md").read_text(encoding="utf-8")
