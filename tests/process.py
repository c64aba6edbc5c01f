"""Python in a process of its own, with this one's modules at hand."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

PATIENCE = 600  # seconds after which something hangs: far more than a loaded machine needs


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code, with more variables in its environment."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        env={**os.environ, "PYTHONPATH": path, **environment},
    )


def output(code: str, **environment: str) -> str:
    """The output of code that runs without an error."""
    done = python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
