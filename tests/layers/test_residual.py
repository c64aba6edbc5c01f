"""A residual branch that is computed for the kept rows alone: its masks, values and gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as torch_functional
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import oracle
import thinned
import thinned.layers.residual as file
from distributed.world import World
from thinned.functional import drop_path, residual, stochastic_depth
from thinned.key_source import active

KEY = thinned.Key(7)
IDS = torch.tensor([31, 4, 15, 9, 26, 5])
TOLERANCE: dict[torch.dtype, float] = {torch.float16: 1e-2, torch.bfloat16: 8e-2}


def all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the branch for all rows, and mask its result."""
    monkeypatch.setattr(file, "computes_rows", lambda _: False)


def key_that_keeps(count: int, rows: int, p: float = 0.5) -> thinned.Key:
    keys = map(thinned.Key, range(10_000))
    return next(key for key in keys if thinned.keep_mask(key, (rows,), p).sum() == count)


class Rows:
    """A branch that counts the rows of each call."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return x.sin()


def results(form: Callable[[Tensor, nn.Module], Tensor], x: Tensor, branch: nn.Module) -> list[Tensor]:
    """Output and gradients of input and parameters; zeros for parameters that have none."""
    x = x.clone().requires_grad_()
    branch.zero_grad()
    y = form(x, branch)
    y.abs().square().sum().backward()
    wrt = [x, *branch.parameters()]
    return [y.detach(), *(torch.zeros_like(each) if each.grad is None else each.grad for each in wrt)]


def assert_close(mine: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(mine, expected, strict=True):
        tolerance = TOLERANCE.get(wanted.dtype, 1e-5)
        torch.testing.assert_close(
            got, wanted, rtol=tolerance, atol=tolerance * (1 + wanted.abs().max().item())
        )


@pytest.mark.filterwarnings("ignore:Complex modules")
@given(
    rows=st.integers(1, 9),
    shape=st.lists(st.integers(1, 3), max_size=3),
    p=st.sampled_from([0.1, 0.4, 0.9, 1.0]),
    dtype=st.sampled_from(oracle.DTYPES),
    kind=st.sampled_from(["one", "batch", "stratified", "drawn"]),
    mode=st.sampled_from(["row", "batch"]),
    seed=st.integers(0, 99),
)
def test_is_the_masked_form(
    rows: int, shape: list[int], p: float, dtype: torch.dtype, kind: str, mode: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    branch = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).to(dtype)
    x = torch.randn(rows, *shape, 4, dtype=dtype)
    keys = {
        "one": thinned.Key(seed),
        "batch": thinned.Key(seed).fold(torch.arange(rows)),
        "stratified": thinned.Key(seed).stratified(3),
    }
    key = keys.get(kind)

    def masked(x: Tensor, branch: nn.Module) -> Tensor:
        torch.manual_seed(seed)
        return x + stochastic_depth(branch(x), p, mode, key=key)

    def gathered(x: Tensor, branch: nn.Module) -> Tensor:
        torch.manual_seed(seed)
        return residual(x, branch, p, mode=mode, key=key)

    mine, expected = results(gathered, x, branch), results(masked, x, branch)
    assert mine[0].dtype == expected[0].dtype
    assert mine[0].stride() == expected[0].stride()
    assert_close(mine, expected)


@pytest.mark.parametrize("kept", [0, 1, 4, 6])
def test_computes_the_kept_rows_alone(kept: int) -> None:
    x, branch, key = torch.randn(6, 3), Rows(), key_that_keeps(kept, 6)
    y = residual(x, branch, 0.5, key=key)
    assert branch.calls == [kept] * bool(kept)
    assert y.data_ptr() != x.data_ptr()
    assert (y != x).any(1).equal(drop_path(torch.ones(6), 0.5, True, key=key) != 0)
    assert residual(x, branch, 0.5, scale_by_keep=False, key=key).allclose(
        x + drop_path(x.sin(), 0.5, True, False, key=key)
    )
    assert residual(x, branch, 1.0).equal(x)
    for options in ({"p": 0.0}, {"p": 0.5, "training": False}):
        assert residual(x, branch, **options).equal(x + x.sin())


def test_an_empty_batch() -> None:
    x = torch.randn(0, 3, requires_grad=True)
    y = residual(x, nn.Linear(3, 3), 0.5)
    y.sum().backward()
    assert y.shape == x.grad.shape == x.shape  # type: ignore[union-attr]


FORMATS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "samples last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "transposed": lambda x: x.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda x: x.repeat(1, 1, 1, 2)[..., ::2],
    "expanded": lambda x: x[..., :1].expand(x.shape),
}


@pytest.mark.parametrize("kept", [0, 3, 6])
@pytest.mark.parametrize("of_branch", [None, *FORMATS])
@pytest.mark.parametrize("name", [*FORMATS, "contiguous"])
def test_memory_format(name: str, of_branch: str | None, kept: int) -> None:
    x = FORMATS.get(name, torch.Tensor.contiguous)(torch.randn(6, 2, 5, 4))
    change, key = FORMATS.get(of_branch or "", lambda y: y), key_that_keeps(kept, 6)
    grads = []
    for form in (
        lambda x, f: residual(x, f, 0.5, key=key),
        lambda x, f: x + drop_path(f(x), 0.5, True, key=key),
    ):
        leaf = x.clone().requires_grad_()
        y = form(leaf, lambda x: change(x.sin()))
        y.square().sum().backward()
        grads.append([y.detach(), leaf.grad])
        if kept or of_branch is None:
            grads[-1].append(torch.tensor(y.stride()))
    assert_close(*grads)


def test_a_result_that_broadcasts_and_one_of_another_dtype() -> None:
    x = torch.randn(6, 1, 4, requires_grad=True)
    for branch in (
        lambda x: x.expand(-1, 3, -1).exp(),
        lambda x: x.double(),
        lambda x: x.bfloat16(),
        lambda x: x.to(torch.complex64),
        lambda x: x.flatten(1).exp()[:, :1, None],
    ):
        mine, expected = residual(x, branch, 0.5, key=KEY), x + drop_path(branch(x), 0.5, True, key=KEY)
        assert mine.dtype == expected.dtype
        torch.testing.assert_close(mine, expected, rtol=1e-2, atol=1e-2)


def test_autocast() -> None:
    x, branch = torch.randn(6, 4), nn.Linear(4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        mine = results(partial(residual, p=0.5, key=KEY), x, branch)
        expected = results(lambda x, f: x + drop_path(f(x), 0.5, True, key=KEY), x, branch)
    assert mine[0].dtype == expected[0].dtype == torch.float32
    torch.testing.assert_close(mine, expected, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("branch", "got"),
    [
        (lambda x: x[:1], r"shape \(1, 3\)"),
        (lambda x: x.sum(), r"shape \(\)"),
        (lambda x: (x, x), "type tuple"),
        (lambda _: None, "None"),
    ],
)
def test_a_result_without_the_rows(branch: Any, got: str) -> None:
    rows = int(thinned.keep_mask(KEY, (6,), 0.5).sum())
    with pytest.raises(RuntimeError, match=f"a tensor of {rows} rows, as its input has, got .*{got}"):
        residual(torch.ones(6, 3), branch, 0.5, key=KEY)


def test_wrong_arguments() -> None:
    for branch in (None, torch.ones(3)):
        with pytest.raises(TypeError, match="branch must be a function of a tensor"):
            residual(torch.ones(3), branch, 0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="branch must be a module, got"):
        thinned.Residual(torch.sin)  # type: ignore[arg-type]
    for make in (partial(residual, torch.ones(3), torch.sin), partial(thinned.Residual, nn.Identity())):
        with pytest.raises(ValueError, match="either 'batch' or 'row', but got 'rows'"):
            make(0.5, mode="rows")
    with pytest.raises(RuntimeError, match="residual needs a batch dimension"):
        residual(torch.ones(()), torch.sin, 0.5)


class Norms(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def branch(self, x: Tensor, *_: Any) -> Tensor:
        return self.norm(x)  # type: ignore[no-any-return]


class Calling:
    def __init__(self, module: nn.Module) -> None:
        self.parts = {"norms": [module]}

    def __call__(self, x: Tensor) -> Tensor:
        return self.parts["norms"][0](x)  # type: ignore[no-any-return]


class ActivatedNorm(nn.BatchNorm1d):
    """As BatchNormAct2d of timm."""


HELD: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "module": lambda norm: nn.Sequential(nn.Identity(), norm),
    "lambda": lambda norm: lambda x: norm(x),
    "default": lambda norm: lambda x, f=norm: f(x),
    "nested closure": lambda norm: (lambda f: lambda x: f(x))(lambda x: norm(x)),
    "bound method": lambda norm: Norms(norm).branch,
    "method in a closure": lambda norm: (lambda f: lambda x: f(x))(Norms(norm).branch),
    "partial": lambda norm: partial(Norms(norm).branch),
    "partial of modules": lambda norm: partial(lambda f, x: f(x), norm),
    "object": Calling,
    "list in a closure": lambda norm: (lambda several: lambda x: several[0](x))([norm]),
    "global": lambda norm: eval("lambda x: norm(x)", {"norm": norm}),
}
NORMS: dict[str, nn.Module] = {
    "BatchNorm1d": nn.BatchNorm1d(3),
    "ActivatedNorm": ActivatedNorm(3),
    "SyncBatchNorm": nn.SyncBatchNorm(3),
    "BatchNorm1d without statistics": nn.BatchNorm1d(3, track_running_stats=False).eval(),
    "InstanceNorm1d": nn.InstanceNorm1d(3, track_running_stats=True),
}


@pytest.mark.parametrize(
    ("held", "norm"), [*((held, "BatchNorm1d") for held in HELD), *(("module", norm) for norm in NORMS)]
)
def test_batch_norm_is_refused_by_name(held: str, norm: str) -> None:
    branch = HELD[held](copy.deepcopy(NORMS[norm]))
    with pytest.raises(ValueError, match=f"the branch has a {norm.split()[0]}.*allow_batch_norm=True"):
        residual(torch.ones(6, 3), branch, 0.5)


def test_batch_norm_that_is_no_hindrance() -> None:
    x, norm = torch.randn(6, 3), nn.BatchNorm1d(3)
    assert residual(x, norm, 0.5, allow_batch_norm=True, key=KEY).shape == x.shape
    assert thinned.Residual(norm, 0.5, allow_batch_norm=True)(x, key=KEY).shape == x.shape
    residual(
        x, nn.Sequential(copy.deepcopy(norm).eval(), nn.LayerNorm(3), nn.InstanceNorm1d(3)), 0.5, key=KEY
    )
    residual(x, norm, 0.5, training=False)


def test_a_branch_that_overwrites_its_input() -> None:
    for key in (KEY, key_that_keeps(6, 6)):
        with pytest.raises(RuntimeError, match="has overwritten its input"):
            residual(torch.randn(6, 3), torch.relu_, 0.5, key=key)


def test_a_branch_that_raises_leaves_no_rows() -> None:
    def branch(_: Tensor) -> Tensor:
        assert active.rows is not None
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        residual(torch.ones(6, 3), branch, 0.5, key=KEY)
    assert active.rows is None


def test_derivatives_of_first_and_second_order() -> None:
    torch.manual_seed(0)
    x, weight = (torch.randn(5, 3, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return residual(x, lambda x: x.sin() * weight.mean(0), 0.5, key=KEY)

    assert torch.autograd.gradcheck(call, (x, weight), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(call, (x, weight))


def test_backward_keeps_the_indices_alone() -> None:
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        for branch in (lambda x: x + 1, lambda x: x.sum(1, keepdim=True) + 1):
            residual(torch.ones(6, 3, requires_grad=True), branch, 0.5, key=KEY)
    assert {x.dtype for x in saved} == {torch.int64}


def test_under_transforms_the_branch_is_computed_for_all_rows() -> None:
    x, branch = torch.randn(6, 3), Rows()
    call = partial(residual, branch=branch, p=0.5, key=KEY)
    expected = x + drop_path(x.sin(), 0.5, True, key=KEY)
    tangent = 1 + drop_path(x.cos(), 0.5, True, key=KEY)
    y, dy = torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x))))
    for got, wanted in (
        (y, expected),
        (dy, tangent),
        (dual.tangent, tangent),
        (torch.func.grad(lambda x: call(x).sum())(x), tangent),
        (torch.vmap(call)(x.expand(2, 6, 3))[1], expected),
        (torch.vmap(lambda scale: call(x) * scale)(torch.ones(2))[0], expected),
    ):
        torch.testing.assert_close(got, wanted)
    assert set(branch.calls) == {6}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors(layout: torch.layout) -> None:
    parts = [torch.randn(length, 3) for length in (2, 5, 1, 4)]
    y = residual(torch.nested.nested_tensor(parts, layout=layout), lambda x: 2 * x, 0.5, key=KEY)
    for part, mine, keep in zip(parts, y.unbind(), thinned.keep_mask(KEY, (4,), 0.5), strict=True):
        torch.testing.assert_close(mine, part + 2 * 2 * part * keep)


class In(nn.Module):
    """A model of one residual block, whose branch calls ``layer``."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.block = thinned.Residual(Branch(layer, call), 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)  # type: ignore[no-any-return]


class Branch(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None) -> None:
        super().__init__()
        self.layer, self.call = layer, call or (lambda layer, x: layer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def swapped(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.transpose(0, 1)).transpose(0, 1)  # type: ignore[no-any-return]


FIRST = partial(lambda layer, x: layer(x)[0])
# Layers within a branch of shape (K, 4, 4); and whether one key suffices for their masks of some rows.
INSIDE: dict[str, tuple[bool, Callable[[], nn.Module]]] = {
    "Dropout": (True, lambda: In(thinned.Dropout(0.5))),
    "Dropout in place": (True, lambda: In(thinned.Dropout(0.5, inplace=True), lambda layer, x: layer(2 * x))),
    "Dropout1d": (True, lambda: In(thinned.Dropout1d(0.5))),
    "AlphaDropout": (True, lambda: In(thinned.AlphaDropout(0.5))),
    "FeatureAlphaDropout": (True, lambda: In(thinned.FeatureAlphaDropout(0.5))),
    "DropPath": (True, lambda: In(thinned.DropPath(0.5))),
    "StochasticDepth": (True, lambda: In(thinned.StochasticDepth(0.5, "batch"))),
    "TokenDropout": (True, lambda: In(thinned.TokenDropout(0.5))),
    "PatchDropout": (False, lambda: In(thinned.PatchDropout(0.5), lambda f, x: f(x).sum(1, keepdim=True))),
    "DropHead": (True, lambda: In(thinned.DropHead(0.5))),
    "DropHead, expected": (True, lambda: In(thinned.DropHead(0.5, normalize="expected"))),
    "DropKey": (True, lambda: In(thinned.DropKey(0.5), lambda layer, x: layer(x).softmax(-1))),
    "DropBlock1d": (False, lambda: In(thinned.DropBlock1d(0.5, 3))),
    "LockedDropout": (True, lambda: In(thinned.LockedDropout(0.5, batch_first=True))),
    "Zoneout": (True, lambda: In(thinned.Zoneout(0.5), lambda layer, x: layer(x, 2 * x))),
    "EmbeddingDropout": (
        False,
        lambda: In(thinned.EmbeddingDropout(nn.Embedding(9, 4), 0.5), lambda f, x: f(x[..., 0].long().abs())),
    ),
    "DropConnect": (
        True,
        lambda: In(thinned.DropConnect(0.5), lambda layer, x: x @ layer(nn.Parameter(torch.ones(4, 4)))),
    ),
    "WeightDrop": (True, lambda: In(thinned.WeightDrop(nn.Linear(4, 4), "weight", p=0.5))),
    "GaussianDropout": (False, lambda: In(thinned.GaussianDropout(0.5))),
    "VariationalDropout": (False, lambda: In(thinned.VariationalDropout(0.5))),
    "ConcreteDropout": (False, lambda: In(thinned.ConcreteDropout(0.5))),
    "VariationalLSTM": (
        False,
        lambda: In(thinned.VariationalLSTM(4, 4, batch_first=True, input_p=0.5, recurrent_p=0.5), FIRST),
    ),
    "LayerDrop": (True, lambda: In(thinned.LayerDrop([nn.Linear(4, 4), nn.Tanh()], p=0.5))),
    "MultiSampleDropout": (False, lambda: In(thinned.MultiSampleDropout(nn.Linear(4, 4), 0.5))),
    "Masksembles": (True, lambda: In(thinned.Masksembles(4, 3))),
    "Residual": (
        True,
        lambda: In(nn.Sequential(thinned.Dropout(0.5), thinned.Residual(thinned.Dropout(0.5), 0.5))),
    ),
    "a batch's Residual": (True, lambda: In(thinned.Residual(thinned.Dropout(0.5), 0.5, mode="batch"))),
    "windows": (
        True,
        lambda: In(thinned.Dropout(0.5), lambda layer, x: layer(x.reshape(-1, 1, 4)).reshape(x.shape)),
    ),
    "a row of all samples": (
        True,
        lambda: In(thinned.Dropout(0.5), lambda layer, x: x + layer(torch.ones(1, 4, 4))),
    ),
    "checkpoint": (
        True,
        lambda: In(thinned.Dropout(0.5), lambda f, x: checkpoint(f, x, use_reentrant=False)),
    ),
    "reentrant": (True, lambda: In(thinned.Dropout(0.5), lambda f, x: checkpoint(f, x, use_reentrant=True))),
}


def steps(model: nn.Module, x: Tensor, samples: Tensor | None, **options: Any) -> list[list[Tensor]]:
    def form(x: Tensor, model: nn.Module, step: int) -> Tensor:
        with thinned.address(model, seed=5, step=step, samples=samples, **options):
            return model(x)  # type: ignore[no-any-return]

    return [results(partial(form, step=step), x, model) for step in range(4)]


@pytest.mark.parametrize("samples", [None, IDS], ids=["one key", "a key for each sample"])
@pytest.mark.parametrize("name", INSIDE)
def test_dropout_within_the_branch_has_the_masks_of_its_rows(
    name: str, samples: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_key, make = INSIDE[name]
    torch.manual_seed(0)
    model, x = make(), torch.randn(6, 4, 4)
    if samples is None and not one_key:
        with pytest.raises(
            RuntimeError, match=r"give thinned\.address samples=, or compute this branch for all"
        ):
            steps(model, x, samples)
        return
    mine = steps(model, x, samples)
    all_rows(monkeypatch)
    for each, expected in zip(mine, steps(model, x, samples), strict=True):
        assert_close(each, expected)


def test_samples_of_several_rows_and_along_another_dimension(monkeypatch: pytest.MonkeyPatch) -> None:
    several, x = In(thinned.Dropout(0.5)), torch.randn(6, 4, 4)
    turned = In(thinned.Dropout(0.5), swapped)
    cases = [
        (several, torch.randn(18, 2), IDS, {}),
        *((turned, x, samples, {"sample_dim": {"block.branch.layer": 1}}) for samples in (IDS, None)),
    ]
    mine = [steps(model, x, samples, **options) for model, x, samples, options in cases]
    all_rows(monkeypatch)
    for each, (model, x, samples, options) in zip(mine, cases, strict=True):
        for got, expected in zip(each, steps(model, x, samples, **options), strict=True):
            assert_close(got, expected)


def test_dropouts_of_torch_that_are_intercepted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = In(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)), torch.randn(6, 5, 4)
    with thinned.intercept():
        mine = [*steps(model, x, None), *steps(model, x, IDS)]
        all_rows(monkeypatch)
        for each, expected in zip(mine, [*steps(model, x, None), *steps(model, x, IDS)], strict=True):
            assert_close(each, expected)


def packed(lstm: nn.Module, x: Tensor) -> Tensor:
    lengths = torch.full((len(x),), x.shape[1])
    y, _ = lstm(nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True))
    return nn.utils.rnn.pad_packed_sequence(y, batch_first=True)[0]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            In(thinned.VariationalGRU(4, 4, batch_first=True, input_p=0.5, weight_p=0.5), FIRST),
            "VariationalGRU with weight_p",
        ),
        (In(nn.LSTM(4, 4, 2, dropout=0.5), packed), "dropout of a packed sequence"),
        (In(nn.Identity(), lambda _, x: torch_functional.dropout(x[:1].expand(7, 4, 4))), "no multiple"),
        (In(thinned.Dropout(0.5), swapped), r"kept rows along dimension 0 or 1.*sample_dim="),
        (In(thinned.DropConnect(0.5)), "drop_connect of a tensor of . rows, which is no parameter"),
        (In(thinned.TargetedDropout(0.5)), "targeted_dropout of a tensor of . rows, which is no parameter"),
        (In(nn.Identity(), lambda _, x: within_an_address(x)), "enter it around the whole model"),
    ],
)
def test_masks_that_the_rows_cannot_have_are_refused(model: nn.Module, message: str) -> None:
    for samples in (None, IDS):
        with thinned.intercept(), pytest.raises(RuntimeError, match=message):
            steps(model, torch.randn(6, 4, 4), samples)
        assert active.rows is None


def within_an_address(x: Tensor) -> Tensor:
    with thinned.address(nn.Identity(), seed=1, step=1):
        return x


def test_a_key_for_intercept_is_refused() -> None:
    with thinned.intercept(key=KEY), pytest.raises(RuntimeError, match=r"use thinned\.address"):
        residual(torch.ones(6, 3), torch_functional.dropout, 0.5, key=KEY)


@pytest.mark.parametrize("samples", [None, IDS[:2]], ids=["one key", "a key for each sample"])
@pytest.mark.usefixtures("fresh_compiler")
def test_one_kept_row_is_not_a_row_of_all_samples(
    samples: Tensor | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = INSIDE["a row of all samples"][1](), torch.randn(2, 4, 4)
    mine = steps(model, x, samples)
    if samples is not None:
        compiled = torch.compile(model, backend="eager")
        for step, each in enumerate(mine):
            with thinned.address(model, seed=5, step=step, samples=samples):
                torch.testing.assert_close(compiled(x).detach(), each[0])
    all_rows(monkeypatch)
    for each, expected in zip(mine, steps(model, x, samples), strict=True):
        assert_close(each, expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_residual_in_a_checkpoint(reentrant: bool) -> None:
    model, x = In(nn.Sequential(nn.Linear(4, 4), thinned.Dropout(0.5))), torch.randn(6, 4)
    for samples in (None, IDS):
        results_of = []
        for call in (
            lambda model, x: checkpoint(model, x, use_reentrant=reentrant),
            lambda model, x: model(x),
        ):
            with thinned.address(model, seed=5, step=1, samples=samples):
                results_of.append(results(lambda x, model, call=call: call(model, x), x, model))
        assert_close(*results_of)


def test_the_mask_of_a_site() -> None:
    model, x = In(nn.Linear(4, 4)), torch.ones(6, 4)
    for samples in (None, IDS):
        with thinned.address(model, seed=5, step=1, samples=samples) as address:
            y = model(x)
        assert address.mask_of("block", (6, 4)).equal(y != x)


def test_monte_carlo(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    branch = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4), thinned.Dropout(0.5))
    model, x = nn.Sequential(thinned.Residual(branch, 0.5), nn.Linear(4, 3)), torch.randn(5, 4)
    mine = thinned.montecarlo.predict(model, x, 20)
    all_rows(monkeypatch)
    torch.testing.assert_close(mine.mean, thinned.montecarlo.predict(model, x, 20).mean)


def test_where_processes_wait_for_each_other_a_dropped_branch_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    branch, x = nn.Linear(3, 3), torch.randn(6, 3, requires_grad=True)
    with monkeypatch.context() as context:
        context.setattr(file, "has_peers", lambda: True)
        residual(x, branch, 0.5, key=key_that_keeps(0, 6)).sum().backward()
    assert branch.weight.grad is not None
    assert not branch.weight.grad.any()
    assert x.grad.equal(torch.ones_like(x))  # type: ignore[union-attr]


def of_rank(samples: Tensor | None) -> list[list[list[Tensor]]]:
    torch.manual_seed(0)
    model, x = In(nn.Sequential(nn.Linear(4, 4), thinned.Dropout(0.5))), torch.randn(6, 4)
    mine = slice(3 * dist.get_rank(), 3 * dist.get_rank() + 3)
    forms = []
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            forms.append(steps(model, x[mine], None if samples is None else samples[mine]))
            all_rows(patch)
    return forms


@pytest.mark.parametrize("world", [2], indirect=True)
@pytest.mark.parametrize("samples", [None, IDS], ids=["one key", "a key for each sample"])
def test_processes_of_data_parallel_training(samples: Tensor | None, world: World) -> None:
    ranks = world.run(of_rank, samples)
    for gathered, masked in ranks:
        for mine, expected in zip(gathered, masked, strict=True):
            assert_close(mine, expected)


def blocks(count: int) -> nn.Module:
    torch.manual_seed(0)
    branches = [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), thinned.Dropout(0.3)) for _ in range(count)]
    return nn.Sequential(*(thinned.Residual(branch, 0.5) for branch in branches))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, after a break
@pytest.mark.parametrize(
    ("backend", "count", "address", "full"),
    [
        ("eager", 1, None, True),
        ("eager", 1, None, False),
        ("eager", 1, IDS, True),
        pytest.param("aot_eager", 2, IDS, True, marks=pytest.mark.slow),
        pytest.param("aot_eager", 1, "one key", False, marks=pytest.mark.slow),
        pytest.param("eager", 6, IDS, False, marks=pytest.mark.slow),
        pytest.param("inductor", 2, None, True, marks=pytest.mark.slow),
        pytest.param("inductor", 2, IDS, False, marks=pytest.mark.slow),
    ],
)
def test_compiled_for_any_number_of_rows(backend: str, count: int, address: Any, full: bool) -> None:
    """One graph where Dynamo captures dynamic shapes; else parts, which the first of 20 steps compile."""
    model, x, counter = blocks(count), torch.randn(6, 4), CompileCounterWithBackend(backend)
    samples = address if isinstance(address, Tensor) else None
    if address is None:
        for block in model:
            block.branch[2].p = 0.0  # draws for the rows that it sees
    compiled, frames = torch.compile(model, backend=counter, fullgraph=full), []

    def form(x: Tensor, _: nn.Module, call: nn.Module, step: int) -> Tensor:
        if address is None:
            torch.manual_seed(step)
            return call(x)  # type: ignore[no-any-return]
        with thinned.address(model, seed=5, step=step, samples=samples):
            return call(x)  # type: ignore[no-any-return]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=full):
        for step in range(20):
            mine = results(partial(form, call=compiled, step=step), x, model)
            assert_close(mine, results(partial(form, call=model, step=step), x, model))
            frames.append(counter.frame_count)
    assert frames[-1] == (1 if full else frames[9])
