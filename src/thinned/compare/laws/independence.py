"""Decisions are independent: of each other, of earlier calls and of what elements hold.

Each law here is Fisher's exact test on disjoint pairs of decisions, one for each group of elements that share
one; see `chance.associate`. At the default shape of a million elements a correlation of 1 % shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from thinned.compare.implementation import Case
from thinned.compare.laws.chance import (
    Association,
    associate,
    chosen_of,
    disjoint_pairs,
    neighbouring,
    strongest,
)
from thinned.compare.laws.law import P_FOR_EQUALITY, Finding, Law, has_mask
from thinned.compare.settings import Settings

__all__ = ["LAWS"]

LAGS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
ROWS = 256
CALLS = 4
SMALL, SMALL_CALLS = 997, 64  # a multiple of no vector; no element drops never or always, but for one in 2^53


def neighbours(layer: Case, settings: Settings) -> Finding:
    """Next to each other along each axis, in pairs that start at even and at odd positions."""
    return strongest(neighbouring(_dropped(layer, settings)))


def lags(layer: Case, settings: Settings) -> Finding:
    """The periods of vectors, words and blocks, and the distance of the largest autocorrelation."""
    dropped = _dropped(layer, settings).flatten()
    found = _apart(dropped, LAGS)
    if distances := len(dropped) // 2:
        found += [chosen_of(distances, each) for each in _apart(dropped, [_most_correlated(dropped)])]
    return strongest(found)


def _apart(dropped: Tensor, lags: Sequence[int]) -> list[Association]:
    return [
        associate(*pair, f"elements {lag} apart") for lag in lags for pair in disjoint_pairs(dropped, lag)
    ]


def _most_correlated(values: Tensor) -> int:
    """The lag with the largest autocorrelation in standard deviations, up to half the length."""
    n = len(values)
    centred = values.float() - values.float().mean()
    spectrum = torch.fft.rfft(centred, 2 * n).abs().square()
    lags = torch.arange(1, n // 2 + 1, device=values.device)
    return 1 + int((torch.fft.irfft(spectrum, 2 * n)[lags].abs() / (n - lags).sqrt()).argmax())


def rows(layer: Case, settings: Settings) -> Finding:
    """Any two of the first 256 rows."""
    dropped = _dropped(layer, settings)
    if dropped.ndim == 1 or len(dropped) == 1:
        return strongest([])
    return strongest([_most_alike(dropped.flatten(1)[:ROWS], "rows")])


def _most_alike(rows: Tensor, name: str) -> Association:
    """The two rows with the largest correlation, as the strongest of all pairs."""
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    spread = centred.square().sum(1).sqrt().clamp(min=1e-9)
    correlations = (centred @ centred.T / spread / spread[:, None]).fill_diagonal_(0).abs()
    i, j = sorted(divmod(int(correlations.argmax()), len(rows)))
    return chosen_of(math.comb(len(rows), 2), associate(rows[i], rows[j], f"{name} {i} and {j}"))


def counts(layer: Case, settings: Settings) -> Finding:
    """How many decisions of each slice drop, along each axis: hypergeometric, given how many all lose.

    The same of each element in the first calls of 64 layers: one that never drops hardly shows in its slice.
    """
    found = _outliers(_dropped(layer, settings))
    if layer.takes_any_shape:
        found += _outliers(
            _of_small_calls((layer.module(P_FOR_EQUALITY) for _ in range(SMALL_CALLS)), settings)
        )
    return strongest(found)


def _outliers(dropped: Tensor) -> list[Association]:
    """Of each axis the slice whose share is the furthest from all others'."""
    found = []
    for axis in range(dropped.ndim):
        slices = dropped.movedim(axis, 0)
        share = slices.reshape(len(slices), -1).double().mean(1)
        index = int((share - share.mean()).abs().argmax())
        chosen = torch.zeros_like(slices)
        chosen[index] = True
        found.append(associate(slices, chosen, f"slice {index} of axis {axis} loses {share[index]:.0%}"))
    return [chosen_of(sum(dropped.shape), each) for each in found]


def calls(layer: Case, settings: Settings) -> Finding:
    """Any two of four calls of one layer with one input, and of 64 calls with a small one."""
    module, x = layer.module(settings.p), settings.ones()
    masks = {call: layer.once(module(x)) == 0 for call in range(1, CALLS + 1)}
    found = [associate(masks[i], masks[j], f"calls {i} and {j}") for i, j in combinations(masks, 2)]
    if layer.takes_any_shape:
        found.append(
            _most_alike(
                _of_small_calls([layer.module(P_FOR_EQUALITY)] * SMALL_CALLS, settings), "small calls"
            )
        )
    return strongest(found)


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


def _of_small_calls(modules: Iterable[Any], settings: Settings) -> Tensor:
    """Where a call of each drops, a row a call."""
    x = settings.ones(SMALL)
    return torch.stack([module(x) == 0 for module in modules])


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
        "elements any distance apart are dropped independently",
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
