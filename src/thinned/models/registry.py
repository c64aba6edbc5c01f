"""Which module of somebody else's becomes which of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from thinned import layers

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


class UnsupportedError(ValueError):
    """A module does what ours cannot; its words say what, and the module is left and reported."""


@dataclass(frozen=True)
class Rule:
    """``build`` makes a module of ours from one of theirs and leaves theirs as it is."""

    name: str
    build: Build


_by_type: dict[type[nn.Module], Rule] = {}
_by_name: dict[str, Rule] = {}


def register(kind: type[nn.Module] | str, build: Build) -> None:
    """Let :func:`thinned.convert` swap modules of another type.

    Args:
        kind: the class, or its full name, such as ``"package.module.Class"``, for a package that may not be
            installed; a name may have the wildcards of :mod:`fnmatch`. What is registered last counts first,
            and a class before a name.
        build: makes the module to put in its place from the old one, which it must not change. It may raise
            :class:`ValueError` where ours cannot do what the old one does: the module is then left, and the
            words are reported. Training mode, hooks and further attributes are carried over for it. If it
            keeps parameters or buffers, under the old names, ``state_dict`` stays as it was.

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
    if isinstance(kind, str):
        _by_name.pop(kind, None)
        _by_name[kind] = Rule(kind, build)
    elif isinstance(kind, type) and issubclass(kind, nn.Module):
        _by_type[kind] = Rule(qualified_name(kind), build)
    else:
        raise TypeError(f"kind must be a class of modules or its full name, got {kind!r}")


def rule_for(module: nn.Module) -> Rule | None:
    """How to build ours from ``module``, or None where nothing is known of its type.

    A subclass without a forward of its own is what its base is.

    Raises:
        UnsupportedError: the type is known, and the module runs code of its own in the place of its forward.
    """
    kind = type(module)
    for base in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        rule = _rule_of(base)
        if rule is None:
            continue
        if "forward" in vars(module):
            raise UnsupportedError("its forward was replaced on the module itself")
        if any(getattr(kind, name) is not getattr(base, name) for name in ("forward", "__call__")):
            raise UnsupportedError(f"a {rule.name} with a forward of its own")
        return rule
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
    try:
        return rule_for(module) is not None
    except UnsupportedError:
        return True


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
    return next((name for name in PROBABILITIES if name in vars(module)), None)


def _names(kind: type[nn.Module]) -> set[str]:
    """By the class and by its forward, as a class may have been given another module to be pickled by."""
    # A scripted class has no forward to speak of.
    forward = getattr(kind, "forward", None)
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
    p = min(1.0, old.drop_prob * old.gamma_scale)
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


for _name in ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d"):
    register(getattr(nn, _name), _flags(getattr(layers, _name), "p", "inplace"))
for _name in ("AlphaDropout", "FeatureAlphaDropout"):
    # torch takes inplace=True here and ignores it: so has what was written around it.
    register(getattr(nn, _name), _flags(getattr(layers, _name), "p"))
for _place in ("timm.layers", "timm.models.layers"):
    register(f"{_place}.drop.DropPath", _drop_path)
    register(f"{_place}.drop.DropBlock2d", _timm_drop_block)
    register(f"{_place}.patch_dropout.PatchDropout", _patch_dropout(False))
    register(f"{_place}.patch_dropout.PatchDropoutWithIndices", _patch_dropout(True))
register("torchvision.ops.stochastic_depth.StochasticDepth", _flags(layers.StochasticDepth, "p", "mode"))
register("torchvision.ops.drop_block.DropBlock2d", _torchvision_drop_block(layers.DropBlock2d))
register("torchvision.ops.drop_block.DropBlock3d", _torchvision_drop_block(layers.DropBlock3d))
register("transformers.models.*.modeling_*.*DropPath", _drop_path)
register("transformers.models.*.modeling_*.StableDropout", _stable_dropout)
