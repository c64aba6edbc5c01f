"""The arguments of thinned.address: seeds, steps, paths and dimensions, used as documented or refused."""

from __future__ import annotations

import copy
import pickle
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import thinned
from thinned import Dropout, Key
from thinned.models import address, convert, intercept


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(nn.Identity(), Dropout(0.5))


@pytest.mark.parametrize("step", [torch.tensor([3]), torch.tensor([[3]]), torch.tensor(3)])
@pytest.mark.parametrize("shape", [(1000, 1), (64, 64), (1,), ()])
def test_a_step_counter_of_one_element_is_its_number(
    model: nn.Sequential, step: Tensor, shape: tuple[int, ...]
) -> None:
    x, ys = torch.ones(shape), []
    for number in (step, 3):
        with address(model, seed=1, step=number):
            ys.append(model(x))
    assert ys[0].equal(ys[1])


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"step": torch.arange(4)}, ValueError, r"step .* got torch.int64 of shape \(4,\)"),
        ({"step": torch.empty(0, dtype=torch.int64)}, ValueError, r"step .* of shape \(0,\)"),
        ({"step": torch.tensor(3.0)}, TypeError, "step .* got torch.float32"),
        ({"step": torch.tensor([3], dtype=torch.int32)}, TypeError, "step .* got torch.int32"),
        ({"step": "3"}, TypeError, "step .* got '3'"),
        ({"step": 3.0}, TypeError, "integer"),
        ({"seed": Key(1).fold(torch.arange(4))}, ValueError, r"seed .* one key, got keys of shape \(4,\)"),
        ({"seed": Key.from_bits(torch.tensor([1]))}, ValueError, r"seed .* got keys of shape \(1,\)"),
        ({"samples": torch.ones(8)}, TypeError, "samples must be int64 ids in one dimension"),
        ({"samples": torch.ones(2, 4, dtype=torch.int64)}, TypeError, "samples must be int64 ids in one"),
        ({"samples": torch.tensor([])}, TypeError, "ids in one dimension, got torch.float32 of shape"),
        *(
            ({"samples": wrong}, TypeError, f"one dimension, got {re.escape(repr(wrong))}")
            for wrong in ([[1]], [1.5], 5, "ab", [None], np.array([1.5]), np.array([[1, 2]]))
        ),
        ({"samples": [1, 2**64]}, ValueError, f"samples must be in .*, got {2**64}"),
        ({"sample_dim": "1"}, TypeError, "got '1'"),
        ({"sample_dim": {"1": "1"}}, TypeError, "got {'1': '1'}"),
        ({"sample_dim": {"encoder.*": 1}}, ValueError, r"no module .* at a path like 'encoder\.\*'"),
    ],
)
def test_errors(model: nn.Sequential, given: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        address(model, **({"seed": 1, "step": 0} | given))


@pytest.mark.parametrize(
    "samples",
    [(3, 5), [3, 5], range(3, 6, 2), np.array([3, 5]), (n for n in (3, 5)), [np.uint64(3), np.int8(5)]],
)
def test_samples_are_any_integers(model: nn.Sequential, samples: Any) -> None:
    key = address(model, seed=1, step=0, samples=samples).key_of("1")
    assert key == address(model, seed=1, step=0, samples=torch.tensor([3, 5])).key_of("1")


@pytest.mark.parametrize("samples", [[], (), range(0), torch.tensor([], dtype=torch.int64), np.arange(0)])
def test_an_empty_batch_has_no_samples(model: nn.Sequential, samples: Any) -> None:
    context = address(model, seed=1, step=0, samples=samples)
    assert context.mask_of("1", (0, 8)).shape == (0, 8)
    with context:
        assert model(torch.ones(0, 8)).shape == (0, 8)
        shared = model(torch.ones(1, 8))
    assert shared.equal(2.0 * address(model, seed=1, step=0).mask_of("1", (1, 8), call=1))
    with context, pytest.raises(RuntimeError, match=r"shape \(4, 8\), .* no multiple of the 0 samples"):
        model(torch.ones(4, 8))
    assert thinned.Keyed(model)(torch.ones(0, 8), key=torch.tensor(7), samples=samples).shape == (0, 8)


def test_more_samples_than_an_empty_batch_has(model: nn.Sequential) -> None:
    with address(model, seed=1, step=0, samples=[3, 5]):
        assert model(torch.ones(0, 8)).shape == (0, 8)


class TestPaths:
    def test_a_second_path_means_the_first(self) -> None:
        shared = Dropout(0.5)
        model = nn.Sequential(shared, nn.Tanh(), shared)
        x = torch.ones(4, 30)
        with address(model, seed=7, step=1):
            first = shared(x) != 0
            second = shared(x) != 0
        context = address(model, seed=7, step=1)
        for path in ("0", "2"):
            assert context.mask_of(path, x.shape).equal(first)
            assert context.mask_of(path, x.shape, call=1).equal(second)
            assert context.mask_of(path, x.shape, 0.5).equal(first)
            assert context.key_of(path) == Key(7).fold(1).fold("0")

    @pytest.mark.parametrize("path", ["2", "1.inner", "0#1", "nothing"])
    def test_a_path_that_is_not_there_is_an_error(self, model: nn.Sequential, path: str) -> None:
        context = address(model, seed=7, step=1)
        for ask in (
            lambda: context.key_of(path),
            lambda: context.mask_of(path, (3,)),
            lambda: context.mask_of(path, (3,), 0.5),
        ):
            with pytest.raises(ValueError, match=f"no module of this Sequential is at '{path}'"):
                ask()

    def test_a_module_that_was_added_later_is_an_error(self, model: nn.Sequential) -> None:
        context = address(model, seed=7, step=1)
        model.append(Dropout(0.5))
        with pytest.raises(ValueError, match=r"'2' was added after the first thinned\.address"):
            context.mask_of("2", (3,))

    def test_one_that_was_converted_later_is_none(self) -> None:
        model = nn.Sequential(nn.Dropout(0.5))
        address(model, seed=7, step=1)
        convert(model)
        x = torch.ones(30)
        with address(model, seed=7, step=1) as context:
            assert context.mask_of("0", x.shape).equal(model(x) != 0)

    def test_a_negative_call_is_an_error(self, model: nn.Sequential) -> None:
        with pytest.raises(ValueError, match="call has to be at least 0, but got -1"):
            address(model, seed=7, step=1).key_of("1", -1)

    def test_a_number_sign_in_a_name_is_no_call_number(self) -> None:
        model = nn.ModuleDict({name: Dropout(0.5) for name in ("a", "a#1", "a#", "a##1")})
        context = address(model, seed=7, step=1)
        keys = {(name, call): context.key_of(name, call) for name in model for call in range(3)}
        assert len({int(key) for key in keys.values()}) == len(keys)
        x = torch.ones(30)
        with context:
            for call in range(3):
                for name, layer in model.items():
                    mask = thinned.keep_mask(keys[name, call], x.shape, 0.5)
                    assert mask.equal(layer(x) != 0)


IDS = torch.tensor([5, 2, 9])
N, LENGTH, WIDTH = 3, 6, 8  # the length is a multiple of the number of samples


def made(kind: type[nn.Module], batch_first: bool, *sizes: int) -> nn.Module:
    """A transformer, or a layer of one, with dropouts of thinned."""
    torch.manual_seed(0)
    plain = kind(WIDTH, 2, *sizes, 16, 0.3, batch_first=batch_first, dtype=torch.float64)
    return convert(plain)


class Custom(nn.Module):
    """A sequence-first model, with or without ``batch_first``."""

    def __init__(self, batch_first: bool | None = None) -> None:
        super().__init__()
        self.dropout = Dropout(0.5)
        if batch_first is not None:
            self.batch_first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(x)
        return y


class TestSampleDim:
    def run(self, model: nn.Module, x: Tensor, ids: Tensor = IDS, **options: Any) -> Tensor:
        with intercept(), address(model, seed=7, step=1, samples=ids, **options):
            both = isinstance(model, nn.TransformerDecoderLayer | nn.Transformer)
            y: Tensor = model(x, x) if both else model(x)
        return y

    @pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
    @pytest.mark.parametrize(
        ("kind", "sizes"),
        [
            (nn.TransformerEncoderLayer, ()),
            (nn.TransformerDecoderLayer, ()),
            (nn.Transformer, (1, 1)),
        ],
    )
    def test_batch_first_of_torchs_layers_is_read(self, kind: type[nn.Module], sizes: tuple[int]) -> None:
        """Sequence-first layers have the masks of batch-first ones, at any place of a sample."""
        x = torch.randn(N, LENGTH, WIDTH, dtype=torch.float64)
        batch_first = self.run(made(kind, True, *sizes), x)
        model, sequences = made(kind, False, *sizes), x.transpose(0, 1)
        y = self.run(model, sequences)
        torch.testing.assert_close(y.transpose(0, 1), batch_first)
        for order in (torch.tensor([2, 0, 1]), torch.tensor([1])):
            torch.testing.assert_close(self.run(model, sequences[:, order], IDS[order]), y[:, order])

    def test_batch_first_of_other_models_is_read(self) -> None:
        x = torch.ones(LENGTH, N, WIDTH)
        masks = thinned.functional.dropout(
            x.transpose(0, 1), 0.5, key=Key(7).fold(1).fold("dropout").fold(IDS)
        ).transpose(0, 1)
        assert self.run(Custom(batch_first=False), x).equal(masks)
        assert self.run(Custom(), x, sample_dim=1).equal(masks)
        assert self.run(Custom(), x, sample_dim=-2).equal(masks)
        assert self.run(Custom(), x, sample_dim={"drop*": 1}).equal(masks)
        assert self.run(Custom(batch_first=True), x, sample_dim={"dropout": 1, "*": 0}).equal(masks)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_batch_first_of_a_copy_is_read(self, copied: Any) -> None:
        x = torch.randn(LENGTH, N, WIDTH, dtype=torch.float64)
        model = made(nn.TransformerEncoderLayer, False)
        expected = self.run(model, x)
        twin = copied(model)
        assert self.run(twin, x).equal(expected)
        assert self.run(twin, x, sample_dim={"dropout*": 1}).equal(expected)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_memory_format_gradient_and_in_place(self, inplace: bool) -> None:
        model, x = Custom(), torch.randn(LENGTH, N, WIDTH)
        expected = self.run(model, x, sample_dim=1)
        model.dropout.inplace = inplace
        leaf = x.clone().requires_grad_()
        given = leaf * 1
        y = self.run(model, given, sample_dim=1)
        assert y.equal(expected)
        assert y.is_contiguous()
        assert (y is given) == inplace
        y.sum().backward()
        assert leaf.grad is not None
        assert (leaf.grad != 0).equal(expected != 0)

    def test_shared_dimensions_are_those_of_the_input(self) -> None:
        class Shared(nn.Module):
            def forward(self, x: Tensor) -> Tensor:
                return thinned.functional.dropout(x, 0.5, broadcast_dims=(0,))

        y = self.run(Shared(), torch.ones(LENGTH, N, 50), sample_dim=1)
        assert y.equal(y[:1].expand_as(y))
        assert not y[0, 0].equal(y[0, 1])

    def test_an_ambiguous_dimension_is_refused(self) -> None:
        with pytest.raises(
            RuntimeError, match=r"'dropout' was given a tensor of shape \(6, 3, 8\), which may"
        ):
            self.run(Custom(), torch.ones(LENGTH, N, WIDTH))
        # Other sizes are not ambiguous.
        assert self.run(Custom(), torch.ones(LENGTH, 5, WIDTH)).shape == (LENGTH, 5, WIDTH)
        assert self.run(Custom(), torch.ones(N, LENGTH, WIDTH)).shape == (N, LENGTH, WIDTH)
        assert self.run(Custom(), torch.ones(LENGTH, N, WIDTH), sample_dim=0).shape == (LENGTH, N, WIDTH)

    def test_sample_dim_is_for_element_wise_layers_only(self) -> None:
        """LockedDropout has the masks of its samples in either layout."""
        x = torch.ones(LENGTH, N, WIDTH)
        y = self.run(nn.Sequential(thinned.LockedDropout(0.5)), x, sample_dim=1)
        batch_first = nn.Sequential(thinned.LockedDropout(0.5, batch_first=True))
        assert y.transpose(0, 1).equal(self.run(batch_first, x.transpose(0, 1)))

    def test_noise_is_refused_along_another_dimension(self) -> None:
        with pytest.raises(NotImplementedError, match=r"samples in dimension 0, got dimension 1 of shape"):
            self.run(nn.Sequential(thinned.GaussianDropout(0.5)), torch.ones(LENGTH, N, WIDTH), sample_dim=1)

    def test_a_dimension_that_an_input_lacks_is_refused(self) -> None:
        words = r"sample_dim=3 and was given a tensor of shape \(6, 3, 8\); accepted: -3 .. 2"
        with pytest.raises(IndexError, match=words):
            self.run(Custom(), torch.ones(LENGTH, N, WIDTH), sample_dim=3)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_compiled(self) -> None:
        model = made(nn.TransformerEncoderLayer, False)
        x = torch.randn(LENGTH, N, WIDTH, dtype=torch.float64)
        eager = self.run(model, x)
        fast = torch.compile(model, fullgraph=True, backend="aot_eager")
        with intercept(), address(model, seed=7, step=1, samples=IDS):
            torch.testing.assert_close(fast(x), eager)
