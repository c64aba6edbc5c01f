"""The modules of a model: their paths, their names, and which of them a pattern chooses."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from types import UnionType
from typing import Any, TypeGuard

from torch import Tensor, nn

from thinned.checks import did_you_mean
from thinned.torch_state import WRAPPERS, children_of

__all__ = [
    "ORIGIN",
    "PARALLEL_WRAPPERS",
    "Choice",
    "check_model",
    "chooser",
    "is_ours",
    "is_sequential",
    "join",
    "modules_in_containers",
    "modules_with_paths",
    "original",
    "other_references",
    "qualified_name",
    "unwrapped",
    "wrapped_in",
]

Function = Callable[[str, nn.Module], bool]
Choice = str | type | UnionType | Function | Iterable[str | type | UnionType | Function]

ORIGIN = "_thinned_origin"  # of a module that convert made: what it was made from
PARALLEL_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def is_ours(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of thinned."""
    return any(base.__module__.startswith("thinned.layers.") for base in type(module).__mro__)


def is_sequential(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether ``module`` calls its children in a row and does nothing else."""
    return (
        isinstance(module, nn.Sequential)
        and type(module).forward is nn.Sequential.forward
        and "forward" not in vars(module)
    )


def original(module: nn.Module) -> nn.Module:
    """The module that :func:`thinned.convert` replaced by ``module``; others are their own originals."""
    origin = vars(module).get(ORIGIN)
    replaced: nn.Module = module if origin is None else origin.module
    return replaced


def qualified_name(kind: type) -> str:
    """``thinned.Dropout``, ``torch.nn.Dropout``, or the name with the module that defines the class."""
    module, name = kind.__module__, kind.__qualname__
    if module.startswith("thinned.layers."):
        return f"thinned.{name}"
    return f"torch.nn.{name}" if module.startswith("torch.nn.modules.") else f"{module}.{name}"


def modules_with_paths(model: nn.Module) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Each module once, in the order of ``named_modules``, with every path that leads to it.

    >>> import torch
    >>> shared = torch.nn.Dropout()
    >>> model = torch.nn.Sequential(shared, torch.nn.Linear(2, 2), shared)
    >>> [paths for _, paths in modules_with_paths(model)]
    [('',), ('0', '2'), ('1',)]
    """
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in _walk(model, "", frozenset()):
        found.setdefault(id(module), (module, []))[1].append(path)
    return [(module, tuple(paths)) for module, paths in found.values()]


def _walk(module: nn.Module, path: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
    yield path, module
    above |= {id(module)}
    for name, child in children_of(module).items():
        if child is not None and id(child) not in above:
            yield from _walk(child, join(path, name), above)


def join(path: str, name: Any) -> str:
    """The path of what the module at ``path`` has under ``name``; the model itself has the path ""."""
    return f"{path}.{name}" if path else str(name)


def other_references(found: Iterable[tuple[nn.Module, tuple[str, ...]]]) -> dict[int, list[str]]:
    """The attributes that refer to a module without being children, such as lists, by the module's id.

    Args:
        found: the result of :func:`modules_with_paths`.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Dropout())
    >>> model.drops = [model[0]]
    >>> other_references(modules_with_paths(model)) == {id(model[0]): ["drops"]}
    True
    """
    references: dict[int, list[str]] = {}
    for parent, paths in found:
        for name, value in vars(parent).items():
            if value is children_of(parent):
                continue
            items = value.values() if isinstance(value, dict) else value
            for item in items if isinstance(value, dict | list | tuple | set) else (value,):
                if isinstance(item, nn.Module):
                    references.setdefault(id(item), []).append(join(paths[0], name))
    return references


def modules_in_containers(
    found: Iterable[tuple[nn.Module, tuple[str, ...]]],
) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """The modules that are no children, but in a list, a dictionary or an attribute, and their children.

    Args:
        found: the result of :func:`modules_with_paths`.

    >>> import torch
    >>> model = torch.nn.Sequential()
    >>> model.drops = [torch.nn.Dropout()]
    >>> modules_in_containers(modules_with_paths(model))
    [(Dropout(p=0.5, inplace=False), ('drops[0]',))]
    """
    known = {id(module) for module, _ in found}
    hidden = []
    for parent, paths in found:
        for name, value in vars(parent).items():
            if value is children_of(parent):
                continue
            for root, place in _contained(value, join(paths[0], name)):
                for module, inner in modules_with_paths(root) if id(root) not in known else ():
                    if id(module) not in known:
                        known.add(id(module))
                        hidden.append((module, tuple(f"{place}.{path}" if path else place for path in inner)))
    return hidden


def _contained(value: Any, place: str, depth: int = 3) -> Iterator[tuple[nn.Module, str]]:
    """The modules in a container, and in containers within it, with their places."""
    if isinstance(value, nn.Module):
        yield value, place
    elif depth and isinstance(value, dict | list | tuple | set):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _contained(item, f"{place}[{key!r}]", depth - 1)


def check_model(function: str, model: Any) -> None:
    """Raise a TypeError that says what to pass, if ``model`` is no module."""
    if isinstance(model, nn.Module):
        return
    name = getattr(model, "__name__", "")
    if isinstance(model, type):
        got = f"the class {qualified_name(model)}"
        got += f": call it, as in thinned.{function}({name}(...))" * issubclass(model, nn.Module)
    else:
        # A state_dict would fill the screen.
        kind = type(model).__name__
        shown = f"the {kind} {name}" if name else f"{' '.join(reprlib.repr(model).split())} of type {kind}"
        got = "None" if model is None else shown
        owner = getattr(model, "__self__", None)
        if isinstance(owner, nn.Module):  # model.parameters, without the parentheses
            got += f": pass the {type(owner).__name__} itself"
        elif callable(model):
            got += ": call it, if it makes a model"
        elif isinstance(model, list | tuple):
            got += ": pass each module by itself"
        elif isinstance(model, Iterable):  # model.parameters()
            got += ": pass the model itself"
    raise TypeError(f"model must be a torch.nn.Module, got {got}")


def chooser(
    model: nn.Module, include: Choice | None, exclude: Choice | None
) -> Callable[[tuple[str, ...], nn.Module], bool]:
    """Whether a module of ``model`` is chosen: one of its paths suffices to include or to exclude it.

    A pattern and a class choose the modules that they match, and all modules within these. Warns of one that
    matches nothing, at the line that called the caller.

    Raises:
        TypeError: ``include`` or ``exclude`` is no :data:`Choice`.
    """
    found = modules_with_paths(model)
    wanted = (lambda *_: True) if include is None else _matcher("include", include, found)
    unwanted = (lambda *_: False) if exclude is None else _matcher("exclude", exclude, found)
    return lambda paths, module: (
        any(wanted(path, module) for path in paths) and not any(unwanted(path, module) for path in paths)
    )


def _matcher(
    name: str, choice: Choice, found: Sequence[tuple[nn.Module, tuple[str, ...]]]
) -> Callable[[str, nn.Module], bool]:
    is_one = isinstance(choice, str | Tensor) or callable(choice) or not isinstance(choice, Iterable)
    items = (choice,) if is_one else tuple(choice)  # type: ignore[arg-type]
    matched: set[str] = set()
    plain: list[str | type | UnionType] = []
    functions: list[Function] = []
    for item in items:
        if isinstance(item, str | type | UnionType):
            paths = {path for module, paths in found for path in paths if _matches(item, path, module)}
            if not paths:
                warnings.warn(_no_match(name, item, found), UserWarning, stacklevel=4)
            matched |= paths
            plain.append(item)
        elif callable(item) and not isinstance(item, nn.Module):
            functions.append(item)
        else:
            raise TypeError(
                f"{name} must be a pattern of paths such as 'encoder.*', a class such as torch.nn.Dropout2d, "
                f"several of these, or a function of a path and a module, got {reprlib.repr(choice)}"
            )
    return lambda path, module: (
        any(above in matched for above in _and_above(path))
        or any(_matches(item, path, module) for item in plain)  # one that is no child, as in a list
        or any(function(path, module) for function in functions)
    )


def _matches(item: str | type | UnionType, path: str, module: nn.Module) -> bool:
    if isinstance(item, str):
        return fnmatchcase(path, item)
    return isinstance(module, item) or isinstance(original(module), item)


def _and_above(path: str) -> Iterator[str]:
    """``a.b.c``, ``a.b``, ``a``, and the model itself."""
    while path:
        yield path
        path = path.rpartition(".")[0]
    yield ""


def _no_match(
    name: str, item: str | type | UnionType, found: Sequence[tuple[nn.Module, tuple[str, ...]]]
) -> str:
    shown = qualified_name(item) if isinstance(item, type) else repr(item)
    text = f"{name}={shown} matches no module of {type(found[0][0]).__name__}"
    if not isinstance(item, str):
        types = {qualified_name(type(module)) for module, _ in found}
        drops = sorted(each for each in types if "drop" in each.rpartition(".")[2].lower())
        return text + f"; its dropouts are {', '.join(drops)}" * bool(drops)
    if any(type(module).__name__ == item for module, _ in found):
        return f"{text}: a string is a pattern of paths; pass the class {item} itself"
    paths = [path for _, paths in found for path in paths if path]
    # "dropout" may mean "*.dropout", and "model.encoder" the "encoder" of the model.
    others = [other for other in (f"*.{item}", item.partition(".")[2]) if other.strip("*.")]
    if close := [other for other in others if any(fnmatchcase(path, other) for path in paths)]:
        return f"{text}; did you mean {' or '.join(close)}?"
    of_children = item.endswith(".*")
    named = [f"{path.rpartition('.')[0]}.*" for path in paths if "." in path] if of_children else paths
    return text + did_you_mean(item, named)


def wrapped_in(module: nn.Module) -> nn.Module | None:
    """The module inside a wrapper of torch.compile, FSDP, DDP, DataParallel or checkpointing; else None.

    >>> import torch
    >>> linear = torch.nn.Linear(2, 2)
    >>> wrapped_in(torch.compile(linear, backend="eager")) is linear, wrapped_in(linear)
    (True, None)
    """
    children = children_of(module)
    if type(module) in PARALLEL_WRAPPERS:
        return children["module"]
    return next((children[name] for name in WRAPPERS if name in children), None)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside all of its wrappers; the module itself if it has none."""
    while (inner := wrapped_in(module)) is not None:
        module = inner
    return module
