"""Masksembles against its formula, the authors' way to draw masks, and all sets of masks there are."""

from __future__ import annotations

import copy
import math
import re
from itertools import combinations, product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import oracle
import thinned
from thinned import op, schedules
from thinned.compare.laws import Verdict
from thinned.compare.laws.chance import DEVIATIONS
from thinned.compare.layers import masksembles as entry
from thinned.functional import masksembles_masks
from thinned.layers.masksembles import Masksembles, masksembles
from verdicts import verdict

(ENTRY,) = entry.ENTRIES
MASKS = masksembles_masks(12, 4)
MEMBERS = torch.tensor([3, 0, 2, 2, 1])


def overlap(masks: Tensor) -> float:
    """The mean over pairs of intersection over union."""
    pairs = [(a, b) for a, b in combinations(masks, 2)]
    return sum(float((a & b).sum() / (a | b).sum()) for a, b in pairs) / len(pairs)


def authors_ones(channels: int, n: int, scale: float) -> int:
    return int(int(channels) / (scale * (1 - (1 - 1 / scale) ** n)))


def authors_masks(channels: int, n: int, scale: float, generator: np.random.Generator) -> Tensor:
    """``generation_wrapper`` of the package: bisect the scale until its expected size is ``channels``."""
    ones, low, high = authors_ones(channels, n, scale), scale * 0.8, scale * 1.2
    for _ in range(1000):
        middle = (low + high) / 2
        size = int(ones * middle * (1 - (1 - 1 / middle) ** n))
        while True:
            places = int(ones * middle)
            masks = np.zeros((n, places), np.bool_)
            for mask in masks:
                mask[generator.choice(places, ones, replace=False)] = True
            masks = masks[:, masks.any(0)]
            if masks.shape[1] == size:
                break
        if size == channels:
            return torch.from_numpy(masks)
        low, high = (low, middle) if size > channels else (middle, high)
    raise ValueError("the package finds no masks")


@pytest.mark.parametrize("scale", [1, 1.05, 1.5, 2.0, 3, 6.0])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 16, 50])
def test_masks_have_equally_many_ones_and_leave_no_channel_unused(n: int, scale: float) -> None:
    for channels in (*range(1, 20), 64, 100):
        masks = masksembles_masks(channels, n, scale)
        assert (masks.shape, masks.dtype, masks.device.type) == ((n, channels), torch.bool, "cpu")
        share = 1 - (1 - 1 / scale) ** n
        exact = channels / (scale * share)
        ones = max(math.floor(exact + 1e-9), math.ceil(channels / n))
        assert masks.sum(1).tolist() == [ones] * n
        assert masks.any(0).all()


def test_as_many_ones_as_the_authors() -> None:
    for channels, n, scale in product((10, 16, 64, 100, 512, 1000), (2, 4, 8), (1.5, 2.0, 2.5, 3.0, 6.0)):
        ones = int(masksembles_masks(channels, n, scale)[0].sum())
        assert ones == max(authors_ones(channels, n, scale), math.ceil(channels / n))


def test_all_sets_of_masks_are_equally_likely() -> None:
    """All 114 ways for 3 masks of 2 ones to leave none of 4 channels unused, 50 draws each."""
    subsets = [sum(1 << i for i in pair) for pair in combinations(range(4), 2)]
    covers = [each for each in product(subsets, repeat=3) if each[0] | each[1] | each[2] == 0b1111]
    assert len(covers) == 114
    counts = dict.fromkeys(covers, 0)
    bits = 1 << torch.arange(4)
    for seed in range(50 * len(covers)):
        counts[tuple((masksembles_masks(4, 3, seed=seed) * bits).sum(1).tolist())] += 1
    assert stats.chisquare(list(counts.values())).pvalue > 1e-7


@pytest.mark.parametrize(("channels", "n", "scale"), [(10, 4, 2.0), (32, 4, 2.0), (32, 3, 1.5), (40, 5, 3.0)])
def test_masks_overlap_as_those_of_the_authors(channels: int, n: int, scale: float) -> None:
    """A two-sample z-test of the mean overlap of 400 sets each."""
    generator = np.random.default_rng(1)
    theirs = [overlap(authors_masks(channels, n, scale, generator)) for _ in range(400)]
    ours = [overlap(masksembles_masks(channels, n, scale, seed=seed)) for seed in range(400)]
    error = math.sqrt((np.var(theirs, ddof=1) + np.var(ours, ddof=1)) / 400)
    assert abs(np.mean(theirs) - np.mean(ours)) < DEVIATIONS * error


@pytest.mark.parametrize("scale", [1.0, 1.2, 1.5, 2.0, 3.0, 5.0, 6.0])
def test_the_scale_sets_the_overlap(scale: float) -> None:
    """|a & b| of two masks of M of M * scale places is hypergeometric: its mean is M / scale.

    The pairs are uncorrelated. That M is rounded down and the places are chosen for it moves the mean by
    less than 2.
    """
    n, channels = 4, 4096
    masks = masksembles_masks(channels, n, scale)
    ones = int(masks[0].sum())
    places, pairs = ones * scale, n * (n - 1) / 2
    variance = ones / scale * (1 - 1 / scale) * (places - ones) / (places - 1)
    off = DEVIATIONS * math.sqrt(variance / pairs) + 2
    low, high = (size / (2 * ones - size) for size in (ones / scale - off, ones / scale + off))
    assert low < overlap(masks) < high
    assert low < 1 / (2 * scale - 1) < high


@pytest.mark.usefixtures("backend")
def test_every_backend_has_the_same_masks() -> None:
    assert masksembles_masks(12, 4).equal(MASKS)
    oracle.assert_same(masksembles(torch.ones(4, 12), MASKS, factor=1.5), MASKS * 1.5)


def test_masks_depend_on_the_arguments_alone() -> None:
    state = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]
    with torch.device("meta"):
        again = masksembles_masks(12, 4)
    assert again.equal(MASKS)
    assert state[0].equal(torch.get_rng_state())
    assert (state[1] == np.random.get_state()[1]).all()  # type: ignore[index]
    assert not masksembles_masks(12, 4, seed=1).equal(MASKS)
    # With one key for all, the first mask would be the same.
    assert int((masksembles_masks(64, 50)[0] != masksembles_masks(64, 49)[0]).sum()) > 8


def test_equal_numbers_make_no_mask_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    uniform, calls = op.uniform, []

    def equal_at_first(*args: Any) -> Tensor:
        calls.append(args)
        return uniform(*args) if len(calls) > 1 else torch.zeros(args[1], dtype=torch.int32)

    monkeypatch.setattr(op, "uniform", equal_at_first)
    assert masksembles_masks(12, 50).sum(1).tolist() == [6] * 50
    assert len(calls) > 1


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("shape", [(8, 12), (8, 12, 5), (8, 12, 3, 2), (4, 12, 1, 2, 3), (0, 12), (0, 12, 3)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_formula(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape, dtype=dtype)
    y = Masksembles(12)(x)
    opmath = {torch.float64: torch.float64, torch.complex64: torch.complex64}.get(dtype, torch.float32)
    kept = MASKS.repeat_interleave(shape[0] // 4, 0).view(*shape[:2], *(1,) * (len(shape) - 2))
    assert y.dtype == dtype
    oracle.assert_same(y, torch.where(kept, (x.to(opmath) * 2).to(dtype), 0))  # 6 of 12 are kept
    for member in range(4):
        kept = MASKS[member].view(-1, *(1,) * (len(shape) - 2))
        oracle.assert_same(Masksembles(12, scale_by_keep=False)(x, member=member), torch.where(kept, x, 0))


def test_the_mean_over_channels_stays_and_the_factor_is_not_rounded() -> None:
    layer = Masksembles(10)
    assert layer.factor == 10 / 5
    layer = Masksembles(64)
    assert layer.factor == 64 / 34
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    oracle.assert_same(layer(x), torch.where(layer.masks, (x.float() * (64 / 34)).bfloat16(), 0))
    torch.testing.assert_close(layer(torch.ones(4, 64)).mean(1), torch.ones(4))


def test_training_and_evaluation_have_the_same_members() -> None:
    layer, x = Masksembles(12), torch.randn(6, 12)
    assert layer.train()(x).equal(layer.eval()(x))


def test_what_is_not_kept_is_0_and_so_is_its_gradient() -> None:
    x = torch.full((4, 12), math.nan, requires_grad=True)
    y = Masksembles(12)(x)
    assert y.isnan().equal(MASKS)
    assert not y[~MASKS].signbit().any()
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, math.inf))
    assert gradient.isinf().equal(MASKS)
    assert not gradient[~MASKS].any()
    double = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Masksembles(12), double, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(Masksembles(12), double)


@pytest.mark.parametrize("rows", range(1, 14))
def test_groups_of_a_batch_differ_by_one_row_at_most(rows: int) -> None:
    y = Masksembles(12, scale_by_keep=False)(torch.ones(rows, 12)).bool()
    members = [[row.equal(mask) for mask in MASKS].index(True) for row in y]
    assert members == sorted(members)
    counts = [members.count(member) for member in range(4)]
    assert max(counts) - min(counts) == bool(rows % 4)
    if rows == 8:  # outputs[: B // n] are those of the first, as the authors' README says
        assert members == [0, 0, 1, 1, 2, 2, 3, 3]


def test_a_repeated_batch_has_each_member_once() -> None:
    layer, x = Masksembles(12), torch.randn(3, 12)
    y = layer(x.repeat(4, 1)).unflatten(0, (4, 3))
    assert y.equal(torch.stack([layer(x, member=member) for member in range(4)]))


def test_members_of_rows() -> None:
    layer, x = Masksembles(12), torch.randn(5, 12, 3)
    expected = torch.stack([layer(x[i : i + 1], member=int(m))[0] for i, m in enumerate(MEMBERS)])
    assert layer(x, member=MEMBERS).equal(expected)
    assert layer(x.flip(0), member=MEMBERS.flip(0)).flip(0).equal(expected)
    assert layer(x[3:], member=MEMBERS[3:]).equal(expected[3:])
    for member in (2, np.int64(2), torch.tensor(2)):
        assert layer(x, member=member).equal(layer(x, member=torch.full((5,), 2)))


def test_vmap_over_members_and_examples() -> None:
    layer, x = Masksembles(12), torch.randn(3, 12)
    y = torch.vmap(lambda member: layer(x, member=member))(torch.arange(4))
    assert y.equal(layer(x.repeat(4, 1)).unflatten(0, (4, 3)))
    y = torch.vmap(lambda row, member: layer(row[None], member=member)[0])(x, MEMBERS[:3])
    assert y.equal(layer(x, member=MEMBERS[:3]))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_serves_any_batch_and_member() -> None:
    layer = Masksembles(12)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (8, 5, 3, 7):
        x, members = torch.randn(rows, 12, 2), torch.arange(rows) % 4
        for arguments in ({}, {"member": members}, {"member": 3}, {"member": 1}, {"member": members[0]}):
            oracle.assert_same(compiled(x, **arguments), layer(x, **arguments))


@pytest.mark.usefixtures("fresh_compiler")
def test_inductor() -> None:
    layer, x = Masksembles(12), torch.randn(7, 12, dtype=torch.bfloat16)
    oracle.assert_same(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.parametrize("training", [True, False])
def test_export_with_a_dynamic_batch(training: bool) -> None:
    layer, rows = Masksembles(12).train(training), torch.export.Dim("rows", min=2)
    x = torch.randn(6, 12)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: rows},))
    chosen = torch.export.export(
        layer,
        (x,),
        {"member": torch.zeros(6, dtype=torch.int64)},
        dynamic_shapes={"input": {0: rows}, "member": {0: rows}},
    )
    for size in (2, 4, 7):
        x, members = torch.randn(size, 12), torch.arange(size) % 4
        oracle.assert_same(program.module()(x), layer(x))
        oracle.assert_same(chosen.module()(x, member=members), layer(x, member=members))


def scripted(x: Tensor, masks: Tensor, member: Tensor) -> Tensor:
    return masksembles(x, masks, member=member)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_torchscript() -> None:
    layer, x = Masksembles(12).eval(), torch.randn(5, 12)
    module = torch.jit.freeze(torch.jit.script(layer))
    function = torch.jit.script(scripted)
    for rows in (5, 3, 8):
        x, members = torch.randn(rows, 12), torch.arange(rows) % 4
        oracle.assert_same(module(x), layer(x))
        oracle.assert_same(function(x, MASKS, members), masksembles(x, MASKS, member=members))


def test_masks_are_saved_with_the_weights() -> None:
    trained, fresh = Masksembles(12, seed=7), Masksembles(12)
    x = torch.randn(4, 12)
    assert list(trained.state_dict()) == ["masks"]
    assert not fresh(x).equal(trained(x))
    fresh.load_state_dict(trained.state_dict())
    assert fresh(x).equal(trained(x))
    assert copy.deepcopy(fresh)(x).equal(trained(x))
    assert fresh.half().masks.dtype == torch.bool
    with pytest.raises(RuntimeError, match="size mismatch for masks"):
        Masksembles(12, n=3).load_state_dict(trained.state_dict())


def test_a_checkpoint_of_the_authors_layer_loads() -> None:
    """Their masks are a float64 parameter of the same name and shape."""
    theirs, x = authors_masks(12, 4, 2.0, np.random.default_rng(3)), torch.randn(8, 12)
    layer = Masksembles(12, 4, 2.0, scale_by_keep=False)
    layer.load_state_dict({"masks": theirs.double()})
    assert layer(x).double().equal(x * theirs.double().repeat_interleave(2, 0))


def test_a_layer_made_on_meta_gets_its_masks_back() -> None:
    with torch.device("meta"):
        layers = [Masksembles(12, seed=5), Masksembles(12, seed=5, device="cpu")]
    assert [layer.masks.device.type for layer in layers] == ["meta", "cpu"]
    layer = layers[0].to_empty(device="cpu")
    layer.masks.fill_(True)
    layer.reset_parameters()
    assert layer.masks.equal(layers[1].masks)
    assert layer.masks.equal(masksembles_masks(12, seed=5))


def test_it_is_no_place_where_a_model_drops() -> None:
    model = nn.Sequential(nn.Linear(4, 12), Masksembles(12), thinned.Dropout(0.5))
    assert [site.path for site in thinned.inspect(model)] == ["2"]
    assert [site.path for site in thinned.inspect(model, torch.randn(4, 4))] == ["2"]
    schedule = thinned.DropoutSchedule(model, schedules.linear(0.1, 0.3, steps=2))
    assert list(schedule.last_p) == ["2"]
    before = repr(model)
    thinned.convert(model)
    assert repr(model) == before
    x = torch.randn(4, 4)
    model.eval()
    with thinned.address(model, seed=7, step=0):
        addressed = model(x)
    assert addressed.equal(model(x))


def test_repr() -> None:
    layer = Masksembles(12, 3, scale=1.5, seed=2)
    assert repr(layer) == "thinned.Masksembles(channels=12, n=3, scale=1.5, scale_by_keep=True, seed=2)"


@pytest.mark.parametrize("make", [Masksembles, masksembles_masks])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels has to be at least 1, but got 0"),
        ({"channels": 8, "n": 0}, "n has to be at least 1, but got 0"),
        *(
            ({"channels": 8, "scale": scale}, f"scale has to be between 1 and 6, but got {scale}")
            for scale in (0.9, 6.1, math.nan, -math.inf)
        ),
    ],
)
def test_wrong_arguments_of_masks(make: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make(**arguments)


ONE_D, BATCH = torch.ones(12), torch.ones(5, 12)


@pytest.mark.parametrize(
    ("input", "arguments", "error", "message"),
    [
        (
            ONE_D,
            {},
            RuntimeError,
            "4 masks of 12 channels need an input of shape (N, 12, *), got a tensor of",
        ),
        (torch.ones(12, 5), {}, RuntimeError, "of shape (N, 12, *), got a tensor of shape (12, 5)"),
        (
            BATCH.long(),
            {},
            RuntimeError,
            "masksembles needs a floating-point or complex tensor, got torch.int64",
        ),
        (BATCH.to_sparse(), {}, NotImplementedError, "needs a strided tensor, got layout torch.sparse_coo"),
        (torch.nested.as_nested_tensor([ONE_D], layout=torch.jagged), {}, NotImplementedError, "nested"),
        ([1.0], {}, TypeError, "argument 'input' must be Tensor, not list"),
        (BATCH, {"member": 4}, IndexError, "member has to be in 0 .. 3, but got 4"),
        (BATCH, {"member": -1}, IndexError, "member has to be in 0 .. 3, but got -1"),
        (BATCH, {"member": torch.tensor([0, 1, 2, 3, 4])}, IndexError, "out of range"),
        (BATCH, {"member": torch.tensor([0, 1, 2, 3, -1])}, IndexError, "out of range"),
        (BATCH, {"member": 1.0}, TypeError, "member must be an integer, got 1.0 of type float"),
        (
            BATCH,
            {"member": [0] * 5},
            TypeError,
            "member must be an integer, got [0, 0, 0, 0, 0] of type list",
        ),
        (BATCH, {"member": torch.ones(5)}, TypeError, "member must be an integer or an int64 tensor, got a"),
        (BATCH, {"member": MASKS[0][:5]}, TypeError, "member must be an integer or an int64 tensor, got a"),
        (BATCH, {"member": torch.arange(4)}, RuntimeError, "or one for each row, of shape (5,)"),
        (
            BATCH,
            {"member": torch.zeros(5, 1, dtype=torch.int64)},
            RuntimeError,
            "member of shape (5, 1) does not",
        ),
        (
            BATCH,
            {"member": torch.zeros(5, dtype=torch.int64, device="meta")},
            RuntimeError,
            "member is on meta",
        ),
        (BATCH.to("meta"), {}, RuntimeError, "masks is on cpu and input is on meta"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # of torch, on sparse and nested tensors
def test_wrong_arguments_of_a_call(input: Any, arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Masksembles(12)(input, **arguments)


@pytest.mark.parametrize("masks", [MASKS.float(), MASKS[0], MASKS[None]])
def test_wrong_masks(masks: Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"masks has to be a bool tensor of shape \(n, C\), got a Tensor"):
        masksembles(BATCH, masks)


@pytest.mark.parametrize("law", ["sizes", "coverage", "evaluation of members"])
def test_the_authors_layer_keeps_the_law(law: str) -> None:
    assert verdict(ENTRY, law, ENTRY.peer.make) is Verdict.HOLDS


class Wrong(Masksembles):
    """Masksembles with one thing wrong."""

    def __init__(self, wrong: str, *args: Any, **arguments: Any) -> None:
        super().__init__(*args, **arguments)
        self.wrong = wrong
        if wrong == "random sizes":
            self.masks.copy_(thinned.keep_mask(thinned.Key(1), tuple(self.masks.shape), 0.5))
        if wrong == "independent":
            numbers = torch.rand(self.masks.shape)
            self.masks.copy_(numbers <= numbers.kthvalue(int(self.masks[0].sum()), 1, keepdim=True).values)

    def forward(self, input: Tensor, *, member: int | Tensor | None = None) -> Tensor:
        if self.wrong == "identity" and not self.training:
            return input
        if self.wrong == "unscaled":
            return super().forward(input, member=member) / self.factor
        if self.wrong == "one member":
            member = 0
        if self.wrong == "drops the rest":
            input = input[: len(input) // self.n * self.n]
        return super().forward(input, member=member)


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("random sizes", "sizes"),
        ("independent", "coverage"),
        ("one member", "coverage"),
        ("unscaled", "mean over channels"),
        ("identity", "evaluation of members"),
        ("one member", "odd batch"),
        ("drops the rest", "odd batch"),
    ],
)
def test_a_wrong_layer_is_caught(wrong: str, law: str) -> None:
    assert verdict(ENTRY, law, lambda **arguments: Wrong(wrong, **arguments)) is Verdict.BROKEN
