"""Thinned matrix products give what the dense network gives under the same masks."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import thinned
from thinned.models.intercept import intercept
from thinned.montecarlo import predict, thin
from thinned.montecarlo.draws import Draw
from thinned.montecarlo.dropping import Dropouts
from thinned.montecarlo.prediction import Prediction
from thinned.montecarlo.thin import POINTWISE, Chain, Thinned

DRAWS = 4


@pytest.fixture(autouse=True)
def _thin_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "GATHER", 0)


def logits(output: Tensor) -> Tensor:
    return output


def drawn(model: nn.Module, x: Tensor) -> Prediction:
    return predict(
        model, x, DRAWS, seed=3, task=logits, method="independent", consistent=True, keep_draws=True
    )


def dense(model: nn.Module, x: Tensor) -> Tensor:
    """The same draws, one at a time, by thinned.address alone; examples in dimension 0."""
    draws = []
    with Dropouts(model).on(), torch.no_grad(), intercept():
        for draw in range(DRAWS):
            zeros = torch.zeros(len(x), dtype=torch.int64)
            with thinned.address(model, seed=3, step=draw, samples=zeros):
                draws.append(model(x))
    return torch.stack(draws, 1)


def assert_close(prediction: Prediction, expected: Tensor) -> None:
    """Equal but for the order of sums: 64 ulp of the largest number."""
    assert prediction.outputs is not None
    room = 64 * torch.finfo(expected.dtype).eps * float(expected.abs().max())
    torch.testing.assert_close(prediction.outputs, expected, rtol=0, atol=room)


def check(model: nn.Module, x: Tensor, route: str = "thinned", refused: int = 0) -> None:
    prediction = drawn(model, x)
    assert prediction.route == route, prediction.notes
    assert len(prediction.notes) == refused
    assert_close(prediction, dense(model, x))


def mlp(
    *widths: int, p: float = 0.5, bias: bool = True, act: Callable[[], nn.Module] = nn.ReLU
) -> nn.Sequential:
    modules: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(widths)):
        modules += [act(), nn.Dropout(p)] if i else []
        modules.append(nn.Linear(a, b, bias))
    return nn.Sequential(*modules)


@given(
    widths=st.lists(st.integers(1, 40), min_size=3, max_size=5),
    rows=st.integers(1, 9),
    p=st.sampled_from([1e-6, 0.1, 0.5, 0.9, 1.0]) | st.floats(0.01, 1),
    bias=st.booleans(),
    first=st.booleans(),
    last=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_any_depth_width_and_p(
    widths: list[int], rows: int, p: float, bias: bool, first: bool, last: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(sum(widths))
    model = mlp(*widths, p=p, bias=bias).to(dtype)
    model = nn.Sequential(*[nn.Dropout(p)] * first, *model, *[nn.ReLU(), nn.Dropout(p)] * last)
    check(model, torch.randn(rows, widths[0], dtype=dtype))


@pytest.mark.parametrize("kind", POINTWISE, ids=lambda kind: kind.__name__)
def test_each_pointwise_module_on_both_sides_of_a_dropout(kind: type[nn.Module]) -> None:
    def act() -> nn.Module:
        return kind(0.1, 0.3) if kind is nn.Threshold else kind()

    torch.manual_seed(0)
    x = torch.randn(5, 8)
    check(
        nn.Sequential(
            nn.Linear(8, 30), act(), nn.Dropout(), nn.Linear(30, 30), nn.Dropout(), nn.Linear(30, 4)
        ),
        x,
    )
    behind = nn.Sequential(
        nn.Linear(8, 30), nn.Dropout(), act(), nn.Linear(30, 30), nn.Dropout(), nn.Linear(30, 4)
    )
    check(behind, x)


def test_a_dropped_zero_that_becomes_a_half_is_kept() -> None:
    model = nn.Sequential(nn.Linear(8, 30), nn.Dropout(), nn.Sigmoid(), nn.Linear(30, 4))
    assert not Thinned(model)
    check(model, torch.randn(5, 8), route="vmap")


def test_two_dropouts_between_linears_and_one_that_is_off() -> None:
    x = torch.randn(5, 8)
    check(nn.Sequential(nn.Linear(8, 30), nn.Dropout(0.3), nn.ReLU(), nn.Dropout(0.4), nn.Linear(30, 4)), x)
    check(
        nn.Sequential(nn.Linear(8, 30), nn.Dropout(0.3), nn.Linear(30, 9), nn.Dropout(0), nn.Linear(9, 4)), x
    )


def test_in_place_modules() -> None:
    x = torch.randn(5, 8)
    before = x.clone()
    relu, dropout = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)
    check(
        nn.Sequential(nn.Linear(8, 30), relu, dropout, nn.Linear(30, 30), relu, dropout, nn.Linear(30, 4)), x
    )
    check(nn.Sequential(nn.Dropout(), nn.ReLU(inplace=True), nn.Linear(8, 4)), x)
    assert x.equal(before)
    assert dropout.inplace


def test_in_place_dropout_that_is_seen_from_elsewhere_is_not_folded_into_vmap() -> None:
    class Aliased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.dropout = nn.Linear(8, 8), nn.Dropout(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.inside(x)
            return h + self.dropout(h)

    check(Aliased(), torch.randn(5, 8), route="batch", refused=1)


def test_thinned_dropouts() -> None:
    x = torch.randn(5, 8)
    check(nn.Sequential(nn.Linear(8, 30), thinned.Dropout(), nn.Linear(30, 4)), x)
    check(nn.Sequential(nn.Linear(8, 30), thinned.Dropout(broadcast_dims=(1,)), nn.Linear(30, 4)), x, "vmap")
    for fused in (thinned.ReLUDropout(), thinned.GELUDropout(0.3, "tanh"), thinned.SiLUDropout(0.0)):
        check(nn.Sequential(nn.Linear(8, 30), nn.Dropout(), fused, nn.Linear(30, 4)), x)


def test_modules_that_occur_twice() -> None:
    linear, dropout = nn.Linear(8, 8), nn.Dropout()
    check(nn.Sequential(linear, dropout, nn.ReLU(), linear, dropout, nn.Linear(8, 3)), torch.randn(5, 8))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 30), nn.ReLU(), nn.Dropout(), nn.Linear(30, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.layers(self.layers(x))


def test_a_sequential_that_runs_twice_with_inputs_of_several_draws() -> None:
    check(Twice(), torch.randn(5, 8))


def test_a_sequential_in_a_convolutional_network_and_sequentials_in_sequentials() -> None:
    block = nn.Sequential(nn.Linear(24, 30), nn.ReLU(), nn.Dropout())
    head = nn.Sequential(block, nn.Sequential(nn.Linear(30, 30), nn.Tanh(), nn.Dropout()), nn.Linear(30, 3))
    model = nn.Sequential(
        nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout1d(), nn.Flatten(), head
    )
    assert (
        len([part for parts in Thinned(model)._parts.values() for part in parts if isinstance(part, Chain)])
        == 1
    )
    check(model, torch.randn(5, 2, 8))


def test_what_is_no_chain_runs_as_it_is() -> None:
    norm = nn.Sequential(nn.Linear(8, 30), nn.Dropout(), nn.LayerNorm(30), nn.Linear(30, 4))
    check(norm, torch.randn(5, 8), route="vmap")
    check(
        nn.Sequential(nn.Linear(8, 30), nn.LayerNorm(30), nn.Dropout(), nn.Linear(30, 4)), torch.randn(5, 8)
    )


def test_inputs_of_three_dimensions_and_several_rows_for_an_example() -> None:
    model = mlp(8, 30, 4)
    check(model, torch.randn(5, 6, 8), route="vmap")

    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    check(Rows(), torch.randn(5, 6, 8), route="vmap")


def test_hooks_of_others_run() -> None:
    model = mlp(8, 30, 30, 4)
    model[3].register_forward_hook(lambda _module, _args, result: result + 1)
    check(model, torch.randn(5, 8))
    parametrized = mlp(8, 30, 4)
    nn.utils.parametrizations.weight_norm(parametrized[3])
    check(parametrized, torch.randn(5, 8), route="vmap")


def test_a_dropped_nan_is_zero_and_a_kept_one_is_not() -> None:
    torch.manual_seed(0)
    model = mlp(8, 30, 30, 4)
    with torch.no_grad():
        model[0].bias[3] = torch.inf
        model[3].bias[5] = torch.nan
    x = torch.randn(5, 8)
    expected = dense(model, x)
    addresses = [Draw(model, 3, draw, torch.zeros(5, dtype=torch.int64)) for draw in range(DRAWS)]
    parts = Thinned(model)
    got = []
    with Dropouts(model).on(), torch.no_grad(), intercept():
        for address in addresses:
            with parts.on(address), address:
                got.append(model(x))
    assert 0 < int(expected.isnan().sum()) < expected.numel()
    torch.testing.assert_close(torch.stack(got, 1), expected, equal_nan=True)


def test_the_model_is_as_it_was_also_after_an_error() -> None:
    model = mlp(8, 30, 4)
    twin = deepcopy(model)
    drawn(model, torch.randn(5, 8))
    assert "forward" not in vars(model)
    with pytest.raises(RuntimeError):
        drawn(model, torch.randn(5, 7))
    assert "forward" not in vars(model)
    assert str(model) == str(twin)


def test_a_few_rows_are_not_worth_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    model = mlp(8, 30, 30, 4)
    assert drawn(model, torch.randn(64, 8)).route == "thinned"
    check(model, torch.randn(2, 8), route="vmap")


def test_results_do_not_depend_on_the_batch_size() -> None:
    model, x = mlp(8, 30, 30, 4), torch.randn(9, 8)
    whole = drawn(model, x).outputs
    for size in (1, 4):
        part = predict(
            model, x, DRAWS, seed=3, task=logits, method="independent", consistent=True, keep_draws=True,
            batch_size=size,
        )  # fmt: skip
        assert whole is not None
        assert_close(part, whole)
