"""The values of the names in a function's source, as far as they are plain, and the dropouts among its calls.

Plain are constants, attributes of the module, arguments that a caller passes, names that are assigned once,
and what operators, ``getattr`` and a few functions of Python make of them.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property, partial
from importlib.util import resolve_name
from itertools import takewhile
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from thinned.models.draws import DRAWS, SINGLE, purpose_of
from thinned.models.inspect.targets import (
    ELSEWHERE,
    HAND_WRITTEN,
    TARGETS,
    Argument,
    Call,
    Kind,
    as_float,
    remember,
    remember_all,
)
from thinned.models.source import TRAINING, Source, outline, parsed

__all__ = ["UNCONDITIONAL", "UNKNOWN", "Given", "Names", "call_method"]

UNCONDITIONAL = "does not ask whether the module is training"
UNKNOWN = object()
ANYTHING = ".*"
BY_HAND = {name.partition(".")[2] for name in DRAWS.values() if name.startswith("Tensor.")}
PYTHONS = ("random", "uniform", "rand", "random_sample")
KEEPS = re.compile("keep|surviv", re.IGNORECASE)
RATES = re.compile("drop|prob|rate|^p$", re.IGNORECASE)
# These functions have no side effects, and so have the methods of strings.
PLAIN_FUNCTIONS = (abs, bool, dict, float, int, len, list, max, min, round, str, sum, tuple)
DISPLAYS = ast.Tuple | ast.List | ast.Dict
COMPUTED = ast.UnaryOp | ast.BinOp | ast.Compare | ast.JoinedStr | ast.FormattedValue | DISPLAYS

Given = Mapping[str, tuple[Any, Any]]  # values by name, in training and in evaluation
_At = tuple[str, str, int, int]  # function, file, and the first and the last line


class Names:
    """One function's names, read with the arguments of one call.

    Args:
        function: the function.
        source: its source.
        given: the arguments.
        asked: whether the caller has asked for training.
        depth: how many functions to follow for a value that they return.
    """

    def __init__(
        self, function: FunctionType, source: Source, given: Given, asked: bool, depth: int = 2
    ) -> None:
        self.function, self.source, self.depth = function, source, depth
        code = function.__code__
        parameters = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        self.parameters = set(parameters)
        self.given = {name: given[name] for name in parameters if name in given}
        self.outline = outline(source.tree, parameters, asked)
        self.known: dict[tuple[Any, bool], Any] = {}  # what was evaluated before

    def value(self, node: Any, training: bool = True) -> Any:
        """The value of an expression in training or in evaluation; ``UNKNOWN`` if it is not plain."""
        try:
            return self.evaluate(node, training)
        except Exception:  # besides LookupError, all that a property of the model may raise
            return UNKNOWN

    def evaluate(self, node: Any, training: bool) -> Any:
        """As ``value``; raises if the expression is not plain."""
        if (node, training) not in self.known:
            self.known[node, training] = UNKNOWN  # if this raises
            self.known[node, training] = self._evaluate(node, training)
        return _known(self.known[node, training])

    def _evaluate(self, node: Any, training: bool) -> Any:
        value = partial(self._operand, training=training)
        match node:
            case ast.Constant(constant):
                return constant
            case ast.Name(name):
                return self._named(name, training)
            case ast.Attribute(attr=name) if name in TRAINING:
                return training
            case ast.Attribute(owner, name):
                return self._attribute(value(owner), name, training)
            case ast.Subscript(owner, key):
                holder, name = value(owner), value(key)
                return remember(holder[name], holder, name)
            case ast.IfExp(test, body, otherwise):
                return value(body if value(test) else otherwise)
            case ast.BoolOp(op, operands):
                for operand in operands:
                    result = value(operand)
                    if bool(result) is isinstance(op, ast.Or):
                        break
                return result
            case ast.Call():
                return self._called(node, training)
            case ast.expr() if isinstance(node, COMPUTED):
                return _Computation(value).result(node)
        raise LookupError(node)

    def _operand(self, node: Any, training: bool) -> Any:
        """As ``evaluate``; raises for a tensor, because a reading computes nothing from data."""
        result = self.evaluate(node, training)
        if isinstance(result, Tensor):
            raise LookupError(result)
        return result

    def _attribute(self, holder: Any, name: str, training: bool) -> Any:
        found = remember(getattr(holder, name), holder, name)
        getter = inspect.getattr_static(type(holder), name, None) if isinstance(found, int | float) else None
        if isinstance(getter, property) and getter.fset is None:
            with suppress(Exception):  # the result of the property may be plain, such as self._p
                first = getter.fget.__code__.co_varnames[0]  # type: ignore[union-attr]
                inner = self._result(getter.fget, {first: (holder, holder)}, training)
                return inner if inner == found else found
        return found

    def _named(self, name: str, training: bool) -> Any:
        if assigned := self.outline.assigned.get(name):
            if name in self.parameters or len(assigned) > 1:
                raise LookupError(name)
            return self.evaluate(assigned[0], training)
        if name in self.given:
            return _known(self.given[name][not training])
        if name in TRAINING:
            return training
        if name in self.outline.imported:
            module, attribute = self.outline.imported[name]
            home = sys.modules[resolve_name(module, self.function.__globals__.get("__package__"))]
            return getattr(home, attribute) if attribute else home
        if name in self.function.__code__.co_varnames:
            raise LookupError(name)
        return self._outside(name)

    def _outside(self, name: str) -> Any:
        """The value of a name of the closure, the module or Python."""
        cells = zip(self.function.__code__.co_freevars, self.function.__closure__ or (), strict=True)
        for free, cell in cells:
            if free == name:
                return cell.cell_contents
        found = self.function.__globals__
        return found[name] if name in found else getattr(builtins, name)

    def _called(self, call: ast.Call, training: bool) -> Any:
        """The result of a few functions that have no side effects."""
        value = partial(self._operand, training=training)
        args, keywords = call.args, {each.arg: each.value for each in call.keywords}
        match call.func, args:
            case ast.Name("super"), []:
                first = self.function.__code__.co_varnames[0]
                return super(self._outside("__class__"), self.given[first][0])
            case ast.Attribute(owner, "get" | "get_interface"), [key, *default]:
                # transformers chooses its attention so.
                holder, name = _mapping(value(owner)), value(key)
                return remember(holder.get(name, *map(value, default)), holder, name)
            case ast.Attribute(owner, "values"), []:
                return tuple(remember_all(_mapping(value(owner))).values())
        called = value(call.func)
        if called is getattr:
            holder, attribute, *otherwise = map(value, args)
            return remember(getattr(holder, attribute, *otherwise), holder, attribute)
        if called is partial:
            held, *bound = map(self.value, args)
            return partial(held, *bound, **{name or "": self.value(v) for name, v in keywords.items()})
        if called is type and len(args) == 1:
            return type(value(args[0]))
        if called is float and len(args) == 1 and (number := as_float(value(args[0]))) is not None:
            return number
        is_plain = any(called is each for each in PLAIN_FUNCTIONS) or isinstance(
            getattr(called, "__self__", 0), str
        )
        if is_plain and not keywords:
            return called(*map(value, args))
        return self._returned(call, called, training)

    def _returned(self, call: ast.Call, called: Any, training: bool) -> Any:
        """The result of a function that has one statement, ``return``."""
        function = getattr(called, "__func__", called)
        if not isinstance(function, FunctionType):
            raise LookupError(call)
        given = dict(self.arguments(call, called))
        if isinstance(called, MethodType):
            given[function.__code__.co_varnames[0]] = (called.__self__, called.__self__)
        return self._result(function, given, training)

    def _result(self, function: Any, given: Given, training: bool) -> Any:
        source = parsed(function) if self.depth else None
        body = getattr(getattr(source.tree, "body", [None])[0], "body", []) if source else []
        if not source or not body or not isinstance(body[-1], ast.Return) or len(body) > 2:
            raise LookupError(function)
        return Names(function, source, given, False, self.depth - 1).evaluate(body[-1].value, training)

    def candidates(self, node: Any, depth: int = 4) -> list[Any]:
        """The values that an expression may have, where it is not plain which."""
        if (found := self.value(node)) is not UNKNOWN:
            return [found]
        if not depth:
            return []
        several: list[Any] = []
        match node:
            case ast.Name(name):
                several = [each for each in self.outline.assigned.get(name, ()) if each is not None]
                if name in self.outline.elements:
                    return _elements(self.value(self.outline.elements[name]))
            case ast.IfExp(_, body, otherwise):
                several = [body, otherwise]
            case ast.Subscript(owner, _):
                return _elements(self.value(owner))
            case ast.Call(ast.Name("getattr"), [owner, name, *several]):
                holder, pattern = self.value(owner), re.compile(self._pattern(name))
                if pattern.pattern == ANYTHING:  # perhaps one of a table
                    names = [each for each in self.candidates(name, depth - 1) if isinstance(each, str)]
                    return [getattr(holder, each) for each in names if hasattr(holder, each)]
                if holder is not UNKNOWN and pattern.pattern != ANYTHING:
                    return [getattr(holder, each) for each in dir(type(holder)) if pattern.fullmatch(each)]
        return [value for each in several for value in self.candidates(each, depth - 1)]

    def _pattern(self, name: ast.expr) -> str:
        """A pattern of the strings that an expression may be: ``f"forward_{mode}"`` is ``forward_.*``."""
        if isinstance(found := self.value(name), str):
            return re.escape(found)
        match name:
            case ast.JoinedStr(parts):
                return "".join(map(self._pattern, parts))
            case ast.BinOp(left, ast.Add(), right):
                return self._pattern(left) + self._pattern(right)
        return ANYTHING

    def mentions(self) -> Iterator[tuple[Any, Given, bool]]:
        """Each object that the function mentions, its arguments, and whether training was asked for."""
        callees = {call.func: call for call in self.outline.calls}
        # A look-up that succeeds mentions a default that it does not choose.
        choices = (
            call for call in self.outline.calls if _is_lookup(call) and self.value(call) is not UNKNOWN
        )
        looked_up = {part for call in choices for part in ast.walk(call)}
        for node, asked in self.outline.guarded.items():
            is_read = isinstance(getattr(node, "ctx", None), ast.Load) or isinstance(node, ast.Call)
            if not is_read or (node in looked_up and node not in callees):
                continue
            for value in self.candidates(node) if node in callees else [self.value(node)]:
                if callable(value):
                    yield value, self.arguments(callees[node], value) if node in callees else {}, asked
            if isinstance(node, ast.Attribute) and isinstance(owner := self.value(node.value), nn.Module):
                method = inspect.getattr_static(type(owner), node.attr, None)
                getter = getattr(method, "fget", getattr(method, "func", None))
                if isinstance(method, property | cached_property) and getter is not None:
                    yield MethodType(getter, owner), {}, asked

    def arguments(self, call: ast.Call, called: Any) -> Given:
        """The arguments of a call by the names that the called function gives them, and its defaults."""
        called = call_method(called)
        is_bound = isinstance(called, MethodType)
        function = inspect.unwrap(getattr(called, "__func__", called))
        if not isinstance(function, FunctionType):
            return {each.arg: self._both(each.value) for each in call.keywords if each.arg}
        names = function.__code__.co_varnames[is_bound : function.__code__.co_argcount]
        positional = list(takewhile(_is_no_star, call.args))
        passed = dict(zip(names, map(self._both, positional), strict=False))
        passed |= {each.arg: self._both(each.value) for each in call.keywords if each.arg}
        if len(positional) < len(call.args) or any(each.arg is None for each in call.keywords):
            return passed
        return {**{name: (value, value) for name, value in _defaults(function).items()}, **passed}

    def _both(self, node: ast.expr) -> tuple[Any, Any]:
        return self.value(node, True), self.value(node, False)

    def dropouts(self) -> Iterator[tuple[Any, Call]]:
        """Each call that drops, with its place."""
        code = self.function.__code__
        qualname = getattr(code, "co_qualname", code.co_name)  # a wrapper's __qualname__ is not its own
        for node in self.outline.calls:
            lines = node.lineno + self.source.before, (node.end_lineno or node.lineno) + self.source.before
            at = qualname, self.source.file, *lines
            callees: list[tuple[ast.expr, list[ast.expr]]] = [(node.func, node.args)]
            if not self._is_read(node.func):
                # checkpoint(F.dropout, x, p) passes on what follows.
                callees += [(argument, node.args[i + 1 :]) for i, argument in enumerate(node.args)]
            for callee, args in callees:
                for called in self.candidates(callee):
                    if (call := self._dropout(node, callee, called, args, at)) is not None:
                        yield (node.lineno, node.col_offset, call.name), call
            if (drawn := self._drawn(node, at)) is not None:
                yield (node.lineno, node.col_offset, drawn.name), drawn

    def _is_read(self, called: ast.expr) -> bool:
        """Whether a call is of a function of Python, which shows itself what it does with its arguments."""
        function = inspect.unwrap(self.value(called))
        if function in (partial, getattr, hasattr, isinstance):
            return True
        home = getattr(function, "__module__", None) or ""
        return isinstance(function, FunctionType | MethodType) and home.partition(".")[0] != "torch"

    def _dropout(
        self, node: ast.Call, callee: ast.expr, called: Any, args: list[ast.expr], at: _At
    ) -> Call | None:
        """The call, if it is of a function that is known to drop."""
        if (found := self._known(node, called, args, True)) is None:
            return None
        name, p, on = found
        several: list[float | None] = []
        if p is None and (target := _target(called)) is not None and target.p:
            keywords = {each.arg or "": each.value for each in node.keywords}
            several = self._elements(target.p.of(args, keywords))
            p = several[0] if len(set(several)) == 1 else None
        rates = tuple(read for each in several if (read := getattr(each, "read", None)) is not None)
        in_evaluation = self.value(callee, False)  # a partial may hold the training mode
        again = self._known(node, called if in_evaluation is UNKNOWN else in_evaluation, args, False)
        always = again is not None and again[1] and again[2] and not self.outline.guarded[node]
        return Call(name, *at, 0.0 if on == 0 else p, UNCONDITIONAL if always else "", rates=rates)

    def _elements(self, passed: Any) -> list[float | None]:
        """The numbers in a container of which ``passed`` is one, as in ``rates[i]`` or ``for p in rates``."""
        name = getattr(passed, "id", None)
        is_element = name in self.outline.elements and self.outline.assigned.get(name) == [None]
        is_one = isinstance(passed, ast.Subscript) or is_element
        return [as_float(each) for each in self.candidates(passed)] if is_one else []

    def _known(
        self, node: ast.Call, called: Any, positional: list[ast.expr], training: bool
    ) -> tuple[str, float | None, float | None] | None:
        """The name of a function that is known to drop, ``p``, and whether it is on; None if not plain."""
        args = [self.value(each, training) for each in takewhile(_is_no_star, positional)]
        keywords: dict[str, Any] = {}  # "" for those that are not plain
        for each in node.keywords:
            value = self.value(each.value, training)
            is_unpacked = each.arg is None and isinstance(value, Mapping)
            keywords |= remember_all(value) if is_unpacked else {each.arg or "": value}
        is_whole = len(args) == len(positional) and "" not in keywords
        while isinstance(called, partial):
            args, keywords = [*called.args, *args], {**remember_all(called.keywords), **keywords}
            called = called.func
        target = _target(called)
        if target is None:
            return None

        def number(argument: Argument) -> float | None:
            is_plain = is_whole or argument.name in keywords
            return as_float(argument.of(args, keywords)) if is_plain else None

        p = number(target.p) if target.p else None
        return target.name, p, number(target.training) if target.training else 1.0

    def _drawn(self, node: ast.Call, at: _At) -> Call | None:
        """A call that draws random numbers of a dropout, or what may be one."""
        called, method = self.value(node.func), getattr(node.func, "attr", "")
        python = _of_python(called)
        name = python or next((name for draw, name in DRAWS.items() if draw is called), "")
        if called is UNKNOWN and method in BY_HAND:
            name = f"Tensor.{method}"
        if not name:
            return None
        single = bool(python) or (name == DRAWS[torch.rand] and self._shape(node) in SINGLE)
        purpose = purpose_of(at[1], at[2], self.function.__name__, single)
        if python and not purpose:
            return None
        kind: Kind = "layer" if purpose == "layerdrop" else "random"
        note = ELSEWHERE if python else "" if purpose else HAND_WRITTEN
        rate = self._rate(node) if purpose else None
        return Call(name, *at, rate, note, kind)

    def _shape(self, node: ast.Call) -> Any:
        """The shape of what ``torch.rand`` draws, if it is plain."""
        keywords = {each.arg: each.value for each in node.keywords}
        sizes = [self.value(each) for each in (*node.args, *filter(None, [keywords.get("size")]))]
        return tuple(sizes[0] if len(sizes) == 1 and isinstance(sizes[0], list | tuple) else sizes)

    def _rate(self, node: ast.Call) -> float | None:
        """The probability with which random numbers are compared, if it is plain."""
        assigned = self.outline.assigned.items()
        names = {name for name, values in assigned for each in values if each and node in ast.walk(each)}
        for compared in self.outline.guarded:
            if not isinstance(compared, ast.Compare) or len(compared.comparators) != 1:
                continue
            for drawn, rate in (sides := [compared.left, compared.comparators[0]]), sides[::-1]:
                parts = ast.walk(drawn)
                if any(part is node or getattr(part, "id", None) in names for part in parts):
                    word, value = getattr(rate, "attr", getattr(rate, "id", "")), self.value(rate)
                    if isinstance(value, int | float) and (KEEPS.search(word) or RATES.search(word)):
                        return as_float(1 - value if KEEPS.search(word) else value)
        return None


def call_method(called: Any) -> Any:
    """The bound ``__call__`` of an object whose class is written in Python; other objects as they are."""
    is_object = not isinstance(called, FunctionType | MethodType | partial | type) and callable(called)
    method = inspect.getattr_static(type(called), "__call__", None) if is_object else None
    return MethodType(method, called) if isinstance(method, FunctionType) else called


def _target(called: Any) -> Any:
    with suppress(TypeError):  # a tuple that holds a dictionary has no hash
        return TARGETS.get(called)
    return None


def _is_no_star(argument: ast.expr) -> bool:
    return not isinstance(argument, ast.Starred)


def _mapping(holder: Any) -> Mapping[Any, Any]:
    """``holder``; LookupError if it is no mapping: the ``get`` of a queue takes what it returns."""
    if not isinstance(holder, Mapping):
        raise LookupError(holder)
    return holder


def _is_lookup(call: ast.Call) -> bool:
    return getattr(call.func, "attr", "") in ("get", "get_interface")


class _Computation:
    """Replaces the operands of operators, f-strings and displays by names, and computes with their values."""

    def __init__(self, value: Callable[[ast.expr], Any]) -> None:
        self.value = value
        self.values: dict[str, Any] = {}

    def result(self, node: ast.expr) -> Any:
        tree = ast.fix_missing_locations(ast.Expression(self._named(node)))
        return eval(compile(tree, "<plain>", "eval"), {}, self.values)

    def _named(self, part: Any) -> Any:
        if isinstance(part, list):
            return [self._named(each) for each in part]
        if not isinstance(part, ast.AST):
            return part
        if not isinstance(part, ast.expr) or isinstance(part, COMPUTED | ast.Constant):
            return type(part)(**{name: self._named(field) for name, field in ast.iter_fields(part)})
        name = f"value{len(self.values)}"
        self.values[name] = self.value(part)
        return ast.Name(name, ast.Load())


def _known(value: Any) -> Any:
    if value is UNKNOWN:
        raise LookupError
    return value


def _elements(container: Any) -> list[Any]:
    if isinstance(container, Mapping):
        return [*remember_all(container).values()]
    if isinstance(container, list):
        return [remember(value, container, i) for i, value in enumerate(container)]
    return list(container) if isinstance(container, tuple | set) else []


def _defaults(function: FunctionType) -> dict[str, Any]:
    code, values = function.__code__, function.__defaults__ or ()
    names = code.co_varnames[code.co_argcount - len(values) : code.co_argcount]
    return {**dict(zip(names, values, strict=True)), **(function.__kwdefaults__ or {})}


def _of_python(called: Any) -> str:
    """The name of a function of Python's or NumPy's global generator; empty for others."""
    for module in ("random", "numpy.random"):
        functions = (getattr(sys.modules.get(module), name, None) for name in PYTHONS)
        if any(called == function for function in functions if function is not None):
            return f"{module}.{called.__name__}"
    return ""
