"""Functional dropouts in the source of a forward: each call, its line, and its probability if that is plain.

Plain are numbers, attributes of the module, ``a if self.training else b``, names that are assigned once and
arguments that a caller passes. Every other probability is reported by a run (:mod:`.by_running`).
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from itertools import chain, takewhile
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.inspect.targets import HAND_WRITTEN, TARGETS, Argument, Call, Read, remember

__all__ = ["UNCONDITIONAL", "calls_in_source", "read_source"]

UNCONDITIONAL = "does not ask whether the module is training"
UNKNOWN = object()
BY_HAND = {"bernoulli", "bernoulli_", "rand", "rand_like"}
NEARBY = re.compile("drop|atten", re.IGNORECASE)
TRAINING = {"training", "is_training", "train"}

Given = Mapping[Any, Callable[[bool], Any]]  # values by name or place, as functions of the training mode


def calls_in_source(module: nn.Module) -> list[Call]:
    """The functional dropouts that ``module.forward`` may reach; empty if there is no source.

    >>> import torch
    >>> calls_in_source(torch.nn.Linear(2, 2))
    []
    """
    return read_source(module)[0]


def read_source(module: nn.Module) -> tuple[list[Call], list[Read]]:
    """The functional dropouts that ``module.forward`` may reach, and all attributes that it may read."""
    found: dict[Any, list[Call]] = {}
    reads: list[Read] = []
    _read(module.forward, {}, {base.__module__ for base in type(module).__mro__}, found, reads)
    merged: dict[Call, Call] = {}
    for call in chain.from_iterable(found.values()):
        line = replace(call, p=None)
        if (known := merged.setdefault(line, call)) is not call:  # a function that is called several times
            p = call.p if call.p == known.p else None
            merged[line] = replace(known, p=p, rates=known.rates + call.rates)
    return list(merged.values()), reads


def _read(
    called: Any, given: Given, homes: set[str], found: dict[Any, list[Call]], reads: list[Read]
) -> None:
    """Collect from a function and from those it mentions, if of its file or of a name like ``attention``."""
    undecorated = inspect.unwrap(called) if callable(called) else None
    function = getattr(undecorated, "__func__", undecorated)
    if not isinstance(function, FunctionType):
        return
    home = function.__module__ or ""
    nearby = home in homes or NEARBY.search(function.__name__)
    if found and (not nearby or home.partition(".")[0] in ("torch", "thinned")):
        return
    if (parsed := _parse(function)) is None:
        return
    tree, before, file = parsed
    receiver = getattr(undecorated, "__self__", getattr(called, "__self__", None))
    if receiver is not None:
        given = {place + 1 if isinstance(place, int) else place: value for place, value in given.items()}
        given[0] = lambda _: receiver
    accepted = function.__code__.co_varnames[: function.__code__.co_argcount]
    given = {**given, **{name: given[place] for place, name in enumerate(accepted) if place in given}}
    if (reading := (function.__code__, _known(given))) in found:
        return
    names = _Names(function, tree, given, reads)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    found[reading] = []
    for call in calls:
        if dropout := names.dropout(call):
            name, p, note, rates = dropout
            lines = call.lineno + before, (call.end_lineno or call.lineno) + before
            found[reading].append(Call(name, function.__qualname__, file, *lines, p, note, rates))
    # A look-up that succeeds mentions a default that it does not choose.
    looked_up = {id(part) for call in calls if names.value(call) is not UNKNOWN for part in ast.walk(call)}
    passed = {id(call.func): names.arguments(call) for call in calls}
    for node in ast.walk(tree):
        if isinstance(getattr(node, "ctx", None), ast.Load) and id(node) not in looked_up:
            _read(names.value(node), passed.get(id(node), {}), homes, found, reads)


def _known(given: Given) -> frozenset[tuple[Any, Any]]:
    """The arguments that tell the calls of one function apart: numbers and modules."""
    known = set()
    for key, value in given.items():
        with contextlib.suppress(Exception):
            found = value(True)
            if isinstance(found, int | float | nn.Module):
                known.add((key, found))
    return frozenset(known)


class _Names:
    """The values of one function's names: some arguments, what is assigned once, and its globals."""

    def __init__(self, function: FunctionType, tree: ast.AST, given: Given, reads: list[Read]) -> None:
        self.function, self.given, self.reads = function, given, reads
        nodes = list(ast.walk(tree))
        stored = Counter(n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store))
        stored.update(n.arg for n in nodes if isinstance(n, ast.arg))
        self.assigned: dict[str, ast.expr | None] = {}
        self.asks_for_training = False
        for node in nodes:
            match node:
                case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), value=value):
                    self.assigned[name] = value if stored[name] == 1 else None
                case ast.If(test):
                    mentioned = {getattr(n, "attr", getattr(n, "id", "")) for n in ast.walk(test)}
                    self.asks_for_training |= not mentioned.isdisjoint(TRAINING)

    def arguments(self, call: ast.Call) -> Given:
        """The arguments that a call passes: those before the first ``*args`` by place, the others by name."""
        plain = takewhile(lambda each: not isinstance(each, ast.Starred), call.args)
        passed: dict[Any, ast.expr] = {
            **dict(enumerate(plain)),
            **{k.arg: k.value for k in call.keywords if k.arg},
        }
        return {key: partial(self.evaluate, value) for key, value in passed.items()}

    def value(self, node: Any, training: bool = True) -> Any:
        """The value of an expression in training or in evaluation; ``UNKNOWN`` if it is not plain."""
        try:
            return self.evaluate(node, training)
        except Exception:  # besides LookupError, all that a property of the model may raise
            return UNKNOWN

    def evaluate(self, node: Any, training: bool) -> Any:
        """As ``value``; raises if the expression is not plain."""
        value = partial(self.evaluate, training=training)
        match node:
            case ast.Constant(constant):
                return constant
            case ast.Name(name) if name in self.assigned:
                return value(self.assigned[name])
            case ast.Name(name) if name in self.given:
                return self.given[name](training)
            case ast.Name(name) | ast.Attribute(attr=name) if name in TRAINING:
                return training
            case ast.Name(name) if name not in self.function.__code__.co_varnames:
                return self.function.__globals__[name]
            case ast.Attribute(owner, name) if not isinstance(holder := value(owner), Tensor):
                return self._read(holder, name, getattr(holder, name))
            case ast.IfExp(test, body, otherwise):
                return value(body if value(test) else otherwise)
            case ast.UnaryOp(ast.Not(), operand):
                return not value(operand)
            case ast.Subscript(owner, key):
                holder, name = value(owner), value(key)
                return self._read(holder, name, holder[name])
            case ast.Call(ast.Name("float"), [number], []):
                return value(number) if isinstance(value(number), float) else float(value(number))
            case ast.Call(ast.Attribute(owner, "get" | "get_interface"), [key, default], []):
                return value(owner).get(value(key), value(default))  # transformers chooses attention so
        raise LookupError(node)

    def _read(self, owner: Any, name: Any, value: Any) -> Any:
        self.reads.append((owner, name))
        return remember(value, owner, name)

    def dropout(self, call: ast.Call) -> tuple[str, float | None, str, tuple[Read, ...]] | None:
        """The name, probability, note and probability's attribute of a call that drops; None for others."""
        called = self.value(call.func)
        try:
            target = TARGETS.get(called)
        except TypeError:  # not hashable, so no function
            target = None
        if target is not None:
            p, p_in_evaluation, rates = self._argument(call, target.p)
            on, on_in_evaluation, _ = self._argument(call, target.training) if target.training else (1, 1, ())
            always = p_in_evaluation and on_in_evaluation and not self.asks_for_training
            return target.name, 0.0 if on == 0 else p, UNCONDITIONAL if always else "", rates
        if isinstance(call.func, ast.Attribute) and (name := call.func.attr) in BY_HAND:
            owner = self.value(call.func.value)
            if owner is torch or (hasattr(Tensor, name) and (owner is UNKNOWN or isinstance(owner, Tensor))):
                return f"{'torch' if owner is torch else 'Tensor'}.{name}", None, HAND_WRITTEN, ()
        return None

    def _argument(
        self, call: ast.Call, argument: Argument
    ) -> tuple[float | None, float | None, tuple[Read, ...]]:
        """The number that is passed, in training and in evaluation, and the attribute that holds it.

        None stands for a number that is not plain.
        """
        keywords = {each.arg or "**": each.value for each in call.keywords}
        starred = "**" in keywords or any(isinstance(each, ast.Starred) for each in call.args)
        if starred and argument.name not in keywords:
            return None, None, ()
        passed = argument.of(call.args, keywords)
        if not isinstance(passed, ast.AST):  # torch's default
            return passed, passed, ()
        values = [self.value(passed, training) for training in (True, False)]
        read = getattr(values[0], "read", None)
        in_training, in_evaluation = (float(v) if isinstance(v, int | float) else None for v in values)
        return in_training, in_evaluation, () if read is None else (read,)


@lru_cache(maxsize=4096)
def _parse(function: FunctionType) -> tuple[ast.AST, int, str] | None:
    """The tree, the number of lines before it, and the file."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree, max(first, 1) - 1, inspect.getsourcefile(function) or ""
