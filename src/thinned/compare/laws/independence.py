"""Decisions are independent: of each other, of earlier calls and of what elements hold.

Each law here is Fisher's exact test on disjoint pairs of decisions, one for each group of elements that share
one; see `chance.associate`. At the default shape of a million elements a correlation of 1 % shows.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations

import torch
from torch import Tensor

from thinned.compare.implementation import Case
from thinned.compare.laws.chance import associate, disjoint_pairs, neighbouring, strongest
from thinned.compare.laws.law import Finding, Law, has_mask
from thinned.compare.settings import Settings

__all__ = ["LAWS"]

LAGS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
ROWS = 256
CALLS = 4


def neighbours(layer: Case, settings: Settings) -> Finding:
    """Next to each other along each axis, in pairs that start at even and at odd positions."""
    return strongest(neighbouring(_dropped(layer, settings)))


def lags(layer: Case, settings: Settings) -> Finding:
    """A fixed distance apart in memory: the periods that vectors, words and blocks would leave."""
    dropped = _dropped(layer, settings).flatten()
    return strongest(
        [associate(a, b, f"elements {lag} apart") for lag in LAGS for a, b in disjoint_pairs(dropped, lag)]
    )


def rows(layer: Case, settings: Settings) -> Finding:
    """Any two of the first 256 rows."""
    dropped = _dropped(layer, settings)
    if dropped.ndim == 1 or len(dropped) == 1:
        return strongest([])
    rows = dropped.flatten(1)[:ROWS]
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    spread = centred.square().sum(1).sqrt().clamp(min=1e-9)
    correlations = (centred @ centred.T / spread / spread[:, None]).fill_diagonal_(0).abs()
    i, j = divmod(int(correlations.argmax()), len(rows))
    return strongest([associate(rows[i], rows[j], f"rows {i} and {j}")], tests=math.comb(len(rows), 2))


def counts(layer: Case, settings: Settings) -> Finding:
    """How many decisions of each slice drop, along each axis: hypergeometric, given how many all lose."""
    dropped = _dropped(layer, settings)
    found = []
    for axis in range(dropped.ndim):
        slices = dropped.movedim(axis, 0)
        share = slices.reshape(len(slices), -1).double().mean(1)
        index = int((share - share.mean()).abs().argmax())
        chosen = torch.zeros_like(slices)
        chosen[index] = True
        found.append(associate(slices, chosen, f"slice {index} of axis {axis} loses {share[index]:.0%}"))
    return strongest(found, tests=sum(dropped.shape))


def calls(layer: Case, settings: Settings) -> Finding:
    """Any two of four calls of one layer with one input."""
    module, x = layer.module(settings.p), settings.ones()
    masks = {call: layer.once(module(x)) == 0 for call in range(1, CALLS + 1)}
    return strongest([associate(masks[i], masks[j], f"calls {i} and {j}") for i, j in combinations(masks, 2)])


def contents(layer: Case, settings: Settings) -> Finding:
    """Against the sign of the input, and against its size."""
    x = settings.normal()
    dropped, x = layer.once(layer.module(settings.p)(x)) == 0, layer.once(x)
    return strongest(
        [
            associate(dropped, x < 0, "with the input's sign"),
            associate(dropped, x.abs() > x.abs().float().median(), "with the input's size"),
        ]
    )


def _dropped(layer: Case, settings: Settings) -> Tensor:
    return layer.once(layer.module(settings.p)(settings.ones())) == 0


FAMILY = "independence"
law = partial(Law, FAMILY, applies=has_mask)
LAWS = [
    law(
        "neighbours",
        "elements side by side along any axis are dropped independently",
        neighbours,
        why="Neighbours that drop together let features co-adapt.",
    ),
    law(
        "lags",
        f"elements {LAGS[0]} to {LAGS[-1]} apart are dropped independently",
        lags,
        why="A mask with a period leaves the same groups of features together.",
    ),
    law(
        "rows",
        "any two rows are dropped independently",
        rows,
        why="Samples of a batch that share a mask average over fewer thinned networks.",
    ),
    law(
        "counts",
        "no slice loses more than its share",
        counts,
        why="A sample or feature that is dropped more than others is trained less.",
    ),
    law(
        "calls",
        "every call draws a new mask",
        calls,
        why="A mask that repeats trains one thinned network instead of all of them.",
    ),
    law(
        "contents",
        "the mask does not depend on the input's values",
        contents,
        why="A mask that looks at values distorts them, and the mean is no longer x.",
    ),
]
