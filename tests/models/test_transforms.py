"""Converted models under torch.func, autocast, DataParallel, threads and pickling, in contexts and out."""

from __future__ import annotations

import copy
import io
import pickle
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import pytest
import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import oracle
from models import zoo
from process import PATIENCE
from thinned import Key, keep_mask
from thinned.models import Intercepted, address, convert, intercept

MEMBERS, BATCH, WIDTH = 3, 4, 16
X = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
RANDOMNESS = ["same", "different", "error"]


class Net(nn.Module):
    """A module and a function of torch's; the last mask is seen in the output."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.nn.functional.dropout(self.first(x), 0.3, self.training)
        y: Tensor = self.dropout(self.second(x))
        return y


def net(seed: int = 0) -> Any:
    return convert(Net(seed))


class TestEnsembles:
    """stack_module_state, and vmap of functional_call."""

    @pytest.fixture
    def members(self) -> list[Any]:
        return [net(seed) for seed in range(MEMBERS)]

    def run(self, members: list[Any], randomness: str) -> Tensor:
        parameters, buffers = stack_module_state(members)

        def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
            return functional_call(members[0], (parameters, buffers), (X,))

        return vmap(call, randomness=randomness)(parameters, buffers)  # type: ignore[no-any-return]

    @pytest.mark.parametrize("context", [nullcontext, intercept])
    def test_drawn(self, members: list[Any], context: Callable[[], AbstractContextManager[Any]]) -> None:
        """torch.func documents one mask for all, one for each, or an error."""
        with context():
            same, different = self.run(members, "same"), self.run(members, "different")
            with pytest.raises(RuntimeError, match="randomness"):
                self.run(members, "error")
        masks = same != 0
        assert masks.equal(masks[:1].expand_as(masks))
        assert len({mask.numpy().tobytes() for mask in different != 0}) == MEMBERS

    @pytest.mark.parametrize("randomness", RANDOMNESS)
    def test_keys_in_order(self, members: list[Any], randomness: str) -> None:
        """A function of a key is not random: each member has the masks that it has alone."""
        for member in members:
            member.dropout.p = 0.0
        with intercept(key=Key(7)):
            together = self.run(members, randomness)
        for y, member in zip(together, members, strict=True):
            with intercept(key=Key(7)):
                torch.testing.assert_close(y, member(X))

    @pytest.mark.parametrize("randomness", ["same", "error"])
    def test_address(self, members: list[Any], randomness: str) -> None:
        """Each member has the masks that it has alone, as nothing is drawn."""
        with intercept(), address(members[0], seed=7, step=3):
            together = self.run(members, randomness)
        for y, member in zip(together, members, strict=True):
            with intercept(), address(member, seed=7, step=3):
                torch.testing.assert_close(y, member(X))

    def test_address_different(self, members: list[Any]) -> None:
        """The keys of the members are children of the site's."""
        with intercept(), address(members[0], seed=7, step=3) as site:
            y = self.run(members, "different")
        key = site.key_of("dropout")
        for i in range(MEMBERS):
            assert (y[i] != 0).equal(keep_mask(key.fold(i), X.shape, 0.5))

    def test_address_different_in_different(self) -> None:
        """The outer vmap folds first; a vmap between that is not "different" folds nothing."""
        model = net()

        def call(x: Tensor) -> Tensor:
            y: Tensor = model.dropout(x)
            return y

        for middle in RANDOMNESS:
            mapped = vmap(vmap(vmap(call, randomness="different"), randomness=middle), randomness="different")
            with address(model, seed=7, step=3) as site:
                y = mapped(torch.ones(2, 3, 4, 50))
            key = site.key_of("dropout")
            for index in torch.cartesian_prod(*map(torch.arange, (2, 3, 4))).tolist():
                child = key.fold(index[0])
                child = (child.fold(index[1]) if middle == "different" else child).fold(index[2])
                assert (y[tuple(index)] != 0).equal(keep_mask(child, (50,), 0.5))


def loss(model: nn.Module, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    value: Tensor = functional_call(model, parameters, (x,)).square().sum()
    return value


def test_gradients_of_each_sample() -> None:
    """Mapped one by one, with their ids, samples have the masks of the batch."""
    model, ids = net(), torch.tensor([5, 2**62, 900, -3])
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def of_one(parameters: dict[str, Tensor], x: Tensor, sample: Tensor) -> Tensor:
        with intercept(), address(model, seed=7, step=3, samples=sample[None]):
            return loss(model, parameters, x[None])

    each = vmap(grad(of_one), in_dims=(None, 0, 0))(parameters, X, ids)
    with intercept(), address(model, seed=7, step=3, samples=ids):
        model(X).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


@pytest.mark.filterwarnings("ignore:.*get_attr Node")  # constants of the graph
@pytest.mark.parametrize("contexts", ["address", "key"])
def test_make_fx(contexts: str) -> None:
    """A graph of forward and backward has its masks in it, whatever the input and whatever is drawn."""
    model = net()
    if contexts == "key":
        model.dropout = nn.Dropout(0.5)  # a function of torch's, so that intercept has a key for it
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def step(parameters: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        with ExitStack() as stack:
            stack.enter_context(intercept(key=Key(7) if contexts == "key" else None))
            if contexts == "address":
                stack.enter_context(address(model, seed=7, step=3))
            return grad(lambda parameters: loss(model, parameters, x))(parameters)  # type: ignore[no-any-return]

    graph = make_fx(step)(parameters, X)
    assert not any("draw_key" in str(node.target) for node in graph.graph.nodes)
    for factor in (1.0, -2.0):
        expected = step(parameters, X * factor)
        torch.rand(3)
        found = graph(parameters, X * factor)
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


class TestAutocast:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_types_are_torchs(self, attention: str) -> None:
        plain, model = (zoo.bert(attn_implementation=attention) for _ in range(2))
        convert(model)
        seen: list[dict[str, torch.dtype]] = [{}, {}]
        for types, each in zip(seen, (plain, model), strict=True):
            for name, module in each.named_modules():
                module.register_forward_hook(
                    lambda _, __, y, name=name, types=types: types.update(
                        {name: y.dtype} if isinstance(y, Tensor) else {}
                    )
                )
            with torch.autocast("cpu", torch.bfloat16), intercept() if each is model else nullcontext():
                types[""] = zoo.output(each).dtype
        assert seen[0] == seen[1]
        assert torch.bfloat16 in seen[1].values()

    def test_masks_are_those_without(self) -> None:
        """Those of modules, and of attention, which returns its weights after dropout here."""
        model = convert(zoo.bert(attn_implementation="eager"))
        masks: list[list[Tensor]] = [[], []]
        dropouts = [module for module in model.modules() if type(module).__name__ == "Dropout"]
        found: list[Tensor] = []
        for module in dropouts:
            module.register_forward_hook(lambda _, x, y: found.append((y != 0) | (x[0] == 0)))
        for into, context in zip(masks, (nullcontext(), torch.autocast("cpu", torch.bfloat16)), strict=True):
            found = into
            with context, intercept(), address(model, seed=7, step=3), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                y = model(**zoo.inputs(model), output_attentions=True)
            into += [weights != 0 for weights in y.attentions]
        assert len(masks[0]) == len(dropouts), "attention calls a function in place of its module"
        for plain, cast in zip(*masks, strict=True):
            assert cast.equal(plain)
            assert not plain.all()


def replicas(model: nn.Module, number: int) -> list[Any]:
    """The replicas that torch.nn.parallel.replicate makes of a model, but without GPUs."""
    copies = []
    for _ in range(number):
        made = {module: module._replicate_for_data_parallel() for module in model.modules()}
        for module, replica in made.items():
            for name, child in module._modules.items():
                if child is not None:
                    setattr(replica, name, made[child])
            for name, parameter in module._parameters.items():
                setattr(replica, name, None if parameter is None else parameter.view_as(parameter))
        copies.append(made[model])
    return copies


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """The results of functions that run at the same time; what one raises is raised."""
    results: dict[int, Any] = {}

    def run(i: int, function: Callable[[], Any]) -> None:
        try:
            results[i] = function()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[i] for i in range(len(functions))]


class Meeting(nn.Module):
    """Threads wait for each other here, so that they run at the same time."""

    def __init__(self, barrier: threading.Barrier) -> None:
        super().__init__()
        self.barrier = barrier

    def forward(self, x: Tensor) -> Tensor:
        self.barrier.wait(PATIENCE)
        return x


class TestReplicas:
    """Replicas of DataParallel run in threads of their own and share the model's hooks."""

    def model(self, barrier: threading.Barrier | None = None) -> Any:
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH), nn.Dropout(0.5), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.3)]
        if barrier is not None:
            layers[1:1] = [Meeting(barrier)]
            layers[4:4] = [Meeting(barrier)]
        return convert(nn.Sequential(*layers))

    def test_addressed(self) -> None:
        """Each has the masks of a model that runs its rows alone, and leaves nothing in its thread."""
        model = self.model(threading.Barrier(2))
        with address(model, seed=7, step=3) as site:
            first, second = replicas(model, 2)
            ys = in_threads(lambda: first(X[:2]), lambda: second(X[2:]))
        for y in ys:
            assert (y != 0).equal(site.mask_of("5", (2, WIDTH), 0.3))

    def test_threads_are_left(self) -> None:
        """A part of a replica that runs by itself, before and after the whole, draws its masks."""
        model = self.model()
        with address(model, seed=7, step=3) as site:
            (replica,) = replicas(model, 1)
            part = replica[3]
            before, whole, after, again = in_threads(
                lambda: (part(torch.ones(500)), replica(X), part(torch.ones(500)), replica(X))
            )[0]
        assert not before.equal(after)
        assert whole.equal(again)
        assert (whole != 0).equal(site.mask_of("3", X.shape, 0.3))

    def test_checkpointed(self) -> None:
        """A recomputation in the main thread, after the context, has the replica's masks."""

        class Checkpointed(nn.Sequential):
            def forward(self, x: Tensor) -> Any:
                return (
                    checkpoint(super().forward, x, use_reentrant=False) if self.again else super().forward(x)
                )

            again = False

        model, gradients = Checkpointed(*self.model()), []
        for again in (False, True):
            model.again, x = again, X.clone().requires_grad_()
            model.zero_grad()
            with address(model, seed=7, step=3):
                (replica,) = replicas(model, 1)
                (y,) = in_threads(lambda: replica(x))  # noqa: B023
            y.square().sum().backward()
            gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
        for got, want in zip(*gradients, strict=True):
            oracle.assert_same(got, want)

    def test_of_what_is_intercepted(self) -> None:
        """The wrapper is a part of the replica, and counts in each from 0."""
        model = Intercepted(Net(), key=Key(7))
        with torch.no_grad():
            found = in_threads(*(lambda replica=replica: replica(X) for replica in replicas(model, 2)))
        for y in found:
            oracle.assert_same(y, model(X))

    def test_other_threads_are_not_joined(self) -> None:
        """Only replicas are; the model itself draws in a thread that has entered nothing."""
        model = self.model()
        torch.manual_seed(3)
        expected = model(X)
        torch.manual_seed(3)
        with address(model, seed=7, step=3):
            (y,) = in_threads(lambda: model(X))
        assert y.equal(expected)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="DataParallel needs two GPUs")
    def test_data_parallel(self) -> None:
        model = nn.DataParallel(self.model().cuda())
        with address(model, seed=7, step=3) as site:
            y = model(X.cuda())
        for rows in y.cpu().split(2):
            assert (rows != 0).equal(site.mask_of("3", (2, WIDTH), 0.3))


class TestThreads:
    def test_addresses_of_their_own(self) -> None:
        """One model or two, at different steps, with sites that are called in turn."""
        barrier = threading.Barrier(2)
        one, two = (TestReplicas().model(barrier) for _ in range(2))

        def run(model: nn.Module, step: int) -> Callable[[], Tensor]:
            def call() -> Tensor:
                with address(model, seed=7, step=step):
                    y: Tensor = model(X)
                return y

            return call

        for pair in ((one, two), (one, one)):
            ys = in_threads(run(pair[0], 1), run(pair[1], 2))
            for y, model, step in zip(ys, pair, (1, 2), strict=True):
                kept = address(model, seed=7, step=step).mask_of("5", X.shape, 0.3)
                assert (y != 0).equal(kept)

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoints_of_their_own(self, reentrant: bool) -> None:
        """Contexts that overlap and end in any order; torch is as before at the end."""
        before = dict(vars(torch_checkpoint))
        barrier = threading.Barrier(2)

        def run(step: int, model: nn.Module, through: bool, wait: Callable[[], object]) -> list[Tensor]:
            x = X.clone().requires_grad_()
            with ExitStack() as stack:
                stack.enter_context(intercept(key=Key(step)))
                wait()
                stack.enter_context(address(model, seed=7, step=step))
                wait()
                y = x
                for _ in range(2):
                    y = checkpoint(model, y, use_reentrant=reentrant) if through else model(y)
                if step == 1:
                    wait()  # the other one ends here
            if step == 2:
                wait()
            wait()
            y.square().sum().backward()
            return [y.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]  # type: ignore[list-item]

        plain = [run(step, net(), False, lambda: None) for step in (1, 2)]
        models = net(), net()  # made here, as they are made with the generator that threads share
        found = in_threads(
            lambda: run(1, models[0], True, lambda: barrier.wait(PATIENCE)),
            lambda: run(2, models[1], True, lambda: barrier.wait(PATIENCE)),
        )
        for got, want in zip(found, plain, strict=True):
            for a, b in zip(got, want, strict=True):
                oracle.assert_same(a, b)
        assert dict(vars(torch_checkpoint)) == before

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_backward_in_another_thread(self, reentrant: bool) -> None:
        """Autograd does so on GPUs; a recomputation there has the masks of the first run."""
        model, x = net(), X.clone().requires_grad_()

        def run(call: Callable[[], Tensor]) -> list[Any]:
            model.zero_grad()
            x.grad = None
            with intercept(), address(model, seed=7, step=3):
                y = call()
            in_threads(lambda: y.square().sum().backward())
            return [x.grad, *(parameter.grad for parameter in model.parameters())]

        plain = run(lambda: model(x))
        for a, b in zip(run(lambda: checkpoint(model, x, use_reentrant=reentrant)), plain, strict=True):
            oracle.assert_same(a, b)


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "save": saved,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
}
MODELS: dict[str, Callable[[], Any]] = {
    "net": net,
    "intercepted": lambda: Intercepted(net(), key=Key(7)),
    "bert": lambda: convert(zoo.bert(num_hidden_layers=1)),
    "lstm": lambda: convert(zoo.lstm()),
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_copies(name: str, way: str) -> None:
    """A copy made before, within or after an address has hooks of its own and the same masks."""
    model = MODELS[name]()

    def run(model: Any, step: int) -> Any:
        with intercept(), address(model, seed=7, step=step):
            return model(X) if name in ("net", "intercepted") else zoo.output(model)

    twins = [COPIES[way](model)]
    expected = run(model, 3)
    twins.append(COPIES[way](model))
    with address(model, seed=7, step=5):
        twins.append(COPIES[way](model))
        twins.append(COPIES[way](twins[0]))
    for twin in twins:
        assert run(twin, 3).equal(expected)
        assert not run(twin, 4).equal(expected)
        assert address(twin, seed=7, step=3).hooks.id != address(model, seed=7, step=3).hooks.id
        assert set(twin.state_dict()) == set(model.state_dict())
        # An address of the one has no part in the other.
        with intercept(), address(model, seed=7, step=3):
            assert not (run(twin, 4)).equal(expected)


@pytest.mark.parametrize("way", COPIES)
def test_copies_of_contexts(way: str) -> None:
    """An address, with its model, and an intercept are themselves things to copy."""
    model = net()
    site = COPIES[way](address(model, seed=7, step=3, samples=[4, 2]))
    assert site.key_of("dropout") == address(model, seed=7, step=3, samples=[4, 2]).key_of("dropout")
    context = COPIES[way](intercept(key=Key(7)))
    with context:
        y = torch.nn.functional.dropout(X, 0.5)
    assert (y != 0).equal(keep_mask(Key(7).fold(0), X.shape, 0.5))
