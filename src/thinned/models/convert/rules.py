"""Which module of somebody else's becomes which of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from types import MethodType
from typing import Any

from torch import nn

from thinned import layers
from thinned.torch_state import REPRESENTATION, buffers_of, children_of, parameters_of

__all__ = [
    "PROBABILITIES",
    "Rule",
    "UnsupportedError",
    "is_known",
    "is_ours",
    "probability_name",
    "qualified_name",
    "register",
    "rule_for",
]

Build = Callable[[Any], nn.Module]
# Under these names a module keeps its probability.
PROBABILITIES = ("p", "drop_prob", "prob", "drop_rate", "dropout_rate", "dropout_p", "rate")
# A subclass may define these and still do what its base does: a constructor has run already, how a module
# prints changes with its type anyway, and the rest is metadata that Python and TorchScript keep in a class.
_METADATA = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__slots__", "__constants__"}
_METADATA |= {"__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__"}
_METADATA |= {"__firstlineno__", "__static_attributes__"}
HARMLESS = {"__init__", "__new__"} | REPRESENTATION | _METADATA


class UnsupportedError(ValueError):
    """A module does what ours cannot; its words say what, and the module is left and reported."""


def _same(_: Any) -> float:
    return 1.0


@dataclass(frozen=True)
class Rule:
    """How a module of ours is made from one of theirs.

    Attributes:
        build: makes it, and leaves theirs as it is.
        unit: of theirs, the factor from its probability to that of ours.
        p: the name under which theirs keeps its probability; empty for the first of ``PROBABILITIES``.
        stateless: whether the type has no parameters, buffers and children, so that ours has none either.
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
            installed; a name may have the wildcards of :mod:`fnmatch`. What is registered last counts first,
            and a class before a name.
        build: makes the module to put in its place from the old one, which it must not change. It may raise
            :class:`ValueError` where ours cannot do what the old one does: the module is then left, and the
            words are reported. Training mode, hooks and further attributes are carried over for it. If it
            keeps parameters or buffers, under the old names, ``state_dict`` stays as it was.
        unit: gives, for an old module, the factor by which ``build`` multiplies its probability, such as
            ``lambda old: 0.01`` for a type that counts in percent. :func:`thinned.revert` divides by it. By
            default it is 1.

    Raises:
        TypeError: ``kind`` is neither a class of modules nor a name.

    >>> import torch, thinned
    >>> class Noise(torch.nn.Module):
    ...     def __init__(self, rate):
    ...         super().__init__()
    ...         self.rate = rate
    ...     def forward(self, x):
    ...         return x * torch.rand_like(x).gt(self.rate) if self.training else x
    >>> thinned.register(Noise, lambda old: thinned.Dropout(old.rate))
    >>> thinned.convert(torch.nn.Sequential(torch.nn.Linear(2, 2), Noise(0.2))).model[1]
    Dropout(p=0.2, inplace=False)
    """
    _add(kind, Rule(build, unit))


def _add(kind: type[nn.Module] | str, rule: Rule) -> None:
    if isinstance(kind, str):
        _by_name.pop(kind, None)
        _by_name[kind] = rule
    elif isinstance(kind, type) and issubclass(kind, nn.Module):
        _by_type[kind] = rule
    else:
        raise TypeError(f"kind must be a class of modules or its full name, got {kind!r}")


def rule_for(module: nn.Module) -> Rule | None:
    """How to build ours from ``module``, or None where nothing is known of its type.

    A subclass that adds nothing but a constructor and a representation is what its base is.

    Raises:
        UnsupportedError: the type is known, and the module has behaviour or state beyond it.
    """
    found = _known_base(type(module))
    if found is None:
        return None
    base, rule = found
    own = _own_names(module, base)
    if rule.stateless:
        own |= parameters_of(module).keys() | buffers_of(module).keys() | children_of(module).keys()
    if own:
        raise UnsupportedError(f"a {qualified_name(base)} with its own {', '.join(sorted(own))}")
    return rule


def _own_names(module: nn.Module, base: type[nn.Module]) -> set[str]:
    """The names that the class of ``module`` adds to ``base``, and those of methods set on the module."""
    kind = type(module)
    added = {name for cls in kind.__mro__ if cls not in base.__mro__ for name in vars(cls)} - HARMLESS
    # A class may repeat what its base has, as in ``forward = Base.forward``.
    own = {name for name in added if getattr(kind, name, None) is not getattr(base, name, added)}
    for name, value in vars(module).items():
        replaces = callable(value) and hasattr(kind, name) and name not in HARMLESS
        if replaces or value is module or (isinstance(value, MethodType) and value.__self__ is module):
            own.add(name)
    return own


def _known_base(kind: type[nn.Module]) -> tuple[type[nn.Module], Rule] | None:
    """The nearest class that has a rule, and the rule."""
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        rule = _rule_of(base)
        if rule is not None:
            return base, rule
    return None


def _rule_of(kind: type[nn.Module]) -> Rule | None:
    if kind in _by_type:
        return _by_type[kind]
    names = _names(kind)
    for pattern in reversed(_by_name):
        if any(fnmatchcase(name, pattern) for name in names):
            return _by_name[pattern]
    return None


def is_known(module: nn.Module) -> bool:
    """Whether ``module`` is of a type that has a rule, even if it cannot be swapped."""
    return _known_base(type(module)) is not None


def is_ours(module: nn.Module) -> bool:
    """Whether ``module`` is a layer of thinned."""
    return any(base.__module__.startswith("thinned.layers.") for base in type(module).__mro__)


def qualified_name(kind: type) -> str:
    """``thinned.Dropout``, ``torch.nn.Dropout``, or the module in which a class is written and its name."""
    module, name = kind.__module__, kind.__qualname__
    if module.startswith("thinned.layers."):
        return f"thinned.{name}"
    return f"torch.nn.{name}" if module.startswith("torch.nn.modules.") else f"{module}.{name}"


def probability_name(module: nn.Module) -> str | None:
    """The name of the attribute that holds the probability."""
    names: tuple[str, ...] = PROBABILITIES
    if is_ours(module):
        names = ("drop_prob",) if isinstance(module, layers.DropPath) else ("p",)
    elif (found := _known_base(type(module))) is not None and found[1].p:
        names = (found[1].p,)
    return next((name for name in names if name in vars(module)), None)


def _names(kind: type[nn.Module]) -> set[str]:
    """By the class and by its forward, as a class may have been given another module to be pickled by."""
    # An inherited forward would give a subclass of the same name the name of its base.
    forward = vars(kind).get("forward")
    modules = {kind.__module__, getattr(forward, "__module__", None) or ""}
    return {f"{module}.{kind.__qualname__}" for module in modules}


def _flags(ours: type[nn.Module], *names: str) -> Build:
    return lambda old: ours(*(getattr(old, name) for name in names))


def _drop_path(old: Any) -> nn.Module:
    # Where nothing is dropped, some libraries say None.
    return layers.DropPath(old.drop_prob or 0.0, getattr(old, "scale_by_keep", True))


def _timm_drop_block(old: Any) -> nn.Module:
    if old.with_noise:
        raise UnsupportedError("with_noise=True")
    if not getattr(old, "scale_by_keep", True):
        raise UnsupportedError("scale_by_keep=False")
    if not old.gamma_scale:
        raise UnsupportedError(f"gamma_scale={old.gamma_scale}, which drops nothing at any drop_prob")
    p = min(1.0, (old.drop_prob or 0.0) * old.gamma_scale)
    coupled = getattr(old, "couple_channels", True)
    return layers.DropBlock2d(p, old.block_size, old.inplace, couple_channels=coupled, scale="counted")


def _torchvision_drop_block(ours: Callable[..., nn.Module]) -> Build:
    return lambda old: ours(old.p, old.block_size, old.inplace, scale="counted")


def _patch_dropout(return_indices: bool) -> Build:
    return lambda old: layers.PatchDropout(old.prob, old.num_prefix_tokens, old.ordered, return_indices)


def _stable_dropout(old: Any) -> nn.Module:
    if old.context_stack is not None:
        raise UnsupportedError("it repeats the masks of a context")
    return layers.Dropout(old.drop_prob)


def _gamma_scale(old: Any) -> float:
    return float(old.gamma_scale)


def _theirs(kind: type[nn.Module] | str, p: str, build: Build, unit: Callable[[Any], float] = _same) -> None:
    _add(kind, Rule(build, unit, p, stateless=True))


for _name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"):
    _theirs(getattr(nn, _name), "p", _flags(getattr(layers, _name), "p", "inplace"))
for _name in ("AlphaDropout", "FeatureAlphaDropout"):
    # torch takes inplace=True here and ignores it: so has what was written around it.
    _theirs(getattr(nn, _name), "p", _flags(getattr(layers, _name), "p"))
for _place in ("timm.layers", "timm.models.layers"):
    _theirs(f"{_place}.drop.DropPath", "drop_prob", _drop_path)
    _theirs(f"{_place}.drop.DropBlock2d", "drop_prob", _timm_drop_block, _gamma_scale)
    _theirs(f"{_place}.patch_dropout.PatchDropout", "prob", _patch_dropout(False))
    _theirs(f"{_place}.patch_dropout.PatchDropoutWithIndices", "prob", _patch_dropout(True))
_theirs("torchvision.ops.stochastic_depth.StochasticDepth", "p", _flags(layers.StochasticDepth, "p", "mode"))
_theirs("torchvision.ops.drop_block.DropBlock2d", "p", _torchvision_drop_block(layers.DropBlock2d))
_theirs("torchvision.ops.drop_block.DropBlock3d", "p", _torchvision_drop_block(layers.DropBlock3d))
_theirs("transformers.models.*.modeling_*.*DropPath", "drop_prob", _drop_path)
_theirs("transformers.models.*.modeling_*.StableDropout", "drop_prob", _stable_dropout)
