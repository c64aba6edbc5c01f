"""Trains a small vision transformer twice, with the same masks: all rows computed, and the kept rows alone.

python examples/faster_training.py docs/pictures

Both have stochastic depth: a branch is dropped for an image with p = 0.4. One computes the branch for all
images and multiplies by the mask; the other computes it for the images that keep it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeAlias

import torch
import typer
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import thinned
from thinned.colours import PALETTE

P, WIDTH, HEADS = 0.4, 128, 4
SMOOTH = 10  # steps
Join: TypeAlias = Callable[[Tensor, nn.Module], Tensor]


def masked(x: Tensor, branch: nn.Module) -> Tensor:
    """The usual form."""
    return x + thinned.functional.drop_path(branch(x), P, training=True)


def gathered(x: Tensor, branch: nn.Module) -> Tensor:
    """The same function of the same mask."""
    return thinned.functional.residual(x, branch, P)


class Attention(nn.Module):
    """Self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A block of a transformer; ``join`` adds a branch."""

    def __init__(self, join: Join) -> None:
        super().__init__()
        self.join = join
        mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.attention, self.mlp = (nn.Sequential(nn.LayerNorm(WIDTH), part) for part in (Attention(), mlp))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self.join(x, self.attention), self.mlp)


class ViT(nn.Module):
    """Each of the 64 pixels of a digit, with its neighbours, is a token."""

    def __init__(self, join: Join, depth: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, WIDTH, 3, padding=1)
        self.place = nn.Parameter(0.1 * torch.randn(64, WIDTH))
        self.blocks = nn.Sequential(*(Block(join) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Flatten(), nn.Linear(64 * WIDTH, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(images).flatten(2).mT + self.place))


class Trainee:
    """A network in training, its losses, and the seconds since its start."""

    def __init__(self, join: Join, depth: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.model = ViT(join, depth).to(dtype)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 3e-4)
        self.losses, self.seconds = [], [0.0]

    def step(self, x: Tensor, y: Tensor, samples: Tensor) -> None:
        """A step; its masks are a function of its number, the place in the model and the sample."""
        start = time.perf_counter()
        with thinned.address(self.model, seed=0, step=len(self.losses), samples=samples):
            loss = cross_entropy(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(loss.item())
        self.seconds.append(self.seconds[-1] + time.perf_counter() - start)


def train(steps: int, batch: int, depth: int, dtype: torch.dtype) -> dict[str, Trainee]:
    """Train both by turns, so that whatever else the machine does slows both."""
    joins = {"all rows, masked": masked, "kept rows alone": gathered}
    trainees = {name: Trainee(join, depth, dtype) for name, join in joins.items()}
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    images = (images / 16).to(dtype).view(-1, 1, 8, 8)
    shuffle = torch.Generator().manual_seed(0)
    for _ in range(steps):
        samples = torch.randperm(len(labels), generator=shuffle)[:batch]
        for trainee in trainees.values():
            trainee.step(images[samples], labels[samples], samples)
    return trainees


def draw(trainees: dict[str, Trainee]) -> Figure:
    """The loss over steps and over seconds, each point the mean of some steps."""
    figure = Figure(figsize=(10.4, 4), layout="constrained")
    over_steps, over_seconds = figure.subplots(1, 2, sharey=True)
    for (name, trainee), colour, style in zip(trainees.items(), PALETTE[1::-1], ("-", "--"), strict=False):
        losses = torch.tensor(trainee.losses).unfold(0, SMOOTH, 1).mean(1)
        look = {"label": name, "color": colour, "linestyle": style, "linewidth": 2}
        over_steps.plot(range(SMOOTH, len(trainee.losses) + 1), losses, **look)
        over_seconds.plot(trainee.seconds[SMOOTH:], losses, **look)
    over_steps.set(xlabel="step", ylabel=f"loss, mean of {SMOOTH} steps")
    over_seconds.set(xlabel="seconds")
    over_seconds.legend()
    return figure


def main(
    to: Annotated[Path, typer.Argument(help="the folder of the picture")],
    quick: Annotated[bool, typer.Option("--quick", help="a few seconds; the times mean nothing")] = False,
) -> None:
    """Train, print the times and how far the losses are apart, save the picture."""
    # float64, because in float32 a difference in the last digit grows from step to step.
    trainees = train(10, 8, 1, torch.float64) if quick else train(120, 32, 6, torch.float32)
    for name, trainee in trainees.items():
        last = sum(trainee.losses[-SMOOTH:]) / SMOOTH
        typer.echo(f"{name}: {trainee.seconds[-1]:.1f} s, loss {last:.3f}")
    a, b = trainees.values()
    apart = max(abs(one - other) for one, other in zip(a.losses, b.losses, strict=True))
    typer.echo(f"{a.seconds[-1] / b.seconds[-1]:.2f}x faster; losses at most {apart:.1e} apart")
    to.mkdir(parents=True, exist_ok=True)
    draw(trainees).savefig(to / "residual.png", dpi=90)


if __name__ == "__main__":
    typer.run(main)
