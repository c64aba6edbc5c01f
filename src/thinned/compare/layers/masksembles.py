"""Fixed masks, one for each member of an ensemble: Masksembles.

The laws of random masks do not apply: two calls have the same masks, and no probability is an argument.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, normal, ones
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.masksembles import Masksembles

__all__ = ["ENTRIES", "MasksemblesFormula", "masks_by_trial"]


def masks_by_trial(ones: int, n: int, places: int, channels: int) -> NDArray[np.bool_]:
    """The authors' generation: masks of so many ones of ``places``, until ``channels`` places are used.

    It draws from NumPy's generator, seeded by torch's.
    """
    generator = np.random.default_rng(int(torch.empty((), dtype=torch.int64).random_()))
    while True:
        masks = np.zeros((n, places), np.bool_)
        for mask in masks:
            mask[generator.choice(places, ones, replace=False)] = True
        used = masks.any(0)
        if used.sum() == channels:
            return masks[:, used]


class MasksemblesFormula(nn.Module):
    """The authors' layers: not rescaled, with float64 masks, and float32 for feature maps."""

    def __init__(self, channels: int, n: int = 4, scale: float = 2.0) -> None:
        super().__init__()
        share = 1 - (1 - 1 / scale) ** n
        kept = int(channels / (scale * share))
        masks = torch.from_numpy(masks_by_trial(kept, n, round(channels / share), channels))
        self.masks = nn.Buffer(masks.double())

    def forward(self, x: Tensor) -> Tensor:
        n = len(self.masks)
        groups = x.unflatten(0, (n, -1))  # fails for another number of rows, as theirs does
        y: Tensor = (groups * self.masks.view(n, 1, -1, *(1,) * (x.dim() - 2))).flatten(0, 1)
        return y.float() if x.dim() == 4 else y


CHANNELS, MEMBERS = 64, 4


def _members(layer: Case, settings: Settings, **arguments: object) -> Tensor:
    """The output of each member for ones, of shape (members, channels)."""
    module = layer.make(**{"channels": CHANNELS, "n": MEMBERS, **arguments}).to(settings.device)
    y: Tensor = module(torch.ones(MEMBERS, CHANNELS, device=settings.device))
    return y


def sizes(layer: Case, settings: Settings) -> Finding:
    """64 channels, 4 masks, at scales 1.5, 2 and 3: M = 64 / (S (1 - (1 - 1/S)^4)), rounded down."""
    wrong = []
    for scale in (1.5, 2.0, 3.0):
        kept = (_members(layer, settings, scale=scale) != 0).sum(1).tolist()
        if set(kept) != {int(CHANNELS / (scale * (1 - (1 - 1 / scale) ** MEMBERS)))}:
            wrong.append(f"{kept} at scale {scale}")
    return holds_if(not wrong, "; ".join(wrong) or "M")


def coverage(layer: Case, settings: Settings) -> Finding:
    """At scale 5, where a channel is in 1.6 of 4 masks on average."""
    unused = int((_members(layer, settings, scale=5.0) == 0).all(0).sum())
    return holds_if(not unused, f"{unused} of {CHANNELS} unused" if unused else "all used")


def mean(layer: Case, settings: Settings) -> Finding:
    """The mean over the channels of each member's output, for ones."""
    means = _members(layer, settings).mean(1)
    same = torch.allclose(means, torch.ones_like(means))
    return holds_if(same, "1" if same else f"{float(means[0]):.3f}")


def evaluation(layer: Case, settings: Settings) -> Finding:
    """The output after eval() equals that in training bit for bit."""
    module, inputs = layer.called(settings)
    same = torch.equal(module(*inputs), module.eval()(*inputs))
    return holds_if(same, "as in training" if same else "another")


def odd_batch(layer: Case, settings: Settings) -> Finding:
    """7 rows for 4 members: all rows come back, and each member has 1 or 2 of them."""
    module = layer.make(channels=CHANNELS, n=MEMBERS).to(settings.device)
    rows = module(torch.ones(7, CHANNELS, device=settings.device))
    counts = rows.unique(dim=0, return_counts=True)[1].tolist()
    holds = sum(counts) == 7 and len(counts) == MEMBERS and max(counts) <= 2
    return holds_if(holds, f"groups of {sorted(counts)}")


FAMILY = "members"
_law = partial(Law, FAMILY)

ENTRIES = [
    Entry(
        Masksembles,
        mask="(n, C, 1, ...), fixed",
        source="Durasov et al. 2021, section 3",
        peer=Implementation("formula", MasksemblesFormula, "the authors' code in plain torch"),
        example=Example(
            normal(8, 12, 5),
            {"channels": 12, "n": 4, "scale": 2.0},
            p_name="",
            identity_in_evaluation=False,
            is_random=False,
        ),
        workload=Workload(ones(1024, 1024), {"channels": 1024, "n": 4, "scale": 2.0}),
        exempt={"state_dict": "the masks are in it, because the weights fit no others"},
        special=[
            _law(
                "sizes",
                "each mask has the paper's number of ones",
                sizes,
                why="The members differ in capacity, or overlap more or less than the scale says.",
            ),
            _law(
                "coverage",
                "each channel is in at least one mask",
                coverage,
                why="Some channels are computed and never used.",
            ),
            _law(
                "mean over channels",
                "that of ones is 1 for each member",
                mean,
                level=Level.NICETY,
                why="A pretrained network sees smaller activations behind the layer.",
            ),
            _law(
                "evaluation of members",
                "the same members as in training",
                evaluation,
                why="Predictions come from another network than the members that were trained.",
            ),
            _law(
                "odd batch",
                "rows that n does not divide are split into groups that differ by one row",
                odd_batch,
                level=Level.UNLIKE_TORCH,
                why="The last batch of an epoch fails, or loses rows.",
            ),
        ],
        functional="masksembles, masksembles_masks",
    )
]
