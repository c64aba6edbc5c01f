"""Draws of an example that end once the standard errors of its means are small."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from montecarlo.common import METHODS, both_methods, mlp, without
from thinned.montecarlo import predict

torch.manual_seed(0)
x = torch.randn(60, 8) * torch.linspace(0.1, 4, 60)[:, None]
MOST = 200


def options(method: str) -> dict[str, Any]:
    return {"method": method, "strata": 10, "seed": 3}


@both_methods
@pytest.mark.parametrize(
    "until", [0.02, {"mean": 0.02, "expected_entropy": 0.03}, {"expected_entropy": 0.02}]
)
def test_errors_are_below_the_bound_and_results_those_of_as_many_draws(method: str, until: Any) -> None:
    model = mlp()
    found = predict(model, x, MOST, until=until, quantiles=[0.5], **options(method))
    counts = sorted(set(found.draws.tolist()))
    assert len(counts) > 2, counts
    assert counts[0] < MOST
    early = found.draws < MOST
    bounds = until if isinstance(until, dict) else {"mean": until}
    errors = {"mean": found.standard_error, "expected_entropy": found.expected_entropy_error}
    for name, bound in bounds.items():
        error = errors[name]
        assert error is not None
        assert (error[early] <= bound).all()
    for count in counts:
        chosen = found.draws == count
        whole = predict(model, x, count, quantiles=[0.5], **options(method)).select(chosen)
        part = found.select(chosen)
        torch.testing.assert_close(part.mean, whole.mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(part.standard_error, whole.standard_error, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(part.quantiles[0.5], whole.quantiles[0.5], rtol=1e-5, atol=1e-6)
        assert part.votes is not None
        assert whole.votes is not None
        assert part.votes.equal(whole.votes)
        assert part.votes.sum(1).eq(count).all()
        assert part.ids.equal(whole.ids)


@both_methods
def test_the_count_depends_on_no_chunk(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = predict(mlp(), x, MOST, until=0.02, **options(method)).draws
    for more in ({"memory": 50_000}, {"batch_size": 7}):
        assert predict(mlp(), x, MOST, until=0.02, **more, **options(method)).draws.equal(expected)
    without(monkeypatch, "vmap")
    assert predict(mlp(), x, MOST, until=0.02, **options(method)).draws.equal(expected)


@both_methods
def test_bounds_that_none_and_all_reach(method: str) -> None:
    none = predict(mlp(), x, 40, until=1e-9, **options(method))
    without_bound = predict(mlp(), x, 40, **options(method))
    assert none.draws.eq(40).all()
    torch.testing.assert_close(none.mean, without_bound.mean)
    all_of_them = predict(mlp(), x, 40, until=1e3, **options(method))
    assert all_of_them.draws.eq(20 if method == "stratified" else 10).all()


def test_fewer_samples_than_a_set() -> None:
    found = predict(mlp(), x, 7, until=1e3, method=METHODS[-1])
    assert found.draws.eq(7).all()


@both_methods
def test_examples_that_are_done_cost_nothing(method: str) -> None:
    rows = []
    model = nn.Sequential(mlp(), nn.Identity())
    model[1].register_forward_hook(lambda *args: rows.append(args[2].shape[0]))
    predict(model, x, MOST, until=0.02, **options(method))
    assert rows[-1] < rows[0] == 60
