"""The syntax tree of a function, and which of its nodes run in training only."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import lru_cache
from types import FunctionType
from typing import NamedTuple

__all__ = ["TRAINING", "Source", "asks_for_training", "guarded", "parsed"]

TRAINING = {"training", "is_training", "train"}


class Source(NamedTuple):
    """A function's tree, the number of lines before it, and the file."""

    tree: ast.AST
    before: int
    file: str


@lru_cache(maxsize=4096)
def parsed(function: FunctionType) -> Source | None:
    """The source of a function or lambda; None if there is none."""
    try:
        file = inspect.getsourcefile(function) or ""
        if function.__name__ == "<lambda>":
            return _lambda(function, file)
        lines, first = inspect.getsourcelines(function)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return None
    return Source(tree, max(first, 1) - 1, file)


def _lambda(function: FunctionType, file: str) -> Source | None:
    """A lambda, whose lines may be a part of an expression: found by its line, arguments and names."""
    code = function.__code__
    lines, _ = inspect.findsource(function)
    for node in ast.walk(ast.parse("".join(lines))):
        if not isinstance(node, ast.Lambda) or node.lineno != code.co_firstlineno:
            continue
        arguments = [each.arg for each in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        names = {getattr(each, "attr", getattr(each, "id", None)) for each in ast.walk(node.body)}
        if arguments == list(code.co_varnames[: len(arguments)]) and names.issuperset(code.co_names):
            return Source(node, 0, file)
    return None


def guarded(tree: ast.AST, asked: bool) -> dict[ast.AST, bool]:
    """For each node, whether the code has asked for training before it comes there."""
    found: dict[ast.AST, bool] = {}
    aliases = {
        node.targets[0].id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and asks_for_training(node.value)
    }
    _guard(tree, asked, aliases, found)
    return found


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
