"""Recomputed regions, by any means, have the masks of the forward pass, or raise."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn

import thinned
from thinned import Key
from thinned.models import address, intercept
from thinned.models.checkpoint import _CheckpointPatch

Call = Callable[[Tensor], Tensor]


class Ours(nn.Module):
    """A block that calls one module twice, and a function."""

    drop: Callable[[int], nn.Module] = thinned.Dropout
    function = staticmethod(thinned.functional.dropout)

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), type(self).drop(0.5)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout(self.linear(self.dropout(x))).tanh()
        return self.function(y, 0.3)


class Torchs(Ours):
    drop = nn.Dropout
    function = staticmethod(torch_functional.dropout)

    def __init__(self) -> None:
        super().__init__()
        # Not an LSTM: oneDNN's rounds differently without grad, as in a reentrant checkpoint's forward.
        self.gru = nn.GRU(8, 8, 2, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.gru(super().forward(x))[0]
        return y


class Restoring(torch.autograd.Function):
    """Checkpoints as Megatron, DeepSpeed and fairscale do, restoring the random state to recompute."""

    restores = True

    @classmethod
    def call(cls, region: Call) -> Call:
        return lambda x: cls.apply(region, x, cls.restores)

    @staticmethod
    def forward(ctx: Any, region: Call, x: Tensor, restores: bool) -> Tensor:
        ctx.region, ctx.restores, ctx.state = region, restores, torch.get_rng_state()
        ctx.save_for_backward(x)
        with torch.no_grad():
            return region(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor | None, None]:
        (x,) = ctx.saved_tensors
        leaf, now = x.detach().requires_grad_(), torch.get_rng_state()
        if ctx.restores:
            torch.set_rng_state(ctx.state)
        with torch.enable_grad():
            y = ctx.region(leaf)
        torch.set_rng_state(now)
        torch.autograd.backward(y, grad)
        return None, leaf.grad, None


class NotRestoring(Restoring):
    restores = False


class CalledSelf(Restoring):
    """The context may have any name."""

    @staticmethod
    def forward(self: Any, region: Call, x: Tensor, restores: bool) -> Tensor:
        return Restoring.forward(self, region, x, restores)


class Reversing(torch.autograd.Function):
    """Recomputes as reversible networks do: the last block first, each from its own random state."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, blocks: list[nn.Module]) -> Tensor:
        ctx.parts = []
        for number, block in enumerate(blocks):
            torch.manual_seed(number)
            ctx.parts.append((block, x, number))
            x = block(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        for block, x, number in reversed(ctx.parts):
            leaf = x.detach().requires_grad_()
            torch.manual_seed(number)
            with torch.enable_grad():
                y = block(leaf)
            torch.autograd.backward(y, grad)
            grad = leaf.grad
        return grad, None


def nested(call: Callable[[Call], Call]) -> Make:
    def make(one: nn.Module, other: nn.Module) -> Call:
        inner = call(lambda x: call(one)(call(other)(x)))
        return call(lambda x: inner(x).sin())

    return make


def in_turn(call: Callable[[Call], Call], last: Callable[[Call], Call] | None = None) -> Make:
    return lambda one, other: lambda x: (last or call)(other)(call(one)(x))


def mixed(one: nn.Module, other: nn.Module) -> Call:
    return Restoring.call(in_turn(uncheckpointed, checkpointing(False, True))(one, other))


def uncheckpointed(region: Call) -> Call:
    return region


def checkpointing(reentrant: bool, preserve: bool = False) -> Callable[[Call], Call]:
    options = {"use_reentrant": reentrant, "preserve_rng_state": preserve}
    return lambda region: lambda x: torch_checkpoint.checkpoint(region, x, **options)


# A call of two blocks, which may be one, with recomputation and without.
Make = Callable[[nn.Module, nn.Module], Call]
ONCE, NESTED_ONCE = in_turn(uncheckpointed), nested(uncheckpointed)
MEANS: dict[str, tuple[Make, Make]] = {
    "restoring": (in_turn(Restoring.call), ONCE),
    "not restoring": (in_turn(NotRestoring.call), ONCE),
    "called self": (in_turn(CalledSelf.call), ONCE),
    "nested": (nested(Restoring.call), NESTED_ONCE),
    "torch's reentrant": (in_turn(checkpointing(True)), ONCE),
    "torch's": (in_turn(checkpointing(False)), ONCE),
    "torch's reentrant, preserving": (in_turn(checkpointing(True, True)), ONCE),
    "torch's, preserving": (in_turn(checkpointing(False, True)), ONCE),
    "torch's reentrant, nested": (nested(checkpointing(True)), NESTED_ONCE),
    "torch's, nested": (nested(checkpointing(False)), NESTED_ONCE),
    "torch's, in part": (in_turn(checkpointing(False), uncheckpointed), ONCE),
    "torch's within ours": (mixed, ONCE),
    "reversing": (
        lambda one, other: lambda x: Reversing.apply(x, [one, other, one]),
        lambda one, other: lambda x: one(other(one(x))),
    ),
}
# Those that restore the random state of one whole pass.
RESTORING = ["restoring", "called self", "nested", "torch's within ours"]
RESTORING += ["torch's reentrant, preserving", "torch's, preserving"]


def gradients(
    model: nn.Module, call: Call, context: AbstractContextManager[Any], within: bool
) -> list[Tensor]:
    x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    model.zero_grad()
    torch.manual_seed(0)
    with context:
        loss = call(x).square().sum()
        if within:
            loss.backward()
    if not within:
        loss.backward()
    assert x.grad is not None
    return [x.grad, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)]


def blocks(kind: type[nn.Module], are_one: bool) -> nn.ModuleList:
    torch.manual_seed(1)
    one = kind().double()
    return nn.ModuleList([one, one if are_one else kind().double()])


@pytest.mark.parametrize("within", [True, False], ids=["within", "after"])
@pytest.mark.parametrize("are_one", [True, False], ids=["one block", "two blocks"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of reentrant ones, nested
class TestRightMasks:
    def assert_same(self, means: str, model: nn.ModuleList, context: Any, within: bool) -> None:
        again, once = (make(*model) for make in MEANS[means])
        plain = gradients(model, once, context(), within)
        # A block with two calls may sum its gradients in another order, and is off by some eps = 2e-16.
        error = 1e-13 if model[0] is model[1] or means == "reversing" else 0.0
        for got, want in zip(gradients(model, again, context(), within), plain, strict=True):
            torch.testing.assert_close(got, want, rtol=error, atol=error)

    @pytest.mark.parametrize("means", MEANS)
    def test_addressed(self, means: str, are_one: bool, within: bool) -> None:
        model = blocks(Ours, are_one)
        self.assert_same(means, model, lambda: address(model, seed=3, step=1, samples=range(4)), within)

    @pytest.mark.parametrize("means", MEANS)
    def test_intercepted(self, means: str, are_one: bool, within: bool) -> None:
        self.assert_same(means, blocks(Torchs, are_one), lambda: intercept(key=Key(5)), within)

    @pytest.mark.parametrize("means", RESTORING)
    def test_intercepted_and_drawn(self, means: str, are_one: bool, within: bool) -> None:
        self.assert_same(means, blocks(Torchs, are_one), intercept, within)


def test_twice() -> None:
    model = blocks(Ours, True)
    x = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    with address(model, seed=3, step=1):
        loss = MEANS["nested"][0](*model)(x).sum()
    first = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.autograd.grad(loss, x)[0].equal(first[0])


def test_a_dropout_that_only_the_recomputation_calls_is_refused() -> None:
    model, calls = blocks(Ours, True), iter((1, 2))

    def region(x: Tensor) -> Tensor:
        for _ in range(next(calls)):
            x = model[0](x)
        return x

    with address(model, seed=3, step=1):
        loss = Restoring.call(region)(torch.ones(4, 8, dtype=torch.float64, requires_grad=True)).sum()
    with pytest.raises(
        RuntimeError, match=r"calls a dropout in 0\.dropout that the forward pass did not call"
    ):
        loss.backward()


@pytest.mark.parametrize("within", [True, False], ids=["within", "after"])
@pytest.mark.parametrize("means", ["gradient hook", "saved tensors hook"])
def test_other_calls_in_a_backward_pass_are_refused(means: str, within: bool) -> None:
    """They may repeat any call of the forward pass, or none."""
    model = blocks(Ours, True)
    x = torch.ones(4, 8, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        if means == "gradient hook":
            y = model[0](x) * 2
            y.register_hook(lambda grad: model[0](grad))
            return y.sum()
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda _: None, lambda _: model[0](x).sin())
        y = model[0](x)
        with hooks:
            return y.sin().sum()

    with address(model, seed=3, step=1):
        result = loss()
        if within:
            with pytest.raises(RuntimeError, match=r"while a backward pass runs, within thinned\.address"):
                result.backward()
            return
    with pytest.raises(
        RuntimeError, match=r"in '0\.dropout' is called while a backward pass runs, after the thin"
    ):
        result.backward()
    result = loss()  # within no address: its masks are drawn, and so may be those of a hook
    result.backward()


def test_a_recomputation_without_dropouts_is_none_of_ours() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).double()
    x = torch.ones(4, 8, dtype=torch.float64, requires_grad=True)
    with address(model, seed=3, step=1):
        loss = Restoring.call(model)(x).sum()
    loss.backward()
    assert x.grad is not None


def test_a_gradient_hook_has_torchs_dropout_within_intercept() -> None:
    y = torch.ones(50, requires_grad=True) * 2
    seen: list[Tensor] = []
    y.register_hook(lambda grad: seen.append(torch_functional.dropout(grad)))
    with intercept(key=Key(5)):
        torch.manual_seed(0)
        y.sum().backward()
    torch.manual_seed(0)
    assert seen[0].equal(torch_functional.dropout(torch.ones(50)))


def raising(block: nn.Module) -> Call:
    """A checkpointed region that raises when it is recomputed."""

    def region(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise ValueError("no second time")
        y: Tensor = block(x)
        return y

    return Restoring.call(region)


def test_a_recomputation_that_raises_leaves_nothing() -> None:
    model = blocks(Ours, True)
    x = torch.ones(4, 8, dtype=torch.float64, requires_grad=True)
    with address(model, seed=3, step=1), intercept(key=Key(5)):
        loss = raising(model[0])(x).sum()
    with pytest.raises(ValueError, match="no second time"):
        loss.backward()
    torch.manual_seed(0)
    drawn = model[0](x)
    torch.manual_seed(0)
    assert drawn.equal(model[0](x))  # drawn, and by no address
    with address(model, seed=3, step=1):
        first = model[0](x)
    with address(model, seed=3, step=1):
        assert model[0](x).equal(first)


def entered(context: str, model: nn.Module, number: int) -> AbstractContextManager[Any]:
    return address(model, seed=7, step=number) if context == "address" else intercept(key=Key(number))


@pytest.mark.parametrize("context", ["address", "intercept"])
def test_a_recomputation_that_raises_within_the_context_leaves_nothing(context: str) -> None:
    model = blocks(Ours if context == "address" else Torchs, True)
    x = torch.ones(4, 8, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match="no second time"), entered(context, model, 1):
        raising(model[0])(x).sum().backward()
    assert thinned.key_source.active.key_source is None
    assert torch.overrides._get_current_function_mode_stack() == []
    torch.manual_seed(0)
    drawn = model[0](x)
    torch.manual_seed(1)
    assert not drawn.equal(model[0](x))


def test_a_recomputation_is_not_counted() -> None:
    model, x = blocks(Ours, True), torch.ones(4, 8, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (model[0], checkpointing(True)(model[0]), checkpointing(False)(model[0])):
        with address(model, seed=3, step=1):
            call(x).sum().backward()
            found.append(model[0](x))
    assert found[1].equal(found[0])
    assert found[2].equal(found[0])


def test_a_checkpoint_with_another_generator_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:

    def checkpoint(function: Callable[..., Any], *args: Any, **_: Any) -> Any:
        return function(*args)

    monkeypatch.setattr(torch_checkpoint, "checkpoint", checkpoint)
    with pytest.raises(RuntimeError, match=f"PyTorch {torch.__version__.partition('+')[0]}.* calls none of"):
        _CheckpointPatch().install()


class TestOutOfOrder:
    @pytest.fixture
    def model(self) -> nn.Sequential:
        return nn.Sequential(thinned.Dropout(0.5))

    def test_tasks(self, model: nn.Sequential) -> None:
        """Each task has its own masks, or an error."""
        x, right, refused = torch.ones(1000), [], []

        async def task(step: int) -> None:
            try:
                with address(model, seed=7, step=step):
                    await asyncio.sleep(0)
                    right.append(model(x).equal(expected[step]))
            except RuntimeError as error:
                refused.append(str(error))

        async def tasks() -> None:
            await asyncio.gather(*(task(step) for step in range(3)))

        expected = []
        for step in range(3):
            with address(model, seed=7, step=step):
                expected.append(model(x))
        asyncio.run(tasks())
        assert all(right)
        assert len(right) + len(refused) == 3
        assert all("another task of this thread" in words for words in refused)
        with address(model, seed=7, step=2):
            assert model(x).equal(expected[2])

    def test_a_task_beside_one_within(self, model: nn.Sequential) -> None:
        async def within() -> None:
            with address(model, seed=7, step=0):
                await asyncio.sleep(0)

        async def beside() -> None:
            with pytest.raises(RuntimeError, match="another task of this thread"):
                model(torch.ones(5))

        async def tasks() -> None:
            await asyncio.gather(within(), beside())

        asyncio.run(tasks())

    def test_intercepting_tasks(self) -> None:
        async def task(key: int) -> None:
            with intercept(key=Key(key)):
                await asyncio.sleep(0)
                torch_functional.dropout(torch.ones(5))

        async def tasks() -> list[BaseException | None]:
            return await asyncio.gather(task(1), task(2), return_exceptions=True)

        first, *_ = asyncio.run(tasks())
        assert isinstance(first, RuntimeError)
        assert "another task" in str(first)
        assert torch.overrides._get_current_function_mode_stack() == []

    @pytest.mark.parametrize("context", ["address", "intercept"])
    def test_generators(self, model: nn.Sequential, context: str) -> None:
        def generator(step: int) -> Iterator[None]:
            with entered(context, model, step):
                yield

        first, second = generator(1), generator(2)
        next(first)
        next(second)
        with pytest.raises(
            RuntimeError, match=f"thinned.{context} is left while another that was entered after"
        ):
            next(first)
        assert next(second, None) is None
        assert torch.overrides._get_current_function_mode_stack() == []
        torch.manual_seed(0)
        drawn = model(torch.ones(50))
        torch.manual_seed(0)
        assert model(torch.ones(50)).equal(drawn)
