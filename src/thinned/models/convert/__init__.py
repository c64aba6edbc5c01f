"""Swaps the dropout modules of a model for ours, and swaps them back."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import nn

from thinned.layers._arguments import check_p
from thinned.models.convert.rules import is_known, make, probability_name, probability_of
from thinned.models.text import Listing, count, format_p
from thinned.models.walk import (
    Choice,
    chooser,
    is_ours,
    modules_with_paths,
    other_references,
    qualified_name,
)
from thinned.torch_state import buffers_of, children_of, load_hooks_of, parameters_of

__all__ = ["Conversion", "Swap", "convert", "revert"]

ORIGIN = "_thinned_origin"
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Swap:
    """The report on one module.

    Attributes:
        paths: all its places in the model; ``path`` is the first.
        old: the name of its type.
        new: the name of the type that took its place; empty if it was left, and ``note`` says why.
        p: its probability now.
        note: a difference that remains, or the reason why it was left.
    """

    paths: tuple[str, ...]
    old: str
    new: str
    p: float | None
    note: str = ""

    @property
    def path(self) -> str:
        """The module's first place in the model; empty for the model itself."""
        return self.paths[0]

    def cells(self) -> list[str]:
        """The words of its row in the table."""
        return [", ".join(self.paths) or "(model)", self.old, self.new, format_p(self.p), self.note]


class Conversion(Listing[Swap], Generic[Model]):
    """The result of :func:`convert`: a sequence of :class:`Swap`, which prints as a table.

    Attributes:
        model: the converted model.
        left: the dropout modules of known types that stay as they are, with the reasons.
    """

    headings = ("path", "type", "becomes", "p", "note")

    def __init__(self, model: Model, swaps: Sequence[Swap], left: Sequence[Swap] = ()) -> None:
        self.model = model
        self.left = tuple(left)
        self._items = tuple(swaps)

    def __repr__(self) -> str:
        stayed = f", {len(self.left)} stayed" if self.left else ""
        return self._print(f"{count(len(self), 'dropout module')} became thinned's{stayed}", self.left)


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

    The probability, the flags, the training mode, the hooks with their handles and the keys of ``state_dict``
    stay. A module with several places in the model becomes one module in all of them. A dropout with methods,
    properties, class attributes, parameters, buffers or children of its own may do what ours does not: it is
    left and reported. A call such as ``F.dropout`` in a forward is no module: :func:`thinned.inspect` lists
    it and :func:`thinned.intercept` replaces it. A list or an attribute that is no child keeps the old
    module, and the swap's note names it.

    Args:
        model: any module. If it is a dropout itself, the new one is ``conversion.model``.
        p: a probability for all modules that are swapped, instead of their own.
        include: swap these only: a path's pattern (:mod:`fnmatch`), several, or a function of path and
            module, which is called for dropout modules alone. One matching path of several suffices.
        exclude: leave these.
        inplace: change ``model``; otherwise ``conversion.model`` is a deep copy.

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
        check_p(p)
    chosen = chooser(include, exclude)
    if not inplace:
        model = copy.deepcopy(model)
    news: dict[int, nn.Module] = {}
    origins: list[tuple[nn.Module, _Origin]] = []
    swaps: dict[int, Swap] = {}
    left = []
    found = modules_with_paths(model)
    elsewhere = other_references(found)
    for module, paths in found:
        if is_ours(module) or not is_known(module) or not chosen(paths, module):
            continue
        old = qualified_name(type(module))
        try:
            new, rule = make(module)
        except ValueError as error:
            left.append(Swap(paths, old, "", probability_of(module), f"left: {error}"))
            continue
        if new is None or new is module:
            continue
        origins.append(
            (new, _Origin(module, _raw_probability(module), _raw_probability(new), rule.unit(module)))
        )
        if p is not None:
            name = probability_name(new)
            if name is None:
                kind = type(new).__name__
                raise ValueError(f"p={float(p)} has nowhere to go in {paths[0]!r}: {kind} has no probability")
            setattr(new, name, float(p))
        news[id(module)] = new
        note = _note(module, elsewhere.get(id(module), ()))
        swaps[id(new)] = Swap(paths, old, qualified_name(type(new)), probability_of(new), note)
    # From here on nothing raises.
    for new, origin in origins:
        origin.carry_over(new)
    model = _replace(model, news)
    # A module within another that was swapped is gone unless the new one has it too.
    return Conversion(model, [swaps[id(m)] for m in model.modules() if id(m) in swaps], left)


def revert(model: Model) -> Model:
    """Undo :func:`convert`: the modules that were swapped come back, in all their places.

    The same modules come back or, in a copy or a loaded pickle of the model, copies of them. The current
    training mode, hooks and probabilities stay, ``p=`` of :func:`convert` included. A type may count its
    probability in another unit, as :func:`register` says: a probability that did not change comes back as it
    was, and one that changed is divided by the unit.

    Args:
        model: a model that :func:`convert` changed, a copy or a part of it; others are left as they are.

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
    # An old module may contain a module that was swapped, too.
    return revert(_replace(model, olds)) if olds else model


def _raw_probability(module: nn.Module) -> Any:
    name = probability_name(module)
    return None if name is None else getattr(module, name)


def _note(old: nn.Module, elsewhere: Sequence[str]) -> str:
    notes = []
    if isinstance(old, nn.AlphaDropout | nn.FeatureAlphaDropout) and old.inplace:
        notes.append("inplace=True, which torch ignores, is ignored")
    if elsewhere:
        notes.append(f"still the old one in {', '.join(elsewhere)}")
    return "; ".join(notes)


@dataclass
class _Origin:
    """An attribute of a new module, hidden from ``modules()``, by which :func:`revert` restores the old one.

    Attributes:
        module: the old module.
        p: its probability when it was swapped.
        built: the probability that the new module got for it.
        unit: the factor from the old probability to the new one.
    """

    module: nn.Module
    p: Any
    built: Any
    unit: float

    def carry_over(self, new: nn.Module) -> None:
        """Give the new module the mode, the hooks and the further attributes of the old one."""
        new.training = self.module.training
        _share_hooks(self.module, new)
        skipped = probability_name(self.module)  # do not copy the old probability: nothing would read it
        for name, value in vars(self.module).items():
            if name != skipped:
                vars(new).setdefault(name, value)
        vars(new)[ORIGIN] = self

    def give_back(self, new: nn.Module) -> nn.Module:
        """The old module with the current probability, mode, hooks, parameters and buffers."""
        old, p, name = self.module, _raw_probability(new), probability_name(self.module)
        if name is not None and p is not None:
            # Division by the unit would not restore None, or a p that the new module limited to 1.
            changed = p if self.unit == 1 else p / self.unit
            setattr(old, name, self.p if p == self.built else changed)
        old.training = new.training
        _share_hooks(new, old)
        for store in (parameters_of, buffers_of):
            # A cast or a move replaces buffers, and may replace parameters.
            mine: dict[str, Any] = store(old)
            mine.update({key: value for key, value in store(new).items() if key in mine})
        return old


def _share_hooks(source: nn.Module, target: nn.Module) -> None:
    """Share the dictionaries themselves, so that a handle removes its hook from both modules."""
    for name in HOOKS:
        if name in vars(source):
            vars(target)[name] = vars(source)[name]
    hook: Any
    for hook in load_hooks_of(target).values():
        if getattr(hook, "with_module", False):  # its first argument is this module
            hook.module = weakref.ref(target)


def _replace(model: Model, news: dict[int, nn.Module]) -> Model:
    """Put the new modules in all places of the old ones, in the model and in the new modules themselves."""
    roots: tuple[nn.Module, ...] = (model, *news.values())
    places = [
        (root, children_of(parent), name, child)
        for root in roots
        for parent in root.modules()
        for name, child in children_of(parent).items()
    ]
    for root, children, name, child in places:
        new = news.get(id(child))
        if new is not None and new is not root:  # a new one may be built around its old one
            children[name] = new
    replaced: Any = news.get(id(model), model)
    return replaced  # type: ignore[no-any-return]
