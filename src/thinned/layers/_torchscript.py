"""TorchScript of the layers and functions: an operation for each function, which scripted code calls.

TorchScript cannot compile the functions' own code. It calls ``torch.ops.thinned.dropout`` and its like, which
call the function in Python, so a scripted or traced call has the mask, the errors and the key source of an
eager one. A process that loads a saved model has to import thinned first.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, TypeVar, get_type_hints

import torch
from torch import Tensor, nn

from thinned.key_source import active
from thinned.keys import Key
from thinned.named import Named
from thinned.op.registered import library
from thinned.torch_state import ScriptedForward, SeenByTracer

__all__ = ["Scriptable", "operation", "register"]

Drawing = TypeVar("Drawing", bound=Callable[..., Tensor])

# The type of each annotation, in a schema and in TorchScript. Others, such as Literal["row"], are strings.
_TYPES = {
    "Tensor": ("Tensor", "Tensor"),
    "_Sequence": ("Tensor", "Tensor"),  # locked_dropout's packed sequences are not for TorchScript
    "Tensor | None": ("Tensor?", "Optional[Tensor]"),
    "int | Tensor | None": ("Tensor?", "Optional[Tensor]"),
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
# The functions that do more in evaluation than to return their input.
_MORE_IN_EVALUATION = (
    "bias_dropout_add",
    "drop_head_attention",
    "dropout1d",
    "dropout_add",
    "embedding_dropout",
    "gelu_dropout",
    "multi_sample_dropout",
    "relu_dropout",
    "silu_dropout",
    "zoneout",
)


def register(functions: Iterable[Callable[..., Any]]) -> None:
    """:func:`operation` for each function that draws and has one result."""
    for function in functions:
        draws = any(parameter.annotation == "Key | None" for parameter in _parameters(function))
        has_branch = "branch" in inspect.signature(function).parameters  # TorchScript has no functions
        if draws and not has_branch and not function.__annotations__["return"].startswith("tuple"):
            operation(function)


def operation(function: Drawing) -> Drawing:
    """Define ``torch.ops.thinned.NAME``, which TorchScript calls in place of the function."""
    name, arguments = function.__name__, []
    for parameter in _parameters(function):
        if parameter.kind is parameter.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        arguments.append(f"{_type(parameter)[0]} {parameter.name}{default.replace('()', '[]')}")
    # Conservative: an operation may write to its input or return it, and two equal calls draw two masks.
    library.define(f"{name}({', '.join(arguments)}) -> Tensor", alias_analysis="CONSERVATIVE")

    def call(*args: Any, key: Tensor | None = None, **kwargs: Any) -> Tensor:
        # A size for all dimensions comes as a list of one.
        args = tuple(arg[0] if isinstance(arg, list) and len(arg) == 1 else arg for arg in args)
        if key is not None:
            kwargs["key"] = Key.from_bits(key)
        return function(*args, **kwargs)

    library.impl(name, call, "CompositeImplicitAutograd")
    function.__prepare_scriptable__ = lambda: _twin(function)  # type: ignore[attr-defined]
    return function


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The parameters that an operation has: not those by which its result would be no plain tensor."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter for parameter in parameters if parameter.name not in ("return_indices", "layout")]


def _type(parameter: inspect.Parameter) -> tuple[str, str]:
    return _TYPES.get(parameter.annotation, _STRING)


def _twin(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that TorchScript compiles in place of one of ours: a call of the operation."""
    name = function.__name__
    given = [parameter for parameter in _parameters(function) if _type(parameter)[1]]
    # All are positional: TorchScript compiles no keyword-only arguments with defaults.
    declared = [
        f"{each.name}: {_type(each)[1]}{'' if each.default is each.empty else f' = {each.default!r}'}"
        for each in given
    ]
    names, body = [each.name for each in given], []
    if "training" in names and name not in _MORE_IN_EVALUATION:
        # So that code that was frozen or exported in evaluation has no node of ours.
        valid = [f" and {each} >= 0.0 and {each} <= 1.0" for each in names if each in ("p", "drop_prob")]
        body = [f"    if not training{''.join(valid)}:", f"        return {names[0]}"]
    return _compiled(
        f"def {name}({', '.join(declared)}) -> Tensor:",
        *body,
        f"    return torch.ops.thinned.{name}({_arguments(given, names)})",
    )


def _arguments(parameters: list[inspect.Parameter], values: list[str]) -> str:
    return ", ".join(
        f"{parameter.name}={value}" if parameter.kind is parameter.KEYWORD_ONLY else value
        for parameter, value in zip(parameters, values, strict=True)
    )


def _compiled(*lines: str) -> Callable[..., Any]:
    """The function of a source, which TorchScript reads too."""
    source = "".join(f"{line}\n" for line in lines)
    place = f"<{lines[-1].strip()}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    namespace: dict[str, Any] = {"torch": torch, "__name__": __name__}
    # This file's own future import applies to what it compiles: annotations are not looked up.
    exec(compile(source, place, "exec"), namespace)
    return namespace[lines[0].removeprefix("def ").partition("(")[0]]  # type: ignore[no-any-return]


class Scriptable(Named, SeenByTracer):
    """A module that TorchScript compiles by its function's operation, and records as one node of a trace.

    A layer that is more than a call of its function has a ``_scriptable_forward``, in TorchScript's language,
    or ``_instead_of_script``.
    """

    _scriptable_forward: ClassVar[Callable[..., Any] | None] = None
    _instead_of_script: ClassVar[str] = "use torch.export or torch.compile"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in vars(cls) and cls.__module__.startswith("thinned."):
            # The code of a graph of torch.fx repeats annotations. Its pickle imports types, but no strings.
            cls.forward.__annotations__ = get_type_hints(cls.forward)

    def __prepare_scriptable__(self) -> nn.Module:
        """Called by :func:`torch.jit.script`; NotImplementedError for a layer that cannot be compiled."""
        if (kind := _definer(type(self))) is not None:
            if (forward := _forward_of(kind, self)) is None:
                raise NotImplementedError(
                    f"{kind.__name__} is not available in TorchScript; {self._instead_of_script}"
                )
            if not _has_plain_result(self):
                raise NotImplementedError(f"{self} has another result than TorchScript's operation, a tensor")
            # The scripted module gets this forward; the next eager call takes it off the eager module. To
            # return another module would put that into the eager model.
            vars(self)["forward"] = ScriptedForward.of(self, forward)
        return self

    def _traced_forward(self) -> Callable[..., Any] | None:
        """The function that :func:`torch.jit.trace` records; None for ``forward``, as in evaluation."""
        if not self.training or active.key_source is not None or not _has_plain_result(self):
            return None
        kind = _definer(type(self))
        return None if kind is None else _forward_of(kind, self)


def _has_plain_result(module: nn.Module) -> bool:
    """Whether a layer has one result, which is no nested tensor."""
    layout = getattr(module, "layout", torch.strided)
    return layout is torch.strided and not getattr(module, "return_indices", False)


def _definer(kind: type) -> type | None:
    """The layer whose ``forward`` the class has, or None for a forward that is not ours."""
    definer = next(each for each in kind.__mro__ if "forward" in vars(each))
    ours = next(each for each in kind.__mro__ if each.__module__.startswith("thinned."))
    return ours if definer.__module__ == ours.__module__ else None


_forwards: dict[type, Callable[..., Any] | None] = {}


def _forward_of(kind: type, module: nn.Module) -> Callable[..., Any] | None:
    """The ``forward`` of a layer in TorchScript's language, or None if it has none."""
    if kind not in _forwards:
        _forwards[kind] = vars(kind).get("_scriptable_forward") or _call_of_function(kind, module)
    return _forwards[kind]


def _call_of_function(kind: type, module: nn.Module) -> Callable[..., Any] | None:
    """A ``forward`` that calls the operation of the function in the layer's file."""
    name = re.sub("(?<=[a-z])(?=[A-Z])", "_", kind.__name__).lower()
    function = vars(sys.modules[kind.__module__]).get(name)
    if function is None:
        return None
    inputs = list(inspect.signature(kind.forward).parameters)[1:-1]  # type: ignore[attr-defined]  # not self, key
    parameters = [parameter for parameter in _parameters(function) if _type(parameter)[1]]
    tensors, rest = parameters[: len(inputs)], parameters[len(inputs) :]
    stored = [parameter for parameter in rest if hasattr(module, parameter.name)]
    values = [f"float(self.{p.name})" if p.annotation == "float" else f"self.{p.name}" for p in stored]
    constants = {p.name for p in stored if p.name != "training" and not p.annotation.startswith("Tensor")}
    kind.__constants__ = tuple({*getattr(kind, "__constants__", ()), *constants})  # type: ignore[attr-defined]
    # A layer of several inputs, such as Zoneout, combines them in evaluation too.
    identity = ["    if not self.training:", f"        return {inputs[0]}"] if len(inputs) == 1 else []
    return _compiled(
        f"def forward(self, {', '.join(f'{name}: Tensor' for name in inputs)}) -> Tensor:",
        *identity,  # so that a frozen module in evaluation has no node of ours
        f"    return torch.ops.thinned.{name}({_arguments(tensors + stored, inputs + values)})",
    )
