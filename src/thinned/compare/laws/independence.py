"""Elements are dropped independently: of each other, of earlier calls and of what they hold.

Every law here is Fisher's exact test on disjoint pairs; see `chance.associate`. At the default shape of a
million elements a correlation of 1 % shows.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from thinned.compare.laws.chance import associate, disjoint_pairs, strongest
from thinned.compare.laws.law import Finding, Law
from thinned.compare.settings import Settings
from thinned.compare.subjects import Subject

__all__ = ["LAWS"]

LAGS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
ROWS = 256
CALLS = 4


def neighbours(subject: Subject, settings: Settings) -> Finding:
    """Elements next to each other along each axis, in pairs that start at even and at odd positions."""
    dropped = _dropped(subject, settings)
    return strongest(
        [
            associate(a, b, f"neighbours along axis {axis}")
            for axis in range(dropped.ndim)
            for a, b in disjoint_pairs(dropped.movedim(axis, 0), lag=1)
        ]
    )


def lags(subject: Subject, settings: Settings) -> Finding:
    """Elements a fixed distance apart in memory: the periods that vectors, words and blocks would leave."""
    dropped = _dropped(subject, settings).flatten()
    return strongest(
        [associate(a, b, f"elements {lag} apart") for lag in LAGS for a, b in disjoint_pairs(dropped, lag)]
    )


def rows(subject: Subject, settings: Settings) -> Finding:
    """Any two of the first 256 rows."""
    if len(settings.shape) == 1 or settings.shape[0] == 1:
        return strongest([])
    rows = _dropped(subject, settings).flatten(1)[:ROWS]
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    spread = centred.square().sum(1).sqrt().clamp(min=1e-9)
    correlations = (centred @ centred.T / spread / spread[:, None]).fill_diagonal_(0).abs()
    i, j = divmod(int(correlations.argmax()), len(rows))
    return strongest([associate(rows[i], rows[j], f"rows {i} and {j}")], tests=math.comb(len(rows), 2))


def counts(subject: Subject, settings: Settings) -> Finding:
    """How many elements each slice loses, along each axis: hypergeometric, given how many all lose."""
    dropped = _dropped(subject, settings)
    found = []
    for axis in range(dropped.ndim):
        slices = dropped.movedim(axis, 0)
        share = slices.reshape(len(slices), -1).double().mean(1)
        index = int((share - share.mean()).abs().argmax())
        chosen = torch.zeros_like(slices)
        chosen[index] = True
        found.append(associate(slices, chosen, f"slice {index} of axis {axis} loses {share[index]:.0%}"))
    return strongest(found, tests=sum(dropped.shape))


def calls(subject: Subject, settings: Settings) -> Finding:
    """Any two of four calls of one layer with one input."""
    layer, x = subject.make(settings.p), settings.ones()
    masks = {call: layer(x) == 0 for call in range(1, CALLS + 1)}
    return strongest([associate(masks[i], masks[j], f"calls {i} and {j}") for i, j in combinations(masks, 2)])


def contents(subject: Subject, settings: Settings) -> Finding:
    """Dropped elements against the sign of the input, and against its size."""
    x = settings.normal()
    dropped = subject.make(settings.p)(x) == 0
    return strongest(
        [
            associate(dropped, x < 0, "with the input's sign"),
            associate(dropped, x.abs() > x.abs().float().median(), "with the input's size"),
        ]
    )


def _dropped(subject: Subject, settings: Settings) -> Tensor:
    mask: Tensor = subject.make(settings.p)(settings.ones()) == 0
    return mask


FAMILY = "independence"
LAWS = [
    Law(FAMILY, "neighbours", "elements side by side along any axis are dropped independently", neighbours),
    Law(FAMILY, "lags", f"elements {LAGS[0]} to {LAGS[-1]} apart are dropped independently", lags),
    Law(FAMILY, "rows", "any two rows are dropped independently", rows),
    Law(FAMILY, "counts", "no slice loses more than its share", counts),
    Law(FAMILY, "calls", "every call draws a new mask", calls),
    Law(FAMILY, "contents", "the mask does not depend on the input's values", contents),
]
