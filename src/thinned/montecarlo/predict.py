"""Monte-Carlo dropout: the predictive distribution of any model that drops."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from thinned.checks import check_integer, got
from thinned.keys import Key
from thinned.models.address import ids_of
from thinned.models.address.hooks import hooks_of
from thinned.montecarlo.accumulate import Accumulator
from thinned.montecarlo.draws import Batch, Drawing, Outputs
from thinned.montecarlo.dropping import Dropouts, Inject
from thinned.montecarlo.moments import moments
from thinned.montecarlo.prediction import Kind, Prediction, entropy

__all__ = ["Inputs", "Method", "Settings", "Task", "Until", "predict", "stream"]

Task: TypeAlias = Literal["classification", "regression"] | Callable[[Any], Tensor]
Method: TypeAlias = Literal["stratified", "independent", "moments"]
Until: TypeAlias = float | Mapping[str, float]
Inputs: TypeAlias = Tensor | Mapping[str, Any] | tuple[Any, ...] | DataLoader[Any]
HINT = "; give a function of the output as task"
STATISTICS = ("mean", "expected_entropy")  # the means over draws, which have a standard error
BATCH_SIZE = 256
BUDGET = {"cpu": 2**26}
BUDGET_ELSEWHERE = 2**29
LEAST_DRAWS = 10  # before a standard error can end the draws of an example


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
    memory: int | None = None,
) -> Prediction:
    r"""The mean, variance and uncertainty of a model's predictions with its dropout on.

    .. math:: \bar f(x) = \frac1T\sum_{t=1}^T f_t(x), \qquad
        f_t \text{ the model under the masks of draw } t

    Only dropout is switched on, whatever the flags of the model: dropout modules, functional dropout,
    attention and recurrent layers that drop, all that :func:`thinned.inspect` lists and a key reaches.
    Afterwards, also after an exception, batch normalization's statistics, every module's ``training`` and
    torch's generators are what they were.

    A draw's masks are a function of seed, draw, site and example. So a result does not depend on the batch
    size, on chunks or on the device, but for rounding. A model whose own function mixes the examples of a
    batch is an exception.

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

    Raises:
        ValueError: the model drops nowhere; the inputs have no example; a draw is not finite; or an argument
            is none of those accepted.
        TypeError: the model returns what the task does not read.

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
    return _stream(model, inputs, Settings(samples, **options))


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
    memory: int | None = None

    def __post_init__(self) -> None:
        check_integer("samples", self.samples, least=1)
        check_integer("strata", self.strata, least=1)
        if self.batch_size is not None:
            check_integer("batch_size", self.batch_size, least=1)
        if not callable(self.task) and self.task not in ("classification", "regression"):
            raise ValueError(
                f"task must be 'classification', 'regression' or a function of the model's output, "
                f"{got(self.task)}"
            )
        if self.method not in get_args(Method):
            raise ValueError(f"method must be one of {', '.join(get_args(Method))}, got {self.method!r}")
        if self.method == "moments":
            self._check_moments()
        for name, bound in self.bounds.items():
            if name not in STATISTICS or (name != "mean" and self.kind != "classification"):
                raise ValueError(f"until knows no statistic {name!r}; accepted: {', '.join(STATISTICS)}")
            if not bound > 0:
                raise ValueError(f"until must be above 0, got {bound} for {name}")
        if self.keep_draws and self.bounds:
            raise ValueError("keep_draws needs as many draws of each example, so until has to be None")
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

    @property
    def kind(self) -> Kind:
        """What the task is, whether torch's or a function."""
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


def _stream(model: nn.Module, inputs: Inputs, settings: Settings) -> Iterator[Prediction]:
    dropouts = Dropouts(model, settings.inject)
    hooks_of(model)  # vmap cannot give them
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    budget = settings.memory or BUDGET.get(device.type, BUDGET_ELSEWHERE)
    read = partial(_read, settings.task)
    drawing = Drawing(model, read, settings.seed, settings.set_size, budget)
    batches = _batches(inputs, settings.batch_size, settings.ids, device)
    while True:
        with dropouts.on(), torch.no_grad():
            item = next(batches, None)
            if item is None:
                return
            batch, targets = item
            if settings.consistent:
                batch = Batch(batch.args, batch.kwargs, torch.zeros_like(batch.ids))
            if settings.method == "moments":
                result = _moments(model, batch)
            else:
                result = _predict(batch, drawing, settings)
        yield replace(result, ids=item[0].ids, targets=targets, sites=dropouts.paths)


def _read(task: Task, output: Any) -> Outputs:
    """What the statistics are of, from a model's output."""
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
    tally = _Tally(settings, defaultdict(lambda: Accumulator(settings.set_size)))
    parts, order, done = [], [], 0
    while len(remaining):
        outputs = drawing(batch, done, _next(batch, done, drawing, settings))
        _check(outputs, batch, done)
        tally.add(outputs)
        done += len(outputs[0])
        finished = tally.below(settings.bounds) if done < settings.samples else torch.ones_like(remaining) > 0
        if finished.any():
            result = tally.select(finished).result(batch.ids[finished])
            parts.append(replace(result, route=drawing.route, notes=tuple(drawing.why)))
            order.append(remaining[finished])
            left = ~finished
            remaining, tally, batch = remaining[left], tally.select(left), batch.map(itemgetter(left))
    return Prediction.cat(parts).select(torch.cat(order).argsort())


def _moments(model: nn.Module, batch: Batch) -> Prediction:
    if batch.kwargs or len(batch.args) != 1:
        raise ValueError("method='moments' needs a model of one tensor, and inputs that are one tensor")
    mean, variance = moments(model, batch.args[0])
    nothing = torch.zeros_like(batch.ids)
    return Prediction(
        "regression", mean, variance, torch.zeros_like(mean), nothing, batch.ids, route="moments"
    )


def _next(batch: Batch, done: int, drawing: Drawing, settings: Settings) -> int:
    """How many draws to make next: within one stratified set, and until the next look at the bounds."""
    count = min(drawing.at_once(batch), settings.samples - done)
    if settings.set_size > 1:
        return min(count, settings.set_size - done % settings.set_size)
    return min(count, LEAST_DRAWS) if settings.bounds else count


def _check(outputs: Outputs, batch: Batch, first: int) -> None:
    """Raise for an output without a row for each example, and for one that is not finite."""
    for output in outputs:
        if output.dim() < 2 or output.shape[1] != len(batch):
            raise ValueError(
                f"the model gave a result of shape {tuple(output.shape[1:])} for {len(batch)} examples; "
                "accepted: a row for each example"
            )
        if not (finite := output.isfinite().flatten(2).all(2)).all():
            draw, row = (~finite).nonzero()[0].tolist()
            raise ValueError(
                f"draw {first + draw} of example {int(batch.ids[row])} is not finite, so it has no mean"
            )


@dataclass
class _Tally:
    """Statistics of the draws so far."""

    settings: Settings
    sums: dict[str, Accumulator]
    kept: list[Tensor] = field(default_factory=list)
    votes: Tensor | None = None

    def add(self, outputs: Outputs) -> None:
        """Take further draws, along dimension 0."""
        draws, *variance = outputs
        self.sums["mean"].add(draws)
        if variance:
            self.sums["aleatoric"].add(variance[0])
        if self.settings.kind == "classification":
            self.sums["expected_entropy"].add(entropy(draws, 2))
            votes = nn.functional.one_hot(draws.argmax(2), draws.shape[2]).movedim(-1, 2).sum(0)
            self.votes = votes if self.votes is None else self.votes + votes
        if self.settings.quantiles or self.settings.keep_draws:
            self.kept.append(draws)

    def below(self, bounds: Mapping[str, float]) -> Tensor:
        """Which examples have standard errors within all bounds, after a whole set from the second on."""
        mean = self.sums["mean"]
        too_early = mean.count % mean.size or mean.count < max(2 * mean.size, LEAST_DRAWS)
        found = torch.full((len(mean.mean),), bool(bounds) and not too_early, device=mean.mean.device)
        for name, bound in bounds.items():
            found &= (self.sums[name].standard_error <= bound).flatten(1).all(1)
        return found

    def select(self, chosen: Tensor) -> _Tally:
        """The statistics of some of the examples."""
        sums = {name: each.select(chosen) for name, each in self.sums.items()}
        votes = None if self.votes is None else self.votes[chosen]
        return _Tally(self.settings, sums, [draws[:, chosen] for draws in self.kept], votes)

    def result(self, ids: Tensor) -> Prediction:
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
        )


def _batches(
    inputs: Inputs,
    batch_size: int | None,
    ids: Tensor | Sequence[int] | None,
    device: torch.device,
) -> Iterator[tuple[Batch, Any]]:
    """Batches on the model's device, and what the loader gave beside the inputs."""
    if isinstance(inputs, Tensor | Mapping | tuple):
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, Mapping) else (inputs,)
        kwargs = inputs if isinstance(inputs, Mapping) else {}
        size = _rows([*args, *kwargs.values()])
        whole = Batch(args, kwargs, torch.arange(size) if ids is None else ids_of(ids))
        if len(whole) != size:
            raise ValueError(f"ids must be one for each of the {size} examples, got {len(whole)}")
        step = batch_size or BATCH_SIZE
        for first in range(0, size, step):
            yield _to(device, whole.map(itemgetter(slice(first, first + step)))), None
        return
    if not isinstance(inputs, Iterable):
        raise TypeError(
            f"inputs must be a tensor, a dict or tuple of tensors, or a DataLoader, {got(inputs)}"
        )
    if batch_size is not None or ids is not None:
        raise ValueError(
            "a DataLoader has its own batches, and numbers its examples from 0; leave out batch_size and ids"
        )
    first = 0
    targets: Any
    for item in inputs:
        args, kwargs, targets = (), {}, None
        if isinstance(item, Mapping):
            kwargs = item
        elif isinstance(item, tuple | list):
            args, targets = (item[0],), (item[1] if len(item) == 2 else tuple(item[1:]) or None)
        else:
            args = (item,)
        size = _rows([*args, *kwargs.values()])
        yield _to(device, Batch(args, kwargs, torch.arange(first, first + size))), targets
        first += size


def _rows(values: Sequence[Any]) -> int:
    for value in values:
        if isinstance(value, Tensor) and value.dim():
            return len(value)
    raise TypeError(
        f"inputs need a tensor with an example in each row, got {[type(value).__name__ for value in values]}"
    )


def _to(device: torch.device, batch: Batch) -> Batch:
    """The batch on the model's device."""

    def move(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return Batch(
        tuple(map(move, batch.args)), {k: move(v) for k, v in batch.kwargs.items()}, batch.ids.to(device)
    )
