"""What the Makefile sets up, with a Python that only writes down how it is called."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")

COMMAND, TESTS = "-e .[compare]", "thinned[dev]"

# Makes environments that hold itself. PIP_FAILS stands for a pip that fails.
PYTHON = """#!/bin/sh
case "$*" in
  "-c "*) exit ${TOO_OLD:-0} ;;
  -V) echo Python 3.9.18 ;;
  "-m venv "*) mkdir -p $3/bin && cp $0 $3/bin/python && cp $0 $3/bin/thinned ;;
  "-m pip install "*) echo "$*" | sed 's/.*constraints.txt //' >> installed
    echo WARNING: noise
    test -z "$PIP_FAILS" || { echo ERROR: no disk >&2; exit 1; } ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path, repository: Path) -> Path:
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "CMakeLists.txt"):
        shutil.copy(repository / name, tmp_path)
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "kernel.cpp").touch()
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make(checkout: Path, *targets: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [shutil.which("make") or "", "PYTHON=./python", *targets],
        cwd=checkout,
        env={"PATH": os.environ["PATH"], "CXX": "true", **environment},  # nothing is compiled
        capture_output=True,
        text=True,
        check=False,
    )


def installed(checkout: Path) -> list[str]:
    """What pip was told to install since the last question."""
    log = checkout / "installed"
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def test_each_target_installs_what_it_needs_once(checkout: Path) -> None:
    first = make(checkout, "compare")
    assert first.stdout.startswith("Setting up .venv: PyTorch and thinned's kernel; 1 to 2 minutes")
    assert len(first.stdout.splitlines()) == 2  # the other one is the command
    assert first.stderr == ""
    assert installed(checkout) == [COMMAND]
    assert make(checkout, "compare", "doctor").returncode == 0
    assert installed(checkout) == []
    assert make(checkout, "test").stdout.startswith("Adding what the tests need to .venv")
    assert installed(checkout) == [TESTS]
    make(checkout, "lint", "test", "test-distributed", "compare")
    assert installed(checkout) == []


def test_the_other_order(checkout: Path) -> None:
    make(checkout, "test")
    assert installed(checkout) == [COMMAND, TESTS]
    make(checkout, "compare")
    assert installed(checkout) == []


@pytest.mark.parametrize("target", ["bench-gpu", "check-gpu"])
def test_what_needs_a_gpu_needs_what_the_tests_need(checkout: Path, target: str) -> None:
    assert make(checkout, target).returncode == 0
    assert installed(checkout) == [COMMAND, TESTS]


def test_a_check_on_a_gpu_that_fails_leaves_the_others(checkout: Path) -> None:
    make(checkout, "test")
    command = checkout / ".venv" / "bin" / "thinned"
    command.write_text("#!/bin/sh\necho $* >> called\nexit 1\n")
    (checkout / ".venv" / "bin" / "python").write_text("#!/bin/sh\necho $2 >> called\n")
    assert make(checkout, "check-gpu").returncode == 2
    called = (checkout / "called").read_text().splitlines()
    assert called[-3:] == ["doctor --verify", "pytest", "benchmarks.gpu"]
    command.write_text("#!/bin/sh\n")
    assert make(checkout, "check-gpu").returncode == 0


@pytest.mark.parametrize("changed", ["pyproject.toml", "csrc/kernel.cpp", "constraints.txt"])
def test_a_change_builds_again(checkout: Path, changed: str) -> None:
    make(checkout, "test")
    installed(checkout)
    later = (checkout / ".venv" / ".tests").stat().st_mtime + 10
    os.utime(checkout / changed, (later, later))
    assert make(checkout, "compare").stdout.startswith("Updating .venv: thinned's kernel")
    assert installed(checkout) == [COMMAND]


def test_another_pytorch_has_an_environment_of_its_own(checkout: Path) -> None:
    make(checkout, "test-torch", "VERSION=2.11.0")
    assert installed(checkout) == [COMMAND, TESTS]
    assert (checkout / ".venv-torch-2.11.0" / "constraints.txt").read_text() == "torch==2.11.0\n"
    assert not (checkout / ".venv").exists()


@pytest.mark.parametrize("target", ["compare", "test"])
def test_a_failed_installation_is_tried_again(checkout: Path, target: str) -> None:
    failed = make(checkout, target, PIP_FAILS="1")
    assert failed.returncode == 2
    assert (
        "ERROR: no disk\nSetting up .venv failed: above are the last lines of .venv/pip.log" in failed.stderr
    )
    assert installed(checkout) == [COMMAND]
    assert make(checkout, "compare").returncode == 0
    assert installed(checkout) == [COMMAND]


@pytest.mark.parametrize(
    ("arguments", "environment", "message"),
    [
        (
            ["compare"],
            {"TOO_OLD": "1"},
            "thinned needs Python 3.10 or later, and ./python is Python 3.9.18. "
            "Name another: make compare PYTHON=python3.12",
        ),
        (
            ["test", "PYTHON=no-such-python"],
            {},
            "thinned needs Python 3.10 or later, and no-such-python is not found. "
            "Name another: make test PYTHON=python3.12",
        ),
        (
            ["compare"],
            {"CXX": "no-such-compiler"},
            "thinned's kernel needs a C++17 compiler, and no-such-compiler is not found. "
            "Install one, or go without the kernel: make compare NATIVE=OFF",
        ),
    ],
    ids=["old", "no Python", "no compiler"],
)
def test_what_is_missing_is_one_line(
    checkout: Path, arguments: list[str], environment: dict[str, str], message: str
) -> None:
    done = make(checkout, *arguments, **environment)
    assert done.returncode == 2
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if not line.startswith("make: ***")] == [message]
    assert installed(checkout) == []


def test_without_the_kernel_no_compiler_is_asked_for(checkout: Path) -> None:
    assert make(checkout, "compare", "NATIVE=OFF", CXX="no-such-compiler").returncode == 0
    assert installed(checkout) == [COMMAND]
