"""The dropout modules of a model swapped for ours, and back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar, overload

from torch import nn

from thinned.layers._arguments import threshold_and_scale
from thinned.models.convert.rules import (
    UnsupportedError,
    is_known,
    is_ours,
    probability_name,
    qualified_name,
    rule_for,
)
from thinned.models.text import count, format_p, merge_paths, to_text
from thinned.models.walk import Choice, chooser, modules_with_paths, other_references, places
from thinned.torch_state import buffers_of, children_of, load_hooks_of, parameters_of

__all__ = ["Conversion", "Swap", "build_from", "convert", "probability_of", "revert"]

ORIGIN = "_thinned_origin"
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Swap:
    """What happened to one module.

    Attributes:
        paths: of all its places in the model; ``path`` is the first.
        old: the name of its type.
        new: the name of the type that took its place; empty if it was left, and ``note`` says why.
        p: its probability, as it is now.
        note: what does not carry over.
    """

    paths: tuple[str, ...]
    old: str
    new: str
    p: float | None
    note: str = ""

    @property
    def path(self) -> str:
        """Of its first place in the model; empty for the model itself."""
        return self.paths[0]

    def cells(self) -> list[str]:
        """As the table has it."""
        return [", ".join(self.paths) or "(model)", self.old, self.new, format_p(self.p), self.note]


class Conversion(Sequence[Swap], Generic[Model]):
    """What :func:`convert` did: a sequence of the swaps, which prints as a table.

    Attributes:
        model: the converted one.
        left: dropout modules of known types that stay as they are, and why.
    """

    headings = ("path", "type", "becomes", "p", "note")

    def __init__(self, model: Model, swaps: Sequence[Swap], left: Sequence[Swap] = ()) -> None:
        self.model = model
        self.left = tuple(left)
        self._swaps = tuple(swaps)

    @overload
    def __getitem__(self, index: int) -> Swap: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Swap]: ...

    def __getitem__(self, index: int | slice) -> Swap | Sequence[Swap]:
        return self._swaps[index]

    def __len__(self) -> int:
        return len(self._swaps)

    def __repr__(self) -> str:
        summary = f"{count(len(self), 'dropout module')} became thinned's"
        if self.left:
            summary += f", {len(self.left)} stayed"
        rows = merge_paths([swap.cells() for swap in (*self, *self.left)])
        return f"{summary}\n{to_text(self.headings, rows)}" if rows else summary


def convert(
    model: Model,
    *,
    p: float | None = None,
    include: Choice | None = None,
    exclude: Choice | None = None,
    inplace: bool = True,
) -> Conversion[Model]:
    """Swap every dropout module of a model for ours: torch.nn's six, and those of timm, torchvision and
    transformers; :func:`thinned.register` adds others.

    What a module has is kept: its probability and flags, training mode, hooks (and the handles that remove
    them), the keys of ``state_dict``. A module with several places in the model becomes one module in all of
    them. Layers of thinned are left. A subclass with methods, properties or class attributes of its own is
    left and reported, as it may do what ours does not; so is a dropout with parameters, buffers, children or
    a replaced method. This does not reach what is no module, such as ``F.dropout`` in a forward:
    :func:`thinned.inspect` lists it and :func:`thinned.intercept` replaces it. A list or an attribute that is
    no child keeps the old module, and the swap's note names it.

    Args:
        model: any module. If it is a dropout itself, the new one is ``conversion.model``.
        p: a probability for all that are swapped, instead of their own.
        include: swap these only: a path's pattern (:mod:`fnmatch`), several, or a function of path and
            module, which is asked of dropout modules alone. A module with several paths is meant if any of
            them is.
        exclude: leave these.
        inplace: change ``model``; otherwise a deep copy, which ``conversion.model`` then is.

    Returns:
        A :class:`Conversion`: the swaps, ``.model`` and ``.left``; printed, a table.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or given where a new module has no probability. Whatever is
            raised, the model is as it was.
        TypeError: ``model`` is no module, or ``include`` or ``exclude`` neither patterns nor a function.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    >>> thinned.convert(model)
    1 dropout module became thinned's
    path  type              becomes          p
    1     torch.nn.Dropout  thinned.Dropout  0.1
    >>> type(model[1])
    <class 'thinned.layers.dropout.Dropout'>
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r} of type {type(model).__name__}")
    if p is not None:
        threshold_and_scale(p)
    chosen = chooser(include, exclude)
    if not inplace:
        model = copy.deepcopy(model)
    news: dict[int, nn.Module] = {}
    origins: list[Callable[[], None]] = []
    swaps: dict[int, Swap] = {}
    left = []
    found = modules_with_paths(model)
    elsewhere = other_references(found)
    for module, paths in found:
        if is_ours(module) or not is_known(module) or not chosen(paths, module):
            continue
        old = qualified_name(type(module))
        try:
            new = build_from(module)
        except UnsupportedError as error:
            left.append(Swap(paths, old, "", probability_of(module), f"left: {error}"))
            continue
        rule = rule_for(module)
        if rule is None or new is None or new is module:
            continue
        origin = _Origin(module, _raw_probability(module), _raw_probability(new), rule.unit(module))
        origins.append(partial(_carry_over, new, origin))
        if p is not None:
            _set_probability(new, float(p), paths[0])
        news[id(module)] = new
        note = _note(module, elsewhere.get(id(module), ()))
        swaps[id(new)] = Swap(paths, old, qualified_name(type(new)), probability_of(new), note)
    # From here on nothing raises.
    for carry_over in origins:
        carry_over()
    model = _replace(model, news)
    # A module within another that was swapped is gone unless the new one has it too.
    return Conversion(model, [swaps[id(m)] for m in model.modules() if id(m) in swaps], left)


def revert(model: Model) -> Model:
    """Undo :func:`convert`: the modules that were swapped come back, in all their places.

    They are the very modules that were there, or, in a copy or a loaded pickle of the model, copies of them.
    What changed since is kept: the probabilities as they are now, ``p=`` of :func:`convert` included, the
    training mode and the hooks. A probability is the very number that the new module has, except for a type
    that counts in another unit, as timm's DropBlock2d does with its ``gamma_scale``: an unchanged one comes
    back as it was, and a changed one is divided by the unit.

    Args:
        model: one that :func:`convert` changed, a copy of it, or a part of it; others are left as they are.

    Returns:
        ``model``, or the original of it if it is itself a swapped module.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    >>> thinned.revert(thinned.convert(model).model)[1]
    Dropout(p=0.1, inplace=False)
    >>> type(model[1])
    <class 'torch.nn.modules.dropout.Dropout'>
    """
    olds: dict[int, nn.Module] = {}
    for new in model.modules():
        origin = vars(new).get(ORIGIN)
        if origin is not None:
            olds[id(new)] = origin.give_back(new)
    # An old module may hold a swapped one in its turn.
    return revert(_replace(model, olds)) if olds else model


def build_from(module: nn.Module) -> nn.Module | None:
    """The module of ours that would take ``module``'s place, or None if nothing is known of its type.

    Raises:
        UnsupportedError: it would not do what ``module`` does.
    """
    rule = rule_for(module)
    if rule is None:
        return None
    try:
        return rule.build(module)
    except ValueError as error:
        raise error if isinstance(error, UnsupportedError) else UnsupportedError(str(error)) from error


def probability_of(module: nn.Module) -> float | None:
    """The probability that ``module`` has, or None where no attribute says so."""
    value = _raw_probability(module)
    return float(value) if isinstance(value, int | float) else None


def _raw_probability(module: nn.Module) -> Any:
    name = probability_name(module)
    return None if name is None else getattr(module, name)


def _set_probability(module: nn.Module, p: float, path: str) -> None:
    name = probability_name(module)
    if name is None:
        raise ValueError(f"p={p} has nowhere to go in {path!r}: {type(module).__name__} has no probability")
    setattr(module, name, p)


def _note(old: nn.Module, elsewhere: Sequence[str]) -> str:
    notes = []
    if isinstance(old, nn.AlphaDropout | nn.FeatureAlphaDropout) and old.inplace:
        notes.append("inplace=True, which torch ignores, is ignored")
    if elsewhere:
        notes.append(f"still the old one in {', '.join(elsewhere)}")
    return "; ".join(notes)


@dataclass
class _Origin:
    """Kept by a new module, out of sight of ``modules()``: the old one, and how to give it a probability.

    Attributes:
        module: the old one.
        p: its probability when it was swapped.
        built: what the new one's was for it.
        unit: the factor from the old one's to the new one's.
    """

    module: nn.Module
    p: Any
    built: Any
    unit: float

    def give_back(self, new: nn.Module) -> nn.Module:
        old, p = self.module, _raw_probability(new)
        name = probability_name(old)
        if name is not None and p is not None:
            # An unchanged None, or a number that ours cut to 1, is not what the unit would make of it.
            changed = p if self.unit == 1 else p / self.unit
            setattr(old, name, self.p if p == self.built else changed)
        old.training = new.training
        _share_hooks(new, old)
        for store in (parameters_of, buffers_of):
            # A cast or a move replaces buffers, and may replace parameters.
            mine: dict[str, Any] = store(old)
            mine.update({key: value for key, value in store(new).items() if key in mine})
        return old


def _carry_over(new: nn.Module, origin: _Origin) -> None:
    old = origin.module
    new.training = old.training
    _share_hooks(old, new)
    skipped = probability_name(old)  # under a name that nobody reads, it would deceive
    for name, value in vars(old).items():
        if name != skipped:
            vars(new).setdefault(name, value)
    vars(new)[ORIGIN] = origin


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    """The same dictionaries, so that a handle removes its hook from wherever it is now."""
    for name in HOOKS:
        if name in vars(source):
            vars(target)[name] = vars(source)[name]
    hook: Any
    for hook in load_hooks_of(target).values():
        if getattr(hook, "with_module", False):  # it passes on the module it was registered with
            hook.module = weakref.ref(target)


def _replace(model: Model, news: dict[int, nn.Module]) -> Model:
    """Put the new modules in all places of the old ones: in the model, and in what new ones took over."""
    roots: tuple[nn.Module, ...] = (model, *news.values())
    found = [(root, *place) for root in roots for place in places(root)]
    for root, parent, name, child in found:
        new = news.get(id(child))
        if new is not None and new is not root:  # a new one may be built around its old one
            children_of(parent)[name] = new
    replaced: Any = news.get(id(model), model)
    return replaced  # type: ignore[no-any-return]
