"""The branch before each DropPath of a forward, cut out of its source into a function of its own.

In ``y = self.norm(x); x = x + self.drop_path(self.mlp(y))`` the branch is ``self.mlp(self.norm(x))``: the
statements whose results go nowhere else but into the DropPath, and the expression that it is given. The
forward becomes ``x = run(self, self.drop_path, branch, ..., x)``, beside a function ``branch(self, x)``.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from thinned.models.source import Source

__all__ = ["Cut", "Refused", "attributes_of_self", "cut", "drop_calls", "is_mixing"]

# Calls that draw nothing and write nothing.
QUIET = {"size", "dim", "ndimension", "numel", "stride", "len", "int", "float", "bool", "min", "max", "tuple"}
QUIET |= {"range", "any", "all", "isinstance", "hasattr", "getattr"}
QUIET |= {"is_scripting", "is_tracing", "is_exporting"}
UNKNOWN = (
    ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Return | ast.Raise | ast.Yield | ast.YieldFrom
)
UNKNOWN |= (
    ast.Await | ast.Global | ast.Nonlocal | ast.Try | ast.Match | ast.Delete | ast.Import | ast.ImportFrom
)
NESTED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda
COMPREHENSION = ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp
# Without a dimension these mix all rows.
WHOLE = {"mean", "sum", "std", "var", "var_mean", "std_mean", "median", "nanmean", "nansum", "prod"}
WHOLE |= {"amax", "amin", "aminmax", "argmax", "argmin", "max", "min", "any", "all", "count_nonzero"}
WHOLE |= {"cat", "concat", "concatenate", "chunk", "split", "tensor_split", "unique", "roll", "norm"}
WHOLE |= {"vector_norm"}
# Reductions, sorts and the like, which mix the rows if they work along dimension 0.
ALONG = WHOLE | {"softmax", "log_softmax", "logsumexp", "sort", "argsort", "cumsum", "cumprod", "normalize"}
ALONG |= {"topk", "flip", "glu"}
DIM_THIRD = {"chunk", "split", "tensor_split", "norm", "roll"}  # after the tensor and a number
NO_DIM_SECOND = DIM_THIRD | {"vector_norm", "normalize", "topk", "unique"}
BUILTIN = {"sum", "max", "min", "any", "all"}
RUN = "_thinned_run"  # the function that the compiled forward calls


class Refused(ValueError):  # noqa: N818
    """A branch that cannot be cut out; the message says why."""


@dataclass
class Cut:
    """A branch that was cut out.

    Attributes:
        name: of the function that computes it.
        nodes: its syntax trees.
        outside: why its first statement does not begin earlier; empty if nothing comes before it.
    """

    name: str
    nodes: list[ast.AST]
    outside: str


class Flow:
    """The names that some statements read before they write them, and write perhaps, and surely.

    ``surely`` is None for statements that end in a return or raise.
    """

    def __init__(self, statements: Sequence[ast.stmt]) -> None:
        self.reads: set[str] = set()
        self.perhaps: set[str] = set()
        self.surely: set[str] | None = set()
        for statement in statements:
            self._add(statement)
            if self.surely is None:
                return

    def _then(self, reads: set[str], perhaps: set[str], surely: set[str] | None) -> None:
        assert self.surely is not None
        self.reads |= reads - self.surely
        self.perhaps |= perhaps
        self.surely = None if surely is None else self.surely | surely

    def _add(self, statement: ast.stmt) -> None:
        match statement:
            case ast.If(test, body, orelse):
                self._then(*_names(test))
                one, other = Flow(body), Flow(orelse)
                both = [each.surely for each in (one, other) if each.surely is not None]
                surely = set.intersection(*both) if both else None
                self._then(one.reads | other.reads, one.perhaps | other.perhaps, surely)
            case ast.For(target, iterable, body, orelse):
                self._then(*_names(iterable))
                inner = Flow(body)
                reads, writes, _ = _names(target)
                self._then(reads | (inner.reads - writes), inner.perhaps | writes, set())
                self._maybe(orelse)
            case ast.While(test, body, orelse):
                self._then(*_names(test))
                self._maybe([*body, *orelse])
            case ast.With(items, body):
                for item in items:
                    self._then(*_names(item))
                inner = Flow(body)
                self._then(inner.reads, inner.perhaps, inner.surely)
            case ast.Try() | ast.Match() | ast.AsyncFor() | ast.AsyncWith():
                reads, writes, _ = _names(statement)
                self._then(reads, writes, set())
            case ast.FunctionDef(name) | ast.AsyncFunctionDef(name) | ast.ClassDef(name):
                self._then(_names(statement)[0], {name}, {name})
            case ast.Return() | ast.Raise():
                self._then(*_names(statement))
                self.surely = None
            case _:
                self._then(*_names(statement))

    def _maybe(self, statements: list[ast.stmt]) -> None:
        inner = Flow(statements)
        self._then(inner.reads, inner.perhaps, set())


def _names(tree: ast.AST) -> tuple[set[str], set[str], set[str]]:
    """The names that an expression or a simple statement reads, and twice those that it writes or changes."""
    reads, writes, bound = set[str](), set[str](), set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Name(name, ast.Load()):
                reads.add(name)
            case ast.Name(name, ast.Del()):
                reads.add(name)
                writes.add(name)
            case ast.Name(name):
                writes.add(name)
            case ast.comprehension(target):
                bound |= {each.id for each in ast.walk(target) if isinstance(each, ast.Name)}
            case ast.arg(name):
                bound.add(name)
            case ast.AugAssign(ast.Name(name)):
                reads.add(name)
        for changed in _changed(node):
            reads.add(changed)
            writes.add(changed)
    return reads - bound, writes - bound, writes - bound


def _changed(node: ast.AST) -> list[str]:
    """The names of objects that a node changes in place, other than ``self``."""
    match node:
        case ast.Subscript(ctx=ast.Store() | ast.Del()) | ast.Attribute(ctx=ast.Store() | ast.Del()):
            found = [_root(node)]
        case ast.Call(ast.Attribute(owner, name)) if name.endswith("_") and not name.endswith("__"):
            found = [_root(owner)]
        case ast.Call(args=args, keywords=keywords) if any(
            each.arg in ("inplace", "out") for each in keywords
        ):
            found = [_root(each.value) for each in keywords if each.arg == "out"]
            if any(each.arg == "inplace" and _literal(each.value) is not False for each in keywords):
                found += [_root(each) for each in args[:1]]
        case ast.Expr(ast.Call(ast.Attribute(owner))):  # such as features.append(x)
            found = [_root(owner)]
        case _:
            return []
    return [name for name in found if name not in ("", "self")]


def _root(node: ast.AST) -> str:
    """``x`` of ``x[0].y``; empty if there is none."""
    while isinstance(node, ast.Attribute | ast.Subscript | ast.Call | ast.Starred):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def drop_calls(tree: ast.AST, name: str) -> list[ast.Call]:
    """The calls ``self.NAME(...)`` of a child, in the order of the source."""
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
        and node.func.attr == name
    ]
    return sorted(calls, key=lambda node: (node.lineno, node.col_offset))


def attributes_of_self(nodes: Sequence[ast.AST]) -> set[str] | None:
    """What trees read of ``self``; None if they use it in another way, such as ``getattr(self, name)``."""
    found, known = set[str](), set[ast.AST]()
    for root in nodes:
        for node in ast.walk(root):
            match node:
                case ast.Attribute(ast.Name("self") as owner, name):
                    known.add(owner)
                    found.add(name)
                case ast.Call(
                    ast.Name("getattr" | "hasattr"), [ast.Name("self") as owner, ast.Constant(str(name)), *_]
                ):
                    known.add(owner)
                    found.add(name)
                case ast.Call(ast.Name(name), [ast.Name("self") as owner, *_]) if name == RUN:
                    known.add(owner)
                case ast.Name("self") if node not in known:
                    return None
    return found


def is_mixing(tree: ast.AST) -> str:
    """The first part of a source that works along dimension 0; empty if there is none.

    >>> is_mixing(ast.parse("y = x.mean(dim=0) + x.mean(1)"))
    'x.mean(dim=0)'
    """
    sizes = _batch_sizes(tree)
    for node in ast.walk(tree):
        parts = ast.walk(_part_for_sizes(node))
        if any(_is_batch_size(each) or getattr(each, "id", "") in sizes for each in parts):
            return ast.unparse(node)
        if isinstance(node, ast.Attribute) and node.attr == "T" and _root(node) != "self":
            return ast.unparse(node)
        if not isinstance(node, ast.Call) or _takes_only_parameters(node):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {each.arg: each.value for each in node.keywords}
        by_name = [given[each] for each in ("dim", "dims", "axis") if each in given]
        owner = node.func.value if isinstance(node.func, ast.Attribute) else None
        is_method = owner is not None and _root(owner) not in ("torch", "F", "nn")
        first, *more = [*node.args[not is_method :], None]
        match name, [_literal(each) for each in node.args[not is_method :]]:
            case "transpose" | "swapaxes" | "swapdims" | "movedim" | "moveaxis", [0, int(other)] | [
                int(other),
                0,
            ] if other:
                return ast.unparse(node)
            case "permute", [1, _, _, *_] | [(1, _, _, *_)]:
                return ast.unparse(node)
            case "t" | "cdist" | "pdist" | "cov" | "corrcoef", _ if _root(node.func) != "self":
                return ast.unparse(node)
            case "batch_norm", _ if owner is not None and not is_method:
                return ast.unparse(node)
        if name not in ALONG or _is_attribute_of_self(node.func) or (owner is None and name in BUILTIN):
            continue
        dims = [_literal(each) for each in by_name]
        if not by_name and name not in NO_DIM_SECOND and first is not None:
            dims = [_literal(first)]
        if name in DIM_THIRD and more[:-1]:
            dims = [_literal(node.args[1 + (not is_method)])]
        if any(
            dim == 0 or (isinstance(dim, tuple) and 0 in dim) for dim in dims if not isinstance(dim, bool)
        ):
            return ast.unparse(node)
        has_no_dim = not by_name and (first is None or (name in DIM_THIRD and not more[:-1]))
        if name in WHOLE and has_no_dim and owner is not None:
            return ast.unparse(node)
    return ""


def _part_for_sizes(node: ast.AST) -> ast.AST:
    """The part of a node in which the number of rows makes a result depend on it."""
    match node:
        case ast.BinOp(_, ast.Div(), divisor):
            return divisor
        case ast.BinOp(ast.Name(name), ast.Mult(), factor) if (
            _is_batch_size(factor) and _root(factor) == name
        ):
            return factor
        case ast.Slice():
            return node
        case ast.Compare(_, ops) if any(
            isinstance(each, ast.Lt | ast.LtE | ast.Gt | ast.GtE) for each in ops
        ):
            return node
    return ast.Pass()


def _batch_sizes(tree: ast.AST) -> set[str]:
    """The names that are assigned the size of dimension 0."""
    found = set[str]()
    for node in ast.walk(tree):
        match node:
            case ast.Assign([ast.Name(name)], value) if _is_batch_size(value):
                found.add(name)
            case ast.Assign(
                [ast.Tuple([ast.Name(name), *_])],
                ast.Attribute(_, "shape") | ast.Call(ast.Attribute(_, "size"), []),
            ):
                found.add(name)
    return found


def _is_batch_size(node: ast.AST) -> bool:
    match node:
        case (
            ast.Subscript(ast.Attribute(owner, "shape"), ast.Constant(0))
            | ast.Call(ast.Attribute(owner, "size"), [ast.Constant(0)])
            | ast.Call(ast.Name("len"), [owner])
            | ast.Call(ast.Attribute(owner, "numel"), [])
        ):
            return _root(owner) not in ("", "self")
    return False


def _takes_only_parameters(call: ast.Call) -> bool:
    """Whether a call takes nothing but attributes of ``self``, such as ``torch.cat((self.a, self.b))``."""
    nodes = list(ast.walk(call))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    calls_children = any(isinstance(node, ast.Call) and _is_attribute_of_self(node.func) for node in nodes)
    return "self" in names <= {"self", "torch", "F"} and not calls_children


def _is_attribute_of_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


def _literal(node: ast.AST) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return None
    return tuple(value) if isinstance(value, list) else value


@dataclass
class _Place:
    """A statement's place: the block that has it, its index there, and the statement around the block."""

    block: list[ast.stmt]
    index: int
    around: ast.stmt | None


def _places(function: ast.FunctionDef, wanted: ast.AST) -> list[_Place]:
    """The way to the statement with ``wanted`` in an expression of its own, outermost first."""

    def search(block: list[ast.stmt], around: ast.stmt | None) -> list[_Place] | None:
        for index, statement in enumerate(block):
            here = _Place(block, index, around)
            if not any(node is wanted for node in ast.walk(statement)):
                continue
            for name in ("body", "orelse", "finalbody"):
                inner = getattr(statement, name, None)
                if isinstance(inner, list) and (found := search(inner, statement)):
                    return [here, *found]
            return [here]
        return None

    return search(function.body, None) or []


def cut(
    source: Source, calls: Sequence[tuple[str, int]]
) -> tuple[list[ast.FunctionDef], list[Cut | Refused]]:
    """Cut the branches of some calls of DropPaths out of a function.

    Args:
        source: that of the function; its tree is not changed.
        calls: each by the name of the child, and by its number in :func:`drop_calls` of this child.

    Returns:
        The functions of the branches and, last, the function that calls them by ``_thinned_run``; and what
        became of each call.
    """
    function: ast.FunctionDef = copy.deepcopy(source.tree.body[0])  # type: ignore[attr-defined]
    found = {name: drop_calls(function, name) for name, _ in calls}
    functions: list[ast.FunctionDef] = []
    cuts: dict[tuple[str, int], Cut | Refused] = {}
    done: dict[str, Cut] = {}
    # Those that stand first are cut first: a later branch may contain them.
    for name, number in sorted(calls, key=lambda call: _position(found, *call)):
        try:
            _check(function)
            if number >= len(found[name]):
                raise Refused("its source has changed")
            made, one = _Cutting(function, found[name][number]).cut(f"{function.name}_{name}{number}")
            mentioned = [
                node.id for each in one.nodes for node in ast.walk(each) if isinstance(node, ast.Name)
            ]
            one.nodes += [node for each in mentioned if each in done for node in done[each].nodes]
            functions.append(made)
            cuts[name, number] = done[one.name] = one
        except Refused as error:
            cuts[name, number] = error
    return [*functions, function], [cuts[call] for call in calls]


def _position(found: Mapping[str, list[ast.Call]], name: str, number: int) -> tuple[int, int]:
    call = found[name][number] if number < len(found[name]) else None
    return (0, 0) if call is None else (call.lineno, call.col_offset)


def _check(function: ast.FunctionDef) -> None:
    """Raise :class:`Refused` for a function that means something else when its parts move."""
    if not function.args.args or function.args.args[0].arg != "self":
        raise Refused("its function has no self")
    for node in ast.walk(function):
        match node:
            case ast.Name("super" | "__class__" | "locals" | "vars" | "eval" | "exec" as name):
                raise Refused(f"its function calls {name}()")
            case ast.Name(name) | ast.Attribute(attr=name) if name.startswith("__") and not name.endswith(
                "__"
            ):
                raise Refused(f"its function uses the private name {name}")
            case ast.Yield() | ast.YieldFrom() | ast.Await() | ast.AsyncFor() | ast.AsyncWith():
                raise Refused("its function is a generator or a coroutine")
            case ast.Name("self", ast.Store()):
                raise Refused("its function assigns to self")
            case ast.Global() | ast.Nonlocal():
                raise Refused("its function assigns to names outside of it")


class _Cutting:
    """The cutting of one branch out of a function, which is changed only if it succeeds."""

    def __init__(self, function: ast.FunctionDef, call: ast.Call) -> None:
        self.function, self.call = function, call
        if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
            raise Refused("its DropPath gets other arguments than the branch alone")
        self.branch = call.args[0]
        self.places = _places(function, call)
        if not self.places:
            raise Refused("it stands in the branch of another DropPath")
        for place in self.places:
            if isinstance(place.around, ast.Try | ast.Match | NESTED):
                raise Refused(f"its branch stands in a {type(place.around).__name__.lower()} statement")
        self.block, self.index = self.places[-1].block, self.places[-1].index
        self.statement = self.block[self.index]
        self.conditional = self._is_conditional()
        self.local, self.functions = _local_names(function)
        self.flows = [Flow([statement]) for statement in self.block[: self.index]]
        self.of_branch = _names(self.branch)[0]
        if any(isinstance(node, ast.NamedExpr) for node in ast.walk(self.statement)):
            raise Refused("its statement assigns within an expression")

    def _is_conditional(self) -> bool:
        """Whether the call may be left out of its statement."""
        for node in ast.walk(self.statement):
            if not any(inner is self.call for inner in ast.walk(node)):
                continue
            if isinstance(node, COMPREHENSION | ast.Lambda):
                raise Refused("its DropPath is called in a comprehension or a lambda")
            if isinstance(node, UNKNOWN) and not isinstance(node, ast.Return):
                raise Refused(f"its branch stands in a {type(node).__name__.lower()} statement")
            if isinstance(node, ast.If | ast.While | ast.For | ast.With):
                raise Refused("its DropPath is called in the head of a statement")
        return any(
            any(inner is self.call for part in parts for inner in ast.walk(part))
            for node in ast.walk(self.statement)
            for parts in (
                [node.body, node.orelse] if isinstance(node, ast.IfExp) else [],
                node.values[1:] if isinstance(node, ast.BoolOp) else [],
            )
        )

    def cut(self, name: str) -> tuple[ast.FunctionDef, Cut]:
        inside, repeated, outside = self._slice()
        everything = sorted(inside | repeated)
        if not any(isinstance(node, ast.Call) for node in self._nodes(inside)):
            self._refuse_empty(outside)
        try:
            values = self._values(inside, everything)
        except Refused:
            if outside:
                self._refuse_empty(outside)
            raise
        self._check_order(inside)
        rows = self._rows(values, inside)
        ordered = [*rows, *sorted(values - set(rows))]
        nodes: list[ast.AST] = [self.block[i] for i in everything]
        body = [copy.deepcopy(self.block[i]) if i in repeated else self.block[i] for i in everything]
        result = ast.copy_location(ast.Return(self.branch), self.call)
        function = ast.copy_location(
            ast.FunctionDef(name, _arguments(["self", *ordered]), [*body, result], []), self.call
        )
        if hasattr(self.function, "type_params"):
            function.type_params = []  # type: ignore[attr-defined]
        self._replace(name, ordered, len(rows), inside)
        return ast.fix_missing_locations(function), Cut(name, [*nodes, self.branch], _last(outside))

    def _nodes(self, inside: set[int]) -> Iterator[ast.AST]:
        for i in sorted(inside):
            yield from ast.walk(self.block[i])
        yield from ast.walk(self.branch)

    def _reach(self, name: str, before: int) -> int:
        """The last statement before another that may write a name; -1 for none of the block."""
        if name not in self.local:
            return -1
        return next((i for i in reversed(range(before)) if name in self.flows[i].perhaps), -1)

    def _reads(self, i: int) -> set[str]:
        """The names whose values before a statement matter to it, or go through it to later ones."""
        flow = self.flows[i]
        return flow.reads | (flow.perhaps - (flow.surely or set())) & {name for name, _ in self.users[i]}

    def _behind(self, allowed: Container[int]) -> set[int]:
        """The statements whose results reach the branch by way of allowed statements alone."""
        found = set[int]()
        todo = [self._reach(name, self.index) for name in self.of_branch]
        while todo:
            i = todo.pop()
            if i in allowed and i not in found:  # -1 stands for none
                found.add(i)
                todo += [self._reach(name, i) for name in self._reads(i)]
        return found

    def _slice(self) -> tuple[set[int], set[int], dict[int, str]]:
        """The statements of the branch, those that it repeats, and what those left out of it are used for."""
        k = self.index
        rest = self._rest_of_statement()
        live = self._live_after()
        own = Flow([self.statement])
        users: dict[int, list[tuple[str, int | str]]] = {i: [] for i in range(k)}
        self.users = users
        for name in self.of_branch:
            if (i := self._reach(name, k)) >= 0:
                users[i].append((name, "branch"))
        for name in rest:
            if (i := self._reach(name, k)) >= 0:
                users[i].append((name, _text(self.statement)))
        for name in live - (own.surely or set()):
            if (i := self._reach(name, k)) >= 0:
                users[i].append((name, "what follows"))
        for j in reversed(range(k)):  # the users of a statement come after it
            for name in self._reads(j):
                if (i := self._reach(name, j)) >= 0:
                    users[i].append((name, j))
        inside = self._behind(range(k))
        repeated, outside = set[int](), dict[int, str]()
        changed = True
        while changed:
            changed = False
            for i in sorted(inside):
                reason = self._unfit(i)
                for name, user in users[i]:
                    if user != "branch" and user not in inside:
                        where = _text(self.block[user]) if isinstance(user, int) else user
                        reason = reason or f"{name!r} is also used by {where}"
                if reason:
                    inside.discard(i)
                    (repeated.add(i) if _is_shape(self.block[i]) else outside.setdefault(i, reason))
                    changed = True
        # A statement that only left ones need goes with them; one of shapes is repeated only if it is needed.
        needed = self._behind(inside | repeated)
        return inside & needed, repeated & needed, outside

    def _unfit(self, i: int) -> str:
        """Why a statement cannot be a part of the branch."""
        for node in ast.walk(self.block[i]):
            if isinstance(node, UNKNOWN):
                kind = (
                    "nested function"
                    if isinstance(node, NESTED)
                    else f"{type(node).__name__.lower()} statement"
                )
                return f"a {kind} stands in it"
            stores = isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Store)
            if stores and _root(node) == "self":
                return f"{_text(self.block[i])} assigns to self"
        return ""

    def _rest_of_statement(self) -> set[str]:
        """The names that the statement of the DropPath reads, but for those in the branch."""
        argument, self.call.args[0] = self.call.args[0], ast.Constant(None)
        try:
            return _names(self.statement)[0]
        finally:
            self.call.args[0] = argument

    def _live_after(self) -> set[str]:
        """The names that are read after the statement, before they are written."""
        live, written = set[str](), set[str]()
        for place in reversed(self.places):
            flow = Flow(place.block[place.index + 1 :])
            live |= flow.reads - written
            if flow.surely is None:
                break
            written |= flow.surely
            if isinstance(place.around, ast.For | ast.While):
                live |= Flow([place.around]).reads - written
        return live

    def _refuse_empty(self, outside: dict[int, str]) -> None:
        if outside:
            raise Refused(_last(outside))
        raise Refused(f"{_text(self.branch)} is computed outside of the block of {_text(self.statement)}")

    def _values(self, inside: set[int], everything: list[int]) -> set[str]:
        """The local names that the branch takes from outside."""
        k = self.index
        taken: dict[str, int] = {}
        for j in [*everything, k]:
            names = self.of_branch if j == k else self._reads(j)
            for name in names & self.local:
                i = self._reach(name, j)
                if i in everything:
                    continue
                if taken.setdefault(name, i) != i:
                    raise Refused(f"two values of {name!r} reach its branch")
        for name, i in taken.items():
            later = [j for j in range(i + 1, k) if j not in inside and name in self.flows[j].perhaps]
            if later:
                raise Refused(f"{name!r} changes before the DropPath, in {_text(self.block[later[0]])}")
            if name not in self._defined(inside):
                raise Refused(f"{name!r} may have no value there")
            if name in self.functions:
                raise Refused(f"it calls {name!r}, a nested function")
        for j in inside:
            for node in ast.walk(self.block[j]):
                changed = {*_changed(node)}
                if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):
                    changed.add(node.target.id)
                for name in changed & taken.keys():
                    if self._reach(name, j) == taken[name]:
                        raise Refused(f"{_text(self.block[j])} changes {name!r} in place")
        for node in ast.walk(self.branch):
            for name in {*_changed(node)} & taken.keys():
                raise Refused(f"{_text(self.branch)} changes {name!r} in place")
        return set(taken) - {"self"}

    def _defined(self, inside: set[int]) -> set[str]:
        """The local names that surely have a value at the DropPath when the branch is cut out."""
        defined = {each.arg for each in ast.walk(self.function.args) if isinstance(each, ast.arg)}
        for place in self.places:
            before = place.block[: place.index]
            if place is self.places[-1]:
                before = [statement for i, statement in enumerate(before) if i not in inside]
            defined |= Flow(before).surely or set()
            match place.around:
                case ast.For(target):
                    defined |= _names(target)[1]
                case ast.With(items):
                    defined |= {name for item in items for name in _names(item)[1]}
        return defined

    def _check_order(self, inside: set[int]) -> None:
        """Refuse a branch that would move behind a call or a write."""
        if not inside:
            return
        if self.conditional:
            raise Refused("its DropPath is called under a condition, after its branch was computed")
        for i in range(min(inside), self.index):
            if i not in inside and (loud := _loud(self.block[i])):
                raise Refused(f"{loud} runs between its branch and its DropPath")
        place = (self.call.lineno, self.call.col_offset)
        for node in ast.walk(self.statement):
            is_before = isinstance(node, ast.Call) and (node.end_lineno, node.end_col_offset) <= place
            if is_before and not _is_quiet(node):
                raise Refused(f"{_text(node)} runs between its branch and its DropPath")

    def _rows(self, values: set[str], inside: set[int]) -> list[str]:
        """The values that have a row for each row of the batch, as far as the source says so."""
        if not values:
            raise Refused("its branch takes no value of the function")
        found = []
        other = self._other_summand()
        roots = {node.id for node in ast.walk(other) if isinstance(node, ast.Name)} if other else set()
        roots |= {alias for name in roots if (alias := self._alias(name))}
        parameters = [each.arg for each in (*self.function.args.posonlyargs, *self.function.args.args)][1:]
        first = sorted(roots & values) or ([*values] if len(values) == 1 else [])
        first = first or [name for name in parameters[:1] if name in values]
        if not first:
            raise Refused(f"the source does not say which of {', '.join(sorted(values))} has the rows")
        found.append(first[0])
        for node in self._nodes(inside):
            match node:
                case ast.Subscript(ast.Name(name), index) if name == first[0] and _picks_rows(index):
                    raise Refused(f"its branch takes rows: {_text(node)}")
                case ast.Call(
                    ast.Attribute(ast.Name("torch"), "cat" | "concat" | "stack"), [ast.Name(name), *_]
                ) if name == first[0]:
                    raise Refused(f"its branch takes a list of tensors: {_text(node)}")
                case ast.Call(
                    ast.Attribute(ast.Name("torch"), "cat" | "concat"),
                    [ast.Tuple(parts) | ast.List(parts), *more],
                    keywords,
                ):
                    dims = [
                        _literal(each)
                        for each in [*more, *(each.value for each in keywords if each.arg == "dim")]
                    ]
                    names = [each.id for each in parts if isinstance(each, ast.Name)]
                    if found[0] in names and len(dims) == 1 and dims[0] not in (None, 0):
                        found += [name for name in names if name in values and name not in found]
        found += sorted(name for name in values if name.endswith("key_padding_mask") and name not in found)
        return found

    def _alias(self, name: str) -> str:
        """``x`` for a name that was last assigned ``x``; else empty."""
        i = self._reach(name, self.index)
        if i < 0:
            return ""
        match self.block[i]:
            case ast.Assign(_, ast.Name(other)):
                return other
        return ""

    def _other_summand(self) -> ast.expr | None:
        parent = next(
            (
                node
                for node in ast.walk(self.statement)
                if isinstance(node, ast.BinOp)
                and isinstance(node.op, ast.Add)
                and self.call in (node.left, node.right)
            ),
            None,
        )
        if parent is not None:
            return parent.right if parent.left is self.call else parent.left
        if isinstance(self.statement, ast.AugAssign) and self.statement.value is self.call:
            return self.statement.target
        if (into := self._into()) is not None:
            return into.value
        return None

    def _into(self) -> ast.AugAssign | None:
        """The statement ``y += x`` right behind ``y = self.drop_path(...)``."""
        following = self.block[self.index + 1 : self.index + 2]
        match self.statement, following:
            case ast.Assign([ast.Name(name)], value), [
                ast.AugAssign(ast.Name(same), ast.Add(), other) as found
            ] if value is self.call and name == same and name not in _names(other)[0]:
                return found
        return None

    def _replace(self, name: str, values: list[str], rows: int, inside: set[int]) -> None:
        """Put the call of the branch's function in place of the DropPath's, and of the addition around it."""
        target: ast.expr = self.call
        kind, other = "", None
        for node in ast.walk(self.statement):
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
                if node.left is self.call:
                    target, kind, other = node, "before", node.right
                elif node.right is self.call:
                    target, kind, other = node, "after", node.left
        into = self._into() if other is None else None
        if into is not None:
            kind, other = "into", into.value
        if other is not None and kind != "after" and not isinstance(other, ast.Name):
            other = ast.Lambda(_arguments([]), other)
        arguments = [
            ast.Name("self", ast.Load()),
            ast.Attribute(ast.Name("self", ast.Load()), self.call.func.attr, ast.Load()),  # type: ignore[attr-defined]
            ast.Name(name, ast.Load()),
            ast.Constant(kind),
            ast.Constant(None) if other is None else other,
            ast.Constant(rows),
            *(ast.Name(value, ast.Load()) for value in values),
        ]
        made = ast.copy_location(ast.Call(ast.Name(RUN, ast.Load()), arguments, []), target)
        _Put(target, made).visit(self.statement)
        drop = {id(self.block[i]) for i in inside} | ({id(into)} if into is not None else set())
        self.block[:] = [statement for statement in self.block if id(statement) not in drop]
        ast.fix_missing_locations(self.function)


def _picks_rows(index: ast.expr) -> bool:
    """Whether an index takes some of the rows of dimension 0, or orders them."""
    first = index.elts[0] if isinstance(index, ast.Tuple) and index.elts else index
    if isinstance(first, ast.Slice):
        return any((first.lower, first.upper, first.step))
    return not (isinstance(first, ast.Constant) and first.value in (None, ...))


class _Put(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.old else super().generic_visit(node)


def _local_names(function: ast.FunctionDef) -> tuple[set[str], set[str]]:
    """The names that are local in a function, and those of nested functions and classes."""
    found = {each.arg for each in ast.walk(function.args) if isinstance(each, ast.arg)}
    nested = set[str]()
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, NESTED) and node is not function and not isinstance(node, ast.Lambda):
            nested.add(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            nested |= {each.id for each in node.targets if isinstance(each, ast.Name)}
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name.partition(".")[0])
    return found | nested, nested


def _arguments(names: Sequence[str]) -> ast.arguments:
    return ast.arguments([], [ast.arg(name) for name in names], None, [], [], None, [])


def _last(outside: dict[int, str]) -> str:
    return f"its branch is used outside too: {outside[max(outside)]}" if outside else ""


def _is_shape(statement: ast.stmt) -> bool:
    """Whether a statement only names other values, or their sizes, so that it can run twice."""
    if not isinstance(statement, ast.Assign):
        return False
    pure = ast.Name | ast.Attribute | ast.Subscript | ast.Slice | ast.Tuple | ast.Constant | ast.keyword
    pure |= ast.UnaryOp | ast.unaryop | ast.FloorDiv | ast.Mod | ast.expr_context | ast.Starred
    return all(
        isinstance(node, pure)
        or (isinstance(node, ast.Call) and _is_quiet(node))
        or (isinstance(node, ast.BinOp) and isinstance(node.op, ast.FloorDiv | ast.Mod))
        for part in (*statement.targets, statement.value)
        for node in ast.walk(part)
    ) and not any(_changed(node) for node in ast.walk(statement))


def _is_quiet(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in QUIET


def _loud(statement: ast.stmt) -> str:
    """What of a statement draws, writes or may do so; empty for none."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Call) and not _is_quiet(node):
            return _text(node)
        if isinstance(node, UNKNOWN | ast.AugAssign | ast.For | ast.While | ast.With):
            return _text(statement)
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            return _text(statement)
    return ""


def _text(node: ast.AST | str) -> str:
    """The first line of a node's source, shortened; other words as they are."""
    if isinstance(node, str):
        return node
    line = ast.unparse(node).partition("\n")[0]
    return f"`{line if len(line) <= 60 else line[:57] + '...'}`"
