"""The modules of a model, each with all the paths that lead to it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

from torch import nn

from thinned.torch_state import children_of

__all__ = ["Choice", "chooser", "modules_with_paths", "other_references", "places"]

Choice = str | Iterable[str] | Callable[[str, nn.Module], bool]


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


def places(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Each parent, the name under which it has a child, and the child."""
    for parent in list(model.modules()):
        for name, child in list(children_of(parent).items()):
            if child is not None:
                yield parent, name, child


def other_references(found: Iterable[tuple[nn.Module, tuple[str, ...]]]) -> dict[int, list[str]]:
    """The attributes that refer to a module without being children, such as lists, by the module's id.

    Args:
        found: what :func:`modules_with_paths` gives.

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
            held = value.values() if isinstance(value, dict) else value
            for item in held if isinstance(value, dict | list | tuple | set) else (value,):
                if isinstance(item, nn.Module):
                    references.setdefault(id(item), []).append(f"{paths[0]}.{name}" if paths[0] else name)
    return references


def chooser(include: Choice | None, exclude: Choice | None) -> Callable[[tuple[str, ...], nn.Module], bool]:
    """Whether a module is meant: by any of its paths to include it, and by any to exclude it."""
    wanted, unwanted = _matcher("include", include), _matcher("exclude", exclude)

    def chosen(paths: tuple[str, ...], module: nn.Module) -> bool:
        if wanted is not None and not any(wanted(path, module) for path in paths):
            return False
        return unwanted is None or not any(unwanted(path, module) for path in paths)

    return chosen


def _matcher(name: str, choice: Choice | None) -> Callable[[str, nn.Module], bool] | None:
    if choice is None:
        return None
    if isinstance(choice, str):
        choice = (choice,)
    if callable(choice):
        return choice
    patterns: tuple[object, ...]
    try:
        patterns = tuple(choice)
    except TypeError:
        patterns = (choice,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(
            f"{name} must be a pattern of paths such as 'encoder.*', several, or a function of a path and "
            f"a module, got {choice!r}"
        )
    return lambda path, _: any(fnmatchcase(path, str(pattern)) for pattern in patterns)
