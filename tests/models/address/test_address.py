"""Within thinned.address a mask depends on seed, step, site, sample and position alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import thinned
from thinned import Key, address
from thinned.key_source import active

WIDTH = 64


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = thinned.Dropout(0.5)
        self.path = thinned.DropPath(0.3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.dropout(self.linear(x))
        return x + self.path(self.dropout(torch.tanh(y)))


class Net(nn.Module):
    """Blocks that may be checkpointed, one of them called twice, and a function of its own at the end."""

    def __init__(self, through: Callable[..., Tensor] | None = None, blocks: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.through = through

    def forward(self, x: Tensor) -> Tensor:
        for block in (*self.blocks, self.blocks[0]):
            x = self.through(block, x) if self.through else block(x)
        return thinned.functional.dropout(x, 0.1, self.training)


# In float64 a batch of another size, whose sums are in another order on some processors, is off by 1e-16.
@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(8, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def run(net: nn.Module, x: Tensor, step: int = 0, **kwargs: Any) -> Tensor:
    with address(net, seed=7, step=step, **kwargs):
        y: Tensor = net(x)
    return y


def gradients(net: nn.Module, x: Tensor, step: int = 0) -> list[Tensor]:
    net.zero_grad()
    y = run(net, x, step)
    y.square().sum().backward()
    return [y.detach(), *(p.grad for p in net.parameters() if p.grad is not None)]


def test_formula(net: Net, x: Tensor) -> None:
    """Step by step with the keys of the definition."""
    root, y = Key(7).fold(5), x
    for path, calls in (("blocks.0", 0), ("blocks.1", 0), ("blocks.2", 0), ("blocks.0", 1)):
        block: Any = net.get_submodule(path)

        def key(name: str, call: int, path: str = path) -> Key:
            return root.fold(f"{path}.{name}" + (f"#{call}" if call else ""))

        z = thinned.functional.dropout(block.linear(y), 0.5, key=key("dropout", 2 * calls))
        z = thinned.functional.dropout(torch.tanh(z), 0.5, key=key("dropout", 2 * calls + 1))
        y = y + thinned.functional.drop_path(z, 0.3, True, key=key("path", calls))
    y = thinned.functional.dropout(y, 0.1, key=root.fold(""))
    assert run(net, x, step=5).equal(y)


def test_a_step_is_a_mask(net: Net, x: Tensor) -> None:
    first = run(net, x, 3)
    state = torch.get_rng_state()
    torch.rand(5)
    assert run(net, x, 3).equal(first)
    assert not run(net, x, 4).equal(first)
    torch.set_rng_state(state)
    run(net, x, 3)
    assert torch.get_rng_state().equal(state)


def test_other_sites_do_not_shift_it(net: Net, x: Tensor) -> None:
    """A layer that is frozen, replaced or run more often leaves the others' masks alone."""
    site = address(net, seed=7, step=0)
    seen: list[Tensor] = []
    block: Any = net.blocks[1]
    block.path.register_forward_hook(lambda _, __, y: seen.append((y != 0).flatten(1).any(1)))
    run(net, x)
    net.blocks[0].eval()
    run(net, x)
    net.through = lambda block, x: block(block(x))
    run(net, x)
    assert seen[0].equal(seen[1])
    assert seen[0].equal(seen[2])
    assert seen[0].equal(site.mask_of("blocks.1.path", (8, WIDTH), 0.3, broadcast_dims=(1,))[:, 0])


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "element": (thinned.Dropout(0.3), (8, 5)),
    "in place": (thinned.Dropout(0.3, inplace=True), (8, 5)),
    "channel": (thinned.Dropout2d(0.3), (8, 4, 3, 3)),
    "path": (thinned.DropPath(0.5), (8, 5)),
    "alpha": (thinned.AlphaDropout(0.3), (8, 5)),
    "time": (thinned.LockedDropout(0.3), (6, 8, 5)),
    "block": (thinned.DropBlock2d(0.3, 3), (8, 2, 9, 9)),
    "tokens": (thinned.PatchDropout(0.3), (8, 10, 2)),
}


@pytest.mark.parametrize("samples", [None, range(40, 48)], ids=["batch", "samples"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_knows_its_mask(name: str, samples: range | None) -> None:
    """mask_of knows the second call too, also in evaluation, and counts nothing."""
    layer, shape = copy.deepcopy(LAYERS[name])
    net = nn.Sequential(nn.Identity(), layer)
    x = torch.rand(shape).add(1).requires_grad_()
    site = address(net, seed=7, step=3, samples=samples)
    with site:
        net(torch.ones(shape))
        y = net(x.clone())
    (grad,) = torch.autograd.grad(y.sum(), x)
    net.eval()
    with torch.no_grad():
        mask = site.mask_of("1", shape, call=1)
    assert mask.equal(grad != 0)
    assert not mask.equal(site.mask_of("1", shape))
    assert 0 < int((~mask).sum()) < mask.numel()
    assert not layer.training
    with site:
        running: Any = active.key_source
        assert (running.calls, running.stack) == ({}, [])


def test_only_a_layer_knows_its_mask(net: Net) -> None:
    site = address(net, seed=7, step=0)
    with pytest.raises(ValueError, match=r"no module of this Net is at 'blocks\.9'"):
        site.mask_of("blocks.9", (2, 2))
    with pytest.raises(ValueError, match=r"p has to be given for the mask of 'blocks\.1', which is a Block"):
        site.mask_of("blocks.1", (2, 2))


def test_a_compiled_model_has_the_sites_of_the_model(net: Net) -> None:
    site, compiled = (address(model, seed=7, step=0) for model in (net, torch.compile(net)))
    assert compiled.mask_of("blocks.1.path", (8, 2)).equal(site.mask_of("blocks.1.path", (8, 2)))


def test_outside_the_context_nothing_is_different(net: Net, x: Tensor) -> None:
    torch.manual_seed(3)
    before = net(x)
    run(net, x)
    torch.manual_seed(3)
    assert net(x).equal(before)
    with pytest.raises(RuntimeError), address(net, seed=7, step=0):
        net(x[:, 1:])
    torch.manual_seed(3)
    assert net(x).equal(before)


def test_a_module_that_raises_leaves_no_trace(net: Net, x: Tensor) -> None:
    with address(net, seed=7, step=0):
        with pytest.raises(RuntimeError):
            net(x[:, 1:])
        running: Any = active.key_source
        assert not running.stack
    assert run(net, x).equal(run(net, x))


def test_a_given_key_stays(x: Tensor) -> None:
    net = nn.Sequential(thinned.Dropout(0.5))
    with address(net, seed=7, step=0):
        assert net[0](x, key=Key(3)).equal(thinned.functional.dropout(x, 0.5, key=Key(3)))


def test_contexts_nest(net: Net, x: Tensor) -> None:
    inner, outer = run(net, x, 1), run(net, x, 2)
    with address(net, seed=7, step=2):
        assert run(net, x, 1).equal(inner)
        assert net(x).equal(outer)


class TestSamples:
    ids = torch.tensor([40, 7, 2**62, -1, 12, 13, 14, 15])

    def test_place_and_size_of_the_batch(self, net: Net, x: Tensor) -> None:
        whole = run(net, x, samples=self.ids)
        order = torch.tensor([3, 1, 6, 0])
        assert run(net, x[order], samples=self.ids[order]).allclose(whole[order])
        assert run(net, x[2:3], samples=[2**62]).allclose(whole[2:3])

    def test_each_sample_has_its_key(self, x: Tensor) -> None:
        net = nn.Sequential(thinned.Dropout(0.5))
        key = Key(7).fold(0).fold("0").fold(self.ids)
        assert run(net, x, samples=self.ids).equal(thinned.functional.dropout(x, 0.5, key=key))
        mask = address(net, seed=7, step=0, samples=self.ids).mask_of("0", (8, WIDTH), 0.5)
        assert mask.equal(run(net, x, samples=self.ids) != 0)

    def test_rows_within_a_sample(self, x: Tensor) -> None:
        """Heads of attention, flattened into dimension 0, each have a key of their own."""
        net = nn.Sequential(thinned.Dropout(0.5))
        heads = x.reshape(16, -1)
        whole = run(net, heads, samples=self.ids)
        assert not whole[0].ne(0).equal(whole[1].ne(0))
        assert run(net, heads[4:6], samples=self.ids[2:3]).equal(whole[4:6])

    def test_what_all_samples_share(self, x: Tensor) -> None:
        net = nn.Sequential(thinned.WeightDrop(nn.Linear(WIDTH, 4).double(), ["weight"], 0.5))
        assert run(net, x, samples=self.ids)[:2].allclose(run(net, x[:2], samples=self.ids[:2]))
        position = nn.Sequential(thinned.Dropout(0.5))
        assert run(position, x[:1], samples=self.ids).equal(run(position, x[:1]))

    @pytest.mark.parametrize(
        "layer",
        [
            thinned.StochasticDepth(0.5, "batch"),
            thinned.DropBlock2d(0.5, 3, batchwise=True),
            thinned.Dropout(0.5, broadcast_dims=(-4,)),
            thinned.AlphaDropout(0.5, broadcast_dims=(0, 2)),
            thinned.GaussianDropout(0.5, broadcast_dims=(0,)),
            thinned.ConcreteDropout(0.5, broadcast_dims=(0,)),
            thinned.DropKey(0.5, broadcast_dims=(0, 1)),
        ],
        ids=repr,
    )
    def test_a_decision_for_the_batch(self, layer: nn.Module) -> None:
        net, x = nn.Sequential(layer), torch.ones(8, 4, 6, 6)
        key = Key(7).fold(0).fold("0")
        assert run(net, x, samples=self.ids).equal(layer(x, key=key))
        assert run(net, x[:3], samples=self.ids[5:]).equal(layer(x[:3], key=key))

    def test_other_rows_are_refused(self, net: Net, x: Tensor) -> None:
        with pytest.raises(RuntimeError, match=r"'blocks\.0\.dropout' .* \(8, 64\), .* of the 3 samples"):
            run(net, x, samples=self.ids[:3])

    def test_recurrent_and_words(self) -> None:
        torch.manual_seed(0)
        words = torch.randint(0, 50, (8, 12))
        net = nn.Sequential(
            thinned.EmbeddingDropout(nn.Embedding(50, 16), 0.3),
            thinned.LockedDropout(0.3, batch_first=True),
            thinned.VariationalLSTM(
                16, 16, batch_first=True, input_p=0.3, recurrent_p=0.3, hidden_zoneout_p=0.1
            ),
        )
        with address(net, seed=7, step=0, samples=self.ids):
            whole, _ = net(words)
        with address(net, seed=7, step=0, samples=self.ids[3:5]):
            part, _ = net(words[3:5])
        assert part.allclose(whole[3:5], atol=1e-6)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_a_function_of_the_module_around_a_checkpointed_region(x: Tensor, reentrant: bool) -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.checkpointed = nn.Identity(), False

        def forward(self, x: Tensor) -> Any:
            def region(x: Tensor) -> Tensor:
                return thinned.functional.dropout(self.inner(x).sin(), 0.5)

            options = {"use_reentrant": reentrant, "preserve_rng_state": False}
            return checkpoint(region, x, **options) if self.checkpointed else region(x)

    net = nn.Sequential(Functional(), Functional())
    x.requires_grad_()
    (plain,) = torch.autograd.grad(run(net, x).sum(), x)
    for part in net:
        part.checkpointed = True  # type: ignore[assignment]
    run(net, x).sum().backward()
    assert x.grad is not None
    assert x.grad.equal(plain)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_with_checkpoints(x: Tensor) -> None:
    """One block, called twice: compilers take a second for each site."""
    net = Net(blocks=1).double()
    x.requires_grad_()
    plain = gradients(net, x)
    net.through = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, x), plain, strict=True):
        assert a.allclose(b, atol=1e-5)


def test_hooks_are_added_once(net: Net, x: Tensor) -> None:
    for step in range(3):
        run(net, x, step)
    assert len(net.blocks[0]._forward_pre_hooks) == 1


def test_a_seed_that_is_a_key(net: Net, x: Tensor) -> None:
    with address(net, seed=Key(7), step=0):
        assert net(x).equal(run(net, x))


def test_wrappers_are_no_part_of_a_path(x: Tensor) -> None:
    net = Net(blocks=2).double()
    with torch.no_grad():  # or Dynamo warns of what it does to inputs that are no leaves
        expected = run(net, x)
        net.blocks[1] = torch.compile(net.blocks[1], backend="eager")
        assert run(nn.DataParallel(copy.deepcopy(net)), x).equal(expected)
        assert run(torch.compile(net, backend="eager"), x).equal(expected)
