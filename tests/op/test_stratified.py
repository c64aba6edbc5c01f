"""Stratified draws: the numbers of the specification on every backend, and their laws."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, groupby
from operator import itemgetter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

import chance
import oracle
import strategies
import thinned
from backend_under_test import BackendUnderTest
from chance import FALSE_ALARM
from test_spec import STRATIFIED
from thinned import Key, backends, op, spec
from thinned.backends import reference
from thinned.backends.strata import prime_for
from thinned.compare.implementation import Implementation
from thinned.compare.laws import Law, Verdict, examine
from thinned.compare.layers import entry_of
from thinned.compare.settings import Settings
from thinned.geometry import Geometry, shared
from thinned.layers._arguments import key_for
from thinned.op.noise import logistic, normal, uniform

STRATA = (1, 2, 3, 20, 64, 100, 1000, 65521)
N = 2**18


def assert_numbers(
    backend: BackendUnderTest,
    key: Tensor,
    shape: tuple[int, ...],
    geometry: Geometry,
    draw: Tensor,
    strata: int,
) -> None:
    found = backend.uniform(key, shape, geometry, draw, strata)
    oracle.assert_same(found, oracle.uniform(key, shape, geometry, draw, strata))
    assert found.is_contiguous()


def test_known_answers(backend: BackendUnderTest) -> None:
    for (i, strata), answers in groupby(sorted(STRATIFIED, key=itemgetter(1, 3)), key=itemgetter(1, 3)):
        if strata == 20 or not backend.slow:
            keys, _, draws, _, expected = zip(*answers, strict=True)
            rows = torch.stack([oracle.key_bits(key) for key in keys])
            found = backend.uniform(rows, (len(rows), 1), Geometry((0, 1), i), torch.tensor(draws), strata)
            assert (found.flatten().long() + 2**31).tolist() == list(expected)


@given(data=st.data())
def test_any_geometry_keys_and_draws(backend: BackendUnderTest, data: st.DataObject) -> None:
    shape = data.draw(strategies.shapes(most=1500))
    key = data.draw(strategies.batches(shape))
    geometry = data.draw(strategies.geometries(shape, key.dim()))
    strata = data.draw(st.sampled_from(STRATA) | st.integers(1, 65521))
    draw = torch.tensor(data.draw(st.integers(0, strata - 1)))
    if data.draw(st.booleans()):
        draw = (draw + torch.arange(key.numel()).reshape(key.shape)) % strata
    if not backend.enough():
        assert_numbers(backend, key, shape, geometry, draw, strata)


@pytest.mark.parametrize("strata", STRATA)
def test_a_draw_for_each_row(backend: BackendUnderTest, strata: int) -> None:
    """Rows under one key, under keys that repeat, under an expanded batch; draws wrap around."""
    draws = torch.arange(6) * (strata // 3 + 1)
    key = torch.tensor([7, -8]).expand(3, 2)
    assert_numbers(backend, key, (3, 2, 70), shared((3, 2, 70), (), 2), draws.reshape(3, 2), strata)
    if backend.slow and strata != 20:
        return
    assert_numbers(backend, key, (3, 2, 70), Geometry((0, 70, 1)), draws.reshape(3, 2).flip(0), strata)
    for key in (torch.tensor([7]).expand(6), torch.tensor([7, -8, 7, 9, -8, 7]), torch.arange(6)):
        assert_numbers(backend, key, (6, 2, 70), Geometry((0, 70, 1), 100), draws, strata)


def test_rows_of_any_length(backend: BackendUnderTest) -> None:
    for count in (1, 31, 32, 33, 63, 65, 4095, 4097, 9000)[:: 3 if backend.slow else 1]:
        assert_numbers(backend, torch.tensor(7), (count,), Geometry((1,)), torch.tensor(4), 20)


def test_nothing(backend: BackendUnderTest) -> None:
    assert backend.uniform(torch.tensor(7), (0, 3), Geometry((3, 1)), torch.tensor(2), 20).shape == (0, 3)
    keys = torch.arange(0)
    assert backend.uniform(keys, (0, 3), Geometry((0, 1)), keys, 20).shape == (0, 3)
    assert_numbers(backend, torch.tensor(7), (), Geometry((), 300), torch.tensor(3), 20)


@pytest.mark.parametrize(
    ("draw", "strata", "message"),
    [
        (torch.tensor(1), 0, "strata must be in 1 .. 65521, got 0"),
        (torch.tensor(1), 65522, "strata must be in 1 .. 65521, got 65522"),
        (torch.tensor(1.0), 20, "draws must be int64, got torch.float32"),
        (torch.arange(3), 20, r"draws of shape \(3,\) do not fit keys of shape \(2,\)"),
    ],
)
def test_refusals(backend: BackendUnderTest, draw: Tensor, strata: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        backend.uniform(torch.arange(2), (2, 5), Geometry((0, 1)), draw, strata)


def test_threads_share_the_work(restore_threads: None) -> None:
    del restore_threads
    keys, draws = torch.arange(30) % 4, torch.arange(30)
    expected = op.uniform(keys, (30, 5000), Geometry((0, 1)), draws, 20)
    torch.set_num_threads(3)
    assert op.uniform(keys, (30, 5000), Geometry((0, 1)), draws, 20).equal(expected)


NUMBERS = torch.randint(-(2**31), 2**31, (3, 4, 5), dtype=torch.int32)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, 2), (None, 0), (0, None)])
@pytest.mark.parametrize("numbers", [NUMBERS, NUMBERS[:, :, :1]], ids=["each", "shared by rows"])
@torch.no_grad()
def test_numbers_choose_under_vmap(in_dims: tuple[int | None, int | None], numbers: Tensor) -> None:
    def of_call(part: Tensor, dim: int | None, i: int) -> Tensor:
        return part[0] if dim is None else part[i]

    def call(x: Tensor, numbers: Tensor) -> Tensor:
        return op.choose(x, numbers, 2**31, 2.0, 0.5, 7.0)

    x = torch.randn(3, 4, 5)
    parts = [
        part[0] if dim is None else part.movedim(0, dim)
        for part, dim in zip((x, numbers), in_dims, strict=True)
    ]
    each = [call(of_call(x, in_dims[0], i), of_call(numbers, in_dims[1], i)) for i in range(3)]
    assert torch.vmap(call, in_dims)(*parts).equal(torch.stack(each))


@pytest.mark.parametrize("keys", [torch.tensor(7), torch.tensor([7, -8, 9])], ids=["one key", "a key a row"])
def test_opcheck(keys: Tensor) -> None:
    for draw in (torch.tensor(3), torch.arange(keys.numel()).reshape(keys.shape)):
        torch.library.opcheck(torch.ops.thinned.uniform.default, (keys, [3, 50], [50, 1], 9, draw, 20))
    constants = 2**31, 2.0, 0.5, 7.0
    torch.library.opcheck(torch.ops.thinned.choose.default, (torch.randn(3, 4, 5), NUMBERS, *constants))


@pytest.mark.parametrize(
    ("in_dims", "keys", "draws"),
    [
        ((0, None), torch.arange(4), torch.tensor(3)),
        ((None, 0), torch.tensor(7), torch.arange(4)),
        ((0, 0), torch.arange(4), torch.arange(4)),
        ((None, 0), torch.arange(3), torch.arange(4)),
        ((1, None), torch.arange(12).reshape(3, 4), torch.arange(3)),
        ((None, 1), torch.arange(3), torch.arange(12).reshape(3, 4)),
        ((1, 0), torch.arange(12).reshape(3, 4), torch.arange(4)),
    ],
)
def test_vmap(in_dims: tuple[int | None, ...], keys: Tensor, draws: Tensor) -> None:
    def call(key: Tensor, draw: Tensor) -> Tensor:
        return op.uniform(key, (3, 50), Geometry((0, 1)), draw, 20)

    found = torch.vmap(call, in_dims)(keys, draws)
    for i in range(4):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip((keys, draws), in_dims, strict=True)]
        assert found[i].equal(call(*one))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_sizes_and_draws_that_change() -> None:
    def call(x: Tensor, draw: Tensor) -> Tensor:
        return thinned.functional.dropout(x, 0.3, key=Key(7).stratified(draw, 20))

    compiled = torch.compile(call, fullgraph=True, dynamic=True)
    for n in (3, 8, 200):
        for draw in (torch.tensor(n % 20), torch.arange(n)):
            x = torch.randn(n, 5)
            assert compiled(x, draw).equal(call(x, draw))


def masks(draws: int, strata: int, p: float, n: int = N, seed: int = 7) -> NDArray[np.bool_]:
    keys = Key(seed).stratified(torch.arange(draws), strata)
    return thinned.keep_mask(keys, (draws, n), p).numpy()


def test_masks_are_the_specifications() -> None:
    for p in (1e-9, 0.1, 0.5, 1 - 2.0**-32, 1 - 1e-9, 1.0):
        found = masks(5, 20, p, 3000)
        for draw in range(5):
            assert (found[draw] == spec.keep_mask(7, 3000, p, draw=draw, strata=20)).all()


@pytest.mark.parametrize(
    ("strata", "p"), [(2, 0.5), (20, 0.1), (20, 0.5), (100, 0.25), (64, 0.25), (1000, 0.3)]
)
def test_as_many_draws_as_there_should_be_keep_an_element(strata: int, p: float) -> None:
    """Exactly ``S q``; fewer than one element in 1e6 meets the rounding of a stratum's width."""
    counts = masks(strata, strata, p, 2000).sum(0)
    assert (counts == round(strata * (1 - p))).all()


@pytest.mark.parametrize("strata", [3, 20, 64])
@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_each_draw_has_the_rate(strata: int, p: float) -> None:
    for mask in masks(3, strata, p):
        assert chance.rate(mask, p) > FALSE_ALARM


def test_rate_notices_two_percent() -> None:
    assert chance.rate(masks(1, 20, 0.102, 2**22)[0], 0.1) < FALSE_ALARM


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("apart", [1, 32, 128, 4096])
def test_elements_are_independent_within_a_draw_and_across(p: float, apart: int) -> None:
    first, other = masks(2, 20, p)
    assert chance.independence(first[:-apart], first[apart:], p=p) > FALSE_ALARM
    assert chance.independence(first[:-apart], other[apart:], p=p) > FALSE_ALARM


def test_sets_of_other_keys_are_independent() -> None:
    first, other = masks(2, 20, 0.3), masks(2, 20, 0.3, seed=8)
    for mask in first:
        for another in other:
            assert chance.independence(mask, another, p=0.3) > FALSE_ALARM


def both_kept(strata: int, q: float) -> float:
    """The probability that two draws keep an element, if each pair of draws has the same.

    ``S q`` draws keep it, a number that is rounded at random.
    """
    low = math.floor(strata * q)
    up = strata * q - low
    pairs = low * (low - 1) * (1 - up) + (low + 1) * low * up
    return pairs / (strata * (strata - 1))


def all_permutations(strata: int) -> NDArray[np.int64]:
    """The place of each draw, in the last dimension, under every affine permutation."""
    prime = prime_for(strata)
    a, b = np.arange(1, prime)[:, None, None], np.arange(prime)[:, None]
    place = (a * np.arange(strata) + b) % prime
    while (place >= strata).any():
        place = np.where(place >= strata, (a * place + b) % prime, place)
    return place.reshape(-1, strata)


def pair_probabilities(strata: int, q: float) -> NDArray[np.float64]:
    """The probability that both of two draws keep an element: an average over the permutations."""
    place = all_permutations(strata)
    apart = (place[:, :, None] - place[:, None]) % strata / strata
    return (np.maximum(q - apart, 0) + np.where(apart > 0, np.maximum(q - 1 + apart, 0), 0)).mean(0)


def pairs_agree(drawn: NDArray[np.bool_], strata: int, p: float) -> float:
    """The smallest probability of how often two draws both keep, times the number of pairs."""
    expected, n = pair_probabilities(strata, 1 - p), drawn.shape[1]
    pairs = list(combinations(range(len(drawn)), 2))
    worst = min(stats.binomtest(int((drawn[s] & drawn[t]).sum()), n, expected[s, t]).pvalue for s, t in pairs)
    return float(worst) * len(pairs)


@pytest.mark.parametrize(("strata", "p"), [(20, 0.1), (20, 0.5), (64, 0.3), (5, 0.5), (8, 0.5), (23, 0.2)])
def test_pairs_of_draws_covary(strata: int, p: float) -> None:
    assert pairs_agree(masks(5, strata, p), strata, p) > FALSE_ALARM


@pytest.mark.parametrize(("strata", "p"), [(20, 0.1), (20, 0.5), (64, 0.3), (5, 0.5), (8, 0.25), (23, 0.2)])
def test_covariance_of_pairs(strata: int, p: float) -> None:
    """On average that of uniform permutations, for prime strata in each pair; in no pair above 0."""
    both, q = pair_probabilities(strata, 1 - p), 1 - p
    pairs = both[~np.eye(strata, dtype=bool)]
    assert pairs.mean() == pytest.approx(both_kept(strata, q), rel=1e-12)
    assert pairs.max() < q**2
    if prime_for(strata) == strata:
        assert pairs == pytest.approx(both_kept(strata, q), rel=1e-12)


@pytest.mark.parametrize("rotated", [False, True], ids=["identity", "rotation"])
def test_pairs_notice_other_permutations(rotated: bool) -> None:
    index, p, strata = np.arange(N, dtype=np.uint64), 0.3, 20
    turn = spec.uniform(8, index) % 20 if rotated else 0
    width, u = np.uint32(2**32 // strata), spec.uniform(7, index)
    places = [(draw + turn) % strata for draw in range(5)]
    drawn = np.stack([u + np.asarray(place, np.uint32) * width < spec.threshold(p) for place in places])
    assert pairs_agree(drawn, strata, p) < FALSE_ALARM


def test_average_covariance_of_pairs() -> None:
    """Over all pairs of a set, exactly that of a fixed number of kept draws."""
    for strata, p in ((20, 0.1), (20, 0.5), (8, 0.25)):
        drawn = masks(strata, strata, p, 5000).astype(float)
        together = (drawn.sum(0) ** 2 - drawn.sum(0)) / (strata * (strata - 1))
        assert together == pytest.approx(both_kept(strata, 1 - p), rel=1e-12)


NOISE = {
    "uniform": (uniform, 1 / 12, 0.5),
    "normal": (normal, 1.0, 0.0),
    "logistic": (logistic, math.pi**2 / 3, 0),
}


@pytest.mark.parametrize("name", NOISE)
def test_noise_of_a_set_has_less_variance_in_the_mean(name: str) -> None:
    function, variance, mean = NOISE[name]
    keys = Key(7).stratified(torch.arange(20), 20)
    noise = function(keys, (20, 20_000), dtype=torch.float64).numpy()
    for draw in noise:
        assert chance.mean(draw, mean, variance) > FALSE_ALARM
    assert noise.mean(0).var() < variance / 20 / 5


DROPS: dict[str, tuple[Callable[..., Tensor], dict[str, Any], tuple[int, ...]]] = {
    "dropout": (thinned.functional.dropout, {}, (20, 4, 5)),
    "shared": (thinned.functional.dropout, {"broadcast_dims": (-1,)}, (20, 4, 5)),
    "channels": (thinned.functional.dropout2d, {}, (20, 4, 5, 2)),
    "path": (thinned.functional.drop_path, {"training": True}, (20, 4, 5)),
    "alpha": (thinned.functional.alpha_dropout, {"training": True}, (20, 4, 5)),
    "head": (thinned.functional.drop_head, {}, (20, 4, 5, 2)),
    "key": (thinned.functional.drop_key, {}, (20, 4, 5)),
    "token": (thinned.functional.token_dropout, {"num_prefix_tokens": 1}, (20, 4, 5)),
    "gaussian": (thinned.functional.gaussian_dropout, {}, (20, 4, 5)),
    "concrete": (
        lambda x, p, **options: thinned.functional.concrete_dropout(x, torch.tensor(p).logit(), **options),
        {},
        (20, 4, 5),
    ),
}


@pytest.mark.parametrize("name", DROPS)
def test_layers_have_the_numbers_in_every_mode(name: str) -> None:
    """Without gradients, with them, mapped, and one draw after the other."""
    function, options, shape = DROPS[name]
    keys = Key(7).stratified(torch.arange(20), 20)
    x = torch.randn(shape)
    y = function(x, 0.5, key=keys, **options)
    assert function(x.clone().requires_grad_(), 0.5, key=keys, **options).equal(y)
    for draw in (0, 13):
        one = function(x[draw : draw + 1], 0.5, key=keys_of(draw), **options)
        assert one.equal(y[draw : draw + 1])
    mapped = torch.vmap(
        lambda x, draw: function(x[None], 0.5, key=Key(7).stratified(draw[None], 20), **options)[0]
    )(x, torch.arange(20))
    assert mapped.equal(y)
    independent = function(x, 0.5, key=Key.from_bits(keys.bits), **options)
    assert not independent.equal(y)


def keys_of(draw: int) -> Key:
    return Key(7).stratified(torch.tensor([draw]), 20)


@pytest.mark.parametrize("name", [name for name in DROPS if name not in ("gaussian", "concrete")])
def test_gradients_are_those_of_a_mask(name: str) -> None:
    function, options, shape = DROPS[name]
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    key = Key(7).stratified(3, 20)
    (grad,) = torch.autograd.grad(function(x, 0.5, key=key, **options).sum(), x)
    again = torch.func.grad(lambda x: function(x, 0.5, key=key, **options).sum())(x.detach())
    _, tangent = torch.func.jvp(
        lambda x: function(x, 0.5, key=key, **options), (x.detach(),), (torch.ones_like(x),)
    )
    assert grad.equal(again)
    assert grad.equal(tangent)
    assert (grad == 0).any()
    assert torch.autograd.gradcheck(lambda x: function(x, 0.5, key=key, **options), (x,))


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("inplace", [False, True])
def test_values_are_masked_to_the_bit(dtype: torch.dtype, inplace: bool) -> None:
    """NaN, infinities and subnormals; a channels-last tensor keeps its strides."""
    key, T = Key(7).stratified(3, 20), spec.threshold(0.3)
    x = oracle.specials((2, 3, 8, 9), dtype).contiguous(memory_format=torch.channels_last)
    keep = torch.from_numpy(spec.keep_mask(7, (2, 3, 8, 9), 0.3, draw=3, strata=20))
    all_kept = oracle.masked_affine(x, torch.tensor(0), shared(x.shape), 2**32, spec.scale(T))
    y = thinned.functional.dropout(x, 0.3, inplace=inplace, key=key)
    assert y.stride() == x.stride()
    assert (y is x) == inplace
    oracle.assert_same(y.contiguous(), torch.where(keep, all_kept, torch.zeros((), dtype=dtype)))


def test_numbers_choose(backend: BackendUnderTest) -> None:
    """Ends of the range of numbers and of T; gaps, shared numbers and other orders in memory."""
    ends = torch.tensor([-(2**31), -(2**31) + 1, -1, 0, 2**31 - 2, 2**31 - 1], dtype=torch.int32)
    for T in (0, 1, 2**31, 2**31 + 1, 2**32 - 1, 2**32):
        for x in (
            torch.randn(5, 6),
            torch.randn(5, 12)[:, ::2],
            torch.randn(6, 5).t(),
            torch.randn(1, 6).expand(5, 6),
        ):
            for numbers in (ends, ends.expand(5, 6).contiguous()):
                found = backend.module.choose(x, numbers, T, 1.25, 0.5, -2.0)
                oracle.assert_same(found, reference.choose(x, numbers, T, 1.25, 0.5, -2.0))


def test_in_place_with_gradients() -> None:
    key = Key(7).stratified(3, 20)
    leaf = torch.randn(4, 50, requires_grad=True)
    expected = thinned.functional.dropout(leaf, 0.3, key=key)
    x = leaf * 1
    thinned.functional.dropout(x, 0.3, inplace=True, key=key)
    assert x.equal(expected)
    assert torch.autograd.grad(x.sum(), leaf)[0].equal(torch.autograd.grad(expected.sum(), leaf)[0])
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable"):
        thinned.functional.dropout(leaf, 0.3, inplace=True, key=key)
    assert leaf.equal(before)
    with pytest.raises(RuntimeError, match="single memory location"):
        thinned.functional.dropout(torch.ones(1, 5).expand(4, 5), 0.3, inplace=True, key=key)


def test_nested_and_sparse_tensors_have_independent_draws() -> None:
    key = Key(7).stratified(3, 20)
    independent = Key(7).fold(3)
    for x in (
        torch.nested.nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=torch.jagged).values(),
        torch.nested.as_nested_tensor([torch.ones(3, 4), torch.ones(2, 4)], layout=torch.jagged),
    ):
        y, z = (thinned.functional.dropout(x, 0.5, key=each) for each in (key, independent))
        if x.is_nested:
            assert y.values().equal(z.values())
        else:
            assert not y.equal(z)
    sparse = torch.ones(4, 4).to_sparse()
    y, z = (thinned.functional.dropout(sparse, 0.5, key=each).to_dense() for each in (key, independent))
    assert y.equal(z)


class OneDraw(thinned.Dropout):
    """Draw 3 of 20 of another set in each call."""

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if not self.training or self.p == 0:
            return super().forward(input, key=key)
        return super().forward(input, key=key_for(input, key).stratified(3, 20))


@pytest.mark.parametrize("law", entry_of("Dropout").laws, ids=lambda law: law.name)
def test_one_draw_keeps_the_laws_of_dropout(law: Law) -> None:
    found = examine(law, Implementation("draw 3 of 20", OneDraw), Settings(quick=True))
    assert found.verdict is Verdict.HOLDS, found.measured


def test_a_key_source_may_give_such_keys() -> None:
    class Source:
        hooks_id, stack, joined = "", [], False

        def sample_dim(self, input: Tensor) -> int:  # noqa: ARG002
            return 1

        def key_for(self, input: Tensor, sample_dim: int | None) -> Key:  # noqa: ARG002
            return Key(7).stratified(torch.arange(20), 20)

    active = thinned.key_source.active
    active.key_source = Source()
    try:
        y = thinned.functional.dropout(torch.ones(6, 20, 50), 0.5)
        q = torch.randn(20, 6, 4)
        with thinned.intercept():
            weights = torch.nn.functional.scaled_dot_product_attention(
                q, q, torch.eye(6).expand(20, 6, 6), dropout_p=0.5
            )
    finally:
        active.key_source = None
    assert ((y != 0).sum(1) == 10).all()
    assert ((weights != 0).sum(0) == 10).all()


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning")
def test_export_without_thinned() -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor, key: Tensor, draw: Tensor) -> Tensor:
            return thinned.functional.dropout(x, 0.3, key=Key.from_bits(key).stratified(draw, 20))

    inputs = torch.ones(4, 50), torch.tensor(7), torch.tensor(3)
    program = torch.export.export(Model(), inputs, strict=False).run_decompositions(thinned.decompositions())
    assert not any("thinned" in str(node.target) for node in program.graph.nodes)
    assert program.module()(*inputs).equal(Model()(*inputs))


def test_backends_take_no_draw_as_before() -> None:
    for backend in backends.available().values():
        geometry = Geometry((1,))
        plain = backend.uniform(torch.tensor(7), (300,), geometry)
        one = backend.uniform(torch.tensor(7), (300,), geometry, torch.tensor(0), 1)
        assert plain.equal(one)
