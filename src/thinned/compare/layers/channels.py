"""Dropout of channels: Dropout1d, Dropout2d, Dropout3d."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import nn

from thinned.compare.implementation import Case, Example, Masked, normal, ones
from thinned.compare.laws.law import Finding, Law, Level, holds_if
from thinned.compare.laws.values import under_seed
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.layers._peers import from_torch
from thinned.compare.settings import Settings
from thinned.layers.channels import Dropout1d, Dropout2d, Dropout3d

__all__ = ["ENTRIES"]

FAMILY = "channels"
SPATIAL = ("L", "H, W", "D, H, W")


def batch_of_one(layer: Case, settings: Settings, shape: tuple[int, ...]) -> Finding:
    """A sample without a batch dimension, against the same sample as a batch."""
    module, x = layer.make(p=0.5), settings.normal(*shape, dtype=torch.float32)
    alone = under_seed(settings, module, x)
    batched = under_seed(settings, module, x.unsqueeze(0))
    same = alone.shape == x.shape and torch.equal(alone, batched.squeeze(0))
    return holds_if(same, "the same mask" if same else "another mask")


def three_dimensions(layer: Case, settings: Settings) -> Finding:
    """Dropout2d reads ``(N, C, L)`` for now, with a warning, as PyTorch does."""
    x = torch.ones(50, 40, 3, device=settings.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = layer.make(p=0.5)(x) != 0
    warned = any("interpreted as shape (N, C, L)" in str(each.message) for each in caught)
    rows_alike = bool((kept == kept[..., :1]).all())
    samples_differ = not bool((kept == kept[:, :1]).all())
    found = {
        "no warning": warned,
        "a channel is split": rows_alike,
        "channels of a sample share a decision": samples_differ,
    }
    wrong = [complaint for complaint, right in found.items() if not right]
    return holds_if(not wrong, ", ".join(wrong) or "(N, C, L)")


def same_in_channels_last(layer: Case, settings: Settings, shape: tuple[int, ...]) -> Finding:
    """As for a contiguous tensor."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    module, x = layer.make(p=0.5), settings.normal(*shape, dtype=torch.float32)
    y = under_seed(settings, module, x.to(memory_format=memory_format))
    same = torch.equal(y, under_seed(settings, module, x))
    return holds_if(same, "the same mask" if same else "another mask")


def ranks(layer: Case, settings: Settings, wrong: Sequence[int], word: str) -> Finding:
    """Another number of dimensions is refused or, where it was allowed before, deprecated."""
    module, quiet = layer.make(p=0.5), []
    for dims in wrong:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                module(torch.ones((2,) * dims, device=settings.device))
            except (RuntimeError, UserWarning) as error:
                if word in str(error) and f"eceived a {dims}" in str(error):
                    continue
            quiet.append(dims)
    return holds_if(not quiet, f"accepts {quiet} dimensions" if quiet else f"says {word!r}")


def _laws(spatial: int) -> Iterator[Law]:
    law = partial(Law, FAMILY)
    if spatial == 1:
        wrong, fate, word = (1, 4), "refused", "Expected 2D or 3D input"
    else:
        wrong, fate, word = (2, spatial + 3), "deprecated", "deprecated"
    statement = f"an input of {' or '.join(map(str, wrong))} dimensions is {fate}"
    yield law(
        "other ranks",
        statement,
        partial(ranks, wrong=wrong, word=word),
        level=Level.UNLIKE_TORCH,
        why="An input of a wrong rank passes unnoticed, where PyTorch says so.",
    )
    if spatial == 2:
        yield law(
            "3 dimensions",
            "count as (N, C, L), with a warning",
            three_dimensions,
            level=Level.UNLIKE_TORCH,
            why="The same input loses other elements than under torch.nn.Dropout2d.",
        )
    else:
        statement = "a sample without a batch dimension has the mask of a batch of one"
        yield law(
            "batch of one",
            statement,
            partial(batch_of_one, shape=(200, *(2,) * spatial)),
            level=Level.UNLIKE_TORCH,
            why="A sample without a batch dimension loses elements or samples where channels are meant.",
        )
    if spatial > 1:
        check = partial(same_in_channels_last, shape=(8, 25, *(3,) * spatial))
        yield law(
            "mask of channels_last",
            "the mask is that of a contiguous tensor",
            check,
            level=Level.UNLIKE_TORCH,
            why="Changing the memory format for speed changes the training run.",
        )


def _entry(layer: type[nn.Module], peer: type[nn.Module], spatial: int, pixels: tuple[int, ...]) -> Entry:
    return Entry(
        layer,
        mask=f"(N, C, {', '.join('1' * spatial)}) for (N, C, {SPATIAL[spatial - 1]})",
        source="Tompson et al. 2015, section 3.2; PyTorch",
        peer=from_torch(peer),
        example=Example(normal(4, 5, *(3,) * (spatial - 1), 8)),
        workload=Workload(ones(16, 64, *pixels)),
        masked=Masked((200, 100, *(2,) * spatial), shared=tuple(range(2, 2 + spatial))),
        special=tuple(_laws(spatial)),
    )


ENTRIES = [
    _entry(Dropout1d, nn.Dropout1d, 1, pixels=(1024,)),
    _entry(Dropout2d, nn.Dropout2d, 2, pixels=(32, 32)),
    _entry(Dropout3d, nn.Dropout3d, 3, pixels=(4, 16, 16)),
]
