"""Calls that no layer computes itself: those of ``__torch_function__``, and those that torch.fx traces."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import MethodType
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function

from thinned.torch_state import compiling

__all__ = ["module_node", "overridden"]

_Result = TypeVar("_Result")


@cache
def _parameters(function: Callable[..., Any]) -> tuple[list[inspect.Parameter], list[inspect.Parameter]]:
    """The parameters by position, last first, and the keyword-only ones."""
    parameters = inspect.signature(function).parameters.values()
    keyword = [each for each in parameters if each.kind is each.KEYWORD_ONLY]
    return [each for each in parameters if each.kind is not each.KEYWORD_ONLY][::-1], keyword


def overridden(function: Callable[..., _Result], arguments: dict[str, Any]) -> _Result:
    """Let ``__torch_function__`` of an argument or of a mode make the call, as torch's own functions do.

    Args:
        function: the function that was called.
        arguments: its ``locals()``. Defaults are left out, so that a node of torch.fx has what the call had.
    """
    by_position, by_keyword = _parameters(function)
    args: list[Any] = []
    for each in by_position:
        value = arguments[each.name]
        if args or value is not each.default:
            args.append(value)
    args.reverse()
    kwargs = {
        each.name: arguments[each.name] for each in by_keyword if arguments[each.name] is not each.default
    }
    relevant: list[Any] = []
    for each in (*by_position, *by_keyword):
        value = arguments[each.name]
        relevant.extend(value if isinstance(value, list | tuple) else (value,))
    result: _Result = handle_torch_function(function, relevant, *args, **kwargs)
    return result


def module_node(module: nn.Module, *args: Any, **kwargs: Any) -> Tensor | None:
    """Add a call of ``module`` to the graph that torch.fx traces, as it does for the layers of torch.nn.

    Returns:
        The node's proxy. None if ``forward`` has to go on: nothing is traced; ``module`` is the root of the
        trace; or a subclass has a ``forward`` of its own, whose other operations the node would repeat.
    """
    proxy = None if compiling() else _first_proxy((args, kwargs))
    if proxy is None or not hasattr(proxy.tracer, "path_of_module"):
        return None
    forward = module.forward
    if not (isinstance(forward, MethodType) and forward.__func__.__module__.startswith("thinned.")):
        return None
    try:
        path = proxy.tracer.path_of_module(module)
    except NameError:  # it is not in the module that is traced
        return None
    if not path:
        return None
    while args and args[-1] is None:
        args = args[:-1]
    given = {name: value for name, value in kwargs.items() if value is not None}
    node: Any = proxy.tracer.create_proxy("call_module", path, args, given)
    return node  # type: ignore[no-any-return]


def _first_proxy(value: Any) -> Proxy | None:
    if isinstance(value, Proxy):
        return value
    if isinstance(value, dict):
        value = tuple(value.values())
    found = (_first_proxy(item) for item in value) if isinstance(value, list | tuple) else ()
    return next((proxy for proxy in found if proxy is not None), None)
