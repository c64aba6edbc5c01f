"""Twenty steps of training give the same losses and parameters, bit for bit, however the steps are computed.

BERT is converted, and within thinned.intercept, as its attention drops in a function; a language model has an
``nn.LSTM`` of two layers, which drops in torch's kernel. Where batches are split or reordered, sums are too,
and what then is equal exactly are the masks.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import thinned
from models import zoo

STEPS, BATCH, LENGTH, CLASSES, SEED = 20, 32, 6, 5, 7

# In float64 a sum in another order has another error, of some eps = 2e-16 of its terms, which each step hands
# on a little larger. Masks that differ move losses by 1e-4: test_without_an_address.
SUMMATION = 1e-13


class Language(nn.Module):
    """The next of a few words, by an LSTM whose parts may be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(zoo.VOCABULARY, zoo.WIDTH)
        self.lstm = nn.LSTM(zoo.WIDTH, zoo.WIDTH, num_layers=2, dropout=0.3, batch_first=True)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(zoo.WIDTH, CLASSES)
        self.through: Callable[..., Any] = lambda part, x: part(x)

    def forward(self, words: Tensor) -> Tensor:
        y, _ = self.through(self.lstm, self.embedding(words))
        logits: Tensor = self.head(self.through(self.dropout, y))
        return logits.flatten(0, 1)


class Classifier(nn.Module):
    """BERT, called as :class:`Language` is."""

    def __init__(self, layers: int = zoo.LAYERS) -> None:
        super().__init__()
        self.bert = zoo.bert(num_labels=CLASSES, num_hidden_layers=layers, use_cache=False)

    def forward(self, words: Tensor) -> Tensor:
        logits: Tensor = self.bert(input_ids=words).logits
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "BERT": Classifier,
    "LSTM": Language,
    "BERT of one layer": partial(Classifier, 1),
}


@pytest.fixture(params=["BERT", "LSTM"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param  # type: ignore[no-any-return]


def make(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = MODELS[name]()
    thinned.convert(model)
    return model.to(dtype)


def examples(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The words and classes of a step's batch, and the samples' ids."""
    generator = torch.Generator().manual_seed(step)
    words = torch.randint(1, zoo.VOCABULARY, (BATCH, LENGTH), generator=generator)
    return words, words % CLASSES, torch.randperm(1000, generator=generator)[:BATCH]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


WHOLE = (torch.arange(BATCH),)


def train(
    model: nn.Module,
    steps: Iterable[int] = range(STEPS),
    *,
    call: Callable[[Tensor], Tensor] | None = None,
    batches: Sequence[Tensor] = WHOLE,
    optimizer: torch.optim.Optimizer | None = None,
    addressed: bool = True,
) -> Tensor:
    """The losses of the steps; `call` is the model in another form, `batches` the rows computed at a time.

    Unless `addressed`, masks are drawn in the order of the calls.
    """
    call = model if call is None else call
    optimizer = optimizer_of(model) if optimizer is None else optimizer
    losses = []
    for step in steps:
        words, classes, ids = examples(step)
        optimizer.zero_grad()
        total = torch.zeros(())
        for rows in batches:
            with ExitStack() as contexts:
                contexts.enter_context(thinned.intercept())
                if addressed:
                    contexts.enter_context(thinned.address(model, seed=SEED, step=step, samples=ids[rows]))
                logits = call(words[rows])
                wanted = classes[rows].flatten() if len(logits) > len(rows) else classes[rows, 0]
                loss = cross_entropy(logits, wanted, reduction="sum") / (BATCH * len(logits) / len(rows))
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        losses.append(total)
    return torch.stack(losses)


Result = tuple[Tensor, list[Tensor]]


def result(model: nn.Module, **arguments: Any) -> Result:
    """The losses, and the parameters after them."""
    losses = train(model, **arguments)
    return losses, [parameter.detach().clone() for parameter in model.parameters()]


_plain: dict[Any, Result] = {}


def plain(name: str, dtype: torch.dtype = torch.float64) -> Result:
    """Eager, uninterrupted, in whole batches."""
    if (name, dtype) not in _plain:
        _plain[name, dtype] = result(make(name, dtype))
    return _plain[name, dtype]


def assert_same_bits(got: Result, want: Result) -> None:
    assert got[0].equal(want[0])
    assert all(a.equal(b) for a, b in zip(got[1], want[1], strict=True))


def assert_close(got: Result, want: Result) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=SUMMATION, atol=SUMMATION)
    torch.testing.assert_close(got[1], want[1], rtol=SUMMATION, atol=SUMMATION)


@contextmanager
def masks(model: nn.Module) -> Iterator[dict[str, list[Tensor]]]:
    """The masks of the model's dropout modules, by path."""
    seen: dict[str, list[Tensor]] = {}

    def record(path: str) -> Callable[..., None]:
        return lambda _, __, y: seen.setdefault(path, []).append(y != 0)

    modules = model.named_modules()
    handles = [m.register_forward_hook(record(path)) for path, m in modules if isinstance(m, thinned.Dropout)]
    yield seen
    for handle in handles:
        handle.remove()


def test_the_plain_run(name: str) -> None:
    """It learns, and drops in modules and in a function: there is something to compare."""
    losses, _ = plain(name)
    assert losses[-5:].mean() < losses[:5].mean()
    assert losses.unique().numel() == STEPS
    model, (words, _, ids) = make(name), examples(0)
    with masks(model) as seen, thinned.address(model, seed=SEED, step=0, samples=ids), thinned.intercept():
        y = model(words)
        for module in model.modules():
            if isinstance(module, thinned.Dropout):
                module.eval()
        assert all(not mask.all() for kept in seen.values() for mask in kept)
        with thinned.address(model, seed=SEED, step=1, samples=ids):
            again = model(words)
        with thinned.address(model, seed=SEED, step=0, samples=ids):
            first = model(words)
    assert seen
    assert not again.equal(first), "what is no module drops too"
    assert not y.equal(first)


def test_resumed(name: str) -> None:
    """At step 10, in a new model, with no state of a generator."""
    dtype = torch.float32
    first = make(name, dtype)
    optimizer = optimizer_of(first)
    losses = train(first, range(10), optimizer=optimizer)
    file = io.BytesIO()
    torch.save({"model": first.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    state = torch.load(file)
    second = make(name, dtype, seed=1)
    optimizer = optimizer_of(second)
    second.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.manual_seed(999)
    losses = torch.cat([losses, train(second, range(10, STEPS), optimizer=optimizer)])
    assert_same_bits((losses, list(second.parameters())), plain(name, dtype))


# oneDNN's LSTM in float32 has other roundings where no gradient is wanted, as when reentrant ones go forward.
ROUNDS_ALIKE = {"BERT": torch.float32, "LSTM": torch.float64}


def checkpointed(name: str, dtype: torch.dtype, reentrant: bool) -> nn.Module:
    model: Any = make(name, dtype)
    options = {"use_reentrant": reentrant, "preserve_rng_state": False}
    if name != "LSTM":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # it is about to have another name
            model.bert.gradient_checkpointing_enable(options)
    else:
        model.through = partial(checkpoint, **options)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed(name: str, reentrant: bool) -> None:
    dtype = ROUNDS_ALIKE[name]
    assert_same_bits(result(checkpointed(name, dtype, reentrant)), plain(name, dtype))


def test_checkpointed_with_drawn_masks(name: str) -> None:
    """Without an address the recomputation draws others: the test above can fail."""
    whole = train(make(name), addressed=False)
    losses = train(checkpointed(name, torch.float64, reentrant=True), addressed=False)
    assert losses[0] == whole[0]
    assert not losses[1:].allclose(whole[1:], rtol=1e-4)


SPLITS = {
    "4 x 8": torch.arange(BATCH).chunk(4),
    "reversed": (torch.arange(BATCH).flip(0),),
}


@pytest.mark.parametrize("split", SPLITS)
def test_other_batches(name: str, split: str) -> None:
    """Masks are the same bit for bit; losses and parameters to the order of sums."""
    batches = SPLITS[split]
    with masks(one := make(name)) as want:
        expected = result(one)
    with masks(other := make(name)) as got:
        assert_close(result(other, batches=batches), expected)
    order = torch.cat(batches)
    for path, kept in want.items():
        for step in range(STEPS):
            parts = got[path][step * len(batches) : (step + 1) * len(batches)]
            assert torch.cat(parts).equal(kept[step][order]), (path, step)


@pytest.mark.parametrize("split", ["4 x 8", "reversed"])
def test_without_an_address(name: str, split: str) -> None:
    """Masks by place in the batch differ, by far more than sums do: the test above can fail."""
    whole = train(make(name), addressed=False)
    losses = train(make(name), batches=SPLITS[split], addressed=False)
    assert (losses / whole - 1).abs().min() > 1e-6


def test_checkpointed_and_accumulated(name: str) -> None:
    assert_close(result(checkpointed(name, torch.float64, False), batches=SPLITS["4 x 8"]), plain(name))


def test_two_stages() -> None:
    """A pipeline, whose stages have a part of the model each and micro-batches in orders of their own."""
    whole: Any = make("LSTM")
    first, second = copy.deepcopy(whole), copy.deepcopy(whole)
    del first.dropout, first.head, second.embedding, second.lstm
    optimizers = [optimizer_of(first), optimizer_of(second)]
    batches = SPLITS["4 x 8"]
    losses = []
    for step in range(STEPS):
        words, classes, ids = examples(step)

        def at(stage: nn.Module, rows: Tensor, step: int = step, ids: Tensor = ids) -> thinned.Address:
            return thinned.address(stage, seed=SEED, step=step, samples=ids[rows])

        between: list[Tensor] = []
        for rows in batches:
            with at(first, rows), thinned.intercept():
                between.append(first.lstm(first.embedding(words[rows]))[0])
        total = torch.zeros(())
        for i in (2, 0, 3, 1):
            handed = between[i].detach().requires_grad_()
            with at(second, batches[i]):
                logits = second.head(second.dropout(handed)).flatten(0, 1)
            loss = cross_entropy(logits, classes[batches[i]].flatten(), reduction="sum") / (BATCH * LENGTH)
            loss.backward()
            between[i].backward(handed.grad)
            total = total + loss.detach()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(total)
    assert_close((torch.stack(losses), [*first.parameters(), *second.parameters()]), plain("LSTM"))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, after a break
class TestCompiled:
    """BERT is one graph. Dynamo breaks its own for ``nn.LSTM``, whose kernel it cannot train."""

    @pytest.mark.parametrize(
        ("name", "is_checkpointed"),
        [
            pytest.param("BERT of one layer", False, id="BERT"),
            pytest.param("BERT of one layer", True, id="BERT checkpointed", marks=pytest.mark.slow),
            pytest.param("LSTM", False, id="LSTM"),
            pytest.param("LSTM", True, id="LSTM checkpointed"),
        ],
    )
    def test_training(self, name: str, is_checkpointed: bool) -> None:
        dtype = torch.float32
        model = checkpointed(name, dtype, reentrant=False) if is_checkpointed else make(name, dtype)
        call = torch.compile(model, backend="aot_eager", fullgraph=name != "LSTM")
        optimizer = optimizer_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of compilers, while they compile
            first = train(model, range(1), call=call, optimizer=optimizer)
        with torch.compiler.set_stance("fail_on_recompile"):
            losses = train(model, range(1, STEPS), call=call, optimizer=optimizer)
        assert_same_bits((torch.cat([first, losses]), list(model.parameters())), plain(name, dtype))

    def test_functions_in_a_checkpoint(self) -> None:
        """Compilers apply a function mode to the checkpoint itself, and not to what is in it."""
        model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        x = torch.randn(4, 3, 8)

        def part(linear: nn.Module, x: Tensor) -> Tensor:
            x = scaled_dot_product_attention(linear(x), x, x, dropout_p=0.5)
            return dropout(x, 0.5).tanh()

        def plain(x: Tensor) -> Tensor:
            return part(model[1], part(model[0], x))

        def nested(x: Tensor) -> Tensor:
            again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
            first: Tensor = again(lambda x: again(part, model[0], x), x)
            return part(model[1], first)

        for key in (thinned.Key(SEED), None):
            found = []
            for call in (plain, torch.compile(nested, backend="aot_eager", fullgraph=True)):
                with thinned.address(model, seed=SEED, step=0), thinned.intercept(key=key):
                    y = call(x)
                found.append([y.detach(), *torch.autograd.grad(y.sum(), list(model.parameters()))])
            assert all(a.equal(b) for a, b in zip(*found, strict=True))
