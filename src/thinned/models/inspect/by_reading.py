"""Functional dropouts in the source of a forward: each call, its line, and its probability if that is plain.

The reading follows what the forward mentions: functions of its own file, methods of any module, also by way
of ``getattr``, ``functools.partial``, ``super()`` or a framework's base class, and functions with a name like
``attention``. Plain are the values that :mod:`.names` computes. A run (:mod:`.by_running`) reports the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.inspect.names import Given, Names, call_method
from thinned.models.inspect.targets import READS, Call, Read, remember_all
from thinned.models.source import parsed

__all__ = ["calls_in_source", "read_source"]

NEARBY = re.compile("drop|atten", re.IGNORECASE)
READINGS = 8  # of one function, with other arguments each
WRAPPERS = 10  # around one function


def calls_in_source(module: nn.Module) -> list[Call]:
    """The functional dropouts that ``module.forward`` may reach; empty if there is no source.

    >>> import torch
    >>> calls_in_source(torch.nn.Linear(2, 2))
    []
    """
    return read_source(module)[0]


def read_source(module: nn.Module) -> tuple[list[Call], list[Read]]:
    """The functional dropouts that ``module.forward`` may reach, and all that the reading has looked up."""
    reading, reads = _Reading(module), list[Read]()
    forward = module.forward
    if isinstance(module, torch.jit.ScriptModule):
        forward = getattr(forward, "__wrapped__", forward)  # that of the module which was scripted
    before = READS.set(reads)
    try:
        with torch.random.fork_rng(devices=()):  # the model's properties may draw
            reading.read(forward)
    finally:
        READS.reset(before)
    return [call for calls in reading.found.values() for call in calls.values()], reads


class _Reading:
    """The state of the reading of one module.

    Attributes:
        found: the calls, by the code of the function around them and by their place.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.homes = {base.__module__ for base in type(module).__mro__}
        self.found: dict[Any, dict[Any, Call]] = {}
        self.seen: set[Any] = set()
        self.wrapped: set[Any] = set()  # the codes of what others wrap
        self.readings: Counter[Any] = Counter()

    def read(self, called: Any, given: Given | None = None, asked: bool = False) -> None:
        """Collect from a function, from those it wraps, and from those that these mention.

        Args:
            called: any object; what is no function that the reading follows is ignored.
            given: the arguments of the call.
            asked: whether the caller has asked for training.
        """
        given, receiver = given or {}, None
        is_root = not self.found
        layers = list(_layers(called))
        if layers and getattr(layers[0], "__code__", "") in self.wrapped:
            return  # the wrapper mentions it, and tells nothing of the arguments
        self.wrapped.update(getattr(layer, "__code__", None) for layer in layers[1:])
        for layer in layers:
            receiver = getattr(layer, "__self__", receiver)
            if isinstance(layer, partial):
                self.read(layer.func, {**_bound(layer), **given}, asked)
            function = getattr(layer, "__func__", layer)
            if not isinstance(function, FunctionType):
                continue
            last = is_root and layer is layers[-1]
            if last or self._follows(function, receiver):
                self._read(function, receiver, given, asked)

    def _follows(self, function: FunctionType, receiver: Any) -> bool:
        """Whether to read a function that another mentions."""
        # functools.wraps copies __module__ from the wrapped function; __globals__ are the function's own.
        home = function.__globals__.get("__name__") or function.__module__ or ""
        if home.partition(".")[0] in ("torch", "thinned"):
            return receiver is self.module and function.__name__ == "forward"  # by super()
        if isinstance(receiver, nn.Module) and receiver is not self.module and function.__name__ == "forward":
            return False  # read for the module that it belongs to
        return home in self.homes or isinstance(receiver, nn.Module) or bool(NEARBY.search(function.__name__))

    def _read(self, function: FunctionType, receiver: Any, given: Given, asked: bool) -> None:
        code = function.__code__
        first = code.co_varnames[: min(code.co_argcount, 1)]
        if receiver is None and first == ("self",):  # taken from the class
            receiver = self.module
        if receiver is not None and first:
            given = {first[0]: (receiver, receiver), **given}
        key = code, asked, tuple((name, *map(_identity, values)) for name, values in sorted(given.items()))
        if key in self.seen or self.readings[code] == READINGS or (source := parsed(function)) is None:
            return
        self.seen.add(key)
        self.readings[code] += 1
        names = Names(function, source, given, asked)
        calls = self.found.setdefault(code, {})
        for place, call in names.dropouts():
            before = calls.get(place)
            if before is not None:  # read with other arguments
                p = call.p if call.p == before.p else None
                call = replace(before, p=p, note=before.note or call.note, rates=before.rates + call.rates)
            calls[place] = call
        for value, arguments, guarded in names.mentions():
            self.read(value, arguments, guarded)


def _layers(called: Any) -> Iterator[Any]:
    """``called`` and what it wraps; for an object that is callable, its method."""
    if isinstance(called, type | Tensor | nn.Module):
        return
    owner = getattr(called, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        called = owner.forward  # by apply()
    elif not isinstance(called, FunctionType | MethodType | partial) and callable(called):
        called = call_method(called)
    for _ in range(WRAPPERS):
        yield called
        if not hasattr(called, "__wrapped__"):
            return
        called = called.__wrapped__


def _bound(called: partial[Any]) -> Given:
    """The arguments that a partial holds, by name."""
    function = getattr(called.func, "__func__", called.func)
    is_bound = isinstance(called.func, MethodType)
    names = function.__code__.co_varnames[is_bound:] if isinstance(function, FunctionType) else ()
    values = {**dict(zip(names, called.args, strict=False)), **remember_all(called.keywords)}
    return {name: (value, value) for name, value in values.items()}


def _identity(value: Any) -> Any:
    is_constant = isinstance(value, bool | int | float | str | None)
    return (type(value), value) if is_constant else id(value)
