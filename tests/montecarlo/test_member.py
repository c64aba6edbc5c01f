"""A member is one draw of predict(consistent=True)."""

from __future__ import annotations

import io
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import thinned
from thinned.montecarlo import member, predict


def outputs(output: Tensor) -> Tensor:
    return output


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(20, 20),
        nn.Dropout(0.2),
        nn.Linear(20, 3),
    )


def drawn(model: nn.Module, x: Tensor, **options: object) -> Tensor:
    prediction = predict(
        model, x, 6, seed=5, task=outputs, method="independent", consistent=True, keep_draws=True, **options
    )
    assert prediction.outputs is not None
    return prediction.outputs


def test_it_is_a_draw_of_predict() -> None:
    model, x = network(), torch.randn(7, 6)
    expected = drawn(model, x)
    for draw in range(6):
        y = member(model, draw, seed=5, method="independent")(x)
        torch.testing.assert_close(y, expected[:, draw])
    assert not expected[:, 0].allclose(expected[:, 1])


@pytest.mark.skipif(not hasattr(thinned.Key, "stratified"), reason="keys have no strata")
def test_it_is_a_draw_of_a_stratified_set() -> None:
    model, x = network(), torch.randn(7, 6)
    prediction = predict(model, x, 8, seed=5, task=outputs, strata=4, consistent=True, keep_draws=True)
    assert prediction.outputs is not None
    for draw in range(8):
        torch.testing.assert_close(member(model, draw, seed=5, strata=4)(x), prediction.outputs[:, draw])


def test_it_is_one_network_for_every_batch() -> None:
    x = torch.randn(7, 6)
    network_ = member(network(), 2, method="independent")
    y = network_(x)
    assert network_(x).equal(y)
    for size in (1, 3):
        torch.testing.assert_close(torch.cat([network_(part) for part in x.split(size)]), y)


def test_it_disturbs_nothing() -> None:
    model = network().train()
    model[1].eval()
    flags = [module.training for module in model.modules()]
    state = deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    member(model, 0, method="independent")(torch.randn(4, 6, generator=torch.Generator()))
    with pytest.raises(RuntimeError):
        member(model, 0, method="independent")(torch.randn(4, 5, generator=torch.Generator()))
    assert flags == [module.training for module in model.modules()]
    assert torch.get_rng_state().equal(generator)
    for name, value in model.state_dict().items():
        assert value.equal(state[name])


def test_copies_and_saved_states() -> None:
    model, x = network(), torch.randn(7, 6)
    one = member(model, 3, seed=5, method="independent")
    y = one(x)
    assert deepcopy(one)(x).equal(y)
    assert {name.partition(".")[0] for name in one.state_dict()} == {"module"}
    other = member(network(), 3, seed=5, method="independent")
    with torch.no_grad():
        other.module[0].weight.zero_()
    assert not other(x).allclose(y)
    other.load_state_dict(one.state_dict())
    assert other(x).equal(y)
    file = io.BytesIO()
    torch.save(one, file)
    file.seek(0)
    assert torch.load(file, weights_only=False)(x).equal(y)


def test_a_copy_has_its_own_parameters() -> None:
    one = member(network(), 3, method="independent")
    x = torch.randn(7, 6)
    y = one(x)
    with torch.no_grad():
        deepcopy(one).module[0].weight.zero_()
    assert one(x).equal(y)


def test_gradients_flow_to_what_it_keeps() -> None:
    one = member(network(), 1, method="independent")
    one(torch.randn(7, 6)).square().sum().backward()
    dropped = (one.module[4].weight.grad == 0).all(0)
    assert 0 < int(dropped.sum()) < 20


class Recomputed(nn.Module):
    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        self.before, self.inner, self.use_reentrant = nn.Linear(6, 20), network()[1:], use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return (
            self.inner(h)
            if self.use_reentrant is None
            else checkpoint(self.inner, h, use_reentrant=self.use_reentrant)
        )


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_with_checkpoints(use_reentrant: bool, training: bool) -> None:
    x, gradients = torch.randn(7, 6), []
    for reentrant in (None, use_reentrant):
        torch.manual_seed(0)
        model = Recomputed(reentrant).train(training)
        member(model, 3)(x).square().sum().backward()
        gradients.append(model.before.weight.grad)
        assert all(module.training == training for module in model.modules())
    torch.testing.assert_close(*gradients)
    assert not model.inner[0].running_mean.any()


def test_arguments_by_name_and_injected_dropout() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, *, a: Tensor, b: Tensor) -> Tensor:
            return self.head(a + b)

    model, x = Two(), torch.randn(5, 4)
    expected = predict(
        model,
        {"a": x, "b": x},
        3,
        task=outputs,
        method="independent",
        consistent=True,
        keep_draws=True,
        inject="head",
    ).outputs
    assert expected is not None
    one = member(model, 2, method="independent", inject="head")
    torch.testing.assert_close(one(a=x, b=x), expected[:, 2])
    assert repr(one).startswith("thinned.Member(\n  draw=2, seed=0, method='independent', inject='head'\n")


@pytest.mark.parametrize(
    "bad", [{"draw": -1}, {"method": "x"}, {"strata": 0}, {"inject": {"nowhere": 0.5}}], ids=str
)
def test_bad_arguments(bad: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        member(network(), **{"draw": 0, **bad})  # type: ignore[arg-type]


def test_a_model_without_dropout() -> None:
    with pytest.raises(ValueError, match="drops nowhere"):
        member(nn.Linear(3, 3), 0)
