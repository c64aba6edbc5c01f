"""Two processes share out examples or draws, and each has the prediction of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from distributed.world import World
from montecarlo.common import METHODS, Masks, as_it_is, mlp, ulps
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
    """The predictions of each process; ``sharing`` between them, or by itself."""
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


class Fails(nn.Module):
    """Raises in one process, in its fifth call."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 4 and dist.get_rank() == 1:
            raise FloatingPointError("broken here")
        return x


def work(shard: str) -> int:
    """The number of rows that this process computes."""
    rows: list[int] = []
    model = mlp()
    model[6].register_forward_hook(lambda *args: rows.append(args[2].shape[0]))
    predict(model, x[:12], 20, strata=2, method="independent", memory=1, shard=shard)  # type: ignore[arg-type]
    return sum(rows)


def error(shard: str) -> str:
    """That of a call in which one process raises."""
    model = nn.Sequential(*mlp(), Fails()).train()
    try:
        for _ in stream(model, x, 20, batch_size=2, method="independent", shard=shard, memory=1):
            pass
    except Exception as caught:
        assert all(module.training for module in model.modules())
        return f"{type(caught).__name__}: {caught}"
    return "no error"


def shared() -> dict[str, Any]:
    """What one of several processes finds."""
    shards = ("examples", "draws")
    return {
        "error": [error(shard) for shard in shards],
        "work": [work(shard) for shard in shards],
        "predictions": predictions(sharing=True),
    }


@pytest.fixture(scope="module")
def found(world: World) -> list[dict[str, Any]]:
    return world.run(shared)


several = pytest.mark.parametrize(
    "world",
    [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)],
    indirect=True,
    scope="module",
)


@several
def test_each_process_has_the_prediction_of_one(found: list[dict[str, Any]]) -> None:
    """Masks bit for bit, statistics to 16 units of the largest."""
    expected = predictions(sharing=False)
    for of_process in found:
        for name, one in expected.items():
            two = of_process["predictions"][name]
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


@several
def test_each_process_computes_its_share(found: list[dict[str, Any]]) -> None:
    """And its first draw once more, alone."""
    by_examples, by_draws = (sum(process["work"][shard] for process in found) for shard in range(2))
    assert by_examples == 20 * 12 + 12
    assert by_draws == (20 + len(found)) * 12


@several
def test_an_error_in_one_process_is_one_in_all(found: list[dict[str, Any]]) -> None:
    """At once, and not when the group's timeout ends; afterwards the processes have gone on together."""
    for rank, process in enumerate(found):
        message = "FloatingPointError: broken here"
        if rank != 1:
            message = f"RuntimeError: process 1 of {len(found)} raised {message}"
        assert process["error"] == [message, message]


def test_a_distributed_sampler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would share out what is shared out already."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        dist, "all_gather_object", lambda parts, mine: parts.__setitem__(slice(None), [mine] * 2)
    )
    data = TensorDataset(x)
    sampler: Any = DistributedSampler(data, num_replicas=2, rank=0)
    with pytest.raises(ValueError, match="DistributedSampler"):
        predict(mlp(), DataLoader(data, sampler=sampler), 20, shard="examples")
