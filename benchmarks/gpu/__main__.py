"""Choose between a GPU and Triton's interpreter, which Triton asks for at its import, then run."""

from __future__ import annotations

import os

import torch
import typer

from thinned import backends

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
if __name__ == "__main__":
    if "triton" in backends.missing():
        raise SystemExit(f"without Triton there is nothing to measure: {backends.missing()['triton']}")

    from benchmarks.gpu.run import main

    torch.manual_seed(0)
    typer.run(main)
