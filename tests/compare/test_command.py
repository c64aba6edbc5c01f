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
from thinned.compare import tables
from thinned.compare.layers import entry_of

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
    # Typer looks at the parent process, which may be no shell.
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    assert printed("--show-completion").rstrip().endswith("_thinned_completion thinned")


def test_version() -> None:
    assert thinned_command("--version").stdout.strip() == thinned.__version__


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, of a project that has no table yet."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "pyproject.toml"


OWN = """
import torch
class Own(torch.nn.Dropout):
    def __init__(self, features, p=0.5):
        super().__init__(p)
"""
TWO_LAWS = "--only", "evaluation", "--only", "dropped NaN or inf"  # torch.nn.Dropout breaks the second


@pytest.mark.usefixtures("project")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ([f"{EXAMPLES}:ScalesInEvaluation", "--check"], 1),
        (["thinned", f"{EXAMPLES}:ScalesInEvaluation", "--check"], 1),
        ([f"{EXAMPLES}:ScalesInEvaluation", "--check", "--skip", "evaluation"], 0),
        ([f"{EXAMPLES}:ScalesInEvaluation"], 0),
        ([f"{EXAMPLES}:Correct", "--check"], 0),
        (["torch", "--check"], 0),
        (["torch", "--check", "--level", "unlike-torch"], 0),
        (["torch", "--check", "--level", "nicety"], 1),
        (["torch.nn.functional:dropout", "--check"], 0),
        (["own:Own", "--check", "--kwargs", "features=8"], 0),
        (["--check"], 0),
    ],
)
def test_status_of_check(arguments: list[str], status: int) -> None:
    result = thinned_command("compare", *TWO_LAWS, *arguments)
    assert result.exit_code == status, result.output
    outcome = result.stdout.splitlines()[-1]
    assert outcome.startswith("check at level ") == ("--check" in arguments)
    assert outcome.endswith(" failed") == (status == 1)


def test_a_project_sets_what_the_options_do(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project.write_text(
        '[tool.thinned]\nimplementations = ["own.py:Own"]\nlevel = "nicety"\nkwargs = {features = 8}\n'
        'only = ["evaluation", "dropped NaN or inf", "sharing"]\n'
    )
    (project.parent / "deep").mkdir()
    monkeypatch.chdir(project.parent / "deep")

    def check(*arguments: str) -> tuple[int, str]:
        result = thinned_command("compare", "--check", *arguments)
        return result.exit_code, result.stdout.splitlines()[-1]

    assert check() == (1, "check at level nicety: Own failed")
    assert check("--level", "wrong") == (0, "check at level wrong: Own passed")
    assert check("--skip", "dropped*") == (0, "check at level nicety: Own passed")
    assert check("--only", "evaluation") == (0, "check at level nicety: Own passed")
    assert check("torch") == (1, "check at level nicety: torch failed")
    assert check("--layer", "LockedDropout") == (0, "check at level nicety: thinned passed")

    project.write_text(project.read_text().replace("own.py:Own", "own:Own"))  # a module beside the file
    monkeypatch.setattr(sys, "path", [*sys.path])
    assert check("--only", "evaluation") == (0, "check at level nicety: Own passed")
    del sys.modules["own"]


def test_only_examines_these_laws_and_nothing_else(tmp_path: Path) -> None:
    record = tmp_path / "record.json"
    result = thinned_command(
        *("compare", "torch", "--only", "edge cases", "--only", "vmap", "--skip", "p*"),
        *("--json", str(record)),
    )
    assert result.exit_code == 0
    content = json.loads(record.read_text())
    chosen = ["evaluation", "no copy", "integer input", "dropped NaN or inf", "vmap"]
    assert [law["name"] for law in content["laws"]] == chosen
    assert content["policy"] == {"level": "wrong", "only": ["edge cases", "vmap"], "skip": ["p*"]}
    assert not any(content[part] for part in ("tutorial", "timings", "bytes_saved", "training"))
    assert result.stdout.startswith("The law of dropout")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinned"], "unknown implementation 'tinned'"),
        (["--p", "1.5"], "p has to be above 0 and below 1 for a comparison, but got 1.5"),
        (["--shape", "3x4"], "shape has to be sizes with commas between, as in 64,128,128, but got 3x4"),
        (["--shape", "3,0"], "shape has to be one or more positive sizes, but got (3, 0)"),
        (["--dtype", "int8"], "dtype has to be one of float16, bfloat16, float32, float64, but got int8"),
        (["--device", "toaster"], "device has to be one that PyTorch finds, but got toaster"),
        (["--level", "bad"], "level has to be one of wrong, unlike-torch, nicety, but got bad"),
        (["--only", "evalution"], "is called 'evalution'; did you mean evaluation?"),
        (["--skip", "share of a token"], "no law and no family of laws is called 'share of a token'"),
        (["--only", "vmap", "--skip", "vmap"], "no law is left by only = ['vmap'] and skip = ['vmap']"),
        (["--only", "vmap", "--html", "page.html"], "--html writes a page of a whole comparison"),
        (
            ["torch", "--kwargs", "inplace=true"],
            "--kwargs is for implementations of your own",
        ),
        (
            ["math:pi", "--kwargs", "8"],
            "kwargs have to be arguments as in a call, such as features=8,",
        ),
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
    verdicts = " ".join(printed.split())
    assert "ForgetsToScale: wrong (6): kept values, mean in float16" in verdicts
    assert (
        "textbook: nothing wrong; unlike torch (3): p = 1, p outside [0, 1], dtype; nicety (3): " in verdicts
    )
    assert "    found: NaN; gradients NaN" in printed
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
