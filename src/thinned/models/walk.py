"""The modules of a model: their paths, their names, and which of them a pattern chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from thinned.torch_state import children_of

__all__ = [
    "ORIGIN",
    "Choice",
    "chooser",
    "is_ours",
    "modules_in_containers",
    "modules_with_paths",
    "original",
    "other_references",
    "qualified_name",
]

Choice = str | Iterable[str] | Callable[[str, nn.Module], bool]

ORIGIN = "_thinned_origin"  # of a module that convert made: what it was made from


def is_ours(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of thinned."""
    return any(base.__module__.startswith("thinned.layers.") for base in type(module).__mro__)


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
            yield from _walk(child, f"{path}.{name}" if path else name, above)


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
                    references.setdefault(id(item), []).append(f"{paths[0]}.{name}" if paths[0] else name)
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
            for root, place in _contained(value, f"{paths[0]}.{name}" if paths[0] else name):
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


def chooser(include: Choice | None, exclude: Choice | None) -> Callable[[tuple[str, ...], nn.Module], bool]:
    """Whether a module is chosen: one of its paths suffices to include it, and one to exclude it."""
    wanted = (lambda *_: True) if include is None else _matcher("include", include)
    unwanted = (lambda *_: False) if exclude is None else _matcher("exclude", exclude)
    return lambda paths, module: (
        any(wanted(path, module) for path in paths) and not any(unwanted(path, module) for path in paths)
    )


def _matcher(name: str, choice: Choice) -> Callable[[str, nn.Module], bool]:
    if callable(choice):
        return choice
    patterns = (choice,) if isinstance(choice, str) or not isinstance(choice, Iterable) else tuple(choice)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"{name} must be a pattern of paths such as 'encoder.*', several, or a function of a path and "
            f"a module, got {choice!r}"
        )
    return lambda path, _: any(fnmatchcase(path, pattern) for pattern in patterns)
