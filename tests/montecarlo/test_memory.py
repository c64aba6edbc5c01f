"""Draws in chunks: the memory at the peak does not grow with their number."""

from __future__ import annotations

from pathlib import Path

import pytest

from process import output

SCRIPT = """
import os, re
from pathlib import Path
import torch
from torch import nn
from thinned.montecarlo import predict

torch.set_num_threads(1)
hidden = nn.Linear(784, 800), nn.ReLU(), nn.Dropout(), nn.Linear(800, 800), nn.ReLU(), nn.Dropout()
model, x = nn.Sequential(*hidden, nn.Linear(800, 10)), torch.rand(256, 784)
predict(model, x[:1], 2)
# Not getrusage: its peak includes that of the process before it became this one.
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
predict(model, x, int(os.environ["DRAWS"]))
print(peak() - before)
"""


# Else glibc keeps a chunk's freed memory for itself, and gives later chunks other pieces.
GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": "131072"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc/self/status")
def test_memory_does_not_grow_with_the_draws() -> None:
    one_chunk, many = (int(output(SCRIPT, DRAWS=draws, **GIVEN_BACK)) for draws in ("26", "260"))
    assert many < 1.5 * one_chunk
