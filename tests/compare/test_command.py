"""The command line, and the files that it writes."""

from __future__ import annotations

import importlib.util
import json
import platform
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from markupsafe import escape
from typer.testing import CliRunner, Result

import thinned
from thinned import cli
from thinned.cli import app
from thinned.compare import run, tables
from thinned.compare.laws import LAWS
from thinned.compare.layers import _entry, entry_of

DROPOUT = entry_of("Dropout").laws
EXAMPLES = Path(__file__).parents[2] / "examples" / "broken_dropout.py"


def thinned_command(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_doctor_names_the_backend_of_the_cpu() -> None:
    result = thinned_command("doctor")
    assert result.exit_code == 0
    assert "portable" in result.stdout


def layers_as_the_table_has_them() -> list[dict[str, object]]:
    table = tables.layers()
    rows = (
        dict(zip(table.columns, (cell.text for cell in row.cells), strict=True)) for row in table.sections[""]
    )
    layers = zip(table.sections[""], rows, strict=True)
    return [
        {"layer": row.heading} | cells | {"functional": cells["functional"].split(", ")}
        for row, cells in layers
    ]


def versions() -> dict[str, object]:
    names = {"thinned": thinned.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return names | {"backends": list(thinned.backends.available())}


@pytest.mark.parametrize(
    ("arguments", "content"),
    [
        (["doctor", "--json"], thinned.backends.describe),
        (["layers", "--json"], layers_as_the_table_has_them),
        (["--version", "--json"], versions),
        (["--json", "--version"], versions),
    ],
    ids=["doctor", "layers", "version", "json first"],
)
def test_json(arguments: list[str], content: Callable[[], object]) -> None:
    result = thinned_command(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    assert json.loads(result.stdout) == content()


@pytest.mark.parametrize(
    "arguments", [["--json"], ["--json", "doctor"], ["layers", "--json", "--markdown"], ["--"]]
)
def test_options_that_do_not_go_together(arguments: list[str]) -> None:
    result = thinned_command(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")


def test_as_a_module(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Help and errors name what was typed; a shell completes the command."""

    def printed(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["__main__.py", *arguments])
        with pytest.raises(SystemExit):
            runpy.run_module("thinned", run_name="__main__")
        return "".join(capsys.readouterr())

    assert "Usage: python -m thinned doctor" in printed("doctor", "--help")
    assert "Try 'python -m thinned --help'" in printed("nonsense")
    assert printed("--show-completion", "bash").rstrip().endswith("_thinned_completion thinned")


@pytest.fixture
def two_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only two laws, of which nn.Dropout breaks the second, are examined, and nothing is timed."""
    names = "evaluation", "dropped NaN or inf"
    monkeypatch.setattr(_entry, "LAWS", [law for law in LAWS if law.name in names])
    monkeypatch.setattr(run.timing, "planned", lambda _: [])


def test_version() -> None:
    assert thinned_command("--version").stdout.strip() == thinned.__version__


@pytest.mark.usefixtures("two_laws")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([f"{EXAMPLES}:ScalesInEvaluation", "--check"], 1),
        (["thinned", f"{EXAMPLES}:ScalesInEvaluation", "--check"], 1),
        (["torch", "--check"], 1),
        ([f"{EXAMPLES}:ScalesInEvaluation"], 0),
        ([f"{EXAMPLES}:Correct", "--check"], 0),
        (["--check"], 0),
    ],
)
def test_status_of_check(arguments: list[str], status: int) -> None:
    assert thinned_command("compare", "--quick", *arguments).exit_code == status


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinned"], "unknown implementation 'tinned'"),
        (["--p", "1.5"], "p has to be above 0 and below 1 for a comparison, but got 1.5"),
        (["--shape", "3x4"], "shape has to be sizes with commas between, as in 64,128,128, but got 3x4"),
        (["--shape", "3,0"], "shape has to be one or more positive sizes, but got (3, 0)"),
        (["--dtype", "int8"], "dtype has to be one of float16, bfloat16, float32, float64, but got int8"),
        (["--device", "toaster"], "device has to be one that PyTorch finds, but got toaster"),
        (["--html", "no/such/directory/page.html"], "there is no directory no/such/directory"),
    ],
)
def test_wrong_arguments_get_one_line(arguments: list[str], message: str) -> None:
    result = thinned_command("compare", "--quick", *arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("file", ["cli.py", "__main__.py"])
def test_a_missing_extra_gets_one_line(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "typer" else name)
    monkeypatch.delitem(sys.modules, "thinned.cli")
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(Path(cli.__file__).with_name(file)), run_name="__main__")
    assert ended.value.code == "thinned's command line needs the extra: pip install 'thinned[compare]'"


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, str]:
    """The output of one comparison, its page and its record."""
    folder = tmp_path_factory.mktemp("compared")
    html, record = folder / "page.html", folder / "record.json"
    result = thinned_command(
        *("compare", "textbook", f"{EXAMPLES}:ForgetsToScale", "--quick"),
        *("--html", str(html), "--json", str(record)),
    )
    assert result.exit_code == 0, result.output
    return result.stdout, html.read_text(encoding="utf-8"), record.read_text(encoding="utf-8")


def test_terminal(compared: tuple[str, str, str]) -> None:
    printed = compared[0]
    assert printed.startswith("The tutorial's comparison (Mandliya 2026): torch.ones(1000, 100), p = 0.5")
    for law in DROPOUT:
        assert law.name in printed
    assert "✗ NaN; gradients NaN" in printed
    assert "ForgetsToScale: breaks 7 of 48 laws, 2 not offered: kept values, mean in float16" in printed
    assert max(len(line) for line in printed.splitlines()) <= 100


def test_record(compared: tuple[str, str, str]) -> None:
    record = json.loads(compared[2])
    assert record["settings"]["dtype"] == "float32"
    assert record["machine"]["thinned"] == thinned.__version__
    assert record["verdicts"]["ForgetsToScale"]["breaks"][0] == "kept values"
    assert [law["name"] for law in record["laws"]] == [law.name for law in DROPOUT]
    rate = record["laws"][3]["findings"]["textbook"]
    assert rate["verdict"] == "holds"
    assert rate["figures"]["low"] < rate["figures"]["rate"] < rate["figures"]["high"]
    assert {timing["elements"] for timing in record["timings"]} == {4_000, 100_000, 1_000_000}
    assert record["bytes_saved"]["textbook"] == 4


def test_page(compared: tuple[str, str, str]) -> None:
    page = compared[1]
    for law in DROPOUT:
        assert escape(law.statement) in page
    assert page.count("data:image/png;base64,") == 2
    assert "<code>--quick</code> leaves training out" in page
