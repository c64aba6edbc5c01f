"""A draw's masks are a function of seed, draw, site and example, whatever else is computed beside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned
from montecarlo.common import METHODS, Masks, as_it_is, both_methods, mlp, ulps, without
from thinned.models.intercept import intercept
from thinned.montecarlo import predict
from thinned.montecarlo.draws import Route

N, SAMPLES = 70, 12
# Matrix products of other sizes add in another order: measured at most 4 units of the largest result.
ULPS = 16
ROUTES: list[tuple[Route, ...]] = [(), ("thinned", "vmap"), ("thinned", "vmap", "batch")]
ones = torch.ones(N, 9)


def masks(x: Tensor = ones, **options: Any) -> Tensor:
    options = {
        "samples": SAMPLES,
        "strata": 5,
        "method": METHODS[-1],
        "task": as_it_is,
        "keep_draws": True,
        **options,
    }
    found = predict(Masks(), x, **options).outputs
    assert found is not None
    return found


@both_methods
@pytest.mark.parametrize("consistent", [False, True])
@pytest.mark.parametrize("refused", ROUTES, ids=["vmap", "batch", "one by one"])
@pytest.mark.parametrize("batch_size", [1, 7, 64, None])
def test_masks_do_not_depend_on_batches_chunks_and_routes(
    method: str,
    consistent: bool,
    refused: tuple[Route, ...],
    batch_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = {"method": method, "consistent": consistent, "seed": 3}
    expected = masks(**options)
    assert (expected[0] == expected[1]).all() == consistent
    assert not expected[:, 0].equal(expected[:, 1])
    without(monkeypatch, *refused)
    x = ones[: {1: 3, 7: 20}.get(batch_size or N, N)]
    for memory in (None, 4 * 3 * 18 * len(x) * 2, 1):  # all draws of a set at once, two, one
        assert masks(x, batch_size=batch_size, memory=memory, **options).equal(expected[: len(x)])


@both_methods
@pytest.mark.parametrize("consistent", [False, True])
def test_results_are_equal_but_for_rounding(
    method: str, consistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, model = torch.randn(N, 8), mlp()
    options: Any = {
        "samples": SAMPLES,
        "strata": 5,
        "method": method,
        "consistent": consistent,
        "keep_draws": True,
    }
    expected = predict(model, x, **options)
    for refused in ROUTES:
        without(monkeypatch, *refused)
        for more in ({"batch_size": 1}, {"batch_size": 7}, {"batch_size": 64}, {"memory": 30_000}):
            count = 9 if more == {"batch_size": 1} else N
            found = predict(model, x[:count], **options, **more)
            assert found.route not in refused
            assert found.ids.equal(expected.ids[:count])
            for name in ("outputs", "mean", "variance", "standard_error", "expected_entropy"):
                assert ulps(getattr(found, name), getattr(expected, name)[:count]) <= ULPS, (more, name)


def test_one_draw_of_one_example_alone() -> None:
    """Draw 17 of example 123 is a call of the model in evaluation but for its dropouts."""
    torch.manual_seed(0)
    model, x = mlp(), torch.randn(130, 8)
    for each in (model.eval(), model.train()):
        found = predict(each, x, 20, method="independent", seed=7, keep_draws=True)
        assert found.outputs is not None
        with torch.no_grad(), intercept(), thinned.address(model.train(), seed=7, step=17, samples=[123]):
            alone = model(x[123:124]).softmax(1)
        assert ulps(found.outputs[123, 17], alone[0]) <= ULPS
    many = torch.ones(130, 9)
    outputs = masks(many, samples=20, method="independent", seed=7)
    drops = Masks().train()
    with intercept(), thinned.address(drops, seed=7, step=17, samples=[123]):
        assert drops(many[123:124])[0].equal(outputs[123, 17])


@both_methods
def test_order_of_the_data_set(method: str) -> None:
    """With their ids the examples have their masks wherever they are."""
    order = torch.randperm(N)
    expected = masks(method=method)
    assert masks(method=method, ids=order).equal(expected[order])
    assert masks(ones[:5], method=method, ids=[3, 3, 69, 0, -1])[:4].equal(expected[[3, 3, 69, 0]])


@both_methods
def test_a_smaller_last_batch_has_its_masks(method: str) -> None:
    """Baal gives another mask to a batch of another size, so its consistent draws are not one network."""
    found = masks(ones[:10], batch_size=4, consistent=True, method=method)
    assert (found == found[0]).all()
    assert masks(ones[:10], batch_size=4, method=method).equal(masks(ones[:10], method=method))


@both_methods
def test_more_samples_begin_with_the_same_draws(method: str) -> None:
    few, many = masks(method=method, samples=10), masks(method=method, samples=30)
    assert many[:, :10].equal(few)


def test_seeds_and_keys() -> None:
    assert masks(seed=5).equal(masks(seed=thinned.Key(5)))
    assert not masks(seed=5).equal(masks(seed=6))


def test_the_callers_generator_has_no_part() -> None:
    expected = masks()
    torch.manual_seed(99)
    assert masks().equal(expected)


class Counted(nn.Module):
    """Counts its calls and the rows that it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.rows = 0, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls, self.rows = self.calls + 1, self.rows + len(x)
        return x


@both_methods
def test_what_comes_before_the_first_dropout_is_computed_twice(method: str) -> None:
    """Once for a draw alone, once for all draws; torch-uncertainty runs the backbone for each of them."""
    backbone = Counted()
    model = nn.Sequential(backbone, nn.Dropout(), nn.Linear(8, 3))
    predict(model, torch.randn(50, 8), 20, method=method)
    assert (backbone.calls, backbone.rows) == (2, 100)
    backbone.calls = backbone.rows = 0
    predict(model, torch.randn(50, 8), 20, method=method, batch_size=10)
    assert (backbone.calls, backbone.rows) == (6, 60)


def test_operations_of_the_prefix_have_no_draws() -> None:
    """The matrix product of the backbone is that of the batch alone, not one of 20 times as many rows."""
    from torch.utils.flop_counter import FlopCounterMode

    model = nn.Sequential(nn.Linear(8, 100), nn.Dropout(), nn.Linear(100, 3))
    with FlopCounterMode(display=False) as counter:
        predict(model, torch.randn(50, 8), 20, method="independent")
    prefix, head = 2 * 50 * 8 * 100, 2 * 50 * 100 * 3
    assert counter.get_total_flops() == 2 * prefix + 21 * head


class Mixes(nn.Module):
    """Reads a number of its whole batch, which vmap cannot, and which is another in a repeated batch."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        return h * float(h.mean())


@both_methods
def test_routes_that_give_other_results_give_way(method: str) -> None:
    """A model that looks at its whole batch is right one draw at a time only."""
    torch.manual_seed(0)
    x = torch.rand(6, 8)
    found = predict(Mixes(), x, 10, task=as_it_is, keep_draws=True, method=method)
    assert found.route == "one by one"
    assert len(found.notes) == 2
    assert "batch: its first draw differs" in found.notes[1]
    with torch.no_grad(), intercept(), thinned.address(model := Mixes(), seed=0, step=3, samples=range(6)):
        alone = model(x)
    if method == "independent":
        assert found.outputs is not None
        assert found.outputs[:, 3].equal(alone)
