"""Residual blocks that compute their branches for the rows that a DropPath keeps, and for no others.

A block gets a subclass of its class, of the same name, whose methods :mod:`.slices` made of the source.
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import copyreg
import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CellType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from thinned.layers import DropPath, Masksembles, RDrop, StochasticDepth
from thinned.layers.residual import BATCH_NORMS, contents_of
from thinned.models.convert.rows import run
from thinned.models.convert.rules import is_known, make
from thinned.models.convert.slices import RUN, Cut, Refused, attributes_of_self, cut, drop_calls, is_mixing
from thinned.models.source import Source, parsed
from thinned.models.walk import join
from thinned.torch_state import ScriptedForward, children_of

__all__ = ["Call", "Skip", "Skips", "drops_rows", "plan", "skippable", "skipped_calls", "unskip"]

FUTURE = functools.reduce(
    int.__or__, (getattr(__future__, each).compiler_flag for each in __future__.all_feature_names)
)
SOFTMAX = nn.Softmax | nn.LogSoftmax | nn.Softmin | nn.GLU
SEGMENTS = {"n_segment", "num_segments", "n_segments", "fold_div"}
ROUTED = re.compile("moe|router|mixtureofexperts", re.IGNORECASE)


class Call(NamedTuple):
    """A call of a DropPath in a class: the method, the DropPath's name, and the number of its call there."""

    method: str
    path: str
    number: int


class Skip(NamedTuple):
    """One call of a DropPath in a block, and whether its branch can be computed for the kept rows alone.

    Attributes:
        path: the name of the DropPath in the block.
        modules: the names of the block's children in the branch.
        reason: why the branch is computed for all rows; empty if it can skip.
        call: where the call stands.
    """

    path: str
    modules: tuple[str, ...]
    reason: str
    call: Call | None = None


def skippable(module: nn.Module, *, allow_batch_norm: bool = False) -> list[Skip]:
    """The calls of DropPaths in the methods of a block, each with the reason why it cannot skip, if any.

    >>> import torch, thinned
    >>> skippable(torch.nn.Linear(2, 2))
    []
    """
    drops = {name for name, child in children_of(module).items() if drops_rows(child)}
    if not drops:
        return []
    kind = _plain(type(module))
    found: list[Skip] = []
    try:
        if "forward" in vars(module) or isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule):
            raise Refused("its block has a forward of its own")
        for method, function in _methods(kind):
            source = _source(function)
            if source is None:
                continue
            calls = [(name, i) for name in sorted(drops) for i, _ in enumerate(drop_calls(source.tree, name))]
            if calls and (reason := _unreadable(function)):
                raise Refused(reason)
            for (name, number), one in zip(calls, cut(source, calls)[1], strict=True):
                found.append(_judge(module, kind, Call(method, name, number), one, allow_batch_norm))
    except Refused as error:
        return [Skip(name, (), str(error)) for name in sorted(drops)]
    missing = drops - {each.path for each in found}
    return found + [Skip(name, (), f"no method of its block calls self.{name}") for name in sorted(missing)]


def drops_rows(child: nn.Module | None) -> bool:
    """Whether a child is a DropPath or a StochasticDepth, or becomes one when it is converted."""
    if child is None:
        return False
    if isinstance(child, DropPath | StochasticDepth):
        return True
    try:
        return is_known(child) and isinstance(make(child)[0], DropPath | StochasticDepth)
    except (ValueError, TypeError):
        return False


def _methods(kind: type) -> Iterator[tuple[str, FunctionType]]:
    """``forward``, and the methods that it calls, and those that these call."""
    todo, seen = ["forward"], set[str]()
    while todo:
        name = todo.pop(0)
        function = inspect.getattr_static(kind, name, None)
        if name in seen or not isinstance(function, FunctionType):
            continue
        seen.add(name)
        yield name, function
        source = _source(function)
        if source is not None:
            todo += sorted(
                attributes_of_self([source.tree])
                or {node.attr for node in ast.walk(source.tree) if isinstance(node, ast.Attribute)}
            )


def _inner(function: FunctionType) -> FunctionType:
    """The function inside of decorators that hold it in a closure."""
    while (inner := getattr(function, "__wrapped__", None)) is not None:
        if not isinstance(inner, FunctionType) or _cell(function, inner) is None:
            break
        function = inner
    return function


def _cell(function: FunctionType, value: Any) -> int | None:
    """The number of the only cell of a closure that holds ``value``."""
    found = [i for i, cell in enumerate(function.__closure__ or ()) if contents_of(cell) is value]
    return found[0] if len(found) == 1 else None


def _source(function: FunctionType) -> Source | None:
    source = parsed(_inner(function))
    is_function = source is not None and isinstance(source.tree, ast.Module)
    return source if is_function and isinstance(source.tree.body[0], ast.FunctionDef) else None  # type: ignore


def _unreadable(function: FunctionType) -> str:
    """Why the function cannot be compiled from its source; empty if it can."""
    function = _inner(function)
    if hasattr(function, "__wrapped__"):
        return f"its {function.__name__} is wrapped by a decorator"
    if "__class__" in function.__code__.co_freevars:
        return f"its {function.__name__} calls super()"
    if function.__code__.co_freevars:
        return (
            f"its {function.__name__} uses {', '.join(function.__code__.co_freevars)} of a function around it"
        )
    return ""


def _judge(module: nn.Module, kind: type, call: Call, one: Cut | Refused, allow_batch_norm: bool) -> Skip:
    if isinstance(one, Refused):
        norm = next((each for each in module.named_modules() if isinstance(each[1], BATCH_NORMS)), None)
        reason = str(one)
        if norm is not None and not allow_batch_norm:
            reason = f"{type(norm[1]).__name__} at {norm[0]!r} takes its statistics over the batch; and {one}"
        return Skip(call.path, (), reason, call)
    try:
        used = _used(kind, one.nodes)
        children = children_of(module)
        names = tuple(each for each in children if each in used and children[each] is not None)
        for each in names:
            if any(inner is children[call.path] for inner in children[each].modules()):  # type: ignore[union-attr]
                raise Refused("the same DropPath drops in its branch, before it")
            _check_module(each, children[each], allow_batch_norm)
        if not names:
            raise Refused(one.outside or "its branch has no module")
        _check_source(ast.Module([*one.nodes], []), f"its {call.method}")  # type: ignore[list-item]
    except Refused as error:
        return Skip(call.path, (), str(error), call)
    return Skip(call.path, names, "", call)


def _used(kind: type, nodes: Sequence[ast.AST]) -> set[str]:
    """The attributes of the block that a branch reads, itself or by the block's methods."""
    used = attributes_of_self(nodes)
    if used is None:
        raise Refused("its branch passes self on")
    todo, seen = sorted(used), set[str]()
    while todo:
        name = todo.pop()
        function = inspect.getattr_static(kind, name, None)
        if name in seen or function is None or hasattr(nn.Module, name):
            continue
        seen.add(name)
        function = function.fget if isinstance(function, property) else function
        if isinstance(function, staticmethod):
            continue
        if not isinstance(function, FunctionType):
            if callable(function):
                raise Refused(f"the source of its {name} cannot be read")
            continue
        source = _source(function)
        more = None if source is None else attributes_of_self([source.tree])
        if source is None or more is None:
            raise Refused(
                f"its {name} passes self on" if source else f"the source of its {name} cannot be read"
            )
        for node in ast.walk(source.tree):
            if (
                isinstance(node, ast.Attribute)
                and isinstance(node.ctx, ast.Store)
                and getattr(node.value, "id", "") == "self"
            ):
                raise Refused(f"its {name} assigns to self.{node.attr}")
        _check_source(source.tree, f"its {name}")
        used |= more
        todo += sorted(more)
    return used


def _check_source(tree: ast.AST, where: str) -> None:
    if text := is_mixing(tree):
        raise Refused(f"`{text}` in {where} works along dimension 0")


def _check_module(name: str, child: Any, allow_batch_norm: bool) -> None:
    """Raise :class:`Refused` for a module whose rows depend on each other, as far as that can be seen."""
    for path, module in child.named_modules(prefix=name):
        kind, shown = type(module), f"{type(module).__name__} at {path!r}"
        has_statistics = any(each.startswith("running_") for each, _ in module.named_buffers(recurse=False))
        if isinstance(module, BATCH_NORMS) or has_statistics:
            if not allow_batch_norm:
                raise Refused(
                    f"{shown} takes its statistics over the batch; allow_batch_norm=True allows that"
                )
        elif getattr(module, "batch_first", True) is False:
            raise Refused(f"{shown} has batch_first=False, so that dimension 0 is not the batch")
        elif SEGMENTS & vars(module).keys():
            raise Refused(f"{shown} shifts features between rows")
        elif isinstance(module, SOFTMAX) and not module.dim:
            raise Refused(f"{shown} works along dimension 0")  # None is 0 for some shapes
        elif isinstance(module, RDrop | Masksembles) or getattr(module, "scale", "") == "counted":
            raise Refused(f"{shown} depends on the number of rows")
        elif ROUTED.search(kind.__name__):
            raise Refused(f"{shown} depends on all rows")
        if not has_statistics and not kind.__module__.startswith(("torch.nn.", "thinned.")):
            _check_methods(kind, shown)


@functools.lru_cache(maxsize=1024)
def _mixing(kind: type) -> str:
    """What in the methods of a class, and in the functions of its file that these call, mixes rows."""
    todo: list[FunctionType] = [function for _, function in _methods(kind)]
    seen = set[FunctionType]()
    while todo:
        function = todo.pop()
        source = _source(function)
        if function in seen or source is None:
            continue
        seen.add(function)
        if text := is_mixing(source.tree):
            return text
        names = {node.id for node in ast.walk(source.tree) if isinstance(node, ast.Name)}
        mentioned = (_inner(function).__globals__.get(name) for name in names)
        todo += [
            each
            for each in mentioned
            if isinstance(each, FunctionType) and each.__module__ == function.__module__
        ]
    return ""


def _check_methods(kind: type, shown: str) -> None:
    if text := _mixing(kind):
        raise Refused(f"`{text}` in {shown} works along dimension 0")


# The classes of blocks that skip.


class _Skipping(NamedTuple):
    """What the class of a block that skips was made of."""

    kind: type
    calls: frozenset[Call]


MARK = "_thinned_skipping"


def _plain(kind: type) -> type:
    made: _Skipping | None = getattr(kind, MARK, None)
    return kind if made is None else made.kind


def skipped_calls(module: nn.Module) -> frozenset[Call]:
    """The calls of a block that skip; empty for other modules."""
    made: _Skipping | None = getattr(type(module), MARK, None)
    return frozenset() if made is None else made.calls


def skipping_class(module: nn.Module, calls: Iterable[Call]) -> type:
    """The class by which a block skips at these calls, besides those at which it does.

    Raises:
        Refused: it cannot be made.
    """
    try:
        return _class(_plain(type(module)), skipped_calls(module) | frozenset(calls))
    except Refused:
        raise
    except Exception as error:  # of a metaclass or an __init_subclass__
        raise Refused(f"{type(module).__name__} cannot be subclassed: {error}") from error


def unskip(module: nn.Module) -> bool:
    """Give a block its own class back; return whether it had another."""
    if not skipped_calls(module):
        return False
    module.__class__ = _plain(type(module))
    return True


@dataclass
class Skips:
    """What :func:`plan` found.

    Attributes:
        classes: the blocks that will skip, and their classes.
        done: the paths of the DropPaths whose branches skip, one for each call.
        left: the paths of the others, and the reasons.
    """

    classes: list[tuple[nn.Module, type]] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)


def plan(
    found: Sequence[tuple[nn.Module, tuple[str, ...]]],
    chosen: Callable[[tuple[str, ...], nn.Module], bool],
    allow_batch_norm: bool,
) -> Skips:
    """Find the branches of a model that can skip, and change nothing.

    Args:
        found: the result of :func:`~thinned.models.walk.modules_with_paths`.
        chosen: whether a DropPath takes part.
        allow_batch_norm: as for :func:`thinned.convert`.
    """
    wanted = {id(module) for module, paths in found if drops_rows(module) and chosen(paths, module)}
    skips = Skips()
    for module, paths in found:
        children = children_of(module)
        of_block = [
            each
            for each in skippable(module, allow_batch_norm=allow_batch_norm)
            if id(children[each.path]) in wanted
        ]
        calls = [each.call for each in of_block if not each.reason and each.call is not None]
        try:
            kind = skipping_class(module, calls) if calls else None
        except Refused as error:
            of_block = [each._replace(reason=each.reason or str(error)) for each in of_block]
            kind = None
        if kind is not None:
            skips.classes.append((module, kind))
        for each in of_block:
            path = join(paths[0], each.path)
            if each.reason:
                skips.left.append((path, each.reason))
            else:
                skips.done.append(path)
    return skips


@functools.cache
def _class(kind: type, calls: frozenset[Call]) -> type:
    """The subclass of a block's class that skips at these calls."""
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
        "__reduce_ex__": _reduce,
        "__prepare_scriptable__": _prepare_scriptable,
        MARK: _Skipping(kind, calls),
    }
    for method in {call.method for call in calls}:
        function = inspect.getattr_static(kind, method)
        names[method] = _compiled(function, [call[1:] for call in calls if call.method == method])
    return type(kind)(kind.__name__, (kind,), names)


def _compiled(function: FunctionType, calls: Sequence[tuple[str, int]]) -> FunctionType:
    """The function whose branches are functions of their own, with the lines and the file of the original."""
    inner = _inner(function)
    if inner is not function:
        return _rewrapped(function, _compiled(function.__wrapped__, calls))  # type: ignore[attr-defined]
    source = _source(function)
    if source is None:
        raise Refused("its source cannot be read")
    trees, cuts = cut(source, calls)
    for one in cuts:
        if isinstance(one, Refused):
            raise one
    signature = trees[-1].args
    for argument in ast.walk(signature):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    trees[-1].returns = None
    # The defaults are those of the original, which are set below.
    signature.defaults = [ast.Constant(None) for _ in signature.defaults]
    signature.kw_defaults = [each and ast.Constant(None) for each in signature.kw_defaults]
    around = ast.parse(f"def around({RUN}):\n    return {function.__name__}").body[0]
    assert isinstance(around, ast.FunctionDef)
    around.body[:0] = trees
    tree = ast.fix_missing_locations(ast.Module([around], []))
    ast.increment_lineno(tree, source.before)
    code, found = function.__code__, dict[str, Any]()
    # Names that the function does not define are those of its module.
    made = compile(tree, code.co_filename, "exec", code.co_flags & FUTURE, dont_inherit=True)
    exec(made, function.__globals__, found)
    return _like(function, found["around"](run))


def _rewrapped(wrapper: FunctionType, inner: FunctionType) -> FunctionType:
    """A decorator's function around another function than its own."""
    place, cells = _cell(wrapper, wrapper.__wrapped__), list(wrapper.__closure__ or ())  # type: ignore[attr-defined]
    assert place is not None
    cells[place] = CellType(inner)
    made = _like(
        wrapper, FunctionType(wrapper.__code__, wrapper.__globals__, wrapper.__name__, None, tuple(cells))
    )
    made.__wrapped__ = inner  # type: ignore[attr-defined]
    return made


def _like(function: FunctionType, made: FunctionType) -> FunctionType:
    for name in (
        "__module__",
        "__qualname__",
        "__doc__",
        "__defaults__",
        "__kwdefaults__",
        "__annotations__",
    ):
        setattr(made, name, getattr(function, name))
    vars(made).update(vars(function))
    return made


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle the block as one of its own class that skips at the same calls."""
    made: _Skipping = getattr(type(self), MARK)
    reduced = super(type(self), self).__reduce_ex__(protocol)
    function, arguments, *rest = reduced
    if function is not copyreg.__newobj__ or arguments[0] is not type(self):  # type: ignore[attr-defined]
        return reduced
    return (_unpickled, (made.kind, made.calls, *arguments[1:]), *rest)


def _unpickled(kind: type, calls: frozenset[Call], *arguments: Any) -> Any:
    # If the source of the class has changed it may have no such calls, and computes all rows.
    with contextlib.suppress(Exception):
        kind = _class(kind, calls)
    return kind.__new__(kind, *arguments)


def _prepare_scriptable(self: Any) -> nn.Module:
    """Let :func:`torch.jit.script` compile the original forward."""
    kind = _plain(type(self))
    if any(call.method != "forward" for call in skipped_calls(self)):
        raise NotImplementedError(
            f"a {kind.__name__} that skips is not available in TorchScript; revert it before"
        )
    vars(self)["forward"] = ScriptedForward.of(self, kind.forward)  # type: ignore[attr-defined]
    return self  # type: ignore[no-any-return]
