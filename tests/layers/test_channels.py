"""Dropout of whole channels: which elements share a decision, and all that PyTorch's own tests ask."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable
from itertools import pairwise, permutations

import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
import thinned
from subject import Subject
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers import Entry
from thinned.compare.layers.channels import ENTRIES
from thinned.compare.settings import Settings
from thinned.geometry import shared
from thinned.layers.channels import Dropout1d, Dropout2d, Dropout3d, dropout1d, dropout2d, dropout3d

KEY = thinned.Key(7)
P = 0.3
FUNCTIONS = {"dropout1d": dropout1d, "dropout2d": dropout2d, "dropout3d": dropout3d}
LAYERS = [Dropout1d, Dropout2d, Dropout3d]
BATCHES = {"dropout1d": (6, 5, 7), "dropout2d": (6, 5, 4, 3), "dropout3d": (6, 5, 2, 3, 4)}
CASES = [pytest.param(FUNCTIONS[name], shape, id=name) for name, shape in BATCHES.items()]

Function = Callable[..., Tensor]


@pytest.mark.parametrize(("function", "shape"), CASES)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_every_backend_is_the_specification(
    subject: Subject, function: Function, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    x = oracle.specials(shape, dtype)
    expected = oracle.dropout(x, KEY.bits, P, tuple(range(2, len(shape))))
    for each in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        y = function(each.to(subject.device), P, key=KEY)
        oracle.assert_same(y.cpu(), expected)
    keys = KEY.fold(torch.arange(6))
    y = function(x.to(subject.device), P, key=keys.to(subject.device))
    geometry = shared(shape, range(2, len(shape)), 1)
    T = thinned.spec.threshold(P)
    oracle.assert_same(y.cpu(), oracle.masked_affine(x, keys.bits, geometry, T, thinned.spec.scale(T)))


@pytest.mark.parametrize(("function", "shape"), CASES)
def test_one_decision_for_each_channel(function: Function, shape: tuple[int, ...]) -> None:
    y = function(torch.ones(shape), 0.5, key=KEY)
    channels = thinned.keep_mask(KEY, shape[:2], 0.5)
    assert 0 < int(channels.sum()) < channels.numel()
    assert y.equal(2.0 * channels.reshape(*shape[:2], *(1,) * (len(shape) - 2)).expand(shape))


@pytest.mark.parametrize(
    ("function", "shape", "own"),
    [
        *((dropout2d, shape, 2) for shape in [(6, 5), (6, 5, 4), (3, 5, 4, 2, 2)]),
        *((dropout3d, shape, 1) for shape in [(6,), (6, 5), (6, 5, 4), (3, 5, 4, 2, 2, 2)]),
    ],
)
def test_deprecated_ranks_drop_what_they_dropped(
    function: Function, shape: tuple[int, ...], own: int
) -> None:
    """The leading dimensions of PyTorch's noise, which Dropout3d makes for one more dimension in front."""
    x = torch.ones(shape)
    with pytest.warns(UserWarning, match=rf"{function.__name__}: Received a {len(shape)}-?D input"):
        y = function(x, 0.5, key=KEY)
    decisions = thinned.keep_mask(KEY, shape[:own], 0.5)
    assert y.equal(2.0 * decisions.reshape(*shape[:own], *(1,) * (len(shape) - own)).expand(shape))


@pytest.mark.filterwarnings("ignore:dropout.d. Received a .-D input")
@pytest.mark.parametrize(("function", "shape"), [(dropout2d, (6,)), (dropout2d, ()), (dropout3d, ())])
def test_no_channels(function: Function, shape: tuple[int, ...]) -> None:
    message = f"Feature dropout requires at least 2 dimensions in the input, got a tensor of shape {shape}"
    with pytest.raises(RuntimeError, match=re.escape(message)):
        function(torch.ones(shape), 0.5)
    assert not function(torch.ones(shape), 1.0).any()
    x = torch.ones(shape)
    assert function(x, 0.0) is x
    assert function(x, 0.5, False) is x


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("layer", "shape"), [(Dropout1d, (50, 2)), (Dropout3d, (50, 2, 2, 2))])
def test_a_sample_alone_has_the_mask_of_a_batch_of_one(
    layer: type[nn.Module], shape: tuple[int, ...], inplace: bool
) -> None:
    module, x = layer(0.5, inplace), torch.rand(shape)
    batch = x.clone().unsqueeze(0)
    again = x.clone(), batch.clone()
    torch.manual_seed(5)
    alone = module(x)
    torch.manual_seed(5)
    assert alone.equal(module(batch).squeeze(0))
    assert alone.shape == shape
    assert (alone is x) == inplace
    assert module(again[0], key=KEY).equal(module(again[1], key=KEY).squeeze(0))


@pytest.mark.parametrize(("function", "shape"), CASES)
def test_rate_and_independence(function: Function, shape: tuple[int, ...]) -> None:
    """Of 200,000 channels; neighbours along both dimensions, and the masks of two keys."""
    x = torch.ones(1000, 200, *(1,) * (len(shape) - 2))
    kept, other = (function(x, P, key=KEY.fold(i)).reshape(1000, 200).ne(0).numpy() for i in range(2))
    assert chance.rate(kept, P) > chance.FALSE_ALARM
    assert chance.independence(kept, other, p=P) > chance.FALSE_ALARM
    assert chance.independence(kept[::2], kept[1::2], p=P) > chance.FALSE_ALARM
    assert chance.independence(kept[:, ::2], kept[:, 1::2], p=P) > chance.FALSE_ALARM


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
def test_as_many_channels_a_sample_as_torch(entry: Entry) -> None:
    """How many of 8 channels of a sample are dropped: one law for both, by chi-squared of 20,000 samples."""
    samples, channels, most = 20_000, 8, 5
    (example,) = entry.example.inputs(torch.float32)
    x = torch.ones(samples, channels, *(1,) * (example.dim() - 2))
    counts = []
    for implementation in (entry.own, entry.peer):
        torch.manual_seed(11)
        dropped = (implementation.make(p=P)(x) == 0).flatten(1).sum(1)
        counts.append(torch.bincount(dropped.clamp(max=most), minlength=most + 1).numpy())
    assert min(each.min() for each in counts) >= 100
    assert stats.chi2_contingency(counts).pvalue > chance.FALSE_ALARM
    expected = stats.binom.pmf(range(most + 1), channels, P)
    expected[most] = stats.binom.sf(most - 1, channels, P)
    assert stats.chisquare(counts[0], samples * expected).pvalue > chance.FALSE_ALARM


@pytest.mark.parametrize(("function", "shape"), CASES)
def test_mask_of_a_row_is_that_of_its_key(function: Function, shape: tuple[int, ...]) -> None:
    x, ids = torch.randn(shape), torch.arange(10, 16)
    y = function(x, 0.5, key=KEY.fold(ids))
    order = torch.tensor([3, 1, 5, 0])
    assert function(x[order], 0.5, key=KEY.fold(ids[order])).equal(y[order])
    assert y[:1].equal(function(x[:1], 0.5, key=KEY.fold(10)))
    assert not y[:1].ne(0).equal(y[1:2].ne(0))


@pytest.mark.parametrize(("function", "shape"), [CASES[0], CASES[2]])
def test_vmap_over_samples_and_keys(function: Function, shape: tuple[int, ...]) -> None:
    x, keys = torch.randn(shape), KEY.fold(torch.arange(shape[0]))

    def one(x: Tensor, bits: Tensor) -> Tensor:
        return function(x, 0.5, key=thinned.Key.from_bits(bits))

    assert torch.func.vmap(one)(x, keys.bits).equal(function(x, 0.5, key=keys))


@pytest.mark.parametrize(("function", "shape"), CASES)
def test_dropped_is_plus_zero_whatever_it_was(function: Function, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, math.nan, requires_grad=True)
    keep = function(torch.ones(shape), 0.5, key=KEY) != 0
    y = function(x, 0.5, key=KEY)
    assert y.isnan().equal(keep)
    (gradient,) = torch.autograd.grad(y, x, torch.full(shape, math.inf))
    oracle.assert_same(gradient, torch.where(keep, math.inf, 0.0))
    oracle.assert_same(function(x, 1.0), torch.zeros(shape))


@pytest.mark.parametrize("shape", [(), (2,), (1, 2, 2, 2), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_ranks_that_dropout1d_refuses(shape: tuple[int, ...], training: bool) -> None:
    message = f"Expected 2D or 3D input, but received a {len(shape)}D input"
    with pytest.raises(RuntimeError, match=message) as error:
        dropout1d(torch.ones(shape), 0.5, training)
    assert str(shape) in str(error.value)
    with pytest.raises(RuntimeError, match=message):
        Dropout1d(0.0)(torch.ones(shape))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("function", "shape", "words"),
    [
        (dropout2d, (1, 2), "Received a 2-D input to dropout2d"),
        (dropout2d, (1, 2, 2, 2, 2), "Received a 5-D input to dropout2d"),
        (dropout2d, (1, 2, 2), "assuming that channel-wise 1D dropout behavior is desired"),
        (dropout3d, (1, 2, 2), "Received a 3-D input to dropout3d"),
        (dropout3d, (1, 2, 2, 2, 2, 2), "Received a 6-D input to dropout3d"),
    ],
)
def test_warning_points_at_the_caller(
    function: Function, shape: tuple[int, ...], words: str, training: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function(torch.ones(shape), 0.5, training)
    (warning,) = caught
    assert warning.category is UserWarning
    assert words in str(warning.message)
    assert warning.filename == __file__


def test_usual_ranks_do_not_warn() -> None:
    for function, shapes in (
        (dropout1d, [(2, 3), (2, 3, 4)]),
        (dropout2d, [(2, 3, 4, 5)]),
        (dropout3d, [(2, 3, 4, 5), (2, 3, 4, 5, 6)]),
    ):
        for shape in shapes:
            function(torch.ones(shape))  # warnings are errors here


def test_a_compiled_call_warns_when_it_is_compiled(fresh_compiler: None) -> None:  # noqa: ARG001
    compiled = torch.compile(Dropout2d(0.5), fullgraph=True, backend="aot_eager")
    x = torch.ones(20, 5, 3)
    with pytest.warns(UserWarning, match=r"interpreted as shape \(N, C, L\)"):
        y = compiled(x, key=KEY)
    assert y.equal(dropout1d(x, 0.5, key=KEY))
    compiled(x, key=KEY)


@pytest.mark.parametrize(("function", "shape"), CASES)
def test_a_refused_call_has_changed_nothing(function: Function, shape: tuple[int, ...]) -> None:
    inputs = [torch.ones(shape[1:], requires_grad=True)] if function is not dropout2d else []
    inputs += [torch.ones(shape, requires_grad=True), torch.ones(1, *shape[1:]).expand(shape)]
    for x in inputs:
        with pytest.raises(RuntimeError, match=r"leaf Variable|more than one element"):
            function(x, 0.5, inplace=True)
        assert x.eq(1).all()
        assert x.shape in (shape, shape[1:])  # torch's own dropout1d leaves a dimension of 1 behind
    x = torch.ones(shape)
    with pytest.raises(
        RuntimeError, match=re.escape(f"keys of shape (4,) do not fit a tensor of shape {shape}")
    ):
        function(x, 0.5, inplace=True, key=KEY.fold(torch.arange(4)))
    assert x.eq(1).all()


@pytest.mark.parametrize(("function", "shape"), CASES)
@pytest.mark.parametrize("training", [True, False])
def test_arguments_are_checked_in_evaluation_too(
    function: Function, shape: tuple[int, ...], training: bool
) -> None:
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=f"between 0 and 1, but got {p}"):
            function(torch.ones(shape), p, training)
    with pytest.raises(TypeError, match=r"write thinned\.Key\(7\)"):
        function(torch.ones(shape), 0.5, training, key=7)
    with pytest.raises(
        TypeError, match=rf"{function.__name__}\(\): argument 'input' must be Tensor, not list"
    ):
        function([1.0], 0.5, training)


@pytest.mark.parametrize(("function", "shape"), CASES)
def test_integers_pass_in_evaluation_only(function: Function, shape: tuple[int, ...]) -> None:
    x = torch.ones(shape, dtype=torch.int64)
    assert function(x, 0.5, False) is x
    assert function(x, 0.0) is x
    with pytest.raises(RuntimeError, match=re.escape(f"got torch.int64 of shape {shape}")):
        function(x, 0.5)


# What PyTorch's test/nn/test_dropout.py asks of its own layers.


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape", "memory_format"),
    [
        (Dropout1d, (1000, 12, 11), torch.contiguous_format),
        (Dropout2d, (1000, 3, 4, 5), torch.contiguous_format),
        (Dropout2d, (1000, 3, 4, 5), torch.channels_last),
        (Dropout3d, (1000, 3, 2, 4, 5), torch.contiguous_format),
        (Dropout3d, (1000, 3, 2, 4, 5), torch.channels_last_3d),
    ],
)
def test_mean_and_format_of_output_and_gradient(
    layer: type[nn.Module], shape: tuple[int, ...], memory_format: torch.memory_format, inplace: bool
) -> None:
    """Inputs of 1-p have that mean after dropout too, within the binomial law's bound; so have gradients."""
    p = 0.2
    values = torch.full(shape, 1 - p, dtype=torch.float64)
    leaf = values.clone(memory_format=memory_format).requires_grad_()
    torch.manual_seed(0)
    y = layer(p, inplace)(leaf + 0)
    y.backward(values)
    assert leaf.grad is not None
    # The bound of the normal law for a mean of channels, each (1-p)/(1-p) or 0, at a false alarm of 1e-6.
    bound = 4.9 * math.sqrt(p * (1 - p) / math.prod(shape[:2]))
    for each in (y, leaf.grad):
        assert each.is_contiguous(memory_format=memory_format)
        assert abs(float(each.detach().mean()) - (1 - p)) < bound
    assert layer(p, inplace).eval()(values) is values


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("p", [0, 1e-10])
@pytest.mark.parametrize("layer", [Dropout2d, Dropout3d])
def test_every_other_element_of_a_tensor(
    layer: type[nn.Module], p: float, memory_format: torch.memory_format
) -> None:
    x = torch.empty(2, 3, 3, 6, memory_format=memory_format)[..., ::2].copy_(torch.rand(2, 3, 3, 3))
    y = layer(p)(x)
    assert y.equal(x)
    assert y.is_contiguous(memory_format=memory_format) or not p


@pytest.mark.parametrize("order", list(permutations(range(4))), ids=str)
def test_order_of_the_strides_is_kept(order: tuple[int, ...]) -> None:
    inverse = sorted(range(4), key=order.__getitem__)
    for shift in ((0, 0), (1, 0), (0, 1), (1, 1)):
        x = torch.ones(3, 4, 5, 6).permute(order).contiguous().permute(inverse)[shift[0] :, shift[1] :]
        for p in (1e-10, 0.5):
            y = dropout2d(x, p, key=KEY)
            assert y.permute(order).is_contiguous()
            assert y.stride() == nn.functional.dropout2d(x, p).stride()
            assert y.equal(x) == (p < 0.1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_channel_is_whole_or_zero(layer: type[nn.Module], inplace: bool) -> None:
    torch.manual_seed(0)
    for _ in range(20):
        y = layer(0.5, inplace)(torch.ones(10, 4, *(2,) * (1 + LAYERS.index(layer))))
        counts = y.flatten(2).count_nonzero(-1)
        assert set(counts.flatten().tolist()) == {0, 2 ** (1 + LAYERS.index(layer))}


@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (5, 4, 0)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_empty(shape: tuple[int, ...], p: float) -> None:
    x = torch.empty(shape, requires_grad=True)
    y = dropout1d(x, p)
    assert y.shape == shape
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


# Implementations that break the law, each in one way, and the law that shows it.


class Shared(nn.Module):
    """A mask that is shared along other dimensions than it should be."""

    def __init__(self, p: float, dims: tuple[int, ...]) -> None:
        super().__init__()
        self.p, self.dims = p, dims

    def forward(self, x: Tensor) -> Tensor:
        return thinned.functional.dropout(
            x, self.p, broadcast_dims=[dim for dim in self.dims if dim < x.dim()]
        )


CULPRITS = {
    "drop rate at p = 0.3": lambda p: nn.Dropout2d(p * 1.02),
    "sharing": lambda p: Shared(p, dims=(3,)),
    "neighbours": lambda p: Shared(p, dims=(1, 2, 3)),
    "neighbours ": lambda p: Shared(p, dims=(0, 2, 3)),
    "3 dimensions": lambda p: Shared(p, dims=(1, 2, 3)),
    "other ranks": lambda p: Shared(p, dims=()),
    "kept values": lambda p: nn.Sequential(nn.Dropout2d(p), nn.Hardtanh(-2.0, 2.0)),
}


@pytest.mark.parametrize("law", CULPRITS)
def test_a_wrong_law_is_caught(law: str) -> None:
    (entry,) = [entry for entry in ENTRIES if entry.name == "Dropout2d"]
    (check,) = [each for each in entry.laws if each.name == law.strip()]
    found = examine(check, Implementation("culprit", CULPRITS[law]), Settings(quick=True))
    assert found.verdict is Verdict.BROKEN, found.measured


def test_a_lost_batch_dimension_is_caught() -> None:
    (entry,) = [entry for entry in ENTRIES if entry.name == "Dropout1d"]
    (check,) = [each for each in entry.laws if each.name == "batch of one"]
    culprit = Implementation("culprit", lambda p: Shared(p, dims=(2,)))
    assert examine(check, culprit, Settings(quick=True)).verdict is Verdict.BROKEN


def test_masks_are_nested() -> None:
    """What a larger p keeps, a smaller one keeps too."""
    x = torch.ones(200, 10, 2)
    kept = [dropout1d(x, p, key=KEY) != 0 for p in (0.1, 0.3, 0.5, 0.9)]
    for more, fewer in pairwise(kept):
        assert bool((more | ~fewer).all())
        assert more.sum() > fewer.sum()
