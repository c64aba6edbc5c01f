"""The numbers that a model drops with: attributes of its modules, and of objects such as a config."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

from torch import nn

from thinned.models.convert.rules import (
    is_dropout,
    is_known,
    is_number,
    numbers_of,
    probability_name,
    unit_of,
)
from thinned.models.inspect.by_reading import read_source
from thinned.models.inspect.targets import look_up
from thinned.models.walk import is_ours, join, modules_with_paths, qualified_name, unwrapped, wrapped_in
from thinned.torch_state import children_of

__all__ = ["Place", "Rate", "RatesByPath", "own_attribute", "rates_of"]

# It matches dropout, layerdrop, attn_pdrop, drop_path_rate and hidden_dropout_prob; it does not match
# drop_last or dropout_keep_prob.
NAME = re.compile(
    r"\w*drop(out[a-z]?)?s?_?(path|connect|block|head|key|edge|node|token)?(_?(rate|ratio|prob|probs|probability|p|\d+))*",
    re.IGNORECASE,
)
LAYERDROP = re.compile(r"layer_?drop", re.IGNORECASE)


class Place(NamedTuple):
    """Where a model holds an object.

    Attributes:
        path: the path of a module.
        way: the attributes and items that lead from the module to the object; none if it is the module.
    """

    path: str
    way: tuple[Any, ...] = ()

    def __str__(self) -> str:
        return ".".join(str(part) for part in (self.path, *self.way) if part != "")


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
        places: where the modules that drop with it hold ``owner``.
    """

    module: nn.Module
    paths: tuple[str, ...]
    owner: Any
    name: Any
    key: str
    stays_off: bool = False
    places: tuple[Place, ...] = ()

    @property
    def value(self) -> float:
        """The number now."""
        value: float = look_up(self.owner, self.name)
        return value

    @value.setter
    def value(self, value: float) -> None:
        _set(self.owner, self.name, value)

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
            holders.add(value, *(Place(path, (name,)) for path in paths))
    rates: dict[tuple[int, str], Rate] = {}
    for reader, reader_paths in found:
        for owner, name in _numbers(reader, holders):
            module, paths = reader, reader_paths
            if isinstance(owner, nn.Module):  # a forward may read the number of another module
                module, paths = owner, paths_of.get(id(owner), ())
            held = paths_of.get(id(owner))
            places = holders.places_of(owner) if held is None else [Place(path) for path in held]
            if not places:
                continue  # perhaps a global, which other models use too
            of_module = module is owner and name == own_attribute(module)
            stays_off = bool(LAYERDROP.search(str(name))) or isinstance(owner, list)
            stays_off |= is_ours(module) and not of_module
            key = str(places[0]) if of_module else join(str(places[0]), name)
            rate = rates.get((id(owner), name)) or Rate(module, (), owner, name, key, stays_off)
            if rate.paths or _can_be_set(owner, name):
                rate.paths += tuple(path for path in paths if path not in rate.paths)
                read = [place for place in places if place.path in rate.paths]
                rate.places = tuple(read) or tuple(places[:1])
                rates[id(owner), name] = rate
    return list(rates.values())


class _Holders:
    """Where the modules hold configs, dictionaries, and what these hold and a forward reads."""

    def __init__(self) -> None:
        # By id, with the object, so that no other has its id. The places are an ordered set.
        self.known: dict[int, tuple[Any, dict[Place, None]]] = {}

    def add(self, value: Any, *places: Place) -> None:
        """Note where ``value`` is; of a partial, its keywords."""
        value = value.keywords if isinstance(value, partial) else value
        if value is not None and not isinstance(value, bool | int | float | str):
            self.known.setdefault(id(value), (value, {}))[1].update(dict.fromkeys(places))

    def places_of(self, value: Any) -> list[Place]:
        """Where ``value`` is; empty if no module holds it, such as a global."""
        return list(self.known.get(id(value), (None, ()))[1])


def own_attribute(module: nn.Module) -> str | None:
    """The attribute with the probability of a dropout module; None for other modules."""
    name = probability_name(module) if is_dropout(module) else None
    return name if name is not None and is_number(getattr(module, name)) else None


def _numbers(module: nn.Module, holders: _Holders) -> Iterator[tuple[Any, str]]:
    """The objects and the attributes with a number that ``module`` drops with, some of them repeatedly."""
    yield from ((module, name) for name in numbers_of(module) if is_number(getattr(module, name)))
    if is_ours(module):
        return
    if not (isinstance(module, nn.MultiheadAttention | nn.RNNBase) or is_known(module)):
        yield from ((module, name) for name, value in vars(module).items() if _is_named_rate(name, value))
    if not type(module).__module__.startswith("torch."):
        calls, reads = read_source(module)
        for owner, name in reads:
            inner = (Place(path, (*way, name)) for path, way in holders.places_of(owner))
            holders.add(look_up(owner, name), *inner)
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


def _set(owner: Any, name: Any, number: float) -> None:
    if isinstance(owner, dict | list):
        owner[name] = number
    else:
        setattr(owner, name, number)


def _can_be_set(owner: Any, name: Any) -> bool:
    try:
        _set(owner, name, look_up(owner, name))
    except Exception:  # a property, or a frozen config
        return False
    return True


@dataclass(eq=False)
class Found:
    """A number of a model, and what was there at the last look.

    Attributes:
        place: where the model holds the owner of the number.
        names: the attributes in which the owner may have it, the first that is a number; None stands for the
            probability of a dropout module, whatever its name.
        module: the module at the place's path.
        owner: the object that has the number, and ``name`` where it has it.
        unit: the factor from the number to the probability.
        number: its value.
    """

    place: Place
    names: tuple[str | None, ...]
    module: nn.Module | None = None
    owner: Any = None
    name: Any = None
    unit: float = 1.0
    number: float = math.nan

    def look(self, module: nn.Module) -> None:
        """Find the number in ``module``, which is at the path now; RuntimeError if it has none."""
        owner: Any = unwrapped(module)
        for part in self.place.way:
            value = look_up(owner, part)
            owner = value.keywords if isinstance(value, partial) else value
        main = own_attribute(owner) if isinstance(owner, nn.Module) else None
        for name in (main if name is None else name for name in self.names):
            if name is not None and is_number(number := look_up(owner, name)):
                if not _can_be_set(owner, name):
                    raise _replaced(self.place, f"it is now {_a(owner)}, whose {name} cannot be set")
                self.owner, self.name, self.number = owner, name, number
                self.unit = unit_of(owner) if name == main else 1.0
                return
        wanted = " or ".join(repr(name) for name in self.names if name is not None)
        raise _replaced(self.place, f"it is now {_a(owner)}, which has no number called {wanted}")

    def set(self, number: float) -> None:
        """Set the number, without a look."""
        _set(self.owner, self.name, number)


class RatesByPath:
    """Rates of a model that are looked up by path at each use, also in modules that replace others.

    Args:
        model: the model that has the rates now. Wrappers, as that of :func:`torch.compile`, have no part in
            paths.
        rates: each rate, with the names for :class:`Found`.

    Attributes:
        of_module: whether a rate is that of a dropout module, by the rate's key.
    """

    def __init__(self, model: nn.Module, rates: Iterable[tuple[Rate, tuple[str | None, ...]]]) -> None:
        self.model = model
        self.of_module: dict[str, bool] = {}
        # Paths share their beginnings. Each is one line: the number of the line above, and the child's name.
        self._paths: dict[str, int] = {"": 0}
        self._lines: list[tuple[int, str]] = []
        self._found: list[tuple[str, int, Found]] = []
        for rate, names in rates:
            key = _without_wrappers(model, rate.key)
            self.of_module[key] = rate.of_module
            for path, way in rate.places:
                path = _without_wrappers(model, path)
                self._found.append((key, self._line(path), Found(Place(path, way), names)))

    def _line(self, path: str) -> int:
        if path not in self._paths:
            above, _, name = path.rpartition(".")
            self._lines.append((self._line(above), name))
            self._paths[path] = len(self._lines)
        return self._paths[path]

    def look(self) -> list[tuple[str, Found]]:
        """The rates as they are now, with their keys; a rate that the model has in several places repeatedly.

        Raises:
            RuntimeError: one of them is not there any more.
        """
        modules = [self.model]
        for above, name in self._lines:
            child = children_of(modules[above]).get(name)
            modules.append(self._beyond(modules, above, name) if child is None else child)
        for _, line, found in self._found:
            if (module := modules[line]) is found.module and not found.place.way:
                found.number = look_up(found.owner, found.name)
                if is_number(found.number):
                    continue
            found.look(module)
            found.module = module
        return [(key, found) for key, _, found in self._found]

    def _beyond(self, modules: list[nn.Module], above: int, name: str) -> nn.Module:
        """The child of what a module wraps, or one that its ``__getattr__`` finds, as in wrappers of peft."""
        module = unwrapped(modules[above])
        child = getattr(module, name, None)
        if not isinstance(child, nn.Module):
            path = list(self._paths)[above]
            what = f"{path!r} is now" if path else "the model is"
            raise _replaced(Place(join(path, name)), f"{what} {_a(module)} without a module {name!r}")
        return child


def _without_wrappers(model: nn.Module, path: str) -> str:
    """A path, which may go on into what a module holds, without the names of wrapped modules."""
    parts: list[str] = []
    module: nn.Module | None = model
    for part in path.split(".") if path else ():
        child = None if module is None else children_of(module).get(part)
        if module is None or child is None or child is not wrapped_in(module):
            parts.append(part)
        module = child
    return ".".join(parts)


def _replaced(place: Place, what: str) -> RuntimeError:
    return RuntimeError(
        f"there is no probability to schedule at {str(place)!r} any more: {what}. Make a new DropoutSchedule "
        "of the model, with each probability at its full value. Nothing has changed"
    )


def _a(owner: Any) -> str:
    return "None" if owner is None else f"a {qualified_name(type(owner))}"
