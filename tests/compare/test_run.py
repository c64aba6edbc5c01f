"""`thinned compare --layer`, and the table of layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from thinned.cli import app
from thinned.compare.layers import ENTRIES, entry_of
from thinned.compare.tables import layers_page

BROKEN = """
import torch

class Path(torch.nn.Module):
    def __init__(self, drop_prob=0.0, scale_by_keep=True):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        return torch.nn.functional.dropout(x, self.drop_prob, self.training)
"""


def thinned_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_a_layer_prints_its_laws_and_verdicts(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    result = thinned_command("compare", "--layer", "droppath", "--quick", "--check", "--json", str(record))
    assert result.exit_code == 0, result.output
    entry = entry_of("DropPath")
    for law in entry.laws:
        assert law.name in result.stdout
    assert f"thinned: {len(entry.laws)} of {len(entry.laws)} laws hold" in result.stdout
    assert f"{entry.peer.name}: nothing wrong; " in result.stdout
    assert "x * mask" in result.stdout
    assert [law["name"] for law in json.loads(record.read_text())["laws"]] == [law.name for law in entry.laws]


def test_an_implementation_of_ones_own_is_held_to_the_layers_laws(tmp_path: Path) -> None:
    module = tmp_path / "broken_path.py"
    module.write_text(BROKEN)
    result = thinned_command("compare", f"{module}:Path", "--layer", "DropPath", "--quick", "--check")
    assert result.exit_code == 1
    (verdict,) = [line for line in result.stdout.splitlines() if line.startswith("Path: ")]
    assert "sharing" in verdict


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "Droppath2"], "unknown layer 'Droppath2'; accepted are "),
        (["--layer", "DropPath", "--html", "page.html"], "--html is for the comparison of Dropout"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: list[str], message: str) -> None:
    result = thinned_command("compare", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


def test_table_of_layers() -> None:
    result = thinned_command("layers")
    assert result.exit_code == 0
    for entry in ENTRIES:
        assert entry.name in result.stdout


def test_docs_have_the_table(repository: Path) -> None:
    """`thinned layers --markdown > docs/layers.md` writes it."""
    assert thinned_command("layers", "--markdown").stdout == layers_page()
    assert (repository / "docs" / "layers.md").read_text(encoding="utf-8") == layers_page()
