"""`pytest --thinned` in a project of its own: three files outside the repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

from process import PATIENCE, output

FILES = {
    "pyproject.toml": """
        [tool.thinned]
        implementations = ["layers:Honest"]
        only = ["evaluation", "p = *", "in place", "other devices", "same seed"]
        skip = ["p = NaN"]
    """,
    "layers.py": """
        import torch
        from torch import nn

        class Honest(nn.Module):
            def __init__(self, p=0.5):
                super().__init__()
                self.p = p

            def forward(self, x):
                return self.drop(x) if self.training else x

            def drop(self, x):
                return x * (torch.rand_like(x) < 1 - self.p) / (1 - self.p)

        class OnTheCPU(Honest):
            def drop(self, x):
                return x * (torch.rand(x.shape) < 1 - self.p) / (1 - self.p)
    """,
    "test_layers.py": """
        def test_other():
            pass
    """,
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(dedent(text), encoding="utf-8")
    return tmp_path


def run(project: Path, *arguments: str) -> tuple[int, list[str]]:
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True, timeout=PATIENCE, check=False)
    return done.returncode, (done.stdout + done.stderr).splitlines()


def test_the_project_of_an_honest_layer_passes(project: Path) -> None:
    status, lines = run(project, "--thinned-project")
    assert status == 0, lines
    assert "collected 7 items" in lines
    assert any(line.startswith("XFAIL Honest::p = 1 - unlike torch: NaN; gradients NaN. ") for line in lines)
    assert any("no inplace argument" in line for line in lines if line.startswith("SKIPPED"))
    assert any("5 passed, 1 skipped, 1 xfailed" in line for line in lines)


def test_a_law_is_a_test_that_fails(project: Path) -> None:
    """Chosen with -k, in two processes of xdist, for an implementation beside the project's own options."""
    status, lines = run(project, "--thinned", "layers:OnTheCPU", "-k", "device or evaluation", "-n", "2")
    assert status == 1, lines
    broken = "OnTheCPU breaks the law 'other devices' (wrong): RuntimeError: Tensor on device cpu is not on"
    assert any(line.startswith(broken) for line in lines)
    assert any(line.startswith("FAILED OnTheCPU::other devices - ") for line in lines)
    assert any("1 failed, 1 passed" in line for line in lines)


def test_a_single_test_runs_alone(project: Path) -> None:
    status, lines = run(project, "--thinned-project", "test_layers.py::test_other")
    assert status == 0, lines
    assert "collected 1 item" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--thinned", "layers:Onest"],
            "ERROR: --thinned: layers has nothing called 'Onest'; ",
        ),
        (["--thinned-project", "--thinned-level", "bad"], "ERROR: --thinned: level has to be one of wrong, "),
    ],
)
def test_a_mistake_is_one_line(project: Path, arguments: list[str], message: str) -> None:
    status, lines = run(project, *arguments)
    assert status == 4
    assert next(line for line in lines if line.startswith("ERROR")).startswith(message)
    assert not [line for line in lines if "Traceback" in line]


def test_random_numbers_of_other_tests_stay(project: Path) -> None:
    (project / "conftest.py").write_text(
        "import pytest, torch\n"
        "@pytest.fixture(autouse=True, scope='session')\n"
        "def state():\n"
        "    before = torch.get_rng_state()\n"
        "    yield\n"
        "    assert torch.equal(torch.get_rng_state(), before)\n",
        encoding="utf-8",
    )
    status, lines = run(project, "--thinned-project", "-k", "seed or other")
    assert status == 0, lines


def test_pytest_without_it_imports_no_torch(project: Path) -> None:
    text = "import sys\ndef test_other():\n    assert 'torch' not in sys.modules\n"
    (project / "test_layers.py").write_text(text, encoding="utf-8")
    status, lines = run(project)
    assert status == 0, lines
    assert output("import sys, pytest_thinned; print('torch' in sys.modules)") == "False\n"
