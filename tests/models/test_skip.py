"""thinned.convert(skip=True): blocks compute their branches for the rows that a DropPath keeps alone."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import itertools
import logging
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import thinned
from models import zoo
from thinned.layers.residual import Branch
from thinned.models.convert.skip import skippable, skipped_calls
from thinned.models.walk import modules_with_paths

ROWS, LENGTH, WIDTH = 6, 5, 8
COUNTED: list[int] = []  # the tokens that each call of a Counts saw


class Counts(nn.Linear):
    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            COUNTED.append(x.shape[:-1].numel())
        return super().forward(x)


class Base(nn.Module):
    """What the blocks of this file share: one DropPath, and what their forwards mention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.f, self.g = Counts(), Counts()
        self.drop_path = thinned.DropPath(0.5)
        self.shortcut = nn.Identity()
        self.gamma: Any = nn.Parameter(torch.linspace(0.5, 1, WIDTH))
        self.flag = True


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, 2, C // 2).permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return y.transpose(1, 2).reshape(B, N, C)


class ViT(Base):
    """An expression, with a mask that all rows share."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.drop_path1, self.drop_path2 = self.drop_path, thinned.DropPath(0.3, scale_by_keep=False)
        del self.drop_path

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.f(self.attn(self.norm1(x), mask=attn_mask)))
        return x + self.drop_path2(self.g(self.norm2(x)))


class Swin(Base):
    """A method that splits the rows in windows, and sizes that are used inside and outside of the branch."""

    def _windows(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        if self.flag:
            x = torch.roll(x, shifts=1, dims=1)
        return self.f(x.reshape(B * N, 1, C)).reshape(B, N, C)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        shortcut = x
        x = self.norm1(x).view(B, N * C).view(B, N, C)
        x = self._windows(x)
        x = shortcut + self.drop_path(x)
        x = x.reshape(B, -1, C)
        return x.reshape(B, N, C)


class ConvNeXt(Base):
    """Statements with two arms, and a shortcut that is computed after the branch."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm1(x)
        if self.flag:
            x = self.f(x)
        else:
            x = x.transpose(1, 2)
            x = self.f(x.transpose(1, 2))
        if self.gamma is not None:
            x = x.mul(self.gamma)
        return self.drop_path(x) + self.shortcut(shortcut)


class Torchvision(Base):
    """Of torchvision: an addition in place, in "batch" mode."""

    def __init__(self) -> None:
        super().__init__()
        del self.drop_path
        self.stochastic_depth = thinned.StochasticDepth(0.5, "row")

    def forward(self, input: Tensor) -> Tensor:
        result = self.gamma * self.f(input)
        result = self.stochastic_depth(result)
        result += input
        return result


class Batch(Torchvision):
    def __init__(self) -> None:
        super().__init__()
        self.stochastic_depth = thinned.StochasticDepth(0.5, "batch")


class Mixer(Base):
    """One DropPath twice."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.f(self.norm1(x).transpose(1, 2).transpose(1, 2)))
        return x + self.drop_path(self.gamma * self.g(self.norm2(x)))


class NoSum(Base):
    """No addition right around the DropPath."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.f(x))
        return x + self.gamma * self.drop_path(self.g(x)) + y * 2


class Arms(Base):
    """A DropPath in each arm, in a loop and in a with."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            with torch.enable_grad():
                if self.gamma is None:
                    x = x + self.drop_path(self.f(x))
                else:
                    y = self.gamma * self.g(x)
                    x = x + self.drop_path(y)
        return x


class Parallel(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(self.norm1(x))) + self.drop_path(self.g(self.norm2(x)))


class Cat(Base):
    """Of CaiT: two tensors of rows."""

    def forward(self, x: Tensor) -> Tensor:
        first = x[:, :1]
        u = torch.cat((first, x), dim=1)
        first = first + self.drop_path(self.f(self.norm1(u))[:, :1])
        return torch.cat([first, x[:, 1:]], dim=1)


class Inner(Base):
    """A DropPath in the branch of another, and modules in a loop of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = thinned.DropPath(0.5)
        self.blocks = nn.ModuleList([Counts(), Counts()])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        y = y + self.inner(self.f(y))
        for block in self.blocks:
            y = block(y)
        return self.drop_path(y) + x


def twice(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def inner(self: nn.Module, x: Tensor) -> Tensor:
        return 2 * forward(self, x)

    return inner


class Decorated(Base):
    """Within decorators that hold the forward in a closure, one of which changes what it gives."""

    @torch.enable_grad()
    @twice
    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x))


def with_drop_path() -> nn.Module:
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0.0, batch_first=True, norm_first=True)
    layer.dropout1, layer.dropout2 = thinned.DropPath(0.5), thinned.DropPath(0.5)  # type: ignore[assignment]
    return layer


BLOCKS: list[Callable[[], nn.Module]] = [
    ViT,
    Swin,
    ConvNeXt,
    Torchvision,
    Batch,
    Mixer,
    NoSum,
    Arms,
    Parallel,
]
BLOCKS += [Cat, Inner, Decorated, with_drop_path]
Around = Callable[[nn.Module], AbstractContextManager[Any]]
by_name = pytest.mark.parametrize("make", BLOCKS, ids=lambda make: make.__name__)


def seeded(_: nn.Module) -> AbstractContextManager[Any]:
    torch.manual_seed(1)
    return nullcontext()


def addressed(model: nn.Module) -> AbstractContextManager[Any]:
    return thinned.address(model, seed=3, step=5)


def with_samples(model: nn.Module) -> AbstractContextManager[Any]:
    return thinned.address(model, seed=3, step=5, samples=[9, 4, 11, 2, 3, 70])


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model of a block in float64, and one that skips."""
    torch.manual_seed(0)
    masked = nn.Sequential(make(), make()).double()
    return masked, thinned.convert(masked, skip=True, inplace=False)


def data(rows: int = ROWS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, LENGTH, WIDTH, dtype=torch.float64, generator=generator)


def gradients(model: nn.Module, x: Tensor, around: Around = seeded, *args: Any) -> list[Tensor]:
    """The output, and the gradients of the input and the parameters."""
    x = x.clone().requires_grad_()
    with around(model):
        # The first operation of Arms writes to its input.
        y = model(x, *args)
        parameters = [each for each in model.parameters() if each.requires_grad]
        weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
        found = torch.autograd.grad((y * weights).sum(), [x, *parameters], allow_unused=True)
    return [y.detach(), *(torch.zeros(()) if each is None else each for each in found)]


def assert_equal(found: list[Tensor], wanted: list[Tensor], rtol: float = 1e-9) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.expand_as(one), rtol=rtol, atol=rtol)


@pytest.mark.parametrize("around", [seeded, addressed, with_samples])
@by_name
def test_equals_the_masked_form(make: Callable[[], nn.Module], around: Around) -> None:
    if make is Inner and around is seeded:
        pytest.skip("the DropPath of its branch draws after the branch's own")
    masked, skipping = pair(make)
    COUNTED.clear()
    wanted = gradients(masked, data(), around)
    masked_count = sum(COUNTED)
    COUNTED.clear()
    assert_equal(gradients(skipping, data(), around), wanted)
    assert sum(COUNTED) < masked_count or make is with_drop_path
    left = [each for block in skipping for each in skippable(block) if each.call not in skipped_calls(block)]
    assert not left


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_few_rows(rows: int, p: float) -> None:
    masked, skipping = pair(Torchvision)
    for model in (masked, skipping):
        for block in model:
            block.stochastic_depth.p = p
    for seed in range(4):
        x = data(rows, seed)
        assert_equal(gradients(skipping, x), gradients(masked, x))


# Blocks that stay as they are, with a part of the reason.


class BatchNorm(Base):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.Sequential(nn.BatchNorm1d(LENGTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(self.bn(x)))


class Statistics(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm1d(LENGTH, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.norm(x))


class SequenceFirst(Base):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.attn(x, x, x)[0])


class Swaps(nn.Module):
    """Attention over dimension 0, written by hand."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1)
        return F.scaled_dot_product_attention(y, y, y).transpose(0, 1)


class Centres(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(dim=0, keepdim=True)


class Shifts(nn.Module):
    """Of TSM: a shift between the frames of one video, which are rows."""

    def __init__(self) -> None:
        super().__init__()
        self.n_segment = 2

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, self.n_segment, *x.shape[1:]).roll(1, 1).view_as(x)


class SwitchMoE(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def holds(child: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    class Holds(Base):
        def __init__(self) -> None:
            super().__init__()
            self.child = nn.Sequential(nn.Identity(), child())

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.child(self.norm1(x)))

    return Holds


class Weights(Base):
    """The attention weights leave the block."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.f(x).chunk(2, -1)
        y = self.drop_path(torch.cat([y, y], -1)) + x
        return y, weights


class Remembers(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        self.last = y
        return x + self.drop_path(self.g(y) * 2)


class RemembersInside(Base):
    def keeps(self, x: Tensor) -> Tensor:
        self.last = x
        return x

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(self.keeps(x)))


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(F.relu(x, inplace=True)))


class AugmentedInPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x += 1
        x = self.f(x)
        return shortcut + self.drop_path(x)


class Super(ViT):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, attn_mask) + self.drop_path1(self.f(x))


class Nested(Base):
    def forward(self, x: Tensor) -> Tensor:
        def residual(y: Tensor) -> Tensor:
            return self.f(self.norm1(y))

        return x + self.drop_path(residual(x))


class ByName(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        for name in ("f", "g"):
            y = getattr(self, name)(y)
        return x + self.drop_path(y)


class Interrupted(Base):
    """A dropout draws between the branch and its DropPath."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        z = F.dropout(x, 0.5)
        return z + self.drop_path(y)


class Changes(Base):
    """The input of the branch has another value at the DropPath."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        x = x * 2
        return x + self.drop_path(y)


class Conditional(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        return x + self.drop_path(y) if self.flag else x


class Before(Base):
    """The branch is computed before the block of its DropPath."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.f(x)
        if self.flag:
            y = self.drop_path(y)
            y += x
        return y


class NormBefore(Before):
    """Of EfficientNet."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm1d(LENGTH)


class Unbound(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.flag:
            scale = 2.0
        return x + self.drop_path(self.f(x) * (scale if self.flag else 1.0))


class Tries(Base):
    def forward(self, x: Tensor) -> Tensor:
        try:
            return x + self.drop_path(self.f(x))
        finally:
            self.norm1(x)


class Appends(Base):
    """Of Res2Net: the parts of the branch are in a list, which a loop over the whole block fills."""

    def forward(self, x: Tensor) -> Tensor:
        parts: list[Tensor] = []
        parts.append(self.f(x))
        y = torch.cat(parts, 1)
        parts.append(y)
        return x + self.drop_path(y) + len(parts)


class SameTwice(Base):
    def forward(self, x: Tensor) -> Tensor:
        y = self.drop_path(self.f(x))
        return x + self.drop_path(self.g(y))


class Private(Base):
    def __hidden(self, x: Tensor) -> Tensor:
        return self.f(x)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.__hidden(x))


class Listed(Base):
    def __init__(self) -> None:
        super().__init__()
        del self.drop_path
        self.drops = nn.ModuleList([thinned.DropPath(0.5)])

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drops[0](self.f(x))


def computes(branch: Callable[[Any, Tensor], Tensor]) -> Callable[[], nn.Module]:
    class Computes(nn.Module):
        pass

    Computes.forward = branch  # type: ignore[assignment]
    return holds(Computes)


def over_all(_: nn.Module, x: Tensor) -> Tensor:
    return x / x.abs().max()


def of_all(_: nn.Module, x: Tensor) -> Tensor:
    return x * torch.std(x)


def halves(_: nn.Module, x: Tensor) -> Tensor:
    return x + sum(x.chunk(2)).mean(1, keepdim=True).repeat(2, 1, 1)


def one_after_another(_: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([x[1:], x[:1]])


def rolled(_: nn.Module, x: Tensor) -> Tensor:
    return x.roll(1, 0)


def divided(_: nn.Module, x: Tensor) -> Tensor:
    B, L, C = x.shape
    return x.view(B * L, C).view(B, L, C) / B


def by_length(_: nn.Module, x: Tensor) -> Tensor:
    return x / len(x)


def times_length(_: nn.Module, x: Tensor) -> Tensor:
    return x * x.shape[0]


def in_large_batches(_: nn.Module, x: Tensor) -> Tensor:
    return 2 * x if x.size(0) > 4 else x


def first_of_table(_: nn.Module, x: Tensor) -> Tensor:
    return x + torch.arange(100)[: len(x), None, None]


def normed(_: nn.Module, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


class FirstRow(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.f(x - x[:1]))


class Dense(Base):
    """Of RDNet: the input is the list of all results so far."""

    def forward(self, x: Tensor) -> Tensor:
        return self.joins([x])

    def joins(self, x: list[Tensor]) -> Tensor:
        return self.drop_path(self.f(torch.cat(x, 1)))  # type: ignore[no-any-return]


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (BatchNorm, "BatchNorm1d at 'bn.0' takes its statistics over the batch"),
    (Statistics, "InstanceNorm1d at 'norm' takes its statistics"),
    (SequenceFirst, "MultiheadAttention at 'attn' has batch_first=False"),
    (holds(Swaps), "`x.transpose(0, 1)` in Swaps at 'child.1' works along dimension 0"),
    (holds(Centres), "`x.mean(dim=0, keepdim=True)` in Centres"),
    (holds(Shifts), "Shifts at 'child.1' shifts features between rows"),
    (holds(SwitchMoE), "SwitchMoE at 'child.1' depends on all rows"),
    (holds(lambda: nn.LSTM(WIDTH, WIDTH)), "LSTM at 'child.1' has batch_first=False"),
    (holds(lambda: thinned.Masksembles(LENGTH, 2)), "Masksembles at 'child.1' depends on the number of rows"),
    (holds(lambda: nn.Softmax(0)), "Softmax at 'child.1' works along dimension 0"),
    (computes(over_all), "`x.abs().max()` in Computes"),
    (computes(of_all), "`torch.std(x)` in Computes"),
    (computes(halves), "`x.chunk(2)` in Computes"),
    (computes(one_after_another), "`torch.cat([x[1:], x[:1]])` in Computes"),
    (computes(rolled), "`x.roll(1, 0)` in Computes"),
    (computes(divided), "`x.view(B * L, C).view(B, L, C) / B` in Computes"),
    (computes(by_length), "`x / len(x)` in Computes"),
    (computes(times_length), "`x * x.shape[0]` in Computes"),
    (computes(in_large_batches), "`x.size(0) > 4` in Computes"),
    (computes(first_of_table), "`:len(x)` in Computes"),
    (computes(normed), "`F.batch_norm(x, None, None, training=True)` in Computes"),
    (Dense, "its branch takes a list of tensors: `torch.cat(x, 1)`"),
    (FirstRow, "its branch takes rows: `x[:1]`"),
    (Weights, "'weights' is also used by what follows"),
    (Remembers, ""),  # only what comes after `self.last = y`
    (RemembersInside, "its keeps assigns to self.last"),
    (InPlace, "changes 'x' in place"),
    (AugmentedInPlace, "changes 'x' in place"),
    (Super, "calls super()"),
    (Nested, "a nested function stands in it"),
    (ByName, "its branch passes self on"),
    (Interrupted, "`F.dropout(x, 0.5)` runs between its branch and its DropPath"),
    (Changes, "'x' changes before the DropPath, in `x = x * 2`"),
    (Conditional, "is called under a condition"),
    (Before, "`y` is computed outside of the block of `y = self.drop_path(y)`"),
    (NormBefore, "BatchNorm1d at 'norm1' takes its statistics over the batch; and `y` is computed outside"),
    (Unbound, "'scale' may have no value there"),
    (Tries, "stands in a try statement"),
    (Appends, "'y' is also used by `parts.append(y)`"),
    (SameTwice, "the same DropPath drops in its branch"),
    (Private, "private name"),
]


@pytest.mark.parametrize(("make", "reason"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_refuses_by_name(
    make: Callable[[], nn.Module], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    masked = make().double()
    skipping = thinned.convert(masked, skip=True, inplace=False)
    assert reason in caplog.text
    # Two have several outputs, and two write to their input.
    if make not in (Weights, AugmentedInPlace, InPlace) and "LSTM" not in reason:
        assert_equal(gradients(skipping, data()), gradients(masked, data()))


def test_batch_norm_is_allowed_on_request() -> None:
    block = thinned.convert(BatchNorm(), skip=True, allow_batch_norm=True)
    COUNTED.clear()
    torch.manual_seed(1)
    block(data().float())
    assert COUNTED[0] < ROWS * LENGTH


# Values that a branch takes besides its rows.


class Takes(Base):
    def forward(self, x: Tensor, other: Any) -> Tensor:
        return x + self.drop_path(self.f(self.norm1(x)) + self.reads(other))

    def reads(self, other: Any) -> Any:
        if isinstance(other, dict):
            other = other["mask"]
        if isinstance(other, list | tuple):
            other = other[-1]
        return other.to(torch.float64) if isinstance(other, Tensor) else other


@pytest.mark.parametrize(
    ("other", "rows"),
    [
        (torch.ones(LENGTH, WIDTH), "kept"),
        (torch.ones(1, LENGTH, WIDTH), "kept"),
        ((torch.ones(LENGTH, WIDTH),), "kept"),
        ({"mask": torch.ones(LENGTH, 1)}, "kept"),
        (2.5, "kept"),
        ((ROWS, 3), "kept"),  # a height and a width
        (torch.arange(ROWS).view(ROWS, 1, 1), "all"),
        (torch.arange(LENGTH).view(LENGTH, 1), "all"),  # such as the edges of a graph
        (torch.rand(ROWS, 1, 1), "all"),
        ([torch.rand(ROWS, 1, 1)], "all"),
        ({"mask": torch.rand(ROWS, 1, 1)}, "all"),
        (ROWS, "all"),
    ],
    ids=str,
)
def test_what_else_a_branch_takes(other: Any, rows: str) -> None:
    torch.manual_seed(0)
    masked = Takes().double()
    skipping = thinned.convert(masked, skip=True, inplace=False)
    wanted = gradients(masked, data(), seeded, other)
    COUNTED.clear()
    assert_equal(gradients(skipping, data(), seeded, other), wanted)
    assert (sum(COUNTED) == ROWS * LENGTH) == (rows == "all")


def test_a_padding_mask_has_the_rows() -> None:
    masked = with_drop_path().double()
    skipping = thinned.convert(masked, skip=True, inplace=False)
    padding = torch.arange(LENGTH) >= torch.tensor([[5], [2], [3], [1], [4], [2]])
    found, wanted = (gradients(each, data(), seeded, None, padding) for each in (skipping, masked))
    assert_equal(found, wanted)


class Writes(Base):
    """The first module of the branch writes to its input, the summand."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop_path(self.act(x))


def test_refuses_a_branch_that_writes_to_its_input() -> None:
    block = thinned.convert(Writes(), skip=True)
    torch.manual_seed(1)
    with pytest.raises(RuntimeError, match="DropPath in a Writes overwrites its input"):
        block(data())


# All rows.


def test_evaluation_and_p_0_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    masked, skipping = pair(Mixer)
    monkeypatch.setattr(Branch, "decide", lambda *_: pytest.fail("decides"))
    assert skipping.eval()(data()).equal(masked.eval()(data()))
    for model in (masked, skipping):
        for block in model.train():
            block.drop_path.drop_prob = 0.0
    assert skipping(data()).equal(masked(data()))


def test_a_hook_of_the_drop_path_sees_all_rows() -> None:
    masked, skipping = pair(Mixer)
    seen: list[int] = []
    skipping[0].drop_path.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    assert_equal(gradients(skipping, data()), gradients(masked, data()))
    assert seen == [ROWS, ROWS]


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@by_name
def test_vmap_sees_the_masked_form(make: Callable[[], nn.Module]) -> None:
    masked, skipping = pair(make)
    x = torch.stack([data(), data(seed=1)])
    found = [seeded(each) and torch.vmap(each, randomness="same")(x) for each in (skipping, masked)]
    assert found[0].equal(found[1])


@pytest.mark.parametrize("make", [ViT, ConvNeXt, Torchvision, Mixer])
def test_a_symbolic_trace_sees_the_masked_form(make: Callable[[], nn.Module]) -> None:
    masked, skipping = pair(make)
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda module, _: (
        isinstance(module, Attention) or not isinstance(module, Base | nn.Sequential)
    )  # type: ignore[method-assign]
    targets = [[str(node.target) for node in tracer.trace(each).nodes] for each in (skipping, masked)]
    assert targets[0] == targets[1]


# Compiled, checkpointed, in mixed precision.


@pytest.mark.parametrize(
    ("make", "around"),
    [
        (Torchvision, with_samples),
        pytest.param(ConvNeXt, addressed, marks=pytest.mark.slow),
        pytest.param(ViT, seeded, marks=pytest.mark.slow),
        pytest.param(Cat, seeded, marks=pytest.mark.slow),
    ],
)
def test_compiled_without_a_recompilation_a_step(make: Callable[[], nn.Module], around: Around) -> None:
    masked, skipping = (each[0] for each in pair(make))
    if around is not seeded:
        around(masked)
        around(skipping)
    compiled = torch.compile(skipping, backend="aot_eager", fullgraph=True)
    for seed in range(4):
        with torch.compiler.set_stance("fail_on_recompile" if seed else "default"):
            found = gradients(compiled, data(seed=seed), lambda _, s=seed: within(around, skipping, s))
        wanted = gradients(masked, data(seed=seed), lambda _, s=seed: within(around, masked, s))
        assert_equal(found, wanted)


def within(around: Around, model: nn.Module, seed: int) -> AbstractContextManager[Any]:
    torch.manual_seed(seed)
    if around is seeded:
        return nullcontext()
    samples = None if around is addressed else list(range(seed, seed + ROWS))
    return thinned.address(model, seed=1, step=seed, samples=samples)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("around", [seeded, with_samples])
def test_checkpointed(around: Around, reentrant: bool) -> None:
    masked, skipping = pair(ViT)

    class Checkpointed(nn.Module):
        def __init__(self, blocks: nn.Module) -> None:
            super().__init__()
            self.blocks = blocks

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    def run(model: nn.Module, around: Around) -> list[Tensor]:
        x = data().requires_grad_()
        with around(model):
            y = model(x)
        y.pow(2).sum().backward()
        return [y.detach(), *(each.grad for each in (x, *model.parameters()) if each.grad is not None)]

    assert_equal(run(Checkpointed(skipping), around), run(Checkpointed(masked), around))


def test_autocast_keeps_the_dtypes() -> None:
    for make in (ViT, ConvNeXt, Torchvision, NoSum):
        masked, skipping = pair(make)
        masked.float()
        skipping.float()
        if make is Torchvision:  # whose sum in place keeps the dtype of the branch
            for block in (*masked, *skipping):
                del block.gamma
                block.gamma = 1.0
        for dtype, training in itertools.product((torch.float32, torch.bfloat16), (True, False)):
            outputs = []
            for model in (masked, skipping):
                torch.manual_seed(2)
                with torch.autocast("cpu", torch.bfloat16):
                    outputs.append(model.train(training)(data().to(dtype)))
            torch.testing.assert_close(*outputs, rtol=0.05, atol=0.05)  # which compares dtypes too


# The model around it.


def test_the_block_looks_as_before(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "thinned")
    model = nn.Sequential(ViT(), nn.Sequential(Mixer()))
    block, kind, forward = model[0], type(model[0]), type(model[0]).forward
    keys, text = list(model.state_dict()), repr(model)
    assert thinned.convert(model, skip=True) is model
    assert "4 branches compute their kept rows alone" in caplog.text
    assert model[0] is block
    assert isinstance(block, kind)
    assert type(block) is not kind
    assert type(block).__name__ == "ViT"
    assert type(block).__qualname__ == kind.__qualname__
    assert list(model.state_dict()) == keys
    assert repr(model) == text
    assert inspect.getsource(block.forward) == inspect.getsource(forward)
    assert inspect.signature(block.forward) == inspect.signature(forward.__get__(block))
    classes = [type(each) for each in model.modules()]
    thinned.convert(model, skip=True)
    assert [type(each) for each in model.modules()] == classes
    thinned.revert(model)
    assert type(block) is kind
    assert type(model[1][0]) is Mixer
    assert "2 blocks no longer skip" in caplog.text


def test_include_and_exclude_choose_drop_paths() -> None:
    model = nn.Sequential(ViT(), Mixer())
    thinned.convert(model, skip=True, exclude="1.*")
    assert skipped_calls(model[0])
    assert not skipped_calls(model[1])
    thinned.convert(model, skip=True, include="*.drop_path")
    assert skipped_calls(model[1])
    thinned.revert(model)
    thinned.convert(model, skip=True, include="0.drop_path2")
    assert {call.path for call in skipped_calls(model[0])} == {"drop_path2"}
    thinned.convert(model, skip=True, include="0.drop_path1")
    assert {call.path for call in skipped_calls(model[0])} == {"drop_path1", "drop_path2"}


def test_copies_and_pickles_skip() -> None:
    masked, skipping = pair(ViT)
    wanted = gradients(masked, data())
    file = io.BytesIO()
    torch.save(skipping, file)
    file.seek(0)
    for each in (
        copy.deepcopy(skipping),
        pickle.loads(pickle.dumps(skipping)),
        torch.load(file, weights_only=False),
    ):
        assert [type(block) for block in each] == [type(block) for block in skipping]
        assert_equal(gradients(each, data()), wanted)
        assert type(thinned.revert(each)[0]) is ViT


def test_inspect_lists_a_call_once() -> None:
    class Functional(Base):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(F.dropout(self.f(x), 0.1))

    model = Functional()
    before = len(thinned.inspect(model))
    assert len(thinned.inspect(thinned.convert(model, skip=True))) == before


def test_a_schedule_sets_the_rate() -> None:
    _, skipping = pair(Mixer)
    for block in skipping:
        block.drop_path.drop_prob = 1.0
    assert skipping(data()).equal(data())


MODELS = {
    "ConvNextModel": ("ConvNextConfig", {"hidden_sizes": [8, 8], "depths": [1, 2], "num_stages": 2}, 16),
    "Dinov2Model": ("Dinov2Config", zoo.SMALL | {"image_size": 16, "patch_size": 8}, 16),
    "BeitModel": (
        "BeitConfig",
        zoo.SMALL | {"image_size": 16, "patch_size": 8, "use_relative_position_bias": True},
        16,
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "Dinov2Model")) for name in MODELS],
)
def test_models_of_transformers(name: str) -> None:
    config, arguments, size = MODELS[name]
    model = zoo._make(name, config, drop_path_rate=0.5, **arguments).double()
    masked = thinned.convert(model, inplace=False)
    skipping = thinned.convert(model, skip=True)
    x = torch.randn(ROWS, 3, size, size, dtype=torch.float64)
    found = []
    for each in (masked, skipping):
        with thinned.address(each, seed=1, step=2, samples=range(ROWS)):
            found.append(each(x).last_hidden_state)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)
    assert any(skipped_calls(module) for module, _ in modules_with_paths(skipping))
