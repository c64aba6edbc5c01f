"""Each layer on DTensors, in every placement on worlds of 1, 2 and 4: the result of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

import thinned
from distributed.placements import Call, compare
from distributed.world import World
from layers.test_every_layer import example
from layers.test_tools import LAYERS, OF_WEIGHTS, SAMPLE_DIM
from thinned.compare.implementation import first
from thinned.compare.layers import Entry, entry_of

KEY = thinned.Key(7)


def keyed(entry: Entry, key: thinned.Key | None) -> Call:
    layer, inputs = example(entry)
    return layer, inputs, {} if key is None else {"key": key}


def calls(entry: Entry) -> dict[str, Callable[[], Call]]:
    if entry.name in ("Masksembles", "RDrop"):
        return {"no key": partial(keyed, entry, None)}
    made = {"one key": partial(keyed, entry, KEY)}
    if entry.name not in OF_WEIGHTS:
        rows = example(entry)[1][0].shape[SAMPLE_DIM.get(entry.name, 0)]
        made["a key for each sample"] = partial(keyed, entry, KEY.fold(torch.arange(rows)))
    return made


def examine(name: str) -> list[tuple[str, str, list[str]]]:
    return compare(calls(entry_of(name)))


@pytest.mark.parametrize("world", [1, 2, 4], indirect=True, scope="module")
@pytest.mark.parametrize("entry", LAYERS, ids=lambda entry: entry.name)
def test_layer(world: World, entry: Entry) -> None:
    failed = []
    for rank, results in enumerate(world.run(examine, entry.name)):
        for shape, case, problems in results:
            if problems:
                failed.append(f"rank {rank} of {shape}: {case}: {'; '.join(problems)}")
    assert not failed, "\n".join(failed)
