"""The rules by which a module of another library becomes one of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from numbers import Real
from types import MethodType
from typing import Any

from torch import Tensor, nn

from thinned import layers
from thinned.checks import got
from thinned.models.walk import is_ours, qualified_name
from thinned.torch_state import REPRESENTATION, buffers_of, children_of, parameters_of

__all__ = [
    "is_dropout",
    "is_known",
    "is_number",
    "make",
    "numbers_of",
    "own_names",
    "probability_name",
    "probability_of",
    "refusal",
    "register",
    "unit_of",
]

Build = Callable[[Any], nn.Module]
# The attributes in which modules keep their probability.
PROBABILITIES = ("p", "drop_prob", "prob", "drop_rate", "dropout_rate", "dropout_p", "rate")
# A subclass may define these and still do what its base does: a constructor has run already, how a module
# prints changes with its type anyway, and the rest is metadata that Python and TorchScript keep in a class.
_METADATA = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__", "__constants__"}
_METADATA |= {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
_METADATA |= {"__firstlineno__", "__static_attributes__"}
HARMLESS = {"__init__", "__new__"} | REPRESENTATION | _METADATA


def _same(_: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class Rule:
    """How to make a module of ours from one of theirs.

    Attributes:
        build: makes ours and leaves theirs as it is; a ValueError says what ours cannot do.
        unit: gives the factor from the probability of theirs to that of ours.
        p: the attribute with the probability of theirs; empty for the first of ``PROBABILITIES``.
        stateless: whether a module with parameters, buffers or children is more than the rule knows.
    """

    build: Build
    unit: Callable[[Any], float] = _same
    p: str = ""
    stateless: bool = False


_by_type: dict[type[nn.Module], Rule] = {}
_by_name: dict[str, Rule] = {}


def register(kind: type[nn.Module] | str, build: Build, *, unit: Callable[[Any], float] = _same) -> None:
    """Let :func:`thinned.convert` swap modules of another type.

    Args:
        kind: the class, or its full name, such as ``"package.module.Class"``, for a package that may not be
            installed; a name may have the wildcards of :mod:`fnmatch`. A class takes precedence over a name,
            and the latest name over earlier ones.
        build: makes the new module from the old one, which it must not change. A :class:`ValueError` says
            that no layer of ours is equivalent: the module stays and the message is logged. Training mode,
            hooks and further attributes are carried over. If the new module keeps the parameters and buffers
            under the old names, ``state_dict`` stays as it was.
        unit: gives, for an old module, the factor by which ``build`` multiplies its probability, such as
            ``lambda old: 0.01`` for a type that counts in percent. :func:`thinned.revert` divides by it.

    Raises:
        TypeError: ``kind`` is neither a class of modules nor a name; ``build`` or ``unit`` is no function; or
            later, where ``build`` makes no module.

    >>> import torch, thinned
    >>> class Noise(torch.nn.Module):
    ...     def __init__(self, rate):
    ...         super().__init__()
    ...         self.rate = rate
    ...     def forward(self, x):
    ...         return x * torch.rand_like(x).gt(self.rate) if self.training else x
    >>> thinned.register(Noise, lambda old: thinned.Dropout(old.rate))
    >>> thinned.convert(torch.nn.Sequential(torch.nn.Linear(2, 2), Noise(0.2)))[1]
    thinned.Dropout(p=0.2, inplace=False)
    """
    for name, function in (("build", build), ("unit", unit)):
        if not callable(function):
            raise TypeError(f"{name} must be a function of the old module, {got(function)}")
    _add(kind, Rule(build, unit))


def _add(kind: type[nn.Module] | str, rule: Rule) -> None:
    if isinstance(kind, str):
        _by_name.pop(kind, None)
        _by_name[kind] = rule
    elif isinstance(kind, type) and issubclass(kind, nn.Module):
        _by_type[kind] = rule
    else:
        raise TypeError(f"kind must be a class of modules or its full name, got {kind!r}")


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` is of a type that has a rule, even if it cannot be swapped."""
    return _known_base(type(module)) is not None


def make(module: nn.Module) -> tuple[nn.Module, Rule]:
    """Our layer for a module of a known type, and the rule that made it.

    A subclass that adds nothing but a constructor and a representation counts as its base.

    Raises:
        ValueError: our layer would not do what ``module`` does; the message is for the report.
    """
    found = _known_base(type(module))
    if found is None:
        raise ValueError(f"no rule for a {qualified_name(type(module))}")
    base, rule = found
    if own := own_names(module, base, rule.stateless):
        raise ValueError(f"a {qualified_name(base)} with its own {', '.join(sorted(own))}")
    new = rule.build(module)
    if not isinstance(new, nn.Module | None):
        kind = qualified_name(base)
        raise TypeError(f"build of thinned.register for {kind} must make a torch.nn.Module, {got(new)}")
    return new, rule


def own_names(module: nn.Module, base: type[nn.Module], stateless: bool = True) -> set[str]:
    """The names that the class of ``module`` adds to ``base``, and those of methods set on the module.

    ``stateless`` adds those of its parameters, buffers and children.
    """
    kind = type(module)
    added = {name for cls in kind.__mro__ if cls not in base.__mro__ for name in vars(cls)} - HARMLESS
    # A class may repeat what its base has, as in ``forward = Base.forward``.
    own = {name for name in added if getattr(kind, name, None) is not getattr(base, name, added)}
    for name, value in vars(module).items():
        replaces = callable(value) and hasattr(kind, name) and name not in HARMLESS
        if replaces or value is module or (isinstance(value, MethodType) and value.__self__ is module):
            own.add(name)
    if stateless:
        own |= parameters_of(module).keys() | buffers_of(module).keys() | children_of(module).keys()
    return own


def _known_base(kind: type[nn.Module]) -> tuple[type[nn.Module], Rule] | None:
    """The nearest class that has a rule, and the rule."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        if base in _by_type:
            return base, _by_type[base]
        # A class that pickles under another module is also known by the module of its own forward.
        modules = {base.__module__, getattr(vars(base).get("forward"), "__module__", None)}
        names = [f"{module}.{base.__qualname__}" for module in modules]
        for pattern, rule in reversed(_by_name.items()):
            if any(fnmatchcase(name, pattern) for name in names):
                return base, rule
    return None


def probability_name(module: nn.Module) -> str | None:
    """The attribute that holds the probability, or None."""
    names: tuple[str, ...] = PROBABILITIES
    if is_ours(module):
        names = ("drop_prob",) if isinstance(module, layers.DropPath) else ("p",)
    elif (found := _known_base(type(module))) is not None and found[1].p:
        names = (found[1].p,)
    return next((name for name in names if name in vars(module)), None)


def is_dropout(module: nn.Module) -> bool:
    """Whether ``module`` is of a known type, or is called a dropout and draws masks.

    R-Drop is a loss, and the masks of Masksembles are fixed.
    """
    name = type(module).__name__.lower()
    if isinstance(module, layers.RDrop | layers.Masksembles):
        return False
    return is_ours(module) or is_known(module) or "drop" in name or name == "stochasticdepth"


def refusal(module: nn.Module) -> str:
    """The reason why convert leaves a dropout module; empty for one that it swaps, and for other modules."""
    if is_ours(module) or not is_dropout(module):
        return ""
    if is_known(module):
        try:
            make(module)
        except ValueError as error:
            return str(error)
        return ""
    has_more = any(True for _ in module.parameters()) or bool(children_of(module))
    return "" if has_more else f"no rule for {type(module).__name__}"


def is_number(value: Any) -> bool:
    """Whether ``value`` is a real number of Python or NumPy, and no bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def numbers_of(module: nn.Module) -> dict[str, float]:
    """The numbers that a dropout, or a module of torch.nn with ``dropout=``, drops with, by attribute.

    >>> numbers_of(layers.VariationalLSTM(2, 2, input_p=0.1))["input_p"], numbers_of(nn.LSTM(2, 2, 2))
    (0.1, {'dropout': 0.0})
    """
    names: list[str] = []
    if is_dropout(module):
        names += filter(None, [probability_name(module)])
        names += [name for name in vars(module) if name.endswith("_p") and is_ours(module)]
    elif isinstance(module, nn.MultiheadAttention | nn.RNNBase) and getattr(module, "num_layers", 2) > 1:
        names.append("dropout")  # a recurrent layer drops between its layers, so not if there is only one
    values = {name: _plain(getattr(module, name)) for name in names if name != "initial_p"}
    return {name: value for name, value in values.items() if is_number(value)}


def _plain(value: Any) -> Any:
    """The number in a tensor, such as an element of ``torch.linspace``; other values as they are."""
    is_scalar = isinstance(value, Tensor) and value.dim() == 0 and not value.is_meta
    return value.item() if is_scalar else value


def probability_of(module: nn.Module) -> float | None:
    """The probability that ``module`` drops with; None if it has none, or several that are not 0."""
    values = {min(1.0, float(value) * unit_of(module)) for value in numbers_of(module).values()}
    return max(values) if values and len(values - {0.0}) < 2 else None


def unit_of(module: nn.Module) -> float:
    """The factor from the number that ``module`` has to its probability."""
    found = None if is_ours(module) else _known_base(type(module))
    return 1.0 if found is None else found[1].unit(module)


def _flags(ours: type[nn.Module], *names: str, **flags: Any) -> Build:
    return lambda old: ours(*(getattr(old, name) for name in names), **flags)


def _drop_path(old: Any) -> nn.Module:
    # Some libraries say None for a probability of 0.
    return layers.DropPath(old.drop_prob or 0.0, getattr(old, "scale_by_keep", True))


def _timm_drop_block(old: Any) -> nn.Module:
    return layers.DropBlock2d(
        old.drop_prob or 0.0,
        old.block_size,
        old.inplace,
        # timm before 1.0.23 had a mask for each channel, and no such attribute.
        couple_channels=getattr(old, "couple_channels", False),
        scale="counted",
        batchwise=getattr(old, "batchwise", False) and not old.fast,  # the fast one ignored it
        scale_by_keep=getattr(old, "scale_by_keep", True),
        with_noise=old.with_noise,
        gamma_scale=old.gamma_scale,
    )


def _stable_dropout(old: Any) -> nn.Module:
    if old.context_stack is not None:
        raise ValueError("it repeats the masks of a context")
    return layers.Dropout(old.drop_prob)


def _theirs(kind: type[nn.Module] | str, p: str, build: Build) -> None:
    _add(kind, Rule(build, p=p, stateless=True))


for _name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"):
    _theirs(getattr(nn, _name), "p", _flags(getattr(layers, _name), "p", "inplace"))
for _name in ("AlphaDropout", "FeatureAlphaDropout"):
    # torch takes inplace=True here and ignores it, and so do models that pass it.
    _theirs(getattr(nn, _name), "p", _flags(getattr(layers, _name), "p"))
for _place in ("timm.layers", "timm.models.layers"):
    _theirs(f"{_place}.drop.DropPath", "drop_prob", _drop_path)
    _theirs(f"{_place}.drop.DropBlock2d", "drop_prob", _timm_drop_block)
    for _name, _flag in (("PatchDropout", False), ("PatchDropoutWithIndices", True)):
        _patches = _flags(layers.PatchDropout, "prob", "num_prefix_tokens", "ordered", return_indices=_flag)
        _theirs(f"{_place}.patch_dropout.{_name}", "prob", _patches)
_theirs("torchvision.ops.stochastic_depth.StochasticDepth", "p", _flags(layers.StochasticDepth, "p", "mode"))
for _name in ("DropBlock2d", "DropBlock3d"):
    _blocks = _flags(getattr(layers, _name), "p", "block_size", "inplace", scale="counted")
    _theirs(f"torchvision.ops.drop_block.{_name}", "p", _blocks)
_theirs("transformers.models.*.modeling_*.*DropPath", "drop_prob", _drop_path)
_theirs("transformers.models.*.modeling_*.StableDropout", "drop_prob", _stable_dropout)
