"""From a name on the command line to a module, a model or an implementation."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from inspect import Parameter
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from thinned.checks import did_you_mean, got
from thinned.compare.errors import one_line, one_line_with_place
from thinned.compare.implementation import Case, Implementation, NotOfferedError
from thinned.compare.settings import Settings

__all__ = ["ALIASES", "load", "model_of", "resolve", "resolve_all"]

ALIASES = {
    "thinned": "thinned:Dropout",
    "torch": "torch.nn:Dropout",
    "textbook": "thinned.compare.textbook:TextbookDropout",
}
OF_ONES_OWN = "package.module:NAME or path/to/file.py:NAME of a class or function"
ACCEPTED = f"{', '.join(ALIASES)}, {OF_ONES_OWN}"
IN_FILE = " or kwargs of [tool.thinned]"  # pytest has no option for it
KEPT = {"keep", "kept", "retain", "retained", "survival", "survive"}
DROPPED = {"p", "drop", "dropout", "rate", "prob", "probability", "droprate", "dropprob", "pdrop", "pdropout"}
TRAINING = ("training", "train", "is_training")
BY_NAME = Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY
NO_ARGUMENTS: Mapping[str, Any] = {}
NOTHING_KNOWN: Mapping[str, Implementation] = {}


def load(module_name: str) -> ModuleType:
    """The module called ``package.module``, or the file ``path/to/file.py``, which may lie beside the caller.

    Raises:
        ValueError: with one line, for whatever a stranger's module raises while it is imported.

    >>> load("thinned.spec").__name__
    'thinned.spec'
    """
    try:
        if module_name.endswith(".py"):
            return _load_file(Path(module_name))
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module beside the caller, as `python -m` would find it
        return importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever a stranger's module raises, and a script's exit
        missing, others = _missing(error, module_name)
        why = f"{one_line(error)}{did_you_mean(missing, others)}" if missing else one_line_with_place(error)
        raise ValueError(f"cannot import {module_name}: {why}") from error


def _missing(error: BaseException, module_name: str) -> tuple[str, list[str]]:
    """The name that was not found, and those beside it; two empty ones if the error is another."""
    if isinstance(error, FileNotFoundError) and error.filename == str(Path(module_name)):
        path = Path(module_name)
        return path.name, [file.name for file in path.parent.glob("*.py")]
    if isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}."):
        package, dot, name = (error.name or "").rpartition(".")
        folders = getattr(sys.modules.get(package), "__path__", []) if dot else None
        return name, [each.name for each in pkgutil.iter_modules(folders)]
    return "", []


def _attribute(module_name: str, name: str) -> Any:
    module = load(module_name)
    if hasattr(module, name):
        return getattr(module, name)
    own = sorted(
        each
        for each, value in vars(module).items()
        if getattr(value, "__module__", "") == module.__name__ and not each.startswith("_")
    )
    has = ", ".join(own[:10]) + (f" and {len(own) - 10} more" if len(own) > 10 else "")
    nearest = did_you_mean(name, [*own, *vars(module)], f"; it has {has}" if own else "")
    raise ValueError(f"{module_name} has nothing called {name!r}{nearest}")


def _load_file(path: Path) -> ModuleType:
    name = re.sub(r"\W", "_", str(path.resolve()))
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # as the name ends in .py
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where pickle and dataclasses look for the module of a class
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def model_of(text: str) -> nn.Module:
    """The model behind ``package.module:factory`` or ``path/to/file.py:factory``.

    Args:
        text: names a function or a class to call without arguments, or a model itself.

    Raises:
        ValueError: with one line that says what was given and what is wrong.

    >>> model_of("torch.nn:Dropout")
    Dropout(p=0.5, inplace=False)
    """
    module_name, colon, name = text.rpartition(":")
    if not (colon and name and module_name):
        raise ValueError(
            f"unknown model {text!r}; accepted are package.module:factory or path/to/file.py:factory"
        )
    factory = _attribute(module_name, name)
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ValueError(f"{text} is neither a model nor a function that makes one, but {factory!r}")
    try:
        model = factory()
    except (Exception, SystemExit) as error:  # SystemExit comes from argparse, which reads our arguments
        if isinstance(error, TypeError) and not _can_be_called(factory, error):
            raise ValueError(f"{text} cannot be called without arguments: {one_line(error)}") from error
        raise ValueError(f"{text} raises {one_line_with_place(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text} gave no torch.nn.Module, {got(model)}")
    return model


def _can_be_called(factory: Callable[..., Any], error: TypeError) -> bool:
    """Whether ``factory`` has been called without arguments, and raised ``error`` itself."""
    if error.__traceback__ is None or error.__traceback__.tb_next is None:
        return False  # the call has not entered a function of Python
    with suppress(ValueError):  # no signature
        try:
            inspect.signature(factory).bind()
        except TypeError:
            return False
    return True


def resolve_all(
    texts: Iterable[str],
    kwargs: Mapping[str, Mapping[str, Any]] = NO_ARGUMENTS,
    case: Case | None = None,
    settings: Settings | None = None,
    known: Mapping[str, Implementation] = NOTHING_KNOWN,
) -> list[Implementation]:
    """The implementations behind ``texts``; where two share a name, the full text is the name.

    Args:
        texts: as :func:`resolve` takes them.
        kwargs: arguments beside p, under an implementation's text.
        case: the layer in whose place they are examined. Each is made and called as its example says, so
            that one which cannot be is refused here.
        settings: of that call.
        known: a layer's own implementations, whose names stand in place of the aliases.

    Raises:
        ValueError: with one line that says which, what is wrong and what would help.
    """
    texts = list(dict.fromkeys(texts))
    p_name = _p_name(case) if case else "p"
    found = {text: each for text, each in known.items() if text in texts}
    for text in texts:
        if text in found:
            continue
        if known and ":" not in text:
            nearest = did_you_mean(text, known, f"; accepted are {', '.join(known)}, {OF_ONES_OWN}")
            raise ValueError(f"unknown implementation {text!r} of this layer{nearest}")
        found[text] = resolve(text, kwargs.get(text, NO_ARGUMENTS), p_name)
        if case:
            _try(text, replace(case, implementation=found[text]), settings or Settings())
    names = [*known, *(each.name for text, each in found.items() if text not in known)]
    return [
        replace(found[text], name=text) if names.count(found[text].name) > 1 else found[text]
        for text in texts
    ]


def _p_name(case: Case) -> str:
    """The argument of the layer's constructor that an implementation has under this or another name."""
    return case.example.p_name or ("p" if "p" in case.example.arguments else "")


def resolve(text: str, kwargs: Mapping[str, Any] = NO_ARGUMENTS, p_name: str = "p") -> Implementation:
    """The implementation behind an alias, ``package.module:NAME`` or ``path/to/file.py:NAME``.

    Args:
        text: names a class of layers, or a function in the manner of ``torch.nn.functional``, or a function
            that makes a layer of its first argument, the probability.
        kwargs: its arguments beside the probability. The value ``"p"`` or ``"1-p"`` names the argument that
            takes the probability of dropping or of keeping, where its name does not tell.
        p_name: the laws' name for the probability; empty for a layer without one.

    Raises:
        ValueError: with one line that says what was given and what is accepted.

    >>> resolve("torch").make
    <class 'torch.nn.modules.dropout.Dropout'>
    >>> resolve("torch.nn.functional:dropout").make(p=0.3)
    AsLayer(dropout, p=0.3)
    """
    module_name, colon, name = ALIASES.get(text, text).rpartition(":")
    if not (colon and name and module_name):
        nearest = did_you_mean(text, ALIASES)
        raise ValueError(f"unknown implementation {text!r}{nearest or f'; accepted are {ACCEPTED}'}")
    found = _attribute(module_name, name)
    if text in ALIASES:
        return Implementation(text, found, module_name)
    if isinstance(found, nn.Module):
        layer = type(found)
        home = module_name if layer.__module__ == load(module_name).__name__ else layer.__module__
        kind = f"{home}:{layer.__name__}"
        raise ValueError(
            f"{text} is a layer that is already made, but laws need one for each p: name its class, {kind}"
        )
    if isinstance(found, type):
        make = _maker_of_class(text, found, kwargs, p_name)
    elif callable(found):
        make = _maker_of_function(text, found, kwargs, p_name)
    else:
        raise ValueError(f"{text} is neither a class nor a function, but {found!r}")
    return Implementation(name, make, module_name)


def _maker_of_class(
    text: str, layer: type, kwargs: Mapping[str, Any], p_name: str
) -> Callable[..., nn.Module]:
    if not issubclass(layer, nn.Module):
        raise ValueError(f"{text} is a class, but no torch.nn.Module")
    if inspect.isabstract(layer):
        missing = ", ".join(sorted(getattr(layer, "__abstractmethods__", ())))
        raise ValueError(f"{text} is abstract: it leaves {missing} to a class that inherits from it")
    if not kwargs and (not p_name or p_name in inspect.signature(layer).parameters):
        return layer
    return _maker(text, layer, _parameters_of_class(layer), kwargs, p_name)


def _maker_of_function(
    text: str, function: Callable[..., Any], kwargs: Mapping[str, Any], p_name: str
) -> Callable[..., nn.Module]:
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{text} does not tell its arguments: wrap it in a function of x, p and training"
        ) from error
    head = next(iter(parameters), "")
    if _is_probability(head, parameters.get(head)) or head == p_name:
        return _maker(text, function, parameters, kwargs, p_name)  # of a layer
    parameters.pop(head, None)
    training = next((name for name in TRAINING if name in parameters), "")
    parameters.pop(training, None)

    def layer(**arguments: Any) -> nn.Module:
        return AsLayer(function, training, arguments)

    return _maker(text, layer, parameters, kwargs, p_name)


class AsLayer(nn.Module):
    """A function of a tensor, with its other arguments fixed, as a layer."""

    def __init__(self, function: Callable[..., Any], training: str, arguments: Mapping[str, Any]) -> None:
        super().__init__()
        self.function, self.training_name, self.arguments = function, training, arguments

    def forward(self, *inputs: Tensor) -> Any:
        if self.training_name:
            return self.function(*inputs, **self.arguments, **{self.training_name: self.training})
        return self.function(*inputs, **self.arguments)

    def eval(self) -> AsLayer:
        """As a law calls it; a model that holds the function goes on dropping."""
        if not self.training_name:
            raise NotOfferedError("no training argument")
        return super().eval()

    def state_dict(self, *_: Any, **__: Any) -> Any:
        raise NotOfferedError("a function has no state_dict")

    def __reduce_ex__(self, _: Any) -> Any:
        raise NotOfferedError("a function has no copies")

    def __repr__(self) -> str:
        name = getattr(self.function, "__name__", str(self.function))
        return f"AsLayer({', '.join([name, *(f'{key}={value!r}' for key, value in self.arguments.items())])})"


def _maker(
    text: str,
    layer: Callable[..., nn.Module],
    parameters: Mapping[str, Parameter],
    kwargs: Mapping[str, Any],
    p_name: str,
) -> Callable[..., nn.Module]:
    """``layer`` with some arguments fixed, and with the laws' name for the probability."""
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters.values())
    for name in kwargs:
        if name not in parameters and not takes_any:
            nearest = did_you_mean(name, parameters, f"; it takes {', '.join(parameters)}")
            raise ValueError(f"{text} takes no argument {name!r}{nearest}")
    own_name, keeps = _probability(text, parameters, kwargs, p_name) if p_name else ("", False)
    fixed = {name: value for name, value in kwargs.items() if name != own_name}

    def make(**arguments: Any) -> nn.Module:
        if own_name and p_name in arguments:
            p = arguments.pop(p_name)
            arguments[own_name] = 1 - p if keeps else p
        return layer(**{**fixed, **arguments})

    others = [
        each.replace(kind=Parameter.KEYWORD_ONLY, default=fixed.get(name, each.default))
        for name, each in parameters.items()
        if each.kind in BY_NAME and name != own_name
    ]
    make.__signature__ = inspect.Signature(others)  # type: ignore[attr-defined]
    return make


def _parameters_of_class(layer: type) -> dict[str, Parameter]:
    """Those of the constructor; through ``**kwargs`` also those of the class that it inherits from."""
    found: dict[str, Parameter] = dict(inspect.signature(layer).parameters)
    for base in layer.__mro__:
        if not any(each.kind is Parameter.VAR_KEYWORD for each in found.values()):
            break
        if base is not nn.Module and "__init__" in vars(base):
            found = {name: each for name, each in found.items() if each.kind in BY_NAME}
            _, *others = inspect.signature(vars(base)["__init__"]).parameters.items()
            found |= {name: each for name, each in others if name not in found}
    return found


def _probability(
    text: str, parameters: Mapping[str, Parameter], kwargs: Mapping[str, Any], p_name: str
) -> tuple[str, bool]:
    """The parameter that takes the probability, and whether it is that of keeping."""
    for name, value in kwargs.items():
        if isinstance(value, str) and (said := value.replace(" ", "")) in ("p", "1-p"):
            return name, said == "1-p"
    for name in (p_name, "p"):
        if name in parameters:
            return name, False
    found = [name for name, each in parameters.items() if name not in kwargs and _is_probability(name, each)]
    if len(found) == 1:
        return found[0], bool(_words(found[0]) & KEPT)
    others = [name for name, each in parameters.items() if each.kind in BY_NAME and name not in kwargs]
    if not others:
        raise ValueError(f"{text} takes no probability of dropping")
    raise ValueError(
        f"{text} takes {', '.join(others)}: {'more than one' if found else 'none'} of them looks like the "
        f"probability of dropping; say which is, as in --kwargs '{(found or others)[0]}=p'{IN_FILE}"
    )


def _is_probability(name: str, parameter: Parameter | None) -> bool:
    """By its name, unless its default or annotation is of another type."""
    if parameter is None or parameter.kind not in BY_NAME or parameter.annotation in (bool, "bool"):
        return False
    number = parameter.default in (None, Parameter.empty) or type(parameter.default) in (int, float)
    return number and bool(_words(name) & (KEPT | DROPPED))


def _words(name: str) -> set[str]:
    return set(name.lower().split("_"))


def _try(text: str, case: Case, settings: Settings) -> None:
    """Make the layer and call it once, as the laws are going to."""
    given = case.example.arguments
    needed = [
        f"{name}=..."
        for name, each in inspect.signature(case.implementation.make).parameters.items()
        if each.default is Parameter.empty and each.kind in BY_NAME and name not in given
    ]
    arguments = ", ".join(f"{name}={value!r}" for name, value in given.items())
    remedy = (
        f"; give what it needs beside {arguments} by --kwargs '{','.join(needed)}'{IN_FILE}" if needed else ""
    )
    try:
        layer, inputs = case.called(settings)
    except Exception as error:  # whatever a stranger's layer raises
        raise ValueError(
            f"{text} cannot be made with {arguments}: {one_line_with_place(error)}{remedy}"
        ) from error
    shapes = " and ".join(str(tuple(x.shape)) for x in inputs)
    called = f"called with {inputs[0].dtype} of shape {shapes}"
    try:
        y = layer(*inputs)
    except Exception as error:
        remedy = remedy or "; --layer NAME examines layers for other inputs"
        raise ValueError(f"{text} cannot be {called}: {one_line_with_place(error)}{remedy}") from error
    if not isinstance(y[0] if isinstance(y, tuple) and y else y, Tensor):
        raise ValueError(f"{text} returns no tensor when {called}, but {y!r}")
