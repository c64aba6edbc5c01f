"""The example of Monte-Carlo dropout runs; the numbers of its short run mean nothing."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "uncertainty.py"
PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


def test_tables_and_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLE))["main"](tmp_path, quick=True)
    told = capsys.readouterr().out
    assert all(name in told for name in ("weight scaling", "mutual information", "DropBlock2d", "Auto MPG"))
    assert "nan" not in told
    page = (PICTURES.parent / "uncertainty.md").read_text(encoding="utf-8")
    assert {each.name for each in tmp_path.iterdir()} == set(re.findall(r"\(pictures/([^)]+)\)", page))


def test_pictures_are_small() -> None:
    for picture in PICTURES.glob("*.png"):
        assert picture.stat().st_size < 60_000
