"""Multi-sample dropout against dropout and head, one sample at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers import multi_sample
from thinned.functional import dropout
from thinned.layers.multi_sample import MultiSampleDropout, multi_sample_dropout
from verdicts import verdict

KEY = thinned.Key(7)
(ENTRY,) = multi_sample.ENTRIES


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 20), (6,), (), (0, 3)])
@pytest.mark.usefixtures("backend")
def test_a_sample_is_a_dropout_under_its_own_key(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    for key in (KEY, KEY.fold(torch.arange(shape[0])) if shape else KEY):
        y = multi_sample_dropout(x, 0.3, samples=4, key=key)
        assert y.is_contiguous()
        assert y.equal(torch.stack([dropout(x, 0.3, key=key.fold(m)) for m in range(4)]))
        assert y[:2].equal(multi_sample_dropout(x, 0.3, samples=2, key=key))


def test_mean_of_samples() -> None:
    head, x = nn.Sequential(nn.Linear(20, 3), nn.Tanh()).double(), torch.randn(9, 20, dtype=torch.float64)
    mean = MultiSampleDropout(head, 0.3, samples=6)(x, key=KEY)
    outputs = MultiSampleDropout(head, 0.3, samples=6, reduction="none")(x, key=KEY)
    each = torch.stack([head(dropout(x, 0.3, key=KEY.fold(m))) for m in range(6)])
    torch.testing.assert_close(outputs, each)
    torch.testing.assert_close(mean, each.mean(0))


def test_loss_of_the_paper() -> None:
    """The mean of the samples' losses is the loss of all of them as one batch."""
    layer = MultiSampleDropout(nn.Linear(20, 3), 0.5, samples=4, reduction="none")
    x, target = torch.randn(9, 20), torch.arange(9) % 3
    outputs = layer(x, key=KEY)
    loss = nn.functional.cross_entropy(outputs.flatten(0, 1), target.repeat(layer.samples))
    each = [nn.functional.cross_entropy(output, target) for output in outputs]
    torch.testing.assert_close(loss, torch.stack(each).mean())


@pytest.mark.parametrize(
    "law", ["drop rate at p = 0.3", "evaluation", "independent samples", "mean of samples", "expectation"]
)
def test_a_dropout_for_each_sample_keeps_the_law(law: str) -> None:
    assert verdict(ENTRY, law, ENTRY.peer.make) is Verdict.HOLDS


def test_nothing_dropped_copies_nothing() -> None:
    x = torch.randn(4, 6)
    for arguments in ({"p": 0.0}, {"training": False}):
        y = multi_sample_dropout(x, samples=3, **arguments)
        assert y.equal(x.expand(3, 4, 6))
        assert y.data_ptr() == x.data_ptr()


@pytest.mark.parametrize(
    "make",
    [
        partial(MultiSampleDropout, nn.Identity()),
        partial(multi_sample_dropout, torch.ones(3), training=False),
    ],
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"p": p}, f"between 0 and 1, but got {p}") for p in (-0.1, 1.5, math.nan)),
        ({"samples": 0}, "samples has to be at least 1, but got 0"),
        ({"samples": -2}, "samples has to be at least 1, but got -2"),
    ],
)
def test_wrong_arguments(make: Callable[..., object], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**arguments)


def test_other_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="either 'mean' or 'none', but got 'sum'"):
        MultiSampleDropout(nn.Identity(), reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"head must be a torch.nn.Module, got 0\.1 of type float"):
        MultiSampleDropout(0.1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"needs a batch of features, got an input of shape \(3,\)"):
        MultiSampleDropout(nn.Identity())(torch.ones(3))


def test_vmap_over_keys() -> None:
    x, keys = torch.randn(5, 4, 6), KEY.fold(torch.arange(5))
    y = torch.func.vmap(lambda x, bits: multi_sample_dropout(x, key=thinned.Key.from_bits(bits)))(
        x, keys.bits
    )
    assert y.equal(torch.stack([multi_sample_dropout(row, key=KEY.fold(i)) for i, row in enumerate(x)]))


def test_a_module() -> None:
    layer = MultiSampleDropout(nn.Linear(6, 3), 0.5, samples=3, reduction="none")
    assert "p=0.5, samples=3, reduction='none'\n" in repr(layer)
    assert list(layer.state_dict()) == ["head.weight", "head.bias"]


class Wrong(MultiSampleDropout):
    """Multi-sample dropout with one thing wrong."""

    def __init__(self, wrong: str, head: nn.Module, p: float = 0.5, **arguments: Any) -> None:
        super().__init__(head, p, **arguments)
        self.wrong = wrong

    def forward(self, input: Tensor, *, key: thinned.Key | None = None) -> Any:
        if self.wrong == "one mask" and self.training:
            y = self.head(dropout(input, self.p)).expand(self.samples, *input.shape)
            return y if self.reduction == "none" else y[0]
        y = super().forward(input * (1.02 if self.wrong == "biased" else 1), key=key)
        return y * self.samples if self.wrong == "sum" and self.reduction == "mean" else y


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("one mask", "independent samples"),
        ("biased", "expectation"),
        ("biased", "evaluation"),
        ("sum", "mean of samples"),
    ],
)
def test_a_wrong_layer_is_caught(wrong: str, law: str) -> None:
    def make(inputs: int = 0, outputs: int = 0, **arguments: Any) -> nn.Module:
        return Wrong(wrong, multi_sample._head(inputs, outputs), **arguments)

    assert verdict(ENTRY, law, make) is Verdict.BROKEN
