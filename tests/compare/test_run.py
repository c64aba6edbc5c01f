"""`thinned compare --layer`, and the table of layers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from thinned.cli import app
from thinned.compare.implementation import Implementation
from thinned.compare.layers import ENTRIES, entry_of
from thinned.compare.run import calls
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
    found = json.loads(record.read_text())
    assert [law["name"] for law in found["laws"]] == [law.name for law in entry.laws]
    timings = {timing["subject"]: timing for timing in found["timings"]}
    assert timings["thinned"]["ratio_quartiles"] == [1, 1]
    assert timings[entry.peer.name]["reference"] == "thinned"
    assert timings[entry.peer.name]["quartiles"][0] <= timings[entry.peer.name]["quartiles"][1]


def test_an_implementation_of_ones_own_is_held_to_the_layers_laws(tmp_path: Path) -> None:
    module = tmp_path / "broken_path.py"
    module.write_text(BROKEN)
    result = thinned_command("compare", f"{module}:Path", "--layer", "DropPath", "--quick", "--check")
    assert result.exit_code == 1
    (verdict,) = [line for line in result.stdout.splitlines() if line.startswith("Path: ")]
    assert "sharing" in verdict


PEER = entry_of("DropPath").peer.name


@pytest.mark.parametrize(
    ("layer", "named", "law", "status"),
    [
        ("DropPath", ["thinned"], "sharing", 0),  # which thinned.Dropout breaks
        ("DropPath", [PEER, "thinned", "thinned"], "sharing", 0),
        ("DropPath", ["torch.nn:Dropout"], "evaluation", 0),
        ("DropPath", [], "sharing", 0),
        ("LockedDropout", ["torch.nn:Dropout"], "sharing", 1),
        ("LockedDropout", ["formula"], "sharing", 0),
        ("Dropout", ["torch", "thinned"], "evaluation", 0),
        ("Dropout", ["textbook"], "p = 1", 0),
    ],
)
def test_names_of_a_layers_own_implementations(
    layer: str, named: list[str], law: str, status: int, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    result = thinned_command(
        *("compare", *named, "--layer", layer, "--only", law, "--check", "--json", str(record))
    )
    assert result.exit_code == status, result.output
    (found,) = json.loads(record.read_text())["laws"]
    names = [
        name.rpartition(":")[2] for name in dict.fromkeys(["thinned", entry_of(layer).peer.name, *named])
    ]
    assert list(found["findings"]) == names
    header = next(line for line in result.stdout.splitlines() if line.startswith("┃"))
    columns = [cell.strip() for cell in header.split("┃")[2:-1]]
    assert [column for column in columns if column != "what has to hold"] == names
    checked = ", ".join(name.rpartition(":")[2] for name in dict.fromkeys(named or ["thinned"]))
    assert f"level wrong: {checked} {'failed' if status else 'passed'}" in result.stdout


def test_no_name_stands_for_two(tmp_path: Path) -> None:
    """A class of one's own may have the name of a column."""
    module = tmp_path / "broken_path.py"
    module.write_text(BROKEN + f"\nthinned = {PEER} = Path\n")
    named = f"{module}:thinned", f"{module}:{PEER}", f"{module}:Path"
    result = thinned_command(
        *("compare", *named, "thinned", "--layer", "DropPath", "--only", "sharing", "--check"),
        *("--json", str(tmp_path / "record.json")),
    )
    (found,) = json.loads((tmp_path / "record.json").read_text())["laws"]
    verdicts = {name: finding["verdict"] for name, finding in found["findings"].items()}
    broken = dict.fromkeys((*named[:2], "Path"), "broken")
    assert verdicts == {"thinned": "holds", PEER: "holds", **broken}
    assert result.exit_code == 1


def test_a_layer_is_timed_on_the_device_of_the_settings() -> None:
    entry = entry_of("DropPath")
    made = []

    class Moved(torch.nn.Module):
        def __init__(self, **_: object) -> None:
            super().__init__()

        def to(self, device: str) -> Moved:  # type: ignore[override]
            made.append(device)
            return self

    calls(entry, [Implementation("moved", Moved)], device="meta")
    assert made == ["meta"]
    call = calls(entry, [Implementation("moved", lambda **_: torch.nn.Identity())], device="meta")["moved"]
    assert call().device.type == "meta"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layer", "Droppath2"], "unknown layer 'Droppath2'; accepted are "),
        (["--layer", ""], "unknown layer ''; accepted are "),
        (
            ["--layer", "DropPath", "--html", "page.html"],
            "--html has no meaning for --layer, as the page is one of a comparison",
        ),
        (["--layer", "DropPath", "--p", "0.5"], "--p has no meaning for --layer DropPath, whose laws bring"),
        (["--layer", "RDrop", "--shape", "64,128,128"], "--shape has no meaning for --layer RDrop"),
        (["--layer", "ConcreteDropout", "--dtype", "float32"], "--dtype has no meaning for --layer Concrete"),
        (
            ["torch", "--layer", "DropPath"],
            "unknown implementation 'torch' of this layer; accepted are thinned",
        ),
        (
            ["thined", "--layer", "DropPath"],
            "unknown implementation 'thined' of this layer; did you mean thinned?",
        ),
        (
            ["thinned", "--layer", "DropPath", "--kwargs", "p=1"],
            "--kwargs is for implementations of your own",
        ),
        (["--explain", "menas"], "no law and no family of laws is called 'menas'; did you mean"),
        (["--explain", ""], "no law and no family of laws is called ''"),
        (["--explain", "sharing", "--layer", "Dropout"], "no law and no family of laws is called 'sharing'"),
        (["--explain", "dtype", "torch"], "an implementation has no meaning beside --explain"),
        (["--explain", "dtype", "--p", "0.5"], "--p has no meaning beside --explain"),
        (["--explain", "dtype", "--check"], "--check has no meaning beside --explain"),
        (["--explain", "dtype", "--only", "dtype"], "--only has no meaning beside --explain"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: list[str], message: str) -> None:
    result = thinned_command("compare", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("layer", [[], ["--layer", "LockedDropout"]])
def test_a_law_is_explained_and_nothing_runs(layer: list[str]) -> None:
    result = thinned_command("compare", "--explain", "Sharing", *layer)
    assert (result.exit_code, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    assert text.startswith("sharing: along shared dimensions all are kept or all dropped why: ")
    assert ("Dropout2d" in text) is (not layer)
    assert 'broken by: thinned compare torch.nn:Dropout --layer LockedDropout --only "sharing"' in text
    assert "found:" not in text


def test_settings_that_a_layer_has_are_taken(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    arguments = ("--p", "0.25", "--shape", "30,40", "--dtype", "float64", "--only", "calls")
    result = thinned_command("compare", "--layer", "Dropout", *arguments, "--json", str(record))
    assert result.exit_code == 0, result.output
    settings = json.loads(record.read_text())["settings"]
    assert (settings["p"], settings["shape"], settings["dtype"]) == (0.25, [30, 40], "float64")


def test_table_of_layers() -> None:
    result = thinned_command("layers")
    assert result.exit_code == 0
    for entry in ENTRIES:
        assert entry.name in result.stdout


def test_docs_have_the_table(repository: Path) -> None:
    """`thinned layers --markdown > docs/layers.md` writes it."""
    assert thinned_command("layers", "--markdown").stdout == layers_page()
    assert (repository / "docs" / "layers.md").read_text(encoding="utf-8") == layers_page()
