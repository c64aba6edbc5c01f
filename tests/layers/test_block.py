"""DropBlock: which blocks are dropped, how often, and what becomes of the rest."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
from backend_under_test import BackendUnderTest
from thinned import Key, spec
from thinned.compare.layers.block import ENTRIES, Blocks
from thinned.layers.block import (
    DropBlock1d,
    DropBlock2d,
    DropBlock3d,
    _seed_threshold,
    drop_block1d,
    drop_block2d,
    drop_block3d,
)
from thinned.op.noise import normal, opmath
from verdicts import breaks

KEY = Key(7)
FUNCTIONS = {1: drop_block1d, 2: drop_block2d, 3: drop_block3d}
LAYERS = {1: DropBlock1d, 2: DropBlock2d, 3: DropBlock3d}
MAPS = [
    ((9,), 2),
    ((9,), 3),
    ((4,), 7),
    ((5, 8), 4),
    ((6, 7), (3, 2)),
    ((5, 4, 6), 2),
    ((4, 5, 6), (1, 3, 9)),
]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:, :1].expand(x.shape),
}


def solved(sizes: tuple[int, ...], block: Any, p: float) -> tuple[list[int], int, float]:
    """A block's sizes, cut to the map, and what the layer solves for them."""
    blocks = (block,) * len(sizes) if isinstance(block, int) else block
    blocks = [min(b, size) for b, size in zip(blocks, sizes, strict=True)]
    return blocks, *_seed_threshold(spec.threshold(p), *sizes, *blocks)


def brute_force(key: int, masks: tuple[int, ...], sizes: tuple[int, ...], block: Any, p: float) -> Tensor:
    """The kept positions, block by block, from the specification's own numbers."""
    blocks, no_seed_T, _ = solved(sizes, block, p)
    places = [size - b + 1 for size, b in zip(sizes, blocks, strict=True)]
    index = np.arange(math.prod(masks) * math.prod(places), dtype=np.uint64)
    seeds = (spec.uniform(key, index).astype(np.uint64) >= no_seed_T).reshape(*masks, *places)
    keep = torch.ones(*masks, *sizes, dtype=torch.bool)
    for place in np.argwhere(seeds).tolist():
        mask, corner = place[: len(masks)], place[len(masks) :]
        keep[(*mask, *(slice(at, at + b) for at, b in zip(corner, blocks, strict=True)))] = False
    return keep


@pytest.mark.parametrize(
    ("shares", "masks"),
    [({}, (3, 4)), ({"couple_channels": True}, (3, 1)), ({"batchwise": True}, (1, 4))],
    ids=str,
)
@pytest.mark.parametrize(("sizes", "block"), MAPS)
def test_every_backend_drops_the_blocks_of_the_specification(
    backend: BackendUnderTest,
    sizes: tuple[int, ...],
    block: Any,
    shares: dict[str, bool],
    masks: tuple[int, ...],
) -> None:
    x = torch.randn(3, 4, *sizes, device=backend.device)
    y = FUNCTIONS[len(sizes)](x, 0.4, block, **shares, key=KEY).cpu()
    keep = brute_force(7, masks, sizes, block, 0.4).expand(x.shape)
    _, _, kept_share = solved(sizes, block, 0.4)
    oracle.assert_same(y, torch.where(keep, x.cpu() * (1 / kept_share), 0))


OPTIONS: list[dict[str, Any]] = [
    {"scale_by_keep": False},
    {"scale_by_keep": False, "scale": "counted", "batchwise": True},
    {"with_noise": True},
    {"with_noise": True, "couple_channels": True, "batchwise": True},
    {"with_noise": True, "gamma_scale": 0.5},
    {"gamma_scale": 0.25},
    {"gamma_scale": 4.0},
]


def formula(x: Tensor, keys: Key, p: float, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The options of timm, and their derivative, in plain torch for the mask of ``p * gamma_scale``."""
    p = min(1.0, p * options.get("gamma_scale", 1.0))
    noisy = options.get("with_noise", False)
    samples = 1 if options.get("batchwise") and not keys.shape else len(x)
    masks = (samples, 1 if options.get("couple_channels") else x.shape[1])
    if keys.shape:
        each = [brute_force(int(Key.from_bits(bits)), (1, masks[1]), x.shape[2:], 3, p) for bits in keys.bits]
        keep = torch.cat(each)
    else:
        keep = brute_force(int(keys), masks, x.shape[2:], 3, p)
    _, _, kept_share = solved(tuple(x.shape[2:]), 3, p)
    scaled = not noisy and options.get("scale_by_keep", True)
    scale = (1 / kept_share if kept_share else 0.0) if scaled else 1.0
    noise = normal(keys.fold("noise"), keep.shape, dtype=opmath(x.dtype)) if noisy else torch.zeros(())
    slope = (keep * scale).expand(x.shape)
    return torch.where(keep, x * scale, noise.to(x.dtype)), slope.to(x.dtype)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_backend_has_the_options_of_timm(
    backend: BackendUnderTest, options: dict[str, Any], batch: bool, inplace: bool
) -> None:
    keys = KEY.fold(torch.arange(3)) if batch else KEY
    x = oracle.specials((3, 4, 6, 7), torch.float32)
    expected, slope = formula(x, keys, 0.4, options)
    leaf = x.to(backend.device).requires_grad_()
    given, key = leaf.clone(), keys.to(backend.device)
    y = DropBlock2d(0.4, 3, inplace, **options)(given, key=key)
    assert (y is given) is inplace
    if options.get("with_noise") and backend.device != "cpu":  # another device has an erfinv of its own
        torch.testing.assert_close(y.detach().cpu(), expected, rtol=5e-7, atol=1e-7, equal_nan=True)
    else:
        oracle.assert_same(y.detach().cpu(), expected)
    upstream = torch.linspace(1, 2, x.numel(), device=backend.device).view(x.shape)
    (grad,) = torch.autograd.grad(y, leaf, upstream)
    oracle.assert_same(grad.cpu(), upstream.cpu() * slope)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("coupled", [False, True])
def test_noise_has_the_dtype_and_the_layout_of_the_input(
    dtype: torch.dtype, layout: str, coupled: bool
) -> None:
    x = LAYOUTS[layout](torch.randn(3, 4, 6, 7, dtype=dtype))
    y = drop_block2d(x, 0.4, 3, with_noise=True, couple_channels=coupled, key=KEY)
    assert y.stride() == x.stride()
    oracle.assert_same(y, formula(x, KEY, 0.4, {"with_noise": True, "couple_channels": coupled})[0])


def test_noise_is_standard_normal_and_that_of_its_own_key() -> None:
    y = drop_block2d(torch.zeros(40, 50, 9, 9), 1.0, 3, with_noise=True, key=KEY)
    assert stats.kstest(y.double().flatten().numpy(), "norm").pvalue > chance.FALSE_ALARM
    assert not y.equal(normal(KEY, y.shape))  # the mask's numbers


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiled_and_transformed_options(options: dict[str, Any]) -> None:
    layer = DropBlock2d(0.4, 3, **options)
    x = torch.randn(2, 3, 4, 6, 7)

    def call(x: Tensor, bits: Tensor) -> Tensor:
        return layer(x, key=Key.from_bits(bits))

    def slope(x: Tensor, bits: Tensor) -> Tensor:
        return torch.func.grad(lambda x: call(x, bits).sum())(x)

    bits = KEY.fold(torch.arange(2)).bits
    expected = [call(x[i], bits[i]) for i in range(2)]
    slopes = [formula(x[i], Key.from_bits(bits[i]), 0.4, options)[1] for i in range(2)]
    oracle.assert_same(torch.func.vmap(call)(x, bits), torch.stack(expected))
    oracle.assert_same(torch.func.vmap(slope)(x, bits), torch.stack(slopes))
    for i in range(2):
        leaf = x[i].clone().requires_grad_()
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(leaf, bits[i])
        oracle.assert_same(y.detach(), expected[i])
        oracle.assert_same(torch.autograd.grad(y.sum(), leaf)[0], slopes[i])


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("options", [{}, *OPTIONS], ids=str)
def test_an_exported_layer_has_gradients(options: dict[str, Any], strict: bool) -> None:
    layer, x = DropBlock2d(0.4, 3, **options), torch.randn(3, 4, 6, 7, requires_grad=True)
    exported = torch.export.export(layer, (x.detach(),), strict=strict).module()
    results = []
    for call in (exported, layer):
        torch.manual_seed(3)
        y = call(x)
        results += [y.detach(), *torch.autograd.grad(y.sum(), x)]
    for mine, expected in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(mine, expected)


def test_a_layer_pickled_without_the_options_of_timm_runs() -> None:
    layer = DropBlock2d(0.4, 3)
    x = torch.randn(2, 3, 6, 7)
    y = layer(x, key=KEY)
    for name in ("batchwise", "scale_by_keep", "with_noise", "gamma_scale"):
        del vars(layer)[name]
    oracle.assert_same(layer(x, key=KEY), y)


@pytest.mark.parametrize("p", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize(
    ("sizes", "block"), [((11,), 4), ((7, 9), 3), ((32, 32), 7), ((5, 6, 7), 2), ((3, 4), 9)]
)
def test_the_seeds_give_the_expected_share(sizes: tuple[int, ...], block: int, p: float) -> None:
    blocks = Blocks(sizes, block, p)
    _, no_seed_T, kept_share = solved(sizes, block, p)
    exact = (no_seed_T / 2**32) ** blocks.cover.sum(1)
    assert kept_share == pytest.approx(float(exact.mean()), rel=1e-12)
    steps = float(blocks.cover.sum(1).mean())  # of 2**-32, that one step of the threshold is for the share
    assert abs(kept_share - (1 - p)) <= (steps * 2**-32 if 0 < p < 1 else 0)


def test_a_line_is_dropped_as_the_paper_drops_it_with_the_seeds_of_thinned() -> None:
    """The formula in plain torch, given thinned's probability of a seed, has the same law."""
    n, sizes, block, p = 60_000, (4, 5), 2, 0.3
    blocks = Blocks(sizes, block, p)
    generator = torch.Generator().manual_seed(1)
    seeds = (torch.rand(n, 1, 3, 4, generator=generator) >= blocks.seedless).float()
    paper = nn.functional.max_pool2d(nn.functional.pad(seeds, [1] * 4), block, stride=1).flatten(1)
    ours = (drop_block2d(torch.ones(n, 1, *sizes), p, block, key=KEY) == 0).flatten(1)
    shares = [np.bincount(each.sum(1).long().numpy(), minlength=21) for each in (paper, ours)]
    seen = [i for i in range(21) if min(share[i] for share in shares) >= 100]
    table = [[share[i] for i in seen] for share in shares]
    assert stats.chi2_contingency(table).pvalue > chance.FALSE_ALARM


class Wrong(nn.Module):
    """DropBlock2d with one mistake."""

    def __init__(self, mistake: str, p: float, block_size: int, couple_channels: bool = False) -> None:
        super().__init__()
        self.mistake, self.p = mistake, p
        coupled = (couple_channels or mistake == "coupled") and mistake != "independent"
        p = p * (1.02 if mistake == "biased" else 1)
        self.layer = DropBlock2d(p, block_size, couple_channels=coupled)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        if self.mistake == "specks":
            return nn.functional.dropout(y, 0.001)
        if self.mistake == "off centre":
            return y.roll(1, -1)
        if self.mistake == "batch scale":
            return y * (1 - self.p) / (y != 0).float().mean()
        if self.mistake == "gradient":
            return y + (x - x.detach())
        return y


@pytest.mark.parametrize(
    ("mistake", "law"),
    [
        ("biased", "rate"),
        ("specks", "union of blocks"),
        ("off centre", "positions, even blocks"),
        ("coupled", "independence"),
        ("independent", "coupled channels"),
        ("batch scale", "scale"),
        ("gradient", "mask of gradient"),
    ],
)
def test_laws_catch(mistake: str, law: str) -> None:
    assert breaks(ENTRIES[1], law, partial(Wrong, mistake))


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_examples_of_vmap_share_a_key(layout: str, coupled: bool) -> None:
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 6)).repeat(2, 1, 1, 1, 1).movedim(0, 2)

    def call(x: Tensor) -> Tensor:
        return drop_block2d(x, 0.4, 3, couple_channels=coupled, key=KEY)

    one = call(x[:, :, 0])
    oracle.assert_same(torch.func.vmap(call, in_dims=2)(x), torch.stack([one, one]))
    upstream = torch.func.vmap(torch.func.grad(lambda x: call(x).sum()), in_dims=2)(x)
    assert upstream.ne(0).equal(torch.stack([one, one]).ne(0))


@pytest.mark.parametrize("p", [0.4, 1.0])
@pytest.mark.parametrize(
    ("scale", "coupled"), [("expected", False), ("counted", False), ("counted", True)], ids=str
)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
def test_values_are_rounded_once_and_what_is_dropped_is_plus_zero(
    dtype: torch.dtype, scale: Any, coupled: bool, p: float
) -> None:
    drop = partial(drop_block2d, p=p, block_size=(2, 3), scale=scale, couple_channels=coupled, key=KEY)
    x = oracle.specials((6, 4, 7, 9), dtype).requires_grad_()
    keep = drop(torch.ones(x.shape)) != 0
    _, _, kept_share = solved((7, 9), (2, 3), p)
    opmath = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    factor = torch.tensor(1 / kept_share if kept_share else 0.0, dtype=opmath)
    if scale == "counted":
        factor = 4 * 7 * 9 / keep.sum((1, 2, 3), keepdim=True).clamp(min=1).to(opmath)
        assert len(factor.unique()) > 2 or p == 1

    def expected(x: Tensor) -> Tensor:
        if x.is_complex():
            return torch.complex(expected(x.real), expected(x.imag))
        return torch.where(keep, (x.to(opmath) * factor).to(x.dtype), 0)

    y = drop(x)
    oracle.assert_same(y, expected(x.detach()))
    (grad,) = torch.autograd.grad(y, x, x.detach().resolve_conj())
    oracle.assert_same(grad, expected(x.detach()))


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_of_output_and_gradient(layout: str, coupled: bool) -> None:
    x = LAYOUTS[layout](torch.randn(3, 4, 5, 6)).detach().requires_grad_()
    y = drop_block2d(x, 0.4, 3, couple_channels=coupled, key=KEY)
    assert y.stride() == torch.empty_like(x).stride()
    oracle.assert_same(y, drop_block2d(x.detach().contiguous(), 0.4, 3, couple_channels=coupled, key=KEY))
    for upstream in (torch.ones(y.shape), torch.ones(()).expand(y.shape), torch.ones_like(y)):
        (grad,) = torch.autograd.grad(y, x, upstream, retain_graph=True)
        assert grad.stride() == y.stride()
        assert grad.ne(0).equal(y.ne(0))


def test_inplace() -> None:
    x = torch.randn(3, 4, 5, 6, requires_grad=True)
    written = x.clone()
    results = drop_block2d(written, 0.4, 3, inplace=True, key=KEY), drop_block2d(x, 0.4, 3, key=KEY)
    assert results[0] is written
    oracle.assert_same(*results)
    oracle.assert_same(*(torch.autograd.grad(y.sum(), x)[0] for y in results))
    used = x.exp()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        drop_block2d(used, 0.4, 3, inplace=True).sum().backward()


def test_an_expanded_input_is_not_written() -> None:
    x = torch.ones(1, 1, 1, 6).expand(1, 1, 5, 6)
    with pytest.raises(RuntimeError, match="single memory location"):
        drop_block2d(x, 0.9, 3, inplace=True, key=KEY)
    assert x.equal(torch.ones(1, 1, 5, 6))
    assert x._version == 0


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("inplace", [False, True])
def test_an_input_without_elements_is_returned(dims: int, inplace: bool) -> None:
    for shape in ((0, 3, *(5,) * dims), (2, 0, *(5,) * dims), (2, 3, *(0,) * dims)):
        empty = torch.empty(shape)
        assert LAYERS[dims](0.5, 3, inplace)(empty) is empty


@pytest.mark.usefixtures("fresh_compiler")
def test_another_batch_and_other_channels_take_no_other_graph() -> None:
    layer = DropBlock1d(0.4, 2, couple_channels=True, scale="counted")
    fast = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for stance, masks in (("default", (3, 4)), ("fail_on_recompile", (7, 2))):
        results = []
        with torch.compiler.set_stance(stance):
            for call in (layer, fast):
                torch.manual_seed(3)
                x = torch.ones(*masks, 9, requires_grad=True)
                y = call(x)
                results.append((y, *torch.autograd.grad(y.square().sum(), x)))
        (y, grad), (other, other_grad) = results
        oracle.assert_same(other, y)
        torch.testing.assert_close(other_grad, grad)


def test_text() -> None:
    text = (
        "thinned.DropBlock2d(p=0.4, block_size=(2, 3), inplace=False, couple_channels=True, scale='counted', "
        "batchwise=False, scale_by_keep=True, with_noise=False, gamma_scale=0.5)"
    )
    layer = DropBlock2d(
        drop_prob=0.4, block_size=(2, 3), couple_channels=True, scale="counted", gamma_scale=0.5, fast=False
    )
    assert repr(layer) == text


def test_defaults_are_the_papers() -> None:
    assert (DropBlock2d().p, DropBlock2d().block_size) == (0.1, 7)


def test_two_names_for_one_argument() -> None:
    with pytest.raises(TypeError, match=re.escape("DropBlock1d() got p=0.2 and drop_prob=0.3")):
        DropBlock1d(0.2, 3, drop_prob=0.3)


def test_noise_is_real() -> None:
    x = torch.ones(2, 3, 5, 6, dtype=torch.complex64)
    assert drop_block2d(x, 0.5, 3, with_noise=True, training=False) is x
    with pytest.raises(NotImplementedError, match=re.escape("torch.complex64 of shape (2, 3, 5, 6)")):
        drop_block2d(x, 0.5, 3, with_noise=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block_size": 0}, ValueError, "at least 1, or 2 of them, but got 0"),
        ({"block_size": (3, -1)}, ValueError, "at least 1, or 2 of them, but got (3, -1)"),
        ({"block_size": (3, 3, 3)}, ValueError, "or 2 of them, but got (3, 3, 3)"),
        ({"block_size": 2.5}, TypeError, "an integer or 2 of them, got 2.5"),
        ({"block_size": (2, 2.5)}, TypeError, "an integer or 2 of them, got (2, 2.5)"),
        ({"block_size": "7"}, TypeError, "an integer or 2 of them, got '7'"),
        ({"scale": "mean"}, ValueError, "'expected' or 'counted', but got 'mean'"),
        ({"inplace": 0.25}, TypeError, "gamma_scale, is passed by name here: gamma_scale=0.25"),
        ({"gamma_scale": -1.0}, ValueError, "at least 0 and finite, but got -1.0"),
        ({"gamma_scale": math.nan}, ValueError, "at least 0 and finite, but got nan"),
        ({"p": 4.0, "gamma_scale": 0.1}, ValueError, "between 0 and 1, but got 4.0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"p": 0.5, "block_size": 3, **arguments}
    with pytest.raises(error, match=re.escape(message)):
        DropBlock2d(**arguments)
    for training in (True, False):
        with pytest.raises(error, match=re.escape(message)):
            drop_block2d(torch.ones(2, 3, 5, 6), training=training, **arguments)


@pytest.mark.parametrize("shape", [(5,), (5, 6), (1, 2, 3, 5, 6)])
def test_wrong_dimensions(shape: tuple[int, ...]) -> None:
    message = f"needs an input of 4 dimensions, or of 3 for one sample, got one of shape {shape}"
    with pytest.raises(ValueError, match=re.escape(message)):
        DropBlock2d(0.5, 3)(torch.ones(shape))


def test_keys_need_samples() -> None:
    with pytest.raises(RuntimeError, match=re.escape("keys of shape (2,) do not fit one sample")):
        drop_block2d(torch.ones(2, 5, 6), 0.5, 3, key=KEY.fold(torch.arange(2)))
