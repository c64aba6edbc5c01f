"""Multi-sample dropout against dropout and head, one sample at a time."""

from __future__ import annotations

import copy
import math
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import chance
import thinned
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers import multi_sample
from thinned.compare.settings import Settings
from thinned.functional import dropout
from thinned.layers.multi_sample import MultiSampleDropout, multi_sample_dropout

KEY = thinned.Key(7)
LAWS = {law.name: law for law in multi_sample.ENTRIES[0].laws}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 20), (6,), (), (0, 3)])
@pytest.mark.usefixtures("subject")
def test_a_sample_is_a_dropout_under_its_own_key(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32).to(dtype)
    y = multi_sample_dropout(x, 0.3, 4, key=KEY)
    assert y.is_contiguous()
    assert y.equal(torch.stack([dropout(x, 0.3, key=KEY.fold(m)) for m in range(4)]))
    assert y[:2].equal(multi_sample_dropout(x, 0.3, 2, key=KEY))


def test_strides() -> None:
    x = torch.randn(3, 4, 5).transpose(0, 2)
    assert multi_sample_dropout(x, 0.3, 4, key=KEY).equal(
        multi_sample_dropout(x.contiguous(), 0.3, 4, key=KEY)
    )


@pytest.mark.usefixtures("subject")
def test_a_row_depends_on_its_key_and_not_on_its_place() -> None:
    x, keys = torch.randn(6, 50), KEY.fold(torch.arange(6))
    y = multi_sample_dropout(x, 0.4, 5, key=keys)
    order = torch.tensor([4, 0, 5, 2])
    moved = multi_sample_dropout(x[order], 0.4, 5, key=thinned.Key.from_bits(keys.bits[order]))
    assert moved.equal(y[:, order])
    assert y[:, 2].equal(multi_sample_dropout(x[2], 0.4, 5, key=KEY.fold(2)))


def test_samples_are_independent() -> None:
    y = multi_sample_dropout(torch.ones(60_000), 0.3, 3, key=KEY)
    masks = [(sample != 0).numpy() for sample in y]
    assert chance.independence(*masks, p=0.3) > chance.FALSE_ALARM
    assert chance.independence(masks[0], masks[1], np.roll(masks[1], 1), p=0.3) > chance.FALSE_ALARM
    assert chance.independence(masks[0], masks[0], p=0.3) < chance.FALSE_ALARM


def test_mean_of_samples_for_a_linear_head() -> None:
    head = nn.Linear(20, 3).double()
    x = torch.randn(9, 20, dtype=torch.float64)
    mean = MultiSampleDropout(head, 0.3, 6)(x, key=KEY)
    outputs = MultiSampleDropout(head, 0.3, 6, reduction="none")(x, key=KEY)
    each = torch.stack([head(dropout(x, 0.3, key=KEY.fold(m))) for m in range(6)])
    assert outputs.shape == (6, 9, 3)
    torch.testing.assert_close(outputs, each)
    torch.testing.assert_close(mean, each.mean(0))
    torch.testing.assert_close(mean, head(multi_sample_dropout(x, 0.3, 6, key=KEY).mean(0)))


def test_loss_of_the_paper() -> None:
    """The mean of the samples' losses is the loss of all of them as one batch."""
    layer = MultiSampleDropout(nn.Linear(20, 3), 0.5, 4, reduction="none")
    x, target = torch.randn(9, 20), torch.arange(9) % 3
    outputs = layer(x, key=KEY)
    loss = nn.functional.cross_entropy(outputs.flatten(0, 1), target.repeat(layer.samples))
    each = [nn.functional.cross_entropy(output, target) for output in outputs]
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_agrees_in_distribution_with_the_peer() -> None:
    """How many of 5 samples keep an element: both fit Binomial(5, 0.7)."""
    from scipy import stats

    x = torch.ones(100, 1000)
    for make in (MultiSampleDropout, multi_sample.MultiSampleDropoutFormula):
        torch.manual_seed(2)
        kept = (make(nn.Identity(), 0.3, 5, "none")(x) != 0).sum(0).flatten().numpy()
        law = stats.binom.pmf(range(6), 5, 0.7) * kept.size
        assert stats.chisquare(np.bincount(kept, minlength=6), law).pvalue > chance.FALSE_ALARM


@pytest.mark.parametrize("keys", [KEY, KEY.fold(torch.arange(4))], ids=["one", "batch"])
def test_gradient(keys: thinned.Key) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    layer = MultiSampleDropout(nn.Sequential(nn.Linear(6, 3), nn.Tanh()).double(), 0.4, 3)
    assert torch.autograd.gradcheck(lambda x: layer(x, key=keys), x)
    assert torch.autograd.gradgradcheck(lambda x: layer(x, key=keys), x)
    y = multi_sample_dropout(x, 0.4, 3, key=keys)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, (y.detach() / x.detach()).sum(0))


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_evaluation(p: float) -> None:
    head, x = nn.Linear(6, 3), torch.randn(4, 6)
    layer = MultiSampleDropout(head, p, 3, reduction="none").eval()
    state = torch.get_rng_state()
    assert layer(x).equal(head(x))
    assert torch.get_rng_state().equal(state)


def test_nothing_dropped_copies_nothing() -> None:
    x = torch.randn(4, 6)
    for y in (multi_sample_dropout(x, 0.0, 3), multi_sample_dropout(x, 0.5, 3, training=False)):
        assert y.shape == (3, 4, 6)
        assert y.data_ptr() == x.data_ptr()
    torch.testing.assert_close(
        MultiSampleDropout(nn.Linear(6, 2), 0.0, 3, "none")(x).std(0), torch.zeros(4, 2)
    )


def test_everything_dropped_is_plus_zero() -> None:
    y = multi_sample_dropout(torch.tensor([math.nan, -1.0]), 1.0, 3)
    assert y.view(torch.int32).equal(torch.zeros(3, 2, dtype=torch.int32))


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
def test_p_outside_0_to_1(p: float) -> None:
    message = re.escape(f"dropout probability has to be between 0 and 1, but got {p}")
    with pytest.raises(ValueError, match=message):
        MultiSampleDropout(nn.Identity(), p)
    with pytest.raises(ValueError, match=message):
        multi_sample_dropout(torch.ones(3), p, training=False)


def test_other_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="samples has to be at least 1, but got 0"):
        MultiSampleDropout(nn.Identity(), samples=0)
    with pytest.raises(ValueError, match="samples has to be at least 1, but got -2"):
        multi_sample_dropout(torch.ones(3), samples=-2, training=False)
    with pytest.raises(ValueError, match="either 'mean' or 'none', but got 'sum'"):
        MultiSampleDropout(nn.Identity(), reduction="sum")  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=r"needs a batch of features, got shape \(3,\)"):
        MultiSampleDropout(nn.Identity())(torch.ones(3))
    with pytest.raises(RuntimeError, match=r"keys of shape \(4,\) do not fit a tensor of shape \(3, 2\)"):
        multi_sample_dropout(torch.ones(3, 2), key=KEY.fold(torch.arange(4)))
    with pytest.raises(RuntimeError, match=r"got torch\.int64"):
        multi_sample_dropout(torch.ones(3, 2).long())
    with pytest.raises(TypeError, match=r"write thinned\.Key\(7\)"):
        multi_sample_dropout(torch.ones(3, 2), key=7)  # type: ignore[arg-type]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    x, layer = torch.randn(4, 6), MultiSampleDropout(nn.Linear(6, 3), 0.5, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    keys = KEY.fold(torch.arange(4))
    torch.testing.assert_close(compiled(x, key=keys), layer(x, key=keys))
    torch.manual_seed(5)
    drawn = compiled(x)
    torch.manual_seed(5)
    torch.testing.assert_close(drawn, layer(x))


def test_vmap_over_keys() -> None:
    x, keys = torch.randn(5, 4, 6), KEY.fold(torch.arange(5))
    y = torch.func.vmap(lambda x, bits: multi_sample_dropout(x, 0.5, 3, key=thinned.Key.from_bits(bits)))(
        x, keys.bits
    )
    each = [multi_sample_dropout(row, 0.5, 3, key=KEY.fold(i)) for i, row in enumerate(x)]
    assert y.equal(torch.stack(each))


def test_copies() -> None:
    layer = MultiSampleDropout(nn.Linear(6, 3), 0.5, 3, "none")
    x = torch.randn(4, 6)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin(x, key=KEY).equal(layer(x, key=KEY))
    assert "p=0.5, samples=3, reduction='none'" in repr(layer)
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

    assert examine(LAWS[law], Implementation("wrong", make), Settings(quick=True)).verdict is Verdict.BROKEN
