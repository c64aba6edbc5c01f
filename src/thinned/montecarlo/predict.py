"""Monte-Carlo dropout: the predictive distribution of any model that drops."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from itertools import islice
from operator import itemgetter
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from thinned.checks import check_integer, check_real, got
from thinned.distributed.shards import is_dtensor
from thinned.keys import Key
from thinned.models.address import ids_of
from thinned.models.address.hooks import hooks_of
from thinned.montecarlo.accumulate import Accumulator
from thinned.montecarlo.draws import Batch, Drawing, Outputs
from thinned.montecarlo.dropping import Dropouts, Inject
from thinned.montecarlo.moments import moments
from thinned.montecarlo.prediction import Kind, Prediction, entropy
from thinned.montecarlo.sharing import Ranks, Shard
from thinned.progress import progress_bar
from thinned.torch_state import outside_graphs

__all__ = ["Inputs", "Method", "Settings", "Task", "Until", "predict", "rows_of", "stream"]

Task: TypeAlias = Literal["classification", "regression"] | Callable[[Any], Tensor]
Method: TypeAlias = Literal["stratified", "independent", "moments"]
Until: TypeAlias = float | Mapping[str, float]
Inputs: TypeAlias = Tensor | Mapping[Any, Any] | tuple[Any, ...] | DataLoader[Any]
HINT = "; give a function of the output as task"
STATISTICS = ("mean", "expected_entropy")  # the means over draws, which have a standard error
BATCH_SIZE = 256
BUDGET = {"cpu": 2**26}
BUDGET_ELSEWHERE = 2**29
LEAST_DRAWS = 10  # before a standard error can end the draws of an example


@outside_graphs
def predict(
    model: nn.Module,
    inputs: Inputs,
    samples: int = 100,
    *,
    seed: int | Key = 0,
    task: Task = "classification",
    batch_size: int | None = None,
    method: Method = "stratified",
    strata: int = 20,
    consistent: bool = False,
    inject: Inject | None = None,
    until: Until | None = None,
    quantiles: Sequence[float] = (),
    keep_draws: bool = False,
    ids: Tensor | Sequence[int] | None = None,
    sample_dim: int | Mapping[str, int] | None = None,
    memory: int | None = None,
    shard: Shard | None = None,
    progress: bool = False,
) -> Prediction:
    r"""The mean, variance and uncertainty of a model's predictions with its dropout on.

    .. math:: \bar f(x) = \frac1T\sum_{t=1}^T f_t(x), \qquad
        f_t \text{ the model under the masks of draw } t

    Only dropout is switched on, whatever the flags of the model: dropout modules, functional dropout,
    attention and recurrent layers that drop, all that :func:`thinned.inspect` lists and a key reaches.
    Afterwards, also after an exception, batch normalization's statistics, every module's ``training`` and
    torch's generators are what they were. Code of :func:`torch.compile` runs without the compiler.

    A draw's masks are a function of seed, draw, site and example. So a result does not depend on the batch
    size, on chunks, on the device or on the number of processes, but for rounding. A model whose own function
    mixes the examples of a batch is an exception.

    Args:
        model: any module that drops.
        inputs: a tensor with an example in each row; a tuple of the model's positional arguments, or a
            dictionary of its keyword arguments, in which tensors of the same length have an example in each
            row; or a data loader. A loader's batch may be a tensor, a dictionary of keyword arguments, or a
            list whose first element is the input and whose others are the targets.
        samples: the number of draws.
        seed: an integer or a :class:`~thinned.Key`.
        task: ``"classification"``, for a model that returns logits with the classes in dimension 1;
            ``"regression"``, for one that returns a tensor, or a tuple of a mean and the variance of the
            data's noise; or a function of the model's output that returns a tensor with an example in each
            row. An output with an attribute ``logits``, as of transformers, stands for that.
        batch_size: the number of examples at a time, by default 256. A data loader has its own.
        method: ``"stratified"`` draws repel each other: the mean of as many has a smaller error. Dropouts of
            blocks, weights, edges and targets draw independently all the same.
            ``"independent"``: draw ``t`` has the masks of ``thinned.address(model, seed=seed, step=t,
            samples=ids)``. ``"moments"``: no draws; :func:`~thinned.montecarlo.moments.moments` propagates
            mean and variance through a model of a few kinds of layers, for ``task="regression"``.
        strata: the number of draws of a stratified set. Sets are independent of each other, which gives the
            standard error.
        consistent: let all examples share a draw's masks, those of example 0: a draw is one thinned network.
        inject: puts dropout before modules of a model that has none: probabilities by patterns of paths, or
            ``"head"`` for the last ``nn.Linear`` or convolution, with p = 0.1. It is gone afterwards.
        until: stops the draws of an example early, once the standard errors of all its means are at most this
            number; a dictionary names the statistic, ``"mean"`` or ``"expected_entropy"``. It is looked at
            after every whole set, from the second on; with independent draws after every ten.
        quantiles: probabilities; needs memory for all draws of a batch.
        keep_draws: keep all draws, as ``Prediction.outputs``.
        ids: the numbers of the examples, by default their places in ``inputs``.
        memory: bytes that the largest results of one chunk of draws may take, by default 64 MB on a CPU and
            512 MB elsewhere. Draws are computed in chunks of this size.
        sample_dim: the dimension of the examples within the model, where it is not the first, as for
            :func:`thinned.address`.
        shard: what the processes of torch.distributed's default group share out: ``"examples"``, or the sets
            of ``"draws"``. All call with the same model, inputs and options, and all get the same prediction,
            of all examples. Each reads the whole data loader, which must give all the same batches; process
            ``r`` of ``n`` predicts batches ``r, r + n, ...``. An error in one process raises in all of them
            once their batches are done; one that is interrupted or killed lets the others wait for the
            group's timeout. By default this process predicts by itself.
        progress: show a bar of the batches on standard error, if it is a terminal or a notebook; needs rich.

    Raises:
        ValueError: the model drops nowhere; the inputs have no example; a draw is not finite; a variance is
            negative; or an argument is none of those accepted.
        TypeError: the model returns what the task does not read.
        RuntimeError: ``shard`` without a process group; an error in another process.

    Source: Gal & Ghahramani, "Dropout as a Bayesian approximation", ICML 2016, section 4.

    >>> import torch, thinned
    >>> _ = torch.manual_seed(0)
    >>> hidden = torch.nn.Linear(4, 64), torch.nn.ReLU(), torch.nn.Dropout()
    >>> model = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 3))
    >>> prediction = predict(model, torch.randn(5, 4), samples=100)
    >>> prediction.mean.shape, prediction.mutual_information.shape
    (torch.Size([5, 3]), torch.Size([5]))
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "inputs")}
    return Prediction.cat(list(stream(model, inputs, **options)))


def stream(model: nn.Module, inputs: Inputs, samples: int = 100, **options: Any) -> Iterator[Prediction]:
    """The predictions of :func:`predict`, whose options it takes, one for each batch as soon as it is done.

    Between batches the model and torch's generators are as they were.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(4, 3))
    >>> [len(part) for part in stream(model, torch.randn(5, 4), samples=20, batch_size=2)]
    [2, 2, 1]
    """
    settings = Settings(samples, **options)
    return _stream(model, inputs, settings, Dropouts(model, settings.inject))


@dataclass(frozen=True)
class Settings:
    """The options of :func:`predict`, checked."""

    samples: int = 100
    seed: int | Key = 0
    task: Task = "classification"
    batch_size: int | None = None
    method: Method = "stratified"
    strata: int = 20
    consistent: bool = False
    inject: Inject | None = None
    until: Until | None = None
    quantiles: Sequence[float] = ()
    keep_draws: bool = False
    ids: Tensor | Sequence[int] | None = None
    sample_dim: int | Mapping[str, int] | None = None
    memory: int | None = None
    shard: Shard | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        check_integer("samples", self.samples, least=1)
        check_integer("strata", self.strata, least=1)
        for name in ("batch_size", "memory"):
            if (number := getattr(self, name)) is not None:
                check_integer(name, number, least=1)
        if not callable(self.task) and self.task not in ("classification", "regression"):
            raise ValueError(
                f"task must be 'classification', 'regression' or a function of the model's output, "
                f"{got(self.task)}"
            )
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {self.method!r}")
        if self.method == "moments":
            self._check_moments()
        if self.shard not in (None, "examples", "draws"):
            raise ValueError(f"shard must be 'examples', 'draws' or None, got {self.shard!r}")
        if self.shard == "draws" and self.bounds:
            raise ValueError("until needs all draws of an example in one process; with it, shard='examples'")
        for name, bound in self.bounds.items():
            if name not in STATISTICS or (name != "mean" and self.kind != "classification"):
                raise ValueError(f"until knows no statistic {name!r}; accepted: {', '.join(STATISTICS)}")
            check_real("until", bound)
            if not bound > 0:
                raise ValueError(f"until must be above 0, got {bound} for {name}")
        if self.keep_draws and self.bounds:
            raise ValueError("keep_draws needs as many draws of each example, so until has to be None")
        if not isinstance(self.quantiles, Sequence):
            raise TypeError(f"quantiles must be a sequence such as (0.05, 0.95), {got(self.quantiles)}")
        for q in self.quantiles:
            if not 0 <= q <= 1:
                raise ValueError(f"quantiles must be in [0, 1], got {q}")

    def _check_moments(self) -> None:
        """Raise ValueError for what an analytic mean and variance do not give."""
        if self.task != "regression":
            raise ValueError(
                f"method='moments' is for task='regression', got {self.task!r}; for logits, "
                "thinned.montecarlo.moments.expected_softmax approximates the mean probabilities"
            )
        needs = ("consistent", "inject", "until", "quantiles", "keep_draws")
        if given := [name for name in needs if getattr(self, name)]:
            raise ValueError(f"method='moments' makes no draws, so it takes no {', '.join(given)}")
        if self.shard == "draws":
            raise ValueError("method='moments' makes no draws to share out; accepted: shard='examples'")

    @property
    def kind(self) -> Kind:
        """The name of the task; ``"other"`` for a function."""
        return self.task if self.task == "classification" or self.task == "regression" else "other"

    @property
    def bounds(self) -> Mapping[str, float]:
        """The standard errors at which an example needs no more draws, by statistic."""
        if self.until is None or isinstance(self.until, Mapping):
            return self.until or {}
        return {"mean": self.until}

    @property
    def set_size(self) -> int:
        """The number of draws that are not independent of each other."""
        return min(self.strata, self.samples) if self.method == "stratified" else 1

    @property
    def step(self) -> int:
        """The number of draws between two looks at the bounds."""
        return self.set_size if self.set_size > 1 else LEAST_DRAWS


def _stream(model: nn.Module, inputs: Inputs, settings: Settings, dropouts: Dropouts) -> Iterator[Prediction]:
    ranks = Ranks(settings.shard)
    hooks_of(model)  # vmap cannot give them
    whole = _whole(inputs, settings.ids)
    # A model without parameters runs where its inputs are.
    given = () if whole is None else (arg for arg in whole.args.values() if isinstance(arg, Tensor))
    tensors = (*model.parameters(), *model.buffers(), *given, torch.empty(0, device="cpu"))
    device = tensors[0].device
    budget = settings.memory or BUDGET.get(device.type, BUDGET_ELSEWHERE)
    read = partial(_read, settings.task)
    consistent, sample_dim = settings.consistent, settings.sample_dim
    drawing = Drawing(model, read, settings.seed, settings.set_size, consistent, sample_dim, budget)
    by_draws = settings.shard == "draws"
    at_once, mine = (1, 0) if by_draws else (ranks.size, ranks.rank)
    batches, total = _batches(inputs, whole, settings, at_once)
    items: list[tuple[Batch, Any]] = []

    def compute() -> Any:
        """The part of the next batches for this process: a prediction, or a tally with ``by_draws``."""
        with dropouts.generators():  # outside dropouts.on: the inputs may be made with the model
            items[:] = islice(batches, at_once)
        if mine >= len(items):
            return None
        batch = items[mine][0].to(device)
        part: Prediction | _Tally
        with dropouts.on(), torch.no_grad():
            if settings.method == "moments":
                part = _moments(model, batch)
            elif by_draws:
                part = _tally(batch, drawing, settings, ranks)
            else:
                part = _predict(batch, drawing, settings)
        return part.to(ranks.device or device)

    with progress_bar("batches", total) if settings.progress else nullcontext(str) as tick:
        while True:
            found = [part for part in ranks.gather(compute) if part is not None]
            if not found:
                return
            if by_draws:
                found = [reduce(_Tally.merged, found).result(items[0][0].ids, drawing)]
            for part, (_, targets) in zip(found, items, strict=True):
                tick("")
                yield replace(part.to(device), targets=targets, sites=dropouts.paths)


def _read(task: Task, output: Any) -> Outputs:
    """The tensors of a model's output whose statistics are computed."""
    if callable(task):
        return (_real(task(output), "task"),)
    output = getattr(output, "logits", output)
    if task == "regression":
        parts = output if isinstance(output, tuple | list) else (output,)
        if len(parts) > 2:
            raise TypeError(
                f"task='regression' needs a tensor or a tuple (mean, variance), got {len(parts)} values{HINT}"
            )
        return tuple(_real(part, "the model") for part in parts)
    logits = _real(output, "the model")
    if logits.dim() < 2 or logits.shape[1] < 2:
        raise ValueError(
            "task='classification' needs logits of shape (examples, classes, ...) with 2 classes or more, "
            f"got {tuple(logits.shape)}{HINT}"
        )
    return (logits.softmax(1),)


def _real(value: Any, whose: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{whose} must return a tensor, {got(value)}{HINT}")
    if not value.is_floating_point():
        raise TypeError(f"{whose} must return floating-point numbers, got {value.dtype}")
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def _predict(batch: Batch, drawing: Drawing, settings: Settings) -> Prediction:
    """All draws of one batch."""
    remaining = torch.arange(len(batch), device=batch.ids.device)
    tally = _Tally(settings)
    parts, order, done = [], [], 0
    while len(remaining):
        done = tally.draw(batch, drawing, done, settings.samples)
        finished = tally.below(settings.bounds) if done < settings.samples else torch.ones_like(remaining) > 0
        if finished.any():
            parts.append(tally.select(finished).result(batch.ids[finished], drawing))
            order.append(remaining[finished])
            left = ~finished
            remaining, tally, batch = remaining[left], tally.select(left), batch.map(itemgetter(left))
    return Prediction.cat(parts).select(torch.cat(order).argsort())


def _moments(model: nn.Module, batch: Batch) -> Prediction:
    if list(batch.args) != [0]:
        raise ValueError("method='moments' needs a model of one tensor, and inputs that are one tensor")
    mean, variance = moments(model, batch.args[0])
    nothing = torch.zeros_like(batch.ids)
    return Prediction(
        "regression", mean, variance, torch.zeros_like(mean), nothing, batch.ids, route="moments"
    )


def _tally(batch: Batch, drawing: Drawing, settings: Settings, ranks: Ranks) -> _Tally:
    """The draws of one batch that this process computes: whole sets, but for the last of all."""
    sets = ranks.part(math.ceil(settings.samples / settings.set_size))
    tally, done, last = _Tally(settings), sets.start * settings.set_size, sets.stop * settings.set_size
    while done < min(last, settings.samples):
        done = tally.draw(batch, drawing, done, min(last, settings.samples))
    return tally


def _check(outputs: Outputs, batch: Batch, first: int) -> None:
    """Raise for an output without a row for each example, one that is not finite, a variance below 0."""
    for output in outputs:
        if output.dim() < 2 or output.shape[1] != len(batch):
            raise ValueError(
                f"the model gave a result of shape {tuple(output.shape[1:])} for {len(batch)} examples; "
                "accepted: a row for each example"
            )
        if not (finite := output.isfinite().unsqueeze(-1).flatten(2).all(2)).all():
            draw, row = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"draw {first + draw} of example {int(batch.ids[row])} is not finite, so it has no mean"
            )
    for variance in outputs[1:]:
        if (negative := (variance < 0).unsqueeze(-1).flatten(2).any(2)).any():
            draw, row = negative.nonzero()[0].tolist()
            raise ValueError(
                f"the variance of draw {first + draw} of example {int(batch.ids[row])} is negative; for a "
                "model of its logarithm, let a module around it return the exponential"
            )


@dataclass
class _Tally:
    """Statistics of the draws so far."""

    settings: Settings
    sums: dict[str, Accumulator] = field(default_factory=dict)
    kept: list[Tensor] = field(default_factory=list)
    votes: Tensor | None = None

    def draw(self, batch: Batch, drawing: Drawing, first: int, last: int) -> int:
        """Take draws from ``first`` on, at most to ``last`` or the next look at the bounds.

        Returns the number of the next draw.
        """
        count = min(drawing.at_once(batch, first), last - first)
        if self.settings.bounds:
            count = min(count, self.settings.step - first % self.settings.step)
        outputs = drawing(batch, first, count)
        _check(outputs, batch, first)
        self.add(outputs)
        return first + count

    def add(self, outputs: Outputs) -> None:
        """Take further draws, along dimension 0."""
        draws, *variance = outputs
        found = {"mean": draws}
        if variance:
            found["aleatoric"] = variance[0]
        if self.settings.kind == "classification":
            found["expected_entropy"] = entropy(draws, 2)
            votes = nn.functional.one_hot(draws.argmax(2), draws.shape[2]).movedim(-1, 2).sum(0)
            self.votes = votes if self.votes is None else self.votes + votes
        for name, values in found.items():
            self.sums.setdefault(name, Accumulator(self.settings.set_size)).add(values)
        if self.settings.quantiles or self.settings.keep_draws:
            self.kept.append(draws)

    def below(self, bounds: Mapping[str, float]) -> Tensor:
        """Which examples have standard errors within all bounds, after a whole set from the second on."""
        mean = self.sums["mean"]
        too_early = mean.count % self.settings.step or mean.count < 2 * mean.size
        found = torch.full((len(mean.mean),), bool(bounds) and not too_early, device=mean.mean.device)
        for name, bound in bounds.items():
            found &= (self.sums[name].standard_error <= bound).unsqueeze(-1).flatten(1).all(1)
        return found

    def select(self, chosen: Tensor) -> _Tally:
        """The statistics of some of the examples."""
        sums = {name: each.select(chosen) for name, each in self.sums.items()}
        votes = None if self.votes is None else self.votes[chosen]
        return _Tally(self.settings, sums, [draws[:, chosen] for draws in self.kept], votes)

    def merged(self, other: _Tally) -> _Tally:
        """The statistics of these draws and those that follow them."""
        if not (self.sums and other.sums):  # a process without draws
            return self if self.sums else other
        sums = {name: each.merged(other.sums[name]) for name, each in self.sums.items()}
        votes = None if self.votes is None or other.votes is None else self.votes + other.votes
        return _Tally(self.settings, sums, self.kept + other.kept, votes)

    def to(self, device: torch.device | str) -> _Tally:
        """The same on a device."""
        sums = {name: each.to(device) for name, each in self.sums.items()}
        votes = None if self.votes is None else self.votes.to(device)
        return _Tally(self.settings, sums, [draws.to(device) for draws in self.kept], votes)

    def result(self, ids: Tensor, drawing: Drawing) -> Prediction:
        """The predictions of the examples, whose ids these are."""
        mean, entropies = self.sums["mean"], self.sums.get("expected_entropy")
        kept = torch.cat(self.kept) if self.kept else None
        return Prediction(
            self.settings.kind,
            mean.mean,
            mean.variance,
            mean.standard_error,
            torch.full_like(ids, mean.count),
            ids,
            {} if kept is None else {q: kept.quantile(q, 0) for q in self.settings.quantiles},
            self.sums["aleatoric"].mean if "aleatoric" in self.sums else None,
            None if entropies is None else entropies.mean,
            None if entropies is None else entropies.standard_error,
            self.votes,
            kept.transpose(0, 1) if kept is not None and self.settings.keep_draws else None,
            route=drawing.route,
            notes=tuple(drawing.why),
        )


def _whole(inputs: Inputs, ids: Tensor | Sequence[int] | None) -> Batch | None:
    """All examples of inputs that are no data loader."""
    if not isinstance(inputs, Tensor | Mapping | tuple):
        return None
    args = _arguments(inputs)
    size = rows_of(args)
    whole = Batch.of(args, torch.arange(size) if ids is None else ids_of(ids))
    if len(whole) != size:
        raise ValueError(f"ids must be one for each of the {size} examples, got {len(whole)}")
    return whole


def _batches(
    inputs: Inputs, whole: Batch | None, settings: Settings, at_once: int
) -> tuple[Iterator[tuple[Batch, Any]], int | None]:
    """Batches, with what a loader gave beside the inputs, and how many there are as far as it is known."""
    if whole is not None:
        size = len(whole)
        # No process is left without a batch if there are enough examples.
        step = min(settings.batch_size or BATCH_SIZE, max(1, math.ceil(size / at_once)))
        starts = range(0, size, step)
        return ((whole.map(itemgetter(slice(first, first + step))), None) for first in starts), len(starts)
    if not isinstance(inputs, Iterable):
        raise TypeError(
            f"inputs must be a tensor, a dict or tuple of tensors, or a DataLoader, {got(inputs)}"
        )
    if at_once > 1 and isinstance(getattr(inputs, "sampler", None), DistributedSampler):
        raise ValueError(
            "shard='examples' shares out what the data loader gives; give it no DistributedSampler"
        )
    if settings.batch_size is not None or settings.ids is not None:
        raise ValueError(
            "a DataLoader has its own batches, and numbers its examples from 0; leave out batch_size and ids"
        )
    total = None
    with suppress(TypeError):  # a loader of an iterable dataset
        total = len(inputs)
    return _loaded(inputs), total


def _loaded(loader: Iterable[Any]) -> Iterator[tuple[Batch, Any]]:
    first = 0
    for item in loader:
        targets: Any = None
        if isinstance(item, tuple | list):
            item, *others = item
            others = [list(other) if isinstance(other, tuple) else other for other in others]  # such as names
            targets = others[0] if len(others) == 1 else tuple(others) or None
        args = _arguments(item)
        size = rows_of(args)
        if size:
            yield Batch.of(args, torch.arange(first, first + size)), targets
        first += size


def _arguments(inputs: Any) -> Mapping[int | str, Any]:
    if isinstance(inputs, Mapping):
        return dict(inputs)
    return dict(enumerate(inputs if isinstance(inputs, tuple | list) else (inputs,)))


def rows_of(args: Mapping[int | str, Any]) -> int:
    """The number of examples in the arguments of a model: the length of the first tensor."""
    for value in args.values():
        if isinstance(value, Tensor) and value.dim():
            if is_dtensor(value):
                raise TypeError(
                    f"inputs must be plain tensors, got a DTensor of shape {tuple(value.shape)}; give each "
                    "process all examples, of which shard='examples' takes its own"
                )
            return len(value)
    kinds = [type(value).__name__ for value in args.values()]
    raise TypeError(f"inputs need a tensor with an example in each row, got {kinds}")
