"""LayerDrop: which layers run, under one decision in eager code, compiled code and vmap."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers import layer_drop
from thinned.layers.layer_drop import LayerDrop
from verdicts import verdict

KEY = thinned.Key(3)
(ENTRY,) = layer_drop.ENTRIES


def stack(depth: int = 6, p: float = 0.5) -> LayerDrop:
    torch.manual_seed(0)
    return LayerDrop([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(depth)], p=p)


def run(layers: LayerDrop, x: Tensor, key: thinned.Key) -> Tensor:
    keep = thinned.keep_mask(key, (len(layers),), layers.p)
    for layer, kept in zip(layers, keep.tolist(), strict=True):
        x = layer(x) if kept else x
    return x


@pytest.mark.usefixtures("backend")
def test_runs_what_the_mask_keeps() -> None:
    x, layers = torch.randn(5, 4), stack(12)
    for seed in range(10):
        key = thinned.Key(seed)
        assert layers(x, key=key).equal(run(layers, x, key))


def test_a_skipped_layer_is_not_run() -> None:
    layers, ran = stack(), []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    layers(torch.randn(5, 4), key=KEY).sum().backward()
    kept = thinned.keep_mask(KEY, (6,), 0.5).nonzero().flatten().tolist()
    assert ran == kept == [2, 3, 4, 5]
    assert [i for i, layer in enumerate(layers) if layer[0].weight.grad is not None] == kept


def gradients(y: Tensor, layers: LayerDrop) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y.sum(), list(layers.parameters()), materialize_grads=True, retain_graph=True)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_selects_the_same() -> None:
    x, layers = torch.randn(5, 4), stack()
    compiled = torch.compile(layers, fullgraph=True, backend="eager")
    for seed in range(5):
        results = []
        for each in (layers, compiled):
            y = each(x, key=thinned.Key(seed))
            results.append((y, *gradients(y, layers)))
        torch.testing.assert_close(*results)
    assert not compiled(x, key=thinned.Key(0)).equal(compiled(x, key=thinned.Key(1)))


@torch.library.custom_op("thinned_tests::record", mutates_args=())
def record(x: Tensor, number: int) -> Tensor:
    """A copy of ``x``; Python sees each execution, in compiled code too."""
    executed.append(number)
    return x.clone()


record.register_fake(lambda x, number: torch.empty_like(x))  # noqa: ARG005
record.register_autograd(lambda ctx, grad: (grad, None))  # noqa: ARG005
executed: list[int] = []


class Recorded(nn.Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.linear, self.dropout = number, nn.Linear(4, 4), thinned.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(record(self.linear(x), self.number))


class Around(nn.Module):
    """A model of 10 layers that differ, where Dynamo's limit is 8 graphs for a line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.layers = LayerDrop([Recorded(number) for number in range(10)], p=0.5)

    def forward(self, x: Tensor, key: thinned.Key | None = None) -> Tensor:
        return self.layers(self.first(x), key=key) * 2

    def results(self, call: Callable[..., Tensor], *args: Any, **kwargs: Any) -> list[Any]:
        """Which layers are executed, the output and the gradients."""
        executed.clear()
        self.zero_grad()
        y = call(*args, **kwargs)
        ran = executed[:]
        y.sum().backward()
        assert executed == ran
        return [ran, y, *(parameter.grad for parameter in self.parameters())]


def assert_same(actual: list[Any], expected: list[Any]) -> None:
    assert [each is None for each in actual] == [each is None for each in expected]
    for each, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(each, other)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, after a break
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_skips() -> None:
    model, x, graphs = Around(), torch.randn(5, 4), CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=graphs)
    counts = []
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for seed in range(8):
            results = []
            for call in (compiled, model):
                torch.manual_seed(seed)
                results.append(model.results(call, x))
            assert_same(*results)
            counts.append(graphs.frame_count)
    # One for each layer, one before the LayerDrop, and one behind it.
    assert counts[-3:] == [12] * 3


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("why", ["fullgraph", "a checkpoint", "an address", "run_all"])
def test_compiled_code_that_cannot_skip(why: str) -> None:
    model, x, graphs = Around(), torch.randn(5, 4), CompileCounterWithBackend("eager")
    model.layers.run_all = why == "run_all"

    def checkpointed(x: Tensor, key: thinned.Key) -> Tensor:
        return checkpoint(model, x, key, use_reentrant=False)  # type: ignore[no-any-return]

    call = checkpointed if why == "a checkpoint" else model
    compiled = torch.compile(call, backend=graphs, fullgraph=why == "fullgraph")
    for step in range(2):
        key = KEY.fold(step)
        results = []
        for each in (compiled, model):
            executed.clear()
            with thinned.address(model, seed=7, step=step) if why == "an address" else nullcontext():
                results.append(each(x, key))
            assert each is model or executed == list(range(10))
        if why == "an address":
            torch.testing.assert_close(*results)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_transforms_skip_what_all_examples_skip(transform: str) -> None:
    x, layers = torch.randn(5, 4), stack()
    ran: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    if transform == "vmap":
        state = torch.get_rng_state()
        y = torch.func.vmap(layers, randomness="same")(x)
        vmapped = ran[:]
        ran.clear()
        torch.set_rng_state(state)
        torch.testing.assert_close(y, layers(x))
        assert ran == vmapped != []
        return
    if transform == "grad":
        torch.func.grad(lambda x: layers(x, key=KEY).sum())(x)
    else:
        torch.func.jvp(lambda x: layers(x, key=KEY), (x,), (x,))
    assert ran == [2, 3, 4, 5]


def test_run_all_selects_the_same() -> None:
    x, layers = torch.randn(5, 4), stack()
    skipping = [layers(x, key=KEY), *gradients(layers(x, key=KEY), layers)]
    layers.run_all = True
    ran: list[int] = []
    for index, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    y = layers(x, key=KEY)
    assert ran == list(range(6))
    torch.testing.assert_close([y, *gradients(y, layers)], skipping, rtol=0, atol=0)
    y.sum().backward()
    assert all(each.grad is not None for each in layers.parameters())
    with pytest.raises(
        RuntimeError, match=r"all layers have to run \(run_all=True\): .*or set run_all=False"
    ):
        layers.surviving(key=KEY)
    with pytest.raises(TypeError, match=r"so input must be a Tensor, got .* of type tuple"):
        layers((x,), key=KEY)
    assert layers.eval()(x).equal(nn.Sequential(*layers)(x))


def test_run_all_uses_no_number_of_a_skipped_layer() -> None:
    class Infinite(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.inf

    x, infinite, plain = torch.randn(5, 4, requires_grad=True), Infinite(4, 4), nn.Linear(4, 4)
    y = LayerDrop([infinite, plain], p=0.5, run_all=True)(x, key=thinned.Key(6))
    assert thinned.keep_mask(thinned.Key(6), (2,), 0.5).tolist() == [False, True]
    assert y.equal(plain(x))
    y.sum().backward()
    assert infinite.weight.grad is not None
    assert infinite.weight.grad.eq(0).all()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_vmap_decides_for_each_example() -> None:
    x, layers = torch.randn(7, 5, 4), stack()
    keys = KEY.fold(torch.arange(7))
    y = torch.func.vmap(lambda x, bits: layers(x, key=thinned.Key.from_bits(bits)))(x, keys.bits)
    torch.testing.assert_close(y, torch.stack([run(layers, x[i], KEY.fold(i)) for i in range(7)]))
    with pytest.raises(RuntimeError, match="under vmap; call the LayerDrop itself"):
        torch.func.vmap(lambda bits: list(layers.surviving(key=thinned.Key.from_bits(bits))))(keys.bits)


@pytest.mark.usefixtures("fresh_compiler")
def test_surviving_is_the_loop_of_forward() -> None:
    x, layers = torch.randn(5, 4), stack()

    def loop(x: Tensor) -> Tensor:
        for layer in layers.surviving():
            x = layer(x)
        return x

    for call in (loop, torch.compile(loop, backend="eager")):
        torch.manual_seed(8)
        y = call(x)
        torch.manual_seed(8)
        assert y.equal(layers(x))
    survivors = layers.surviving(key=KEY)
    assert isinstance(survivors, Iterator)
    assert list(survivors) == [layers[i] for i in (2, 3, 4, 5)]


def test_a_key_for_each_layer() -> None:
    layers, x = stack(), torch.randn(5, 4)
    keys = KEY.fold(torch.arange(6))
    kept = [layer for i, layer in enumerate(layers) if thinned.keep_mask(KEY.fold(i), (1,), 0.5).item()]
    assert list(layers.surviving(key=keys)) == kept
    assert 0 < len(kept) < 6
    assert layers(x, key=keys).equal(nn.Sequential(*kept)(x))
    with pytest.raises(RuntimeError, match=r"keys of shape \(5,\) do not fit a tensor of shape \(6,\)"):
        layers(x, key=KEY.fold(torch.arange(5)))


@pytest.mark.parametrize("layers", [stack().eval(), stack(p=0.0)], ids=["evaluation", "p = 0"])
def test_all_layers_run(layers: LayerDrop) -> None:
    x, state = torch.randn(5, 4), torch.get_rng_state()
    assert layers(x).equal(nn.Sequential(*layers)(x))
    assert list(layers.surviving()) == list(layers)
    assert torch.get_rng_state().equal(state)


def test_a_module_list() -> None:
    layers = stack(p=0.3)
    plain = nn.ModuleList(copy.deepcopy(list(layers)))
    assert list(layers.state_dict()) == list(plain.state_dict())
    plain.load_state_dict(layers.state_dict())
    assert len(layers) == 6
    assert list(layers)[-1] is layers[-1]
    layers.run_all = True
    pruned = layers[::2]
    assert isinstance(pruned, LayerDrop)
    assert pruned.run_all
    assert repr(pruned).startswith("thinned.LayerDrop(p=0.3, run_all=True\n")
    layers.run_all = False
    assert (len(pruned), pruned.p, pruned[1] is layers[2]) == (3, 0.3, True)
    layers.append(nn.Identity())
    assert len(layers) == 7
    assert repr(layers).startswith("thinned.LayerDrop(p=0.3\n  (0-5): 6 x Sequential(")


def test_other_arguments_reach_each_layer() -> None:
    class Add(nn.Module):
        def forward(self, x: Tensor, amount: float, *, times: int = 1) -> Tensor:
            return x + amount * times

    layers = LayerDrop([Add() for _ in range(6)], p=0.5)
    assert layers(torch.zeros(1), 2.0, times=3, key=KEY).item() == 2.0 * 3 * 4


@pytest.mark.parametrize(
    ("layer", "message"),
    [(nn.Linear(4, 3), r"layer 1 turned \(5, 4\) into \(5, 3\)"), (nn.GRU(4, 4), "layer 1 .* into a tuple")],
)
def test_a_layer_that_changes_the_shape(layer: nn.Module, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        LayerDrop([nn.Identity(), layer], p=1e-9)(torch.ones(5, 4))


class Wrong(LayerDrop):
    """LayerDrop with one thing wrong."""

    wrong = ""

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.wrong == "pairs" and self.training:
            keep = thinned.keep_mask(thinned.Key(int(torch.randint(2**62, ()))), (len(self),), self.p)
            for index, layer in enumerate(self):
                input = layer(input) if keep[index // 2 * 2] else input
            return input
        if self.wrong == "one key":
            return super().forward(input, *args, key=KEY, **kwargs)
        y = super().forward(input, *args, **kwargs)
        return input + (y - input) / (1 - self.p) if self.wrong == "scaled" and self.p < 1 else y


@pytest.mark.parametrize(
    ("wrong", "law"),
    [
        ("pairs", "independence"),
        ("one key", "independence"),
        ("scaled", "rate"),
        ("rate", "rate"),
        ("dropping", "evaluation"),
    ],
)
def test_a_wrong_layer_is_caught(wrong: str, law: str) -> None:
    def make(p: float, **arguments: Any) -> nn.Module:
        layers = layer_drop._make(Wrong, p * 1.07 if wrong == "rate" else p, **arguments)
        layers.wrong = wrong
        if wrong == "dropping":
            layers.eval = lambda: layers  # type: ignore[method-assign]
        return layers

    assert verdict(ENTRY, law, make).is_breach


@pytest.mark.parametrize("law", ["rate", "independence", "evaluation"])
def test_the_loop_over_fairseqs_list_keeps_the_law(law: str) -> None:
    assert verdict(ENTRY, law, partial(layer_drop._make, layer_drop.LayerDropFormula)) is Verdict.HOLDS


@pytest.mark.parametrize(("layers", "shown"), [(nn.Linear(2, 2), "of type Linear"), (3, "got 3 of type int")])
def test_one_layer_is_no_list_of_layers(layers: object, shown: str) -> None:
    """nn.ModuleList refuses it as well."""
    with pytest.raises(TypeError, match=shown):
        LayerDrop(layers)  # type: ignore[arg-type]
