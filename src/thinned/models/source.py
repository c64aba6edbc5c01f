"""The syntax tree of a function, and which of its nodes run in training only."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Sequence
from functools import lru_cache
from types import CodeType, FunctionType
from typing import NamedTuple

__all__ = ["TRAINING", "Source", "outline", "parsed"]

TRAINING = {"training", "is_training", "train"}


class Source(NamedTuple):
    """A function's tree, the number of lines before it, and the file."""

    tree: ast.AST
    before: int
    file: str


@lru_cache(maxsize=4096)
def parsed(function: FunctionType) -> Source | None:
    """The source of a function or lambda; None if there is none."""
    code = function.__code__  # inspect would take what a wrapper wraps
    try:
        file = inspect.getsourcefile(code) or ""
        if function.__name__ == "<lambda>":
            return _lambda(code, file)
        lines, first = inspect.getsourcelines(code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    tree.body[0].decorator_list = []  # type: ignore[attr-defined]  # which the reading sees as wrappers
    return Source(tree, max(first, 1) - 1, file)


def _lambda(code: CodeType, file: str) -> Source | None:
    """A lambda, whose lines may be a part of an expression: found by its line, arguments and names."""
    lines, _ = inspect.findsource(code)
    for node in ast.walk(ast.parse("".join(lines))):
        if not isinstance(node, ast.Lambda) or node.lineno != code.co_firstlineno:
            continue
        arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        names = {getattr(each, "attr", getattr(each, "id", None)) for each in ast.walk(node.body)}
        if arguments == list(code.co_varnames[: len(arguments)]) and names.issuperset(code.co_names):
            return Source(node, 0, file)
    return None


class Outline:
    """The parts of a function's tree that need no values.

    Attributes:
        guarded: for each node, whether the code has asked for training before it comes there.
        calls: the calls.
        assigned: what is assigned to each name; None where that is no expression.
        elements: what loops go through, by the name of the element.
        imported: the module and, if it is not the module itself, its attribute, by the name of the import.
    """

    def __init__(self, tree: ast.AST, parameters: Sequence[str], asked: bool) -> None:
        nodes = list(ast.walk(tree))
        self.calls = [node for node in nodes if isinstance(node, ast.Call)]
        self.assigned: dict[str, list[ast.expr | None]] = {}
        self.elements: dict[str, ast.expr] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        plainly: set[ast.AST] = set()
        for node in nodes:
            match node:
                case (
                    ast.Assign([ast.Name(name) as target], value)
                    | ast.AnnAssign(ast.Name(name) as target, value=value)
                    | ast.NamedExpr(ast.Name(name) as target, value)
                ):
                    self.assigned.setdefault(name, []).append(value)
                    plainly.add(target)
                case ast.Assign([ast.Tuple(targets)], ast.Tuple(values)) if len(targets) == len(values):
                    for part, value in zip(targets, values, strict=True):
                        if isinstance(part, ast.Name):
                            self.assigned.setdefault(part.id, []).append(value)
                            plainly.add(part)
                case ast.Import(names):
                    for each in names:
                        top = each.name.partition(".")[0]
                        self.imported[each.asname or top] = (each.name if each.asname else top, "")
                case ast.ImportFrom(home, names, level):
                    for each in names:
                        module = "." * (level or 0) + (home or "")
                        self.imported[each.asname or each.name] = (module, each.name)
                case ast.For(ast.Name(name), iterable) | ast.comprehension(ast.Name(name), iterable):
                    self.elements[name] = iterable
        for node in nodes:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and node not in plainly:
                self.assigned.setdefault(node.id, []).append(None)
            elif isinstance(node, ast.arg) and node.arg not in parameters:  # of a function inside
                self.assigned.setdefault(node.arg, []).append(None)
        aliases = {
            name
            for name, values in self.assigned.items()
            if any(value and asks_for_training(value) for value in values)
        }
        self.guarded: dict[ast.AST, bool] = {}
        _guard(tree, asked, aliases, self.guarded)


outline = lru_cache(maxsize=4096)(Outline)


def asks_for_training(node: ast.AST, aliases: set[str] = frozenset()) -> bool:  # type: ignore[assignment]
    """Whether an expression mentions the training mode, or a name that was assigned from it."""
    mentioned = {getattr(each, "attr", getattr(each, "id", "")) for each in ast.walk(node)}
    return not mentioned.isdisjoint(TRAINING | aliases)


def _guard(node: ast.AST, asked: bool, aliases: set[str], found: dict[ast.AST, bool]) -> None:
    found[node] = asked
    match node:
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) | ast.Match(subject=test):
            conditions = [test]
        case ast.BoolOp(values=conditions):
            pass
        case ast.ListComp() | ast.SetComp() | ast.GeneratorExp() | ast.DictComp():
            conditions = [condition for each in node.generators for condition in each.ifs]
        case _:
            conditions = []
    inner = asked or any(asks_for_training(condition, aliases) for condition in conditions)
    for _, field in ast.iter_fields(node):
        after = inner
        for child in field if isinstance(field, list) else (field,):
            if isinstance(child, ast.AST):
                _guard(child, after, aliases, found)
                after = after or (isinstance(child, ast.stmt) and _leaves_in_evaluation(child, aliases))


def _leaves_in_evaluation(statement: ast.stmt, aliases: set[str]) -> bool:
    """Whether a statement asks for training and leaves the block, as ``if not self.training: return x``."""
    if isinstance(statement, ast.Assert):
        return asks_for_training(statement.test, aliases)
    if not isinstance(statement, ast.If) or not asks_for_training(statement.test, aliases):
        return False
    leaving = ast.Return | ast.Raise | ast.Continue | ast.Break
    return any(block and isinstance(block[-1], leaving) for block in (statement.body, statement.orelse))
