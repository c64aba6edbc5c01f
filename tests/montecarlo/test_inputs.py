"""Inputs of all kinds, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import thinned
from montecarlo.common import as_it_is, mlp, ulps
from thinned.montecarlo import Prediction, predict, stream

ULPS = 16
x, y = torch.randn(23, 8), torch.randint(3, (23,))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.last = nn.Dropout(), nn.Linear(8, 3)

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Any = 0.0) -> Tensor:
        h: Tensor = self.last(self.drop(x))
        return (h if scale is None else h * scale) + shift


def assert_equal(found: Prediction, expected: Prediction) -> None:
    assert found.ids.equal(expected.ids)
    assert ulps(found.mean, expected.mean) <= ULPS
    assert ulps(found.variance, expected.variance) <= ULPS


@pytest.mark.parametrize("method", ["independent", "stratified"])
def test_tensors_dictionaries_tuples_and_loaders_agree(method: Any) -> None:
    torch.manual_seed(0)
    model, options = mlp(), {"samples": 20, "method": method}
    expected = predict(model, x, **options)
    assert expected.targets is None
    for inputs in ((x,), {"input": x}, DataLoader(x, batch_size=5), [x[:20], x[20:]]):
        assert_equal(predict(model, inputs, **options), expected)  # type: ignore[arg-type]
    found = predict(model, DataLoader(TensorDataset(x, y), batch_size=5), **options)
    assert_equal(found, expected)
    assert found.targets.equal(y)
    found = predict(model, DataLoader(TensorDataset(x, y, y + 1), batch_size=5), **options)
    assert found.targets[0].equal(y)
    assert found.targets[1].equal(y + 1)
    found = predict(model, DataLoader(TensorDataset(x), batch_size=5), **options)
    assert found.targets is None
    names = [(row, f"name {i}") for i, row in enumerate(x)]
    found = predict(model, DataLoader(names, batch_size=5), **options)  # type: ignore[arg-type]
    assert found.targets == [name for _, name in names]
    named = [(row, {"label": label}) for row, label in zip(x, y, strict=True)]
    found = predict(model, DataLoader(named, batch_size=5), **options)  # type: ignore[arg-type]
    assert found.targets["label"].equal(y)


@pytest.mark.parametrize("chosen", [torch.tensor([20, 3]), torch.arange(23) % 7 == 3])
def test_targets_of_some_examples(chosen: Tensor) -> None:
    rows = [
        (row, label, {"label": label}, f"name {i}") for i, (row, label) in enumerate(zip(x, y, strict=True))
    ]
    found = predict(mlp(), DataLoader(rows, batch_size=5), 4).select(chosen)  # type: ignore[arg-type]
    labels, named, names = found.targets
    assert labels.equal(y[chosen])
    assert named["label"].equal(y[chosen])
    assert names == [f"name {i}" for i in found.ids]


def test_several_arguments() -> None:
    torch.manual_seed(0)
    model, scale = TwoInputs(), torch.rand(23, 1)
    expected = predict(model, (x, scale), 20)
    assert_equal(predict(model, {"x": x, "scale": scale, "shift": 0}, 20), expected)
    assert_equal(predict(model, {"scale": scale, "x": x}, 20, batch_size=4), expected)
    both = [((row, one), 1) for row, one in zip(x, scale, strict=True)]
    assert_equal(predict(model, DataLoader(both, batch_size=4), 20), expected)  # type: ignore[arg-type]
    rows = [{"x": row, "scale": one} for row, one in zip(x, scale, strict=True)]
    assert_equal(predict(model, DataLoader(rows, batch_size=4), 20), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("until", [None, 0.5])
def test_a_tensor_that_all_examples_share_stays_whole(
    until: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in a batch with as many examples as it has rows, and where some have finished."""
    from montecarlo.common import without

    torch.manual_seed(0)
    model, shift = TwoInputs(), torch.tensor([1.0, 2.0, 3.0])
    options: dict[str, Any] = {"samples": 100, "task": "regression", "until": until, "method": "independent"}
    expected = predict(model, (x, None, shift), **options)
    assert_equal(predict(model, (x, None, shift), batch_size=3, **options), expected)
    without(monkeypatch, "vmap")
    assert_equal(predict(model, (x, None, shift), batch_size=3, **options), expected)


class Numbers(Dataset[Tensor]):
    """Draws from torch's generator, as an augmentation does."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> Tensor:
        return torch.randn(8) + i


def test_a_loader_that_draws_goes_on_from_batch_to_batch() -> None:
    torch.manual_seed(5)
    expected = [batch[0, 0].item() % 1 for batch in DataLoader(Numbers(), 1)]
    seen: list[float] = []
    model = mlp()
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0][0, 0].item() % 1))
    torch.manual_seed(5)
    predict(model, DataLoader(Numbers(), 1), 2)
    assert sorted(set(seen)) == sorted(set(expected))


def test_inputs_that_are_made_with_the_model() -> None:
    """Such as adversarial examples: in evaluation, and with gradients."""
    model = mlp().eval()

    def perturbed() -> Iterator[Tensor]:
        for rows in x.split(10):
            leaf = rows.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(model(leaf).square().sum(), leaf)
            yield rows + gradient

    expected = predict(model, torch.cat(list(perturbed())), 10)
    assert_equal(predict(model, perturbed(), 10), expected)  # type: ignore[arg-type]


def test_memory_does_not_grow_with_samples() -> None:
    """No tensor is larger with 400 draws than with 40."""
    from torch.overrides import TorchFunctionMode

    class Largest(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.most = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                self.most = max(self.most, result.numel())
            return result

    sizes = []
    for samples in (40, 400):
        with Largest() as largest:
            predict(mlp(), x, samples, memory=200_000)
        sizes.append(largest.most)
    assert sizes[0] == sizes[1]


def test_outputs_of_half_precision_are_added_in_double() -> None:
    model = mlp().bfloat16()
    found = predict(model, x.bfloat16(), 40, keep_draws=True)
    assert found.mean.dtype == torch.float64
    assert found.outputs is not None
    torch.testing.assert_close(found.mean, found.outputs.double().mean(1))


def test_outputs_of_one_dimension_and_of_three() -> None:
    class Mean(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(1)

    flat = nn.Sequential(nn.Dropout(), Mean())
    for method in ("independent", "stratified"):
        found = predict(flat, x, 40, task="regression", method=method, until=0.1)
        assert found.mean.shape == found.variance.shape == found.draws.shape == (23,)
    maps = nn.Sequential(nn.Dropout(), nn.Conv1d(1, 3, 1))
    found = predict(maps, x[:, None], 20, until={"mean": 0.05, "expected_entropy": 0.05})
    assert found.mean.shape == (23, 3, 8)
    assert found.predictive_entropy.shape == found.variation_ratio.shape == found.label.shape == (23, 8)


class Returns(nn.Module):
    def __init__(self, make: Any) -> None:
        super().__init__()
        self.drop, self.make = nn.Dropout(), make

    def forward(self, x: Tensor) -> Any:
        return self.make(self.drop(x))


@pytest.mark.parametrize(
    ("make", "task", "error", "message"),
    [
        (lambda h: h.sum(), "regression", ValueError, r"a result of shape \(\) for 23 examples"),
        (lambda h: h.sum(0), "regression", ValueError, r"a result of shape \(8,\) for 23 examples"),
        (lambda h: h[:4], "classification", ValueError, r"a result of shape \(4, 8\) for 23 examples"),
        (lambda h: h[:, :1], "classification", ValueError, r"logits of shape \(examples, classes, ...\)"),
        (lambda h: h[:, 0], "classification", ValueError, "logits of shape"),
        (lambda h: h.long(), "regression", TypeError, "floating-point numbers, got torch.int64"),
        (lambda h: h.long(), "classification", TypeError, "floating-point numbers, got torch.int64"),
        (lambda h: (h, h), "classification", TypeError, "must return a tensor, got .* of type tuple"),
        (lambda h: (h, h, h), "regression", TypeError, "got 3 values; give a function of the output as task"),
        (lambda h: (h, -h.abs()), "regression", ValueError, "variance of draw 0 of example 0 is negative"),
        (lambda h: {"out": h}, "classification", TypeError, "must return a tensor, got .* of type dict"),
        (lambda h: None, "regression", TypeError, "must return a tensor, got None"),  # noqa: ARG005
        (lambda h: h, lambda h: h.tolist(), TypeError, "task must return a tensor, got .* of type list"),
    ],
)
def test_outputs_that_the_task_does_not_read(
    make: Any, task: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        predict(Returns(make), x, 10, task=task)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"samples": 0}, ValueError, "samples"),
        ({"samples": 2.5}, TypeError, "samples"),
        ({"strata": 0}, ValueError, "strata"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"memory": 0}, ValueError, "memory"),
        ({"task": "clasification"}, ValueError, "task must be 'classification', 'regression' or a function"),
        ({"method": "antithetic"}, ValueError, "method must be one of stratified, independent, moments, got"),
        ({"until": -1.0}, ValueError, "until must be above 0, got -1.0 for mean"),
        ({"until": float("nan")}, ValueError, "until must be above 0"),
        ({"until": "fast"}, TypeError, "until"),
        ({"until": {"median": 0.1}}, ValueError, "no statistic 'median'; accepted: mean, expected_entropy"),
        (
            {"until": {"expected_entropy": 0.1}, "task": "regression"},
            ValueError,
            "no statistic 'expected_entr",
        ),
        ({"until": 0.1, "keep_draws": True}, ValueError, "keep_draws"),
        ({"quantiles": [0.5, 1.1]}, ValueError, r"quantiles must be in \[0, 1\], got 1.1"),
        ({"quantiles": 0.5}, TypeError, r"quantiles must be a sequence such as \(0.05, 0.95\), got 0.5"),
        ({"ids": [1, 2]}, ValueError, "ids must be one for each of the 23 examples, got 2"),
        ({"ids": torch.zeros(23)}, TypeError, "int64"),
        ({"seed": thinned.Key(1).fold(torch.arange(3))}, ValueError, "seed must be one key"),
        ({"seed": "x"}, TypeError, "seed"),
        ({"inject": "tail"}, ValueError, "inject must be 'head' or a mapping"),
        ({"inject": {"heads*": 0.1}}, ValueError, "no module of this Sequential is at a path like 'heads"),
        ({"inject": {"0": 1.5}}, ValueError, "p"),
        ({"shard": "batches"}, ValueError, "shard must be 'examples', 'draws' or None"),
        ({"shard": "draws"}, RuntimeError, "init_process_group"),
        ({"shard": "draws", "until": 0.1}, ValueError, "shard='examples'"),
        ({"sampels": 3}, TypeError, "sampels"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict(mlp(), x, **options)
    if "samples" not in options:
        with pytest.raises(error, match=message):
            list(stream(mlp(), x, **options))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (x[:0], ValueError, "the inputs have no example"),
        (DataLoader(x[:0]), ValueError, "the inputs have no example"),
        ([], ValueError, "the inputs have no example"),
        ({}, TypeError, "a tensor with an example in each row"),
        ((1, "a"), TypeError, r"a tensor with an example in each row, got \['int', 'str'\]"),
        (torch.tensor(1.0), TypeError, "a tensor with an example in each row"),
        (5, TypeError, "a tensor, a dict or tuple of tensors, or a DataLoader, got 5"),
        (x.numpy(), TypeError, "a tensor with an example in each row"),
    ],
)
def test_inputs_that_are_refused(inputs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        predict(mlp(), inputs, 10)


def test_batches_without_examples_are_left_out() -> None:
    found = predict(mlp(), [x[:0], x[:3], x[3:3], x[3:5]], 10)  # type: ignore[arg-type]
    assert_equal(found, predict(mlp(), x[:5], 10))


@pytest.mark.parametrize("options", [{"batch_size": 4}, {"ids": range(23)}])
def test_a_loader_has_its_own_batches(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a DataLoader has its own batches"):
        predict(mlp(), DataLoader(x), 10, **options)


@pytest.mark.parametrize(
    "model",
    [
        nn.Sequential(nn.Linear(8, 3)), nn.Sequential(nn.Dropout(0.0), nn.Linear(8, 3)),
        nn.LSTM(8, 3, 1), nn.MultiheadAttention(8, 2),
    ],
)  # fmt: skip
def test_a_model_that_drops_nowhere(model: nn.Module) -> None:
    with pytest.raises(
        ValueError, match=r"drops nowhere.*looked for dropout modules, F\.dropout.*inject='head'"
    ):
        predict(model, x, 10)


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        predict(nn.functional.dropout, x, 10)  # type: ignore[arg-type]


def test_statistics_of_a_classification_only() -> None:
    found = predict(mlp(), x, 10, task=as_it_is)
    for name in ("label", "max_probability", "predictive_entropy", "mutual_information", "variation_ratio"):
        with pytest.raises(AttributeError, match=f"{name} is of a classification"):
            getattr(found, name)
