"""A prediction switches on dropout alone, and leaves everything as it was, however it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from montecarlo.common import as_it_is, mlp
from thinned.models.intercept import intercept
from thinned.montecarlo import dropping, predict, stream

F = nn.functional


def state_of(model: nn.Module) -> dict[str, Any]:
    """All that a prediction may not change; tensors as bytes."""
    found: dict[str, Any] = {
        "generator": torch.get_rng_state().numpy().tobytes(),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "modes": torch.overrides.has_torch_function((torch.ones(1),)),
    }
    for path, module in model.named_modules():
        found[f"{path}: training"] = module.training
        found[f"{path}: names"] = sorted(vars(module))
    for name, tensor in model.state_dict(keep_vars=True).items():
        found[name] = (id(tensor), tensor.requires_grad, tensor.detach().numpy().tobytes())
    return found


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    before = state_of(model)
    yield
    assert state_of(model) == before


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.InstanceNorm1d(4, track_running_stats=True), nn.ReLU(),
        nn.Flatten(), nn.Dropout(), nn.utils.parametrizations.spectral_norm(nn.Linear(24, 6)), nn.ReLU(),
        nn.Dropout(0.2), nn.Linear(6, 3),
    )  # fmt: skip
    model[0].weight.requires_grad_(False)
    return model


x = torch.randn(9, 1, 8)


def mixed(model: nn.Module) -> None:
    for number, module in enumerate(model.modules()):
        module.training = number % 2 == 0


FLAGS = pytest.mark.parametrize(
    "flags", [nn.Module.train, nn.Module.eval, mixed], ids=["train", "eval", "mixed"]
)


@FLAGS
@pytest.mark.parametrize("grad", [True, False])
def test_after_success(flags: Callable[[nn.Module], Any], grad: bool) -> None:
    """The mode is back (lerobot#3668), and BatchNorm has not moved (lightning-uq-box)."""
    model = network()
    flags(model)
    with torch.set_grad_enabled(grad), unchanged(model):
        found = predict(model, x, 10, batch_size=4)
    assert not found.mean.requires_grad


@FLAGS
def test_statistics_are_those_of_evaluation(flags: Callable[[nn.Module], Any]) -> None:
    """The mean is that of a model in evaluation but for its dropouts."""
    model = network()
    model(x)
    flags(model)
    found = predict(model, x, 10, method="independent", keep_draws=True).outputs
    model.eval()
    for module in (model[5], model[8]):
        module.train()
    again = predict(model, x, 10, method="independent", keep_draws=True).outputs
    assert found is not None
    assert again is not None
    assert found.equal(again)
    seen = []
    model[1].register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    predict(model, x, 10)
    norm = model[1]
    for inputs, output in seen[:1]:
        expected = F.batch_norm(inputs, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        assert output.equal(expected)


class Fails(nn.Module):
    """Raises, or gives a number that is not finite, in one of its calls."""

    def __init__(self, at: int, error: BaseException | float) -> None:
        super().__init__()
        self.at, self.error, self.calls = at, error, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls < self.at:
            return x
        if isinstance(self.error, BaseException):
            raise self.error
        return x * self.error


@FLAGS
@pytest.mark.filterwarnings(
    "ignore:.*gives two results for one draw"
)  # it does, where only a later call fails
@pytest.mark.parametrize("at", [1, 2, 4])
@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ValueError("broken"), ValueError, "broken"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
        (float("nan"), ValueError, "draw 0 of example"),
        (float("inf"), ValueError, "draw 0 of example"),
    ],
    ids=["exception", "interrupt", "nan", "inf"],
)
def test_after_an_error_in_a_draw(
    flags: Callable[[nn.Module], Any],
    at: int,
    error: BaseException | float,
    kind: type[BaseException],
    message: str,
) -> None:
    """In the draw alone, in the first batch and in a later one."""
    model = nn.Sequential(*network(), Fails(at, error))
    flags(model)
    with unchanged(model), pytest.raises(kind, match=message):
        predict(model, x, 10, task="regression", batch_size=2, inject={"9": 0.1})
    with unchanged(model[:10]):  # and it works again
        predict(model[:10], x, 10)


def test_nan_names_its_draw_and_example() -> None:
    class Nan(nn.Module):
        """Not finite where the first 5 of 6 ones are dropped."""

        def forward(self, x: Tensor) -> Tensor:
            return torch.where((x[:, :5] == 0).all(1, keepdim=True), torch.nan, x)

    model = nn.Sequential(nn.Dropout(), Nan())
    options: dict[str, Any] = {"task": as_it_is, "method": "independent", "samples": 20, "memory": 300}
    with pytest.raises(ValueError, match=r"draw \d+ of example \d+ is not finite") as caught:
        predict(model, torch.ones(40, 6), batch_size=2, ids=range(100, 140), **options)
    _, draw, _, _, example, *_ = str(caught.value).split()
    assert 100 <= int(example) < 140
    assert int(draw) > 1  # it is not in the first chunk
    drops = nn.Sequential(nn.Dropout())
    kept = predict(drops, torch.ones(1, 6), ids=[int(example)], keep_draws=True, **options).outputs
    assert kept is not None
    assert not kept[0, int(draw), :5].any()
    with pytest.raises(ValueError, match=r"draw \d+ of example (2|3)"):
        predict(model, torch.ones(40, 6), batch_size=2, consistent=True, ids=range(20, 60), **options)


@FLAGS
def test_while_and_after_a_stream(flags: Callable[[nn.Module], Any]) -> None:
    """Between its batches, too, and when it is left half way."""
    model = network()
    flags(model)
    with unchanged(model):
        parts = stream(model, x, 10, batch_size=2, inject="head")
        for _ in range(2):
            with unchanged(model):
                next(parts)
        parts.close()  # type: ignore[attr-defined]
    with unchanged(model):
        parts = stream(model, x, 10, batch_size=2)
        next(parts)
        del parts


def test_an_error_of_the_loader() -> None:
    model = network()

    def loader() -> Iterator[Tensor]:
        yield x[:2]
        torch.rand(3)  # a loader may draw, and its numbers go on
        raise OSError("no such file")

    with unchanged(model), pytest.raises(OSError, match="no such file"):
        predict(model, loader(), 10)  # type: ignore[arg-type]


class Functional(nn.Module):
    """Its flag says training for its dropout, and so for its normalizations; its counter counts as well."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm, self.last = norm, nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("var", torch.ones(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.3, self.training)
        if self.training:
            self.seen = self.seen + 1
            self.average.mul_(0.9)
        if self.norm == "batch":
            x = F.batch_norm(x, self.mean, self.var, training=self.training)
        elif self.norm == "batch by position":
            x = F.batch_norm(x, self.mean, self.var, None, None, self.training, 0.3, 1e-3)
        elif self.norm == "torch":
            x = torch.batch_norm(x, None, None, self.mean, self.var, self.training, 0.1, 1e-5, False)
        else:
            x = F.instance_norm(x, self.mean, self.var, use_input_stats=self.training)
        y: Tensor = self.last(x.mean(2))
        return y


@FLAGS
@pytest.mark.parametrize("norm", ["batch", "batch by position", "torch", "instance"])
def test_dropout_and_normalization_by_one_flag(norm: str, flags: Callable[[nn.Module], Any]) -> None:
    torch.manual_seed(0)
    model, rows = Functional(norm), torch.randn(6, 4, 5) + 3
    flags(model)
    with unchanged(model):
        found = predict(model, rows, 50, method="independent")
        alone = predict(model, rows[:1], 50, method="independent")
    torch.testing.assert_close(found.mean[:1], alone.mean, rtol=1e-5, atol=1e-6)


def test_normalization_without_running_statistics_is_that_of_evaluation() -> None:
    model = nn.Sequential(nn.BatchNorm1d(8, track_running_stats=False), nn.Dropout(), nn.Linear(8, 3))
    rows = torch.randn(6, 8)
    with torch.no_grad():
        expected = model.eval()[0](rows)
    seen = []
    model[0].register_forward_hook(lambda *args: seen.append(args[2]))
    predict(model, rows, 10)
    assert seen[0].equal(expected)


def test_inputs_stay_as_they_are() -> None:
    """A dropout in place writes to a copy."""
    rows = torch.randn(6, 8)
    before = rows.clone()
    found = predict(nn.Sequential(nn.Dropout(inplace=True), nn.Linear(8, 3)), rows, 10)
    assert rows.equal(before)
    torch.manual_seed(0)
    model = mlp()
    other = nn.Sequential(
        *(nn.Dropout(each.p, inplace=True) if isinstance(each, nn.Dropout) else each for each in model)
    )
    for method in ("independent", "stratified"):
        one, two = (predict(each, rows, 20, method=method) for each in (model, other))
        torch.testing.assert_close(one.mean, two.mean)
    assert found.route == "vmap"


def test_outer_contexts_stay() -> None:
    """A prediction within other contexts has its own masks and leaves theirs."""
    import thinned

    model, rows = mlp(), torch.randn(6, 8)
    expected = predict(model, rows, 20)
    with intercept(), thinned.address(model, seed=1, step=2), torch.inference_mode():
        with unchanged(model):
            found = predict(model, rows, 20)
        inside = model.train()(rows)
    assert found.mean.equal(expected.mean)
    with intercept(), thinned.address(model, seed=1, step=2), torch.inference_mode():
        assert model(rows).equal(inside)


def test_another_thread_waits_and_a_prediction_within_does_not() -> None:
    model, x = nn.Sequential(nn.Dropout(), nn.Linear(8, 3)).eval(), torch.randn(4, 8)
    entered: list[bool] = []

    def task(output: Tensor) -> Tensor:
        entered.append(pool.submit(dropping.one_thread.acquire, blocking=False).result())
        assert len(predict(model, x, 2)) == 4
        return as_it_is(output)

    with unchanged(model), ThreadPoolExecutor(1) as pool:
        predict(model, x, 2, task=task)
    assert entered
    assert not any(entered)
