"""docs/field-issues.md says what the tests of this folder say, of the same issues."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import FunctionType
from typing import Any

from models.field.halves import OLDEST

TESTS = {
    name: test
    for file in sorted(Path(__file__).parent.glob("test_*.py"))
    if file.stem != "test_page"
    for name, test in vars(importlib.import_module(f"models.field.{file.stem}")).items()
    if name.startswith("test_") and isinstance(test, FunctionType)
}
ISSUES = {re.sub(r"(test_\w+?_\d+)_.*", r"\1", name) for name in TESTS}
REPOSITORIES = {
    "pytorch": "https://github.com/pytorch/pytorch/issues/",
    "functorch": "https://github.com/pytorch/functorch/issues/",
    "OLMo-core": "https://github.com/allenai/OLMo-core/pull/",
    "unsloth": "https://github.com/unslothai/unsloth/pull/",
    "pyg": "https://github.com/pyg-team/pytorch_geometric/issues/",
    "transformers": "https://github.com/huggingface/transformers/issues/",
    "torchtitan": "https://github.com/pytorch/torchtitan/issues/",
    "fairseq2": "https://github.com/facebookresearch/fairseq2/pull/",
    "baal": "https://github.com/baal-org/baal/pull/",
    "vision": "https://github.com/pytorch/vision/issues/",
    "audio": "https://github.com/pytorch/audio/issues/",
    "veScale": "https://github.com/volcengine/veScale/issues/",
    "Megatron-LM": "https://github.com/NVIDIA/Megatron-LM/pull/",
    "opacus": "https://github.com/meta-pytorch/opacus/issues/",
}


def rows(repository: Path) -> list[list[str]]:
    lines = (repository / "docs" / "field-issues.md").read_text(encoding="utf-8").splitlines()
    table = [line for line in lines if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in table]


def test_every_issue_has_its_tests_and_the_reverse(repository: Path) -> None:
    named = [row[-1].strip("`") for row in rows(repository)]
    assert len(named) == len(set(named))
    assert set(named) == ISSUES
    for name in named:
        assert {f"{name}_torch", f"{name}_thinned"} <= set(TESTS)


def test_each_row_names_its_issue(repository: Path) -> None:
    for issue, *_, test in rows(repository):
        match = re.fullmatch(r"\[([\w-]+)#(\d+)\]\((\S+)\)", issue)
        assert match is not None, issue
        project, number, link = match.groups()
        assert link == f"{REPOSITORIES[project]}{number}"
        assert test == f"`test_{project.lower().replace('-', '_')}_{number}`"


def test_each_row_gives_the_recorded_outcome(repository: Path) -> None:
    for _, _, torch_today, thinned_today, name in rows(repository):
        test: Any = TESTS[f"{name.strip('`')}_torch"]
        assert re.match(rf"{test.outcome}(?!\w)", torch_today), name
        assert ("(it did in 2.11" in torch_today) == (test.since > OLDEST), name
        assert thinned_today
