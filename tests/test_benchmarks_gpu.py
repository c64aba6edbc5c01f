"""`make bench-gpu`: its dry run, and what a GPU run decides without one. What it finds is for a GPU."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from rich.console import Console
from torch import Tensor

import thinned
from benchmarks import record
from benchmarks.case import Bound, Case, Result
from process import PATIENCE
from thinned import backends

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.gpu import cases, place, run, targets
from benchmarks.gpu.peers import layers


def test_without_a_gpu_it_is_a_dry_run_of_all_cases(repository: Path) -> None:
    before = record.FILE.read_bytes()
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"],
        cwd=repository,
        env={**os.environ, "TRITON_INTERPRET": "1"},  # on a machine with a GPU, too
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("DRY RUN") == 2
    assert done.stdout.count("These timings mean nothing.") == 2
    assert "left out: CUDA graphs;" in done.stdout
    assert "outputs and gradients have the CPU's bits" in done.stdout
    count = len(list(cases.cases(place.DRY_RUN)))
    assert f"\n{count}/{count}, " in done.stdout
    assert "yes" not in done.stdout
    assert "│ dry run │" in done.stdout
    assert record.FILE.read_bytes() == before


def test_every_case_has_a_name_of_its_own() -> None:
    for where in (place.GPU, place.DRY_RUN):
        names = [(case.group, case.setting) for case in cases.cases(where)]
        assert len(names) == len(set(names))
    groups = {case.group for case in cases.cases(place.GPU)}
    assert groups == {group for target in targets.TARGETS for group in target.groups}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("elements", place.GPU.sizes)
def test_buffers_in_turn_are_more_than_the_cache_holds(elements: int, dtype: torch.dtype) -> None:
    count, size = cases.turns(place.GPU, dtype, elements), elements * dtype.itemsize
    assert count >= 2
    assert count * size >= 100e6
    assert count == 2 or (count - 1) * size < 100e6


def test_calls_take_turns_and_results_stay_until_the_next_turn() -> None:
    inputs: list[Any] = list("abc")
    kept: list[object] = [None] * 3
    first, second = (cases.in_turn(step, inputs, kept) for step in (str.upper, str.title))  # type: ignore[arg-type]
    seen = []
    for _ in range(4):
        first()
        seen.append(list(kept))
    assert seen == [["A", None, None], ["A", "B", None], ["A", "B", "C"], ["A", "B", "C"]]
    kept[:] = [None] * 3
    second()
    assert kept == ["A", None, None]


def result(group: str, elements: int, **seconds: float) -> Result:
    case = Case(group, f"{elements} elements", dict, (), elements=elements)
    return Result(case, {name.replace("_", " "): [value] for name, value in seconds.items()})


COPY = targets.Target("words", Bound("copy", 1 / 0.9), ("forward",), large_only=True)


def test_a_target_is_judged_where_the_subject_did_worst() -> None:
    results = [
        result("forward", 10, thinned=9.0, copy=1.0),  # too small to count
        result("forward", 100, thinned=1.0, copy=0.99),
        result("forward", 200, thinned=1.0, copy=0.95),
        result("backward", 200, thinned=9.0, copy=1.0),  # another group
        result("forward", 300, thinned=9.0, nn=1.0),  # without the copy
    ]
    found = targets.verdict(COPY, results, 100)
    assert found is not None
    assert found.worst is results[2].case
    assert found.speed == pytest.approx(0.95)
    assert found.is_met
    everywhere = targets.verdict(replace(COPY, large_only=False), results, 100)
    assert everywhere is not None
    assert everywhere.worst is results[0].case
    assert not everywhere.is_met


def test_a_target_that_nothing_was_measured_for_is_open() -> None:
    assert targets.verdict(COPY, [result("forward", 10, thinned=1.0, copy=1.0)], 100) is None


@pytest.mark.parametrize(("speed", "is_met"), [(0.899, False), (0.901, True)])
def test_a_target_ends_at_its_bound(speed: float, is_met: bool) -> None:
    found = targets.verdict(COPY, [result("forward", 100, thinned=1.0, copy=speed)], 100)
    assert found is not None
    assert found.is_met is is_met


def test_the_mask_is_one_byte_an_element() -> None:
    assert targets.mask_saved({"thinned": 2.0, "nn.Dropout": 3.0}) == (1.0, True)
    assert targets.mask_saved({"thinned": 2.00003, "nn.Dropout": 3.0})[1]  # by the allocator's pieces
    assert not targets.mask_saved({"thinned": 2.01, "nn.Dropout": 3.0})[1]


class Cuda:
    """A clock that calls advance, as CUDA's events read it, and memory that tensors take."""

    def __init__(self) -> None:
        self.milliseconds, self.allocated, self.peak, self.replays = 0.0, 0, 0, 0

    def work(self) -> None:
        self.milliseconds += 3

    def Event(self, enable_timing: bool) -> Any:  # noqa: N802
        assert enable_timing
        event = SimpleNamespace(at=0.0, synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.milliseconds)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def synchronize(self) -> None:
        self.milliseconds += 1000  # what was queued before does not count

    def memory_allocated(self) -> int:
        return self.allocated

    def max_memory_allocated(self) -> int:
        return self.peak

    def reset_peak_memory_stats(self) -> None:
        self.peak = self.allocated


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    fake = Cuda()
    for name in (
        "Event",
        "synchronize",
        "memory_allocated",
        "max_memory_allocated",
        "reset_peak_memory_stats",
    ):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_events_give_seconds_a_call(cuda: Cuda) -> None:
    assert place.GPU.clock(cuda.work, 5) == pytest.approx(3e-3)


def test_the_peak_counts_from_the_call_on_and_not_what_compiling_took(cuda: Cuda) -> None:
    cuda.allocated, calls = 500, []

    def layer(x: Tensor) -> Tensor:
        calls.append(x)
        cuda.peak = max(cuda.peak, cuda.allocated + (9000 if len(calls) == 1 else 30))
        return x

    assert place.GPU.peak(layer, torch.ones(3)) == 30


def test_a_graphs_time_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = []

    def capture(calls: list[Callable[[], object]]) -> Callable[[], object]:
        captured.append(len(calls))
        return lambda: [call() for call in calls]

    monkeypatch.setattr(cases, "captured", capture)
    monkeypatch.setattr(backends, "for_device_type", lambda _: backends.available()["triton"])
    graphs = replace(place.DRY_RUN, has_graphs=True, clock=lambda call, _: 40.0 if call() else 0.0)
    case = next(case for case in cases.cases(graphs) if case.group == targets.GRAPH)
    seconds = case.run().seconds
    assert set(captured) == {2}
    assert seconds["copy"] == seconds["thinned"] == [20.0]


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_peers_drop_and_scale(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "for_device_type", lambda _: backends.available()["triton"])
    x = torch.ones(5000, dtype=dtype, requires_grad=True)  # two rows of tl.rand's kernel
    for name, layer in layers(0.25).items():
        y = layer(x)
        (grad,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(y, grad), name
        assert y.unique().tolist() == pytest.approx([0, 4 / 3], abs=0.008), name  # a bfloat16's last bit
        assert abs((y == 0).float().mean() - 0.25) < 0.04, name  # 6 standard deviations
        assert not torch.equal(y[:904], y[4096:]), name


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def printed(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_case_that_fails_leaves_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails() -> dict[str, Callable[[], object]]:
        raise RuntimeError("out of memory")

    works = partial(dict, {"thinned": float, "copy": float})
    chosen = [Case("forward", str(number), make, (), rounds=1) for number, make in enumerate((fails, works))]
    monkeypatch.setattr(run, "cases", lambda _: chosen)
    monkeypatch.setattr(run, "peaks", lambda _: {"thinned": 2.0, "nn.Dropout": 3.0})
    monkeypatch.setattr(
        run, "_where", lambda: {"machine": "a GPU", "instruction set": "sm_90", "triton": "3"}
    )
    monkeypatch.setattr(record, "FILE", tmp_path / "results.csv")
    out = console()
    assert not run._measure(out, place.GPU, "", True)
    assert "forward, 0: FAILED: RuntimeError: out of memory" in printed(out)
    rows = list(csv.DictReader(record.FILE.read_text().splitlines(), record.FIELDS))
    assert [(row["machine"], row["triton"], row["subject"]) for row in rows] == [
        ("a GPU", "3", name) for name in ("thinned", "copy", "thinned", "nn.Dropout")
    ]
    assert [row["peak bytes an element"] for row in rows] == ["", "", "2", "3"]
    assert rows[0]["torch"] == torch.__version__
    out = console()
    assert run._measure(out, place.GPU, "1", False)
    assert "FAILED" not in printed(out)
    assert len(record.FILE.read_text().splitlines()) == 4


def test_wrong_bits_end_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    kernel = backends.available()["triton"]

    def wrong(x: Tensor, key: Any, geometry: Any, T: int, scale: float, *rest: Any) -> Tensor:
        return kernel.masked_affine(x, key, geometry, T, scale * (1.001 if T != 2**31 else 1), *rest)

    broken = SimpleNamespace(masked_affine=wrong, fold=kernel.fold)
    monkeypatch.setattr(backends, "available", lambda: {"triton": broken})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(typer.Exit) as raised:
        run.main()
    assert raised.value.exit_code == 1
    out = capsys.readouterr().out
    assert "not the CPU's bits: torch.bfloat16 (305,) p = 0.1" in out.replace("\n", "")
    assert "p = 0.5" not in out
    assert "cases;" not in out


def test_a_gpu_that_triton_does_not_serve_is_not_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(backends, "why_not_triton", lambda device: f"no kernel for {device}")
    with pytest.raises(typer.Exit) as raised:
        run.main()
    assert raised.value.exit_code == 1
    assert capsys.readouterr().out == "no kernel to measure: no kernel for cuda\n"


def test_on_a_gpu_the_table_of_backends_stays() -> None:
    with run._served(place.GPU):
        assert backends.name_for("cpu") != "triton"
    with run._served(place.DRY_RUN):
        assert backends.name_for("cpu") == "triton"
        assert thinned.functional.dropout(torch.ones(3)).shape == (3,)
