"""Two processes share out examples or draws, and each has the prediction of one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from montecarlo.common import METHODS, Masks, as_it_is, mlp, ulps
from process import PATIENCE
from thinned.montecarlo import predict, stream
from thinned.montecarlo.accumulate import Accumulator

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this PyTorch has no torch.distributed")
ULPS = 16
x, targets = torch.randn(23, 8, generator=torch.Generator().manual_seed(0)), torch.arange(23)
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "batches": {"batch_size": 4},
    "consistent": {"consistent": True, "batch_size": 7},
    "independent": {"method": "independent", "samples": 21, "quantiles": [0.5]},
    "a last set that is not whole": {"samples": 13},
    "fewer sets than processes": {"samples": 3},
    "until": {"samples": 60, "until": 0.06, "batch_size": 5},
}


def options(case: str, **more: Any) -> dict[str, Any]:
    return {"samples": 20, "strata": 5, "method": METHODS[-1], **CASES[case], **more}


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(x, targets), batch_size=5)


def predictions(sharing: bool) -> dict[str, Any]:
    """What each process computes; ``sharing`` between them, or by itself."""
    found: dict[str, Any] = {}
    for shard in ("examples", "draws"):
        with_shard = {"shard": shard} if sharing else {}
        for case in CASES:
            if not (case == "until" and shard == "draws"):
                found[f"{shard}: {case}"] = predict(mlp(), x, **options(case, **with_shard))
        found[f"{shard}: one example"] = predict(mlp(), x[:1], **options("whole", **with_shard))
        found[f"{shard}: loader"] = predict(mlp(), loader(), **options("whole", **with_shard))
        for part, prediction in enumerate(stream(mlp(), loader(), **options("whole", **with_shard))):
            found[f"{shard}: part {part} of a stream"] = prediction
        masks: dict[str, Any] = {"task": as_it_is, "keep_draws": True, **with_shard}
        found[f"{shard}: masks"] = predict(Masks(), torch.ones(9, 11), **options("batches", **masks)).outputs
    return found


def test_accumulators_that_nothing_was_added_to_merge() -> None:
    one, none = Accumulator(5), Accumulator(5)
    one.add(torch.randn(7, 3))
    assert one.merged(none).mean.equal(one.mean)
    assert none.merged(one).variance.equal(one.variance)


def launch(code: str, tmp_path: Path, *, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code under torchrun, whose rendezvous takes a free port."""
    script = tmp_path / "script.py"
    start = """
        import sys, torch, warnings
        import torch.distributed as dist
        from datetime import timedelta
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        rank = dist.get_rank()
        from montecarlo import test_processes as tests
        from montecarlo.common import mlp
        from thinned.montecarlo import predict, stream
    """
    script.write_text(textwrap.dedent(start) + textwrap.dedent(code))
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(script)],
        capture_output=True, text=True, timeout=PATIENCE, check=False,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("processes", [3, 5])
def test_more_processes(tmp_path: Path, processes: int) -> None:
    check_processes(tmp_path, processes)


def test_two_processes(tmp_path: Path) -> None:
    check_processes(tmp_path, 2)


def check_processes(tmp_path: Path, processes: int) -> None:
    """Masks bit for bit, statistics to 16 units of the largest; and each has computed its share only."""
    done = launch(
        f"""
        found = tests.predictions(sharing=True)
        for shard in ("examples", "draws"):
            rows = []
            model = mlp()
            model[6].register_forward_hook(lambda *args: rows.append(args[2].shape[0]))
            part = predict(model, tests.x[:12], 20, strata=2, method="independent", memory=1, shard=shard)
            found[shard + ": work"] = sum(rows)
        torch.save(found, r"{tmp_path}/" + str(rank))
        dist.destroy_process_group()
        """,
        tmp_path,
        processes=processes,
    )
    assert done.returncode == 0, done.stderr
    expected = predictions(sharing=False)
    work = {"examples": 0, "draws": 0}
    for rank in range(processes):
        found = torch.load(tmp_path / str(rank), weights_only=False)
        for shard in work:
            work[shard] += found.pop(f"{shard}: work")
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            two = found[name]
            if isinstance(one, Tensor):
                assert two.equal(one), name
                continue
            assert two.ids.equal(one.ids), name
            assert two.draws.equal(one.draws), name
            assert two.votes.equal(one.votes), name
            assert (two.targets is None) == (one.targets is None), name
            assert one.targets is None or two.targets.equal(one.targets), name
            assert two.sites == one.sites
            for statistic in ("mean", "variance", "standard_error", "expected_entropy"):
                assert ulps(getattr(two, statistic), getattr(one, statistic)) <= ULPS, (name, statistic)
            for q, value in one.quantiles.items():
                assert ulps(two.quantiles[q], value) <= ULPS
    assert work == {"examples": 20 * 12 + 12, "draws": (20 + processes) * 12}


@pytest.mark.parametrize("shard", ["examples", "draws"])
def test_an_error_in_one_process_is_one_in_all(shard: str, tmp_path: Path) -> None:
    """At once, and not when the group's timeout ends; afterwards the processes go on together."""
    done = launch(
        f"""
        class Fails(torch.nn.Module):
            calls = 0
            def forward(self, x):
                self.calls += 1
                if rank == 1 and self.calls > 4:
                    raise FloatingPointError("broken here")
                return x
        model = torch.nn.Sequential(*mlp(), Fails()).train()
        try:
            for part in stream(model, tests.x, 20, batch_size=2, shard={shard!r}, memory=1):
                pass
        except Exception as error:
            message = f"{{type(error).__name__}}: {{error}}"
        assert all(module.training for module in model.modules())
        again = predict(mlp(), tests.x, 20, shard={shard!r})
        torch.save((message, again.mean), r"{tmp_path}/" + str(rank))
        dist.destroy_process_group()
        """,
        tmp_path,
    )
    assert done.returncode == 0, done.stderr
    (there, mean), (here, again) = (torch.load(tmp_path / str(rank)) for rank in range(2))
    assert here == "FloatingPointError: broken here"
    assert there == "RuntimeError: process 1 of 2 raised FloatingPointError: broken here"
    assert mean.equal(again)


def test_a_distributed_sampler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would share out what is shared out already."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_gather_object", lambda parts, mine: parts.__setitem__(slice(None), [mine] * 2))
    data = TensorDataset(x)
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match="DistributedSampler"):
        predict(mlp(), DataLoader(data, sampler=sampler), 20, shard="examples")
