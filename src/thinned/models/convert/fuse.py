"""Pairs of an activation and a dropout in an nn.Sequential, and the layers that are both."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container
from typing import Any, NamedTuple

from torch import nn

from thinned.layers import Dropout, GELUDropout, ReLUDropout, SiLUDropout
from thinned.models.address.hooks import has_only_hooks_of_address
from thinned.models.convert.rules import own_names
from thinned.models.walk import is_sequential
from thinned.torch_state import children_of

__all__ = ["fused"]

ACTIVATIONS: dict[type[nn.Module], Callable[[Any], nn.Module]] = {
    nn.ReLU: lambda _: ReLUDropout(),
    nn.GELU: lambda old: GELUDropout(approximate=old.approximate),
    nn.SiLU: lambda _: SiLUDropout(),
}
# Their results are new tensors, so nothing else sees what an activation in place writes over them.
NEW_TENSOR = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.LayerNorm, nn.GroupNorm,
)  # fmt: skip

Place = tuple[int, str]  # the parent's id and the child's name


class _Pair(NamedTuple):
    activation: nn.Module
    dropout: Any
    places: tuple[Place, Place]


def fused(model: nn.Module, chosen: Container[int]) -> dict[int, tuple[nn.Module, nn.Module]]:
    """The modules of all pairs, by their ids, each with what takes its place.

    A module with several places is fused if it is part of an equal pair in all of them.

    Args:
        model: any module.
        chosen: the ids of the dropouts that take part.
    """
    places: dict[int, set[Place]] = defaultdict(set)
    pairs: list[_Pair] = []
    for parent in model.modules():
        for name, child in children_of(parent).items():
            places[id(child)].add((id(parent), name))
        if is_sequential(parent):
            pairs += _pairs(parent, chosen)
    while True:
        known = {place for pair in pairs for place in pair.places}
        kinds = defaultdict(set)
        for pair in pairs:
            kinds[id(pair.dropout)].add(repr(_layer(pair)))
        left = [
            pair
            for pair in pairs
            if places[id(pair.activation)] | places[id(pair.dropout)] <= known
            and len(kinds[id(pair.dropout)]) == 1
        ]
        if len(left) == len(pairs):
            break
        pairs = left
    new: dict[int, tuple[nn.Module, nn.Module]] = {}
    for pair in pairs:
        new.setdefault(id(pair.activation), (pair.activation, nn.Identity()))
        new.setdefault(id(pair.dropout), (pair.dropout, _layer(pair)))
    return new


def _pairs(sequential: nn.Sequential, chosen: Container[int]) -> list[_Pair]:
    """The neighbours in it that one layer can be."""
    items: list[tuple[str, Any]] = [("", None), *children_of(sequential).items()]
    return [
        _Pair(activation, dropout, ((id(sequential), place), (id(sequential), place_of_dropout)))
        for (_, before), (place, activation), (place_of_dropout, dropout) in zip(
            items, items[1:], items[2:], strict=False
        )
        if id(dropout) in chosen
        and _is_plain(dropout, (Dropout,))
        and not dropout.broadcast_dims
        and _is_plain(activation, tuple(ACTIVATIONS))
        and (not getattr(activation, "inplace", False) or type(before) in NEW_TENSOR)
    ]


def _is_plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is of one of the types, and neither its class nor a hook adds anything."""
    base = next((kind for kind in kinds if isinstance(module, kind)), None)
    if base is None or own_names(module, base):
        return False
    return has_only_hooks_of_address(module)


def _layer(pair: _Pair) -> nn.Module:
    base = next(kind for kind in ACTIVATIONS if isinstance(pair.activation, kind))
    layer = ACTIVATIONS[base](pair.activation)
    layer.p = pair.dropout.p
    return layer
