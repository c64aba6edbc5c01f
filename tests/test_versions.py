"""The supported versions of PyTorch are the same in the package, its requirements and its documents."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from thinned.backends.describe import NEWEST_TESTED, describe


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")[:2]))


def test_page_readme_and_requirements_name_the_same_versions(repository: Path) -> None:
    page = (repository / "docs" / "versions.md").read_text(encoding="utf-8")
    tested = re.findall(r"^\| (\d+\.\d+)\.\d+ \|", page, re.MULTILINE)
    assert tested == sorted(tested, key=numbers)
    assert tested[-1] == NEWEST_TESTED
    requirements = (repository / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"torch>={tested[0]}"' in requirements
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert f"PyTorch {tested[0]} and later; [tested](docs/versions.md) up to {tested[-1]}." in readme


@pytest.mark.parametrize(
    ("version", "untested"),
    [("2.11.0", False), (f"{NEWEST_TESTED}.1+cpu", False), ("2.100.0a0+git1", True), ("3.0.0", True)],
)
def test_doctor_tells_of_a_newer_pytorch(
    version: str, untested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    told = f"untested (newest tested: {NEWEST_TESTED})" in describe()["versions"]["torch"]
    assert told == untested
