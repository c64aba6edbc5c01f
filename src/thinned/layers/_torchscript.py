"""TorchScript of the layers and functions: an operation for each function, which scripted code calls.

TorchScript cannot compile the functions' own code. It calls ``torch.ops.thinned.dropout`` and its like, which
call the function in Python, so a scripted or traced call has the masks, the errors and the key source of an
eager one. A process that loads a saved model has to import thinned first.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, List, Optional, TypeVar  # noqa: UP035  TorchScript's names

import torch
from torch import Tensor, nn
from torch.nn.functional import BroadcastingList1

from thinned.key_source import active
from thinned.keys import Key
from thinned.op.registered import library
from thinned.torch_state import ScriptedForward, SeenByTracer

__all__ = ["Scriptable", "operation", "register"]

_Function = TypeVar("_Function", bound=Callable[..., Tensor])

# The types of annotations, in a schema and in TorchScript; all others are strings, such as Literal["row"].
_TYPES = {
    "Tensor": ("Tensor", "Tensor"),
    "Tensor | None": ("Tensor?", "Optional[Tensor]"),
    "float": ("float", "float"),
    "float | None": ("float?", "Optional[float]"),
    "int": ("int", "int"),
    "int | None": ("int?", "Optional[int]"),
    "bool": ("bool", "bool"),
    "Sequence[int]": ("int[]", "List[int]"),
    "int | Sequence[int]": ("int[1]", "BroadcastingList1[int]"),
    "Key | None": ("Tensor?", ""),
}
_STRING = ("str", "str")
_NAMES = {
    "BroadcastingList1": BroadcastingList1,
    "List": List,  # noqa: UP006
    "Optional": Optional,
    "Tensor": Tensor,
    "torch": torch,
}


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that scripted code can give; two results would need another operation."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter for parameter in parameters if parameter.name != "return_indices"]


def register(functions: Iterable[Callable[..., Any]]) -> None:
    """:func:`operation` for each function that draws."""
    for function in functions:
        if any(parameter.annotation == "Key | None" for parameter in _parameters(function)):
            operation(function)


def operation(function: _Function) -> _Function:
    """Define ``torch.ops.thinned.NAME``, which TorchScript calls in place of the function."""
    name, arguments = function.__name__, _declared(_parameters(function), 0)
    # Conservative: an operation may write to its input or return it, and two equal calls draw two masks.
    library.define(f"{name}({', '.join(arguments)}) -> Tensor", alias_analysis="CONSERVATIVE")
    library.impl(name, _with_bits(function), "CompositeImplicitAutograd")
    function.__prepare_scriptable__ = _Twin(function)  # type: ignore[attr-defined]
    return function


def _declared(parameters: Iterable[inspect.Parameter], language: int) -> list[str]:
    """The parameters as a schema (0) or TorchScript (1) declares them."""
    declared = []
    keyword_only = False
    for parameter in parameters:
        kind = _TYPES.get(parameter.annotation, _STRING)[language]
        if not kind:
            continue
        # TorchScript compiles no functions whose keyword-only arguments have defaults.
        if parameter.kind is parameter.KEYWORD_ONLY and not (keyword_only or language):
            keyword_only = True
            declared.append("*")
        default = parameter.default
        value = "" if default is parameter.empty else "=[]" if default == () and not language else f"={default!r}"
        name = parameter.name
        declared.append(f"{name}: {kind}{value}" if language else f"{kind} {name}{value}")
    return declared


def _with_bits(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function of keys as tensors, and of one size for all dimensions as a list of one."""

    def call(*args: Any, key: Tensor | None = None, **kwargs: Any) -> Tensor:
        args = tuple(arg[0] if isinstance(arg, list) and len(arg) == 1 else arg for arg in args)
        if key is not None:
            kwargs["key"] = Key.from_bits(key)
        return function(*args, **kwargs)

    return call


def _compiled(name: str, lines: list[str]) -> Callable[..., Any]:
    """The function of a source, which TorchScript reads too."""
    source = "\n".join(lines) + "\n"
    place = f"<thinned {name}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    namespace: dict[str, Any] = {**_NAMES, "__name__": __name__}
    exec(compile(source, place, "exec", dont_inherit=True), namespace)  # noqa: S102
    return namespace[lines[0].removeprefix("def ").partition("(")[0]]  # type: ignore[no-any-return]


class _Twin:
    """What TorchScript compiles in place of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.twin: Callable[..., Any] | None = None

    def __call__(self) -> Callable[..., Any]:
        if self.twin is None:
            name, parameters = self.function.__name__, _parameters(self.function)
            given = [parameter for parameter in parameters if parameter.annotation != "Key | None"]
            arguments = (_argument(parameter, parameter.name) for parameter in given)
            self.twin = _compiled(
                name,
                [
                    f"def {name}({', '.join(_declared(given, 1))}) -> Tensor:",
                    f"    return torch.ops.thinned.{name}({', '.join(arguments)})",
                ],
            )
        return self.twin


def _argument(parameter: inspect.Parameter, value: str) -> str:
    return f"{parameter.name}={value}" if parameter.kind is parameter.KEYWORD_ONLY else value


class Scriptable(SeenByTracer):
    """A module that TorchScript compiles by its function's operation, and records as one node of a trace.

    A layer that is more than a call of its function has a ``scriptable_forward``, in TorchScript's language.
    """

    scriptable_forward: ClassVar[Callable[..., Any] | None] = None
    instead_of_script: ClassVar[str] = "use torch.export or torch.compile"

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by :func:`torch.jit.script`; NotImplementedError for a layer that cannot be compiled."""
        if (kind := _definer(type(self))) is not None:
            if (forward := _forward_of(kind, self)) is None:
                raise NotImplementedError(
                    f"{kind.__name__} is not available in TorchScript; {self.instead_of_script}"
                )
            if getattr(self, "return_indices", False):
                raise NotImplementedError(f"{self} has two results, and TorchScript's operation has one")
            # The scripted module gets this forward; the next eager call takes it off the eager one.
            vars(self)["forward"] = ScriptedForward.of(self, forward)
        return self

    def traced_forward(self) -> Callable[..., Any] | None:
        """What :func:`torch.jit.trace` records in place of ``forward``, or None for ``forward`` itself."""
        if not self.training or active.key_source is not None or getattr(self, "return_indices", False):
            return None
        kind = _definer(type(self))
        return None if kind is None else _forward_of(kind, self)


def _definer(kind: type) -> type | None:
    """The layer whose ``forward`` the class has, or None for a forward that is not ours."""
    definer = next(each for each in kind.__mro__ if "forward" in vars(each))
    ours = next(each for each in kind.__mro__ if each.__module__.startswith("thinned."))
    return ours if definer.__module__ == ours.__module__ else None


_forwards: dict[type, Callable[..., Any] | None] = {}


def _forward_of(kind: type, module: nn.Module) -> Callable[..., Any] | None:
    """The ``forward`` of a layer in TorchScript's language, or None if it has none."""
    if kind not in _forwards:
        _forwards[kind] = _make_forward(kind, module)
    return _forwards[kind]


def _make_forward(kind: type, module: nn.Module) -> Callable[..., Any] | None:
    written: Callable[..., Any] | None = vars(kind).get("scriptable_forward")
    if written is not None:
        return written
    name = re.sub("(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
    function = vars(sys.modules[kind.__module__]).get(name)
    if function is None:
        return None
    # forward(self, ..., *, key)
    inputs = list(inspect.signature(kind.forward).parameters)[1:-1]  # type: ignore[attr-defined]
    parameters = [parameter for parameter in _parameters(function) if parameter.annotation != "Key | None"]
    parameters = parameters[: len(inputs)] + [each for each in parameters[len(inputs) :] if hasattr(module, each.name)]
    tensors, stored = parameters[: len(inputs)], parameters[len(inputs) :]
    values = inputs + [
        f"float(self.{parameter.name})" if parameter.annotation == "float" else f"self.{parameter.name}"
        for parameter in stored
    ]
    arguments = ", ".join(map(_argument, parameters, values))
    constants = {
        parameter.name
        for parameter in stored
        if parameter.name != "training" and not parameter.annotation.startswith("Tensor")
    }
    kind.__constants__ = tuple({*getattr(kind, "__constants__", ()), *constants})  # type: ignore[attr-defined]
    # Freezing a module in evaluation then leaves nothing of ours in its graph.
    identity = [] if len(tensors) > 1 else ["    if not self.training:", f"        return {inputs[0]}"]
    return _compiled(
        kind.__name__,
        [
            f"def forward(self, {', '.join(f'{name}: Tensor' for name in inputs)}) -> Tensor:",
            *identity,
            f"    return torch.ops.thinned.{name}({arguments})",
        ],
    )
