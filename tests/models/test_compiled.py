"""convert, intercept and address together on compiled models: one graph, eager's bits, no recompilation."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

from models import zoo
from thinned import Dropout, Key
from thinned.models import address, convert, intercept

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SEEDS: list[int | Key] = [7, Key(2**63 + 8)]


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: zoo.bert(num_hidden_layers=1),
    "gpt2": lambda: zoo.gpt2(n_layer=1),
    "vit": lambda: zoo.vit(num_hidden_layers=1),
    "t5": lambda: zoo.t5(num_layers=1),
    "llama": lambda: zoo.llama(num_hidden_layers=1),
    "encoder": lambda: zoo.encoder(1),
    "attention": zoo.attention,
}


def made(name: str) -> nn.Module:
    return convert(MODELS[name]())


def small() -> nn.Module:
    """One site: compilers take half a second for each."""
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)))


def inputs(model: nn.Module, batch: int) -> dict[str, Tensor]:
    if isinstance(model, nn.Sequential):
        return {"input": torch.randn(batch, 8, generator=torch.Generator().manual_seed(0))}
    return zoo.inputs(model, batch)


def results(
    call: Callable[..., Any], model: nn.Module, given: dict[str, Tensor], **addressed: Any
) -> list[Tensor | None]:
    """The value of a call of ``model``, or of what it is compiled to, and the gradients of all parameters."""
    model.zero_grad()
    with intercept(), address(model, **addressed):
        y = call(**given)
    if not isinstance(y, Tensor):
        y = y.logits if "logits" in y else y.last_hidden_state
    y.square().sum().backward()
    return [y.detach(), *(parameter.grad for parameter in model.parameters())]


def assert_same(fast: list[Tensor | None], eager: list[Tensor | None]) -> None:
    assert len(fast) == len(eager)
    for compiled, want in zip(fast, eager, strict=True):
        if want is None:  # compiled code has zeros for what it did not use
            assert compiled is None or not compiled.any()
        else:
            assert compiled is not None
            assert compiled.equal(want)


def compiled(function: Any, backend: Any = "aot_eager", **options: Any) -> Any:
    return torch.compile(function, fullgraph=True, backend=backend, **options)


QUICK = ("attention",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_steps_samples_seeds_and_sizes(name: str) -> None:
    """One compilation for all of them, and values and gradients are eager's bit for bit."""
    if name == "t5" and torch.__version__ < (2, 13):
        pytest.skip("Dynamo has no copy.deepcopy, which T5 calls")
    model = made(name)
    counter = CompileCounterWithBackend("aot_eager")
    fast, values = compiled(model, counter), []
    for step, (batch, seed) in enumerate([(4, SEEDS[0]), (4, SEEDS[1]), (6, SEEDS[0]), (3, SEEDS[1])]):
        given, samples = inputs(model, batch), torch.arange(batch) * 7 + step
        for tensor in (*given.values(), samples):
            torch._dynamo.mark_dynamic(tensor, 0)
        addressed = {"seed": seed, "step": step, "samples": samples}
        again = results(fast, model, given, **addressed)
        expected = results(model, model, given, **addressed)
        assert_same(again, expected)
        values.append(expected[0])
    assert not values[0].equal(values[1]), "the seed or the step makes no difference"
    assert counter.frame_count == 1


def test_sizes_that_nobody_announced() -> None:
    """The second size recompiles, with symbolic sizes, and no further one does."""
    model = small()
    counter = CompileCounterWithBackend("aot_eager")
    fast = compiled(model, counter)
    for step, batch in enumerate((4, 4, 6, 3, 9)):
        given = inputs(model, batch)
        addressed = {"seed": 7, "step": step}
        assert_same(results(fast, model, given, **addressed), results(model, model, given, **addressed))
    assert counter.frame_count == 2


def test_inductor_has_the_masks() -> None:
    """Fusion and rounding change no mask."""
    model = convert(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.Dropout(0.3)))
    fast, x = compiled(model, "inductor"), torch.randn(6, 8)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            addressed = {"seed": 7, "step": step, "samples": torch.arange(6) + step}
            with address(model, **addressed):
                y = fast(x)
            with address(model, **addressed):
                expected = model(x)
            assert (y == 0).equal(expected == 0)
            torch.testing.assert_close(y, expected)


def test_another_model_has_its_own_sites() -> None:
    """A function compiled in one model's address is right in the address of a model that contains it."""
    inner = nn.Sequential(Dropout(0.5))
    outer, x = nn.Sequential(nn.Identity(), inner), torch.ones(4, 8)
    address(inner, seed=7, step=0), address(outer, seed=7, step=0)
    fast = compiled(inner)
    for model, path in ((inner, "0"), (outer, "1.0"), (inner, "0")):
        with address(model, seed=7, step=0) as site:
            assert (fast(x) != 0).equal(site.mask_of(path, x.shape, 0.5))
    torch.manual_seed(3)
    y = fast(x)
    torch.manual_seed(3)
    assert y.equal(inner(x))


def test_hooks_of_ones_own() -> None:
    """They may be registered before and after thinned's, on the model and on its parts."""
    model, x, called = nn.Sequential(Dropout(0.5)), torch.ones(4, 8), []
    model.register_forward_pre_hook(lambda *_: called.append("model"))
    model[0].register_forward_pre_hook(lambda *_: called.append("before"))
    address(model, seed=7, step=0)
    model[0].register_forward_pre_hook(lambda *_: called.append("after"))
    fast = compiled(model)
    with address(model, seed=7, step=0) as site:
        assert (fast(x) != 0).equal(site.mask_of("0", x.shape, 0.5))
    assert called == ["model", "before", "after"]


def test_a_new_thread() -> None:
    """Code compiled before a thread's first context does not run in that context."""
    model, x, found = nn.Sequential(Dropout(0.5)), torch.ones(64), []
    address(model, seed=7, step=0)
    fast = compiled(model)

    def run() -> None:
        found.append(fast(x))
        with address(model, seed=7, step=0):
            found.append(fast(x))
        found.append(fast(x))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    before, within, after = (y != 0 for y in found)
    assert within.equal(address(model, seed=7, step=0).mask_of("0", x.shape, 0.5))
    assert not before.equal(after)
    assert not before.equal(within)


class TestWithin:
    """Contexts that are entered in the compiled function."""

    @pytest.mark.parametrize("kind", ["tensor", "integer"])
    def test_a_whole_step(self, kind: str) -> None:
        """Forward, backward and update in one graph; a step that is a tensor never recompiles."""
        model = convert(zoo.attention(0.3)) if kind == "tensor" else small()
        address(model, seed=7, step=0)
        (x,) = inputs(model, 4).values()

        def train(parameters: dict[str, Tensor], step: Any) -> tuple[dict[str, Tensor], Tensor]:
            def loss(parameters: dict[str, Tensor]) -> Tensor:
                with intercept(), address(model, seed=7, step=step):
                    value: Tensor = functional_call(model, parameters, (x,)).square().mean()
                return value

            gradients, value = grad_and_value(loss)(parameters)
            return {name: parameters[name] - 0.1 * gradients[name] for name in parameters}, value

        counter = CompileCounterWithBackend("aot_eager")
        fast = compiled(train, counter)
        eager = again = {name: parameter.detach() for name, parameter in model.named_parameters()}
        for number in range(1, 4):
            step = torch.tensor(number) if kind == "tensor" else number
            eager, expected = train(eager, number)
            again, value = fast(again, step)
            assert value.equal(expected)
            for name, parameter in eager.items():
                assert again[name].equal(parameter)
        assert counter.frame_count == (1 if kind == "tensor" else 2)

    def test_hooks_have_to_be_there(self) -> None:
        model = nn.Sequential(Dropout(0.5))

        def run(x: Tensor) -> Any:
            with address(model, seed=7, step=0):
                return model(x)

        with pytest.raises(Exception, match="gives a model hooks on first use, which compiled code cannot"):
            compiled(run)(torch.ones(4))
        assert not model._forward_hooks
        expected = run(torch.ones(4))
        torch.compiler.reset()
        assert compiled(run)(torch.ones(4)).equal(expected)

    def test_it_ends_there(self) -> None:
        model = nn.Sequential(Dropout(0.5))
        address(model, seed=7, step=0)

        def run(x: Tensor) -> tuple[Tensor, Tensor]:
            with address(model, seed=7, step=0):
                y = model(x)
            return y, model(x)

        x = torch.ones(64)
        fast = compiled(run)
        for seed in (3, 4):
            torch.manual_seed(seed)
            inside, after = fast(x)
            torch.manual_seed(seed)
            assert after.equal(model(x))
            assert inside.equal(run(x)[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, after a break
def test_graph_breaks() -> None:
    """Dynamo breaks its graph for recurrent networks, whose sites are the same all the same."""
    model = convert(zoo.lstm())
    fast = torch.compile(model, backend="aot_eager")
    for step in range(3):
        for samples in (None, torch.arange(4) + step):
            addressed = {"seed": 7, "step": step, "samples": samples}
            given = inputs(model, 4)
            assert_same(results(fast, model, given, **addressed), results(model, model, given, **addressed))


@pytest.mark.parametrize("randomness", ["same", "different", "error"])
def test_mapped(randomness: str) -> None:
    """An ensemble; each number of members compiles once."""
    members = [convert(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))) for _ in range(3)]
    model, x = members[0], torch.randn(4, 8)
    parameters, _ = stack_module_state(members)
    address(model, seed=7, step=0)

    def run(parameters: dict[str, Tensor]) -> Tensor:
        def call(parameters: dict[str, Tensor]) -> Any:
            return functional_call(model, parameters, (x,))

        return vmap(call, randomness=randomness)(parameters)  # type: ignore[no-any-return]

    counter = CompileCounterWithBackend("aot_eager")
    fast = compiled(run, counter)
    for step in range(3):
        for number in (3, 2):
            given = {name: value[:number].detach() for name, value in parameters.items()}
            with address(model, seed=7, step=step):
                y = fast(given)
            with address(model, seed=7, step=step):
                assert y.equal(run(given))
    assert counter.frame_count == 2


class Devices:
    """A backend that runs graphs as they are and knows on which devices they work."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    def __call__(self, graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, Tensor):
                self.seen.add(value.device.type)
        return graph


@pytest.mark.parametrize("samples", [None, [3, 1, 4, 2]])
def test_keys_are_where_the_model_is(samples: list[int] | None) -> None:
    """A CUDA graph needs this. The meta device stands for one that is not the CPU."""
    model = convert(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Dropout(0.1))).to("meta")
    devices = Devices()
    fast = compiled(model, devices)
    with address(model, seed=7, step=3, samples=samples):
        assert fast(torch.ones(4, 8, device="meta")).is_meta
    assert devices.seen == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("samples", [False, True])
def test_reduce_overhead(samples: bool) -> None:
    """CUDA graphs, each replayed with the keys of its step."""
    from torch._dynamo.utils import counters

    layers = nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64), nn.Dropout(0.1)
    model = convert(nn.Sequential(*layers)).cuda()
    x = torch.randn(32, 64, device="cuda")
    fast = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(6):
            addressed = {"seed": 7, "step": step, "samples": torch.arange(32) + step if samples else None}
            torch.compiler.cudagraph_mark_step_begin()
            with address(model, **addressed) as site:
                y = fast(x)
            y.sum().backward()
            assert (y != 0).cpu().equal(site.mask_of("3", x.shape, 0.1))
            with address(model, **addressed):
                torch.testing.assert_close(y, model(x))
    assert not counters["inductor"]["cudagraph_skips"]
