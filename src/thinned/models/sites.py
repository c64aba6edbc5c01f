"""The numbers that a model drops with: attributes of its modules, and of objects such as a config."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any

from torch import nn

from thinned.models.convert.rules import is_dropout, is_known, is_number, numbers_of, probability_name
from thinned.models.inspect.by_reading import read_source
from thinned.models.inspect.targets import look_up
from thinned.models.walk import is_ours, modules_with_paths

__all__ = ["Rate", "is_dropout", "is_number", "rates_of"]

# It matches dropout, layerdrop, attn_pdrop, drop_path_rate and hidden_dropout_prob; it does not match
# drop_last or dropout_keep_prob.
NAME = re.compile(
    r"\w*drop(out[a-z]?)?s?_?(path|connect|block|head|key|edge|node|token)?(_?(rate|ratio|prob|probs|probability|p|\d+))*",
    re.IGNORECASE,
)
LAYERDROP = re.compile(r"layer_?drop", re.IGNORECASE)


@dataclass(eq=False)
class Rate:
    """One number that a model drops with.

    Attributes:
        module: the module that drops with it; the first, if several read the same config.
        paths: all places of the modules that drop with it.
        owner: the object that has the attribute: the module, or a config that it reads at each call; or a
            dictionary or list.
        name: the attribute, or the dictionary's key, or the list's index.
        key: the path of a dropout module; for other numbers, path and attribute, such as ``attn.dropout``.
        stays_off: whether a 0 says that the model does without this kind of dropout.
    """

    module: nn.Module
    paths: tuple[str, ...]
    owner: Any
    name: Any
    key: str
    stays_off: bool = False

    @property
    def value(self) -> float:
        """The number now."""
        value: float = look_up(self.owner, self.name)
        return value

    @value.setter
    def value(self, value: float) -> None:
        if isinstance(self.owner, dict | list):
            self.owner[self.name] = value
        else:
            setattr(self.owner, str(self.name), value)

    @property
    def of_module(self) -> bool:
        """Whether the number is that of a dropout module."""
        return self.key in self.paths


def rates_of(model: nn.Module) -> list[Rate]:
    """The numbers that ``model`` drops with, each once.

    They are the probabilities of dropout modules, ``nn.MultiheadAttention.dropout``, that of ``nn.LSTM``,
    ``nn.GRU`` and ``nn.RNN`` with several layers, every float from 0 to 1 whose name says so, such as
    ``attention_dropout`` or ``drop_path_rate``, and every attribute that a functional dropout in the source
    of a forward takes its ``p`` from. The attributes of a config count where the source reads them at each
    call. A number that cannot be set does not count.

    >>> import torch
    >>> model = torch.nn.TransformerEncoderLayer(8, 2, dropout=0.1)
    >>> {rate.key: rate.value for rate in rates_of(model)}
    {'self_attn.dropout': 0.1, 'dropout': 0.1, 'dropout1': 0.1, 'dropout2': 0.1}
    """
    found = modules_with_paths(model)
    paths_of = {id(module): paths for module, paths in found}
    holders = _Holders()
    for module, paths in found:
        for name, value in vars(module).items():
            holders.add(value, _join(paths[0], name))
    rates: dict[tuple[int, str], Rate] = {}
    for reader, reader_paths in found:
        for owner, name in _numbers(reader, holders):
            module, paths = reader, reader_paths
            if isinstance(owner, nn.Module):  # a forward may read the number of another module
                module, paths = owner, paths_of.get(id(owner), ())
            place = paths[0] if module is owner and paths else holders.path_of(owner)
            if place is None:
                continue  # perhaps a global, which other models use too
            of_module = module is owner and name == _main(module)
            stays_off = bool(LAYERDROP.search(str(name))) or isinstance(owner, list)
            stays_off |= is_ours(module) and not of_module
            key = place if of_module else _join(place, name)
            rate = rates.get((id(owner), name)) or Rate(module, (), owner, name, key, stays_off)
            if rate.paths or _can_be_set(rate):
                rate.paths += tuple(path for path in paths if path not in rate.paths)
                rates[id(owner), name] = rate
    return list(rates.values())


class _Holders:
    """The paths of what the modules hold: configs, dictionaries, and what these hold and a forward reads."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, str]] = {}  # by id, with the object, so that no other has its id

    def add(self, value: Any, path: str) -> None:
        """Note where ``value`` is; of a partial, its keywords."""
        value = value.keywords if isinstance(value, partial) else value
        self.known.setdefault(id(value), (value, path))

    def path_of(self, value: Any) -> str | None:
        """Where ``value`` is; None if no module holds it, such as a global."""
        return self.known.get(id(value), (None, None))[1]


def _join(path: str, name: Any) -> str:
    return f"{path}.{name}" if path else name


def _main(module: nn.Module) -> str | None:
    """The attribute with the probability of a dropout module; None for other modules."""
    name = probability_name(module) if is_dropout(module) else None
    return name if name is not None and is_number(getattr(module, name)) else None


def _numbers(module: nn.Module, holders: _Holders) -> Iterator[tuple[Any, str]]:
    """The objects and the attributes with a number that ``module`` drops with, some of them repeatedly."""
    yield from ((module, name) for name in numbers_of(module))
    if is_ours(module):
        return
    if not (isinstance(module, nn.MultiheadAttention | nn.RNNBase) or is_known(module)):
        yield from ((module, name) for name, value in vars(module).items() if _is_named_rate(name, value))
    if not type(module).__module__.startswith("torch."):
        calls, reads = read_source(module)
        for owner, name in reads:
            if (path := holders.path_of(owner)) is not None:
                holders.add(look_up(owner, name), _join(path, name))
        yield from (rate for call in calls for rate in call.rates if is_number(look_up(*rate)))
        for owner, name in reads:
            if not isinstance(owner, nn.Module) and _is_named_rate(name, look_up(owner, name)):
                yield owner, name


def _is_named_rate(name: Any, value: Any) -> bool:
    return (
        isinstance(name, str)
        and is_number(value)
        and not isinstance(value, Integral)
        and 0 <= value <= 1
        and NAME.fullmatch(name) is not None
    )


def _can_be_set(rate: Rate) -> bool:
    try:
        rate.value = rate.value
    except Exception:  # a property, or a frozen config
        return False
    return True
