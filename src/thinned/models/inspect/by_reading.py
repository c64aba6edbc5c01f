"""Functional dropouts in the source of a module: in its forward and in what that calls nearby."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.inspect.targets import HAND_WRITTEN, TARGETS, Argument, Target

__all__ = ["Call", "calls_in_source"]

DEPTH = 6
BY_HAND = {"bernoulli", "bernoulli_", "rand", "rand_like"}
NEARBY = re.compile("drop|atten", re.IGNORECASE)


@dataclass(frozen=True)
class Call:
    """One call in a source.

    Attributes:
        name: of what is called.
        function: in which it stands.
        file, line, last_line: where.
        p: its probability if the source says it, or an attribute of the module.
        always: whether nothing there depends on the training mode.
        note: a word on it.
    """

    name: str
    function: str
    file: str
    line: int
    last_line: int
    p: float | None
    always: bool
    note: str = ""


@dataclass(frozen=True)
class _Value:
    """What an expression is: ``known`` or not, and whether the training mode takes part in it."""

    value: Any = None
    known: bool = False
    guarded: bool = False


UNKNOWN = _Value()


def calls_in_source(module: nn.Module) -> list[Call]:
    """The functional dropouts that ``module``'s own forward may reach; none where there is no source.

    >>> import torch
    >>> calls_in_source(torch.nn.Linear(2, 2))
    []
    """
    reader = _Reader(module)
    forward = inspect.unwrap(vars(module).get("forward", type(module).forward))
    forward = getattr(forward, "__func__", forward)
    if isinstance(forward, FunctionType):
        reader.read(forward, {})
    return reader.found


class _Reader:
    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.homes = {base.__module__ for base in type(module).__mro__ if not _is_torch(base.__module__)}
        self.found: list[Call] = []
        self.read_already: set[Any] = set()

    def read(self, function: FunctionType, bound: Mapping[str, _Value], depth: int = 0) -> None:
        """Collect from ``function``, called with ``bound``, and from the functions it mentions."""
        if function.__code__ in self.read_already or depth > DEPTH:
            return
        self.read_already.add(function.__code__)
        parsed = _parse(function)
        if parsed is None:
            return
        tree, before, file = parsed
        scope = _Scope(self.module, function, tree, bound, method=not depth)
        skipped = set(scope.follow_attention_interface(self, depth))
        callers = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                call = self._call(node, scope)
                if call is not None:
                    name, p, always, note = call
                    first, last = node.lineno + before, (node.end_lineno or node.lineno) + before
                    always &= not scope.asks_for_training
                    where = (function.__qualname__, file, first, last)
                    self.found.append(Call(name, *where, p, always, note))
            if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Load):
                target = _function(scope.resolve(node))
                if target is not None and target not in skipped and self._nearby(target):
                    caller = callers.get(id(node))
                    self.read(target, scope.bind(target, caller) if caller else {}, depth + 1)

    def _nearby(self, function: FunctionType) -> bool:
        home = function.__module__ or ""
        if _is_torch(home) or home.startswith("thinned."):
            return False
        return home in self.homes or bool(NEARBY.search(function.__name__))

    def _call(self, node: ast.Call, scope: _Scope) -> tuple[str, float | None, bool, str] | None:
        called = scope.resolve(node.func)
        target = _target(called)
        if target is not None:
            p = scope.argument(node, target.p)
            training = scope.argument(node, target.training) if target.training else _Value(True, True)
            off = training.known and not training.value and not training.guarded
            rate = 0.0 if off else _number(p)
            return target.name, rate, rate != 0 and not (p.guarded or training.guarded), ""
        if isinstance(node.func, ast.Attribute) and node.func.attr in BY_HAND and not _is_module(called):
            owner = scope.resolve(node.func.value)
            home = owner if inspect.ismodule(owner) else Tensor
            if home in (torch, Tensor) and hasattr(home, node.func.attr):
                return f"{home.__name__}.{node.func.attr}", None, False, HAND_WRITTEN
        return None


class _Scope:
    """The names of one function: what its arguments, its assignments and its globals are."""

    def __init__(
        self,
        module: nn.Module,
        function: FunctionType,
        tree: ast.AST,
        bound: Mapping[str, _Value],
        method: bool,
    ) -> None:
        self.module, self.tree = module, tree
        self.bound = dict(bound)
        code = function.__code__
        if code.co_argcount and (method or code.co_varnames[0] == "self"):
            self.bound.setdefault(code.co_varnames[0], _Value(module, True))
        arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.arguments = set(arguments)
        self.outer = dict(function.__globals__)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                self.outer[name] = cell.cell_contents
            except ValueError:  # not yet assigned
                continue
        self.assigned: dict[str, list[ast.expr]] = defaultdict(list)
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                for to in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    if isinstance(to, ast.Name):
                        self.assigned[to.id].append(node.value)
        self.asks_for_training = any(
            isinstance(node, ast.If) and self.value(node.test).guarded for node in ast.walk(tree)
        )

    def resolve(self, node: ast.expr) -> Any:
        """The object behind a chain of names, or None."""
        found = self.value(node)
        return found.value if found.known else None

    def argument(self, node: ast.Call, argument: Argument) -> _Value:
        """What a call passes for an argument."""
        for keyword in node.keywords:
            if keyword.arg == argument.name:
                return self.value(keyword.value)
        unclear = any(isinstance(each, ast.Starred) for each in node.args) or any(
            keyword.arg is None for keyword in node.keywords
        )
        if argument.place < len(node.args) and not unclear:
            return self.value(node.args[argument.place])
        return UNKNOWN if unclear else _Value(argument.default, True)

    def bind(self, function: FunctionType, node: ast.Call) -> dict[str, _Value]:
        """What a call makes of the arguments of ``function``."""
        code = function.__code__
        names = list(code.co_varnames[: code.co_argcount])
        if isinstance(node.func, ast.Attribute) and isinstance(self.resolve(node.func), MethodType):
            names = names[1:]
        bound: dict[str, _Value] = {}
        try:
            for name, parameter in inspect.signature(function).parameters.items():
                if parameter.default is not parameter.empty:
                    bound[name] = _Value(parameter.default, True)
        except (TypeError, ValueError):
            pass
        for name, given in zip(names, node.args, strict=False):
            if isinstance(given, ast.Starred):
                break
            bound[name] = self.value(given)
        bound |= {each.arg: self.value(each.value) for each in node.keywords if each.arg}
        return bound

    def follow_attention_interface(self, reader: _Reader, depth: int) -> Iterator[FunctionType]:
        """Read the attention function that transformers will choose, and yield those it will not."""
        for node in ast.walk(self.tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            interface = self.resolve(node.func.value)
            if type(interface).__name__ != "AttentionInterface" or not node.args:
                continue
            chosen = self.resolve(node.args[0])
            defaults = [f for f in map(_function, map(self.resolve, node.args[1:])) if f is not None]
            if chosen in interface:
                function = _function(interface[chosen])
                yield from defaults
            else:
                function = defaults[0] if defaults else None
            if function is None:
                continue
            for caller in ast.walk(self.tree):
                if (
                    isinstance(caller, ast.Call)
                    and isinstance(caller.func, ast.Name)
                    and any(node is part for each in self.assigned[caller.func.id] for part in ast.walk(each))
                ):
                    reader.read(function, self.bind(function, caller), depth + 1)

    def value(self, node: ast.expr, seen: frozenset[str] = frozenset()) -> _Value:
        """What an expression is as far as names, attributes and conditions tell; nothing is called."""
        if isinstance(node, ast.Constant):
            return _Value(node.value, True)
        if isinstance(node, ast.Name):
            return self._name(node.id, seen)
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value, seen)
            guarded = owner.guarded or node.attr == "training"
            if owner.known and not isinstance(owner.value, Tensor) and node.attr != "training":
                try:
                    return _Value(getattr(owner.value, node.attr), True, guarded)
                except Exception:  # whatever a stranger's property raises
                    pass
            return _Value(guarded=guarded)
        if isinstance(node, ast.IfExp):
            test = self.value(node.test, seen)
            return _larger([self.value(node.body, seen), self.value(node.orelse, seen)], test.guarded)
        parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr)]
        values = [self.value(part, seen) for part in parts]
        guarded = any(value.guarded for value in values)
        if isinstance(node, ast.BoolOp):
            return _larger(values, guarded)
        if isinstance(node, ast.Call) and self._is_float(node):
            return self.value(node.args[0], seen)
        return _Value(guarded=guarded)

    def _is_float(self, node: ast.Call) -> bool:
        return isinstance(node.func, ast.Name) and node.func.id == "float" and len(node.args) == 1

    def _name(self, name: str, seen: frozenset[str]) -> _Value:
        if name in seen:
            return UNKNOWN
        if self.assigned.get(name):
            values = [self.value(each, seen | {name}) for each in self.assigned[name]]
            if name in self.arguments:
                values.append(self.bound.get(name, UNKNOWN))
            return values[0] if len(values) == 1 else _larger(values, False)
        if name in self.bound:
            return self.bound[name]
        if name in self.arguments:
            # An argument of this name is the training mode itself.
            return _Value(guarded=name in ("training", "train", "is_training"))
        return _Value(self.outer[name], True) if name in self.outer else UNKNOWN


def _larger(values: list[_Value], guarded: bool) -> _Value:
    """Of several possible values the largest number, as a probability is 0 where there is no dropout."""
    guarded |= any(value.guarded for value in values)
    numbers = [n for n in map(_number, values) if n is not None]
    if len(numbers) < len(values) and not any(numbers):
        return _Value(guarded=guarded)
    return _Value(max(numbers), True, guarded)


def _number(value: _Value) -> float | None:
    if not value.known or isinstance(value.value, bool) or not isinstance(value.value, int | float):
        return None
    return float(value.value)


def _function(value: Any) -> FunctionType | None:
    value = getattr(value, "__func__", value)
    if not callable(value) or isinstance(value, type | nn.Module):
        return None
    value = inspect.unwrap(value)
    return value if isinstance(value, FunctionType) else None


def _target(value: Any) -> Target | None:
    try:
        return TARGETS.get(value)
    except TypeError:  # not hashable, so no function
        return None


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _is_torch(module: str) -> bool:
    return module == "torch" or module.startswith("torch.")


@lru_cache(maxsize=4096)
def _parse(function: FunctionType) -> tuple[ast.AST, int, str] | None:
    """The tree, the number of lines before it, and the file."""
    try:
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    return tree, max(first, 1) - 1, inspect.getsourcefile(function) or ""
