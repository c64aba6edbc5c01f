"""Random numbers that are known to decide a dropout come from keys within intercept; others stay torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned
from models import zoo
from thinned import Key, keep_mask, op
from thinned.geometry import shared
from thinned.models.inspect import inspect
from thinned.models.intercept import intercept
from thinned.models.intercept.draws import uniform

BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 32}


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_the_numbers_are_those_of_the_mask(dtype: torch.dtype) -> None:
    """``1 - (u + 1) / 2**32``, rounded down: below 1, and ``>= p`` is the mask."""
    shape, unit = (40, 50), 2 ** BITS[dtype]
    r = uniform(torch.empty(shape, dtype=dtype), Key(7))
    u = op.uniform(Key(7).bits, shape, shared(shape)).long() + 2**31
    assert (r.double() * unit).equal(((2**32 - 1 - u) // (2**32 // unit)).double())
    assert r.dtype == dtype
    assert (r >= 0.25).equal(keep_mask(Key(7), shape, 0.25))


def test_the_largest_number_is_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for u in (-(2**31), 2**31 - 1):
        monkeypatch.setattr(op, "uniform", lambda *_, u=u: torch.tensor([u], dtype=torch.int32))
        for dtype in BITS:
            assert 0 <= uniform(torch.empty(1, dtype=dtype), Key(7)).item() < 1


def drop_path(x: Tensor, p: float) -> Tensor:
    return x * (p <= torch.rand((x.shape[0], 1), dtype=x.dtype, device=x.device))


def dropout_edge(edge_index: Tensor, p: float) -> Tensor:
    """torch_geometric.utils has this function."""
    row, _ = edge_index
    return torch.rand(row.size(0), device=edge_index.device) >= p


class DropNode(nn.Module):
    def forward(self, x: Tensor, p: float) -> Tensor:
        return torch.rand_like(x, dtype=torch.float64) >= p


def stochastic_depth(x: Tensor, p: float) -> Tensor:
    """torchvision.ops has this function."""
    return torch.empty(len(x), 1).bernoulli_(1 - p).bool().expand(x.shape)


def drop_block(x: Tensor, p: float) -> Tensor:
    return torch.bernoulli(torch.full_like(x, 1 - p)).bool()


def dropped_uniformly(x: Tensor, p: float) -> Tensor:
    return x.new_empty(x.shape).uniform_(-1, 1) >= 2 * p - 1


drop_node = DropNode()
X, EDGES, P = torch.ones(8, 6), torch.arange(40).reshape(2, 20), 0.25
KNOWN: dict[Callable[..., Tensor], tuple[Tensor, tuple[int, ...]]] = {
    drop_path: (X, (8, 1)),
    dropout_edge: (EDGES, (20,)),
    drop_node: (X, (8, 6)),
    stochastic_depth: (X, (8, 1)),
    drop_block: (X, (8, 6)),
    dropped_uniformly: (X, (8, 6)),
}
# Dynamo shows torch.rand_like to no function mode, and torch.rand from PyTorch 2.13 on.
HIDDEN = {drop_node} if torch.__version__ >= (2, 13) else {drop_node, drop_path, dropout_edge}


@pytest.mark.parametrize("function", KNOWN)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_compiler")
def test_what_a_function_of_that_name_draws_is_the_mask_of_its_key(
    function: Callable[..., Tensor], compiled: bool
) -> None:
    """The mask is that of thinned's own layers; torch's generator stays where it was."""
    shown = not (compiled and function in HIDDEN)
    x, shape = KNOWN[function]
    run = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    state = torch.get_rng_state()
    with intercept(key=Key(7)) as context:
        kept = [run(x, P).bool() for _ in range(2)]
    assert context.count == 2 * shown
    assert torch.get_rng_state().equal(state) == shown
    for number, mask in enumerate(kept if shown else []):
        expected = keep_mask(Key(7).fold(number), shape, P)
        assert mask.equal(expected.expand(mask.shape))


def noise(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    return x + torch.rand(x.shape, generator=generator) + torch.rand([]) + torch.empty(6).uniform_()


def drop_with_generator(x: Tensor) -> Tensor:
    return x * torch.rand(x.shape, generator=torch.default_generator)


@pytest.mark.parametrize("function", [noise, drop_with_generator])
def test_other_numbers_are_torchs(function: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(3)
    expected = function(X)
    torch.manual_seed(3)
    with intercept(key=Key(7)) as context:
        assert function(X).equal(expected)
    assert context.count == 0


def test_torch_refuses_a_wrong_probability() -> None:
    with intercept(key=Key(7)), pytest.raises(RuntimeError, match=r"p to be in \[0, 1\]|p_in >= 0"):
        stochastic_depth(X, 2.0)


def test_a_number_for_each_sample_follows_the_samples() -> None:
    """A sample's decision is its own in any batch; one that has no sample is the same for all."""

    class Net(nn.Module):
        def forward(self, x: Tensor, p: float) -> Tensor:
            return drop_path(x, p) * dropout_edge(EDGES[:, : x.shape[1]], p)

    model, ids = Net(), torch.arange(8)
    order = torch.tensor([5, 0, 3])

    def run(ids: Tensor) -> Tensor:
        with intercept(), thinned.address(model, seed=7, step=1, samples=ids):
            return model(torch.ones(len(ids), 6), 0.5)

    whole = run(ids)
    assert run(ids[order]).equal(whole[order])
    assert 0 < whole.sum() < whole.numel()


def skipped(model: nn.Module, run: Callable[..., Any], **inputs: Tensor) -> list[str]:
    """The layers of a model that a run does not call."""
    paths = {path for path, _ in model.named_modules() if path.split(".")[-2:-1] == ["layers"]}
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda *_, path=path: paths.discard(path))
        for path in tuple(paths)
    ]
    run(**inputs)
    for hook in hooks:
        hook.remove()
    return sorted(paths)


@pytest.fixture(scope="module")
def bart() -> nn.Module:
    return zoo.bart(encoder_layers=6, decoder_layers=6)


def test_layerdrop_follows_the_address(bart: nn.Module) -> None:
    """Which layers are skipped is a function of seed and step: not of the generator, nor of the samples.

    Processes that hold different samples therefore skip the same layers, as their gradients need it.
    """

    def step(number: int, seed: int, samples: Tensor | None = None) -> list[str]:
        torch.manual_seed(seed)
        with intercept(), thinned.address(bart, seed=7, step=number, samples=samples):
            return skipped(bart, bart, **zoo.inputs(bart))

    first = step(1, seed=0)
    assert first == step(1, seed=1) == step(1, 2, torch.arange(4)) == step(1, 3, torch.arange(4, 8))
    assert len({tuple(step(number, 0)) for number in range(5)}) > 1
    expected = [
        keep_mask(thinned.address(bart, seed=7, step=1).key_of("encoder", 1 + i), (), 0.5) for i in range(6)
    ]
    assert [f"encoder.layers.{i}" for i, kept in enumerate(expected) if not kept] == [
        path for path in first if path.startswith("encoder")
    ]


@pytest.mark.usefixtures("fresh_compiler")
def test_layerdrop_compiled_is_layerdrop_eager() -> None:
    """The model branches on the numbers, at which Dynamo leaves parts of it to the interpreter."""
    encoder, x = zoo.bart(encoder_layers=3).encoder, torch.arange(8).view(2, 4)

    def run(model: Any) -> tuple[Tensor, int]:
        # Dynamo warns of gradients where the interpreter calls the mode.
        with torch.no_grad(), intercept(key=Key(7)) as context:
            return model(input_ids=x)[0], context.count

    eager, calls = run(encoder)
    compiled, compiled_calls = run(torch.compile(encoder, backend="aot_eager"))
    assert compiled_calls == calls
    torch.testing.assert_close(compiled, eager)


class Asking(nn.Module):
    """Draws the number of a layer in evaluation too, as older models do."""

    layerdrop = 0.5

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.rand([])
        y = x if self.training and skip < self.layerdrop else x + 1
        return y + torch.rand(3)


def test_in_evaluation_layerdrop_is_torchs() -> None:
    model, x = Asking().eval(), torch.zeros(3)
    torch.manual_seed(3)
    expected = model(x)
    torch.manual_seed(3)
    with intercept(key=Key(7)) as context:
        assert model(x).equal(expected)
        assert context.count == 0
        model.train()(x)
        assert context.count == 1


def test_what_intercept_takes_is_what_inspect_says() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return drop_path(x, P) + noise(x)

    sites = inspect(Net(), X)
    assert {site.function: site.status for site in sites} == {
        "drop_path": "intercept",
        "noise": "perhaps",
    }
