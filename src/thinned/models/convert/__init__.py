"""Swaps the dropout modules of a model for ours, sets its other dropouts' numbers, and undoes both."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from torch import nn

from thinned.layers import Dropout
from thinned.layers._arguments import check_p
from thinned.models.convert.fuse import fused
from thinned.models.convert.report import report_converted, report_reverted
from thinned.models.convert.rules import is_known, make, probability_name, unit_of
from thinned.models.convert.skip import Skips, plan, unskip
from thinned.models.sites import Rate, rates_of
from thinned.models.walk import ORIGIN, Choice, check_model, chooser, is_ours, modules_with_paths
from thinned.torch_state import buffers_of, children_of, load_hooks_of, parameters_of

__all__ = ["convert", "revert"]

BEFORE = "_thinned_before"
HOOKS = tuple(name for name in vars(nn.Module()) if "hook" in name)
Model = TypeVar("Model", bound=nn.Module)


def convert(
    model: Model,
    *,
    p: float | None = None,
    include: Choice | None = None,
    exclude: Choice | None = None,
    fuse: bool = False,
    inplace: bool = True,
    skip: bool = False,
    allow_batch_norm: bool = False,
) -> Model:
    """Swap every dropout module of a model for ours: torch.nn's six, and those of timm, torchvision and
    transformers; :func:`thinned.register` adds others.

    The probability, the flags, the training mode, the hooks with their handles and the keys of ``state_dict``
    stay. A module with several places in the model becomes one module in all of them. A dropout with methods,
    properties, class attributes, parameters, buffers or children of its own may do what ours does not: it
    stays. A call such as ``F.dropout`` in a forward is no module: :func:`thinned.intercept` replaces it. A
    list or an attribute that is no child keeps the old module. The logger ``thinned`` names all of these in
    one WARNING, and at INFO what was swapped; :func:`thinned.inspect` lists each place.

    With ``p``, everything that drops has this probability afterwards, so that ``p=0`` leaves nothing that
    drops. Besides the modules that are swapped, these numbers are set in place:

    - the probability of dropouts of thinned, and of those that are left;
    - ``nn.MultiheadAttention.dropout``, and ``nn.LSTM.dropout``, ``nn.GRU.dropout`` and ``nn.RNN.dropout``
      with several layers;
    - every float from 0 to 1 of a module whose name says that it is one, such as ``attention_dropout``,
      ``layerdrop`` or ``drop_path_rate``;
    - every attribute that the source of a forward passes to a functional dropout, such as ``self.p`` in
      ``F.dropout(x, self.p, self.training)``;
    - the attributes of a config that a forward reads, such as ``self.config.layerdrop``, and the items of a
      dictionary or a list. All models that were built from one config share it, and a saved model has it.

    A layerdrop that is 0 stays 0, because a skipped layer leaves parameters without gradients. So does a 0 in
    a list, which exempts a layer. Another number that is 0 is set, as ``nn.Dropout(0)`` is. The WARNING
    names the places that keep another probability, such as that of ``F.dropout(x, 0.5)``.

    With ``skip=True``, a residual block computes the branch before a DropPath for the rows that it keeps, and
    for no others, as :func:`thinned.functional.residual` does: at p = 0.4 in 60 % of the branch's time. The
    masks are those of DropPath. Outputs and gradients are those of the masked branch to the order of
    floating-point sums, if no other dropout in the branch drops: such a one draws for fewer rows, and has the
    masks of its rows within :func:`thinned.address`.

    The branch is found in the source of the block's forward, in forms such as
    ``x = x + self.drop_path(self.mlp(self.norm(x)))``, over several statements too. The block gets a subclass
    of its class, of the same name; hooks, ``state_dict``, copies and pickles stay. These compute all rows:
    evaluation, p = 0, :func:`torch.vmap`, traces and exports, and calls with a further tensor that may have
    rows of the batch, such as an attention mask whose first size is a multiple of the batch's. An argument
    named ``key_padding_mask`` is known to have a row for each.

    Each row of a branch's result must depend on the same row of its input only. The source shows batch
    normalization, modules with ``batch_first=False``, shifts of features between rows, routed experts and
    reductions along dimension 0 in the branch's modules, and such branches stay as they are. It does not
    show what is hidden in compiled extensions, in state that a module keeps between calls, or in functions
    outside the modules: exclude a DropPath behind such code. The logger says how many branches skip and, in
    a WARNING, which do not and why.

    Args:
        model: any module.
        p: a probability for everything that drops.
        include: convert these only: a path's pattern (:mod:`fnmatch`), a class, or several of both. They
            choose the modules that match, as these are before the conversion, and all that is within them.
            Or a function of path and module, which is called for each module that drops. One matching path
            of several suffices. An attribute is chosen with its module, and that of a config with the modules
            that read it.
        exclude: leave these.
        fuse: in each ``nn.Sequential``, let one layer be a dropout of elements and the ``nn.ReLU``,
            ``nn.GELU`` or ``nn.SiLU`` before it, such as :class:`thinned.ReLUDropout`, which is one pass over
            memory. It stands at the dropout's place, with its masks, and an ``nn.Identity`` at the
            activation's. A pair is chosen by its dropout.
        inplace: change ``model``; otherwise change a deep copy, with a copy of its config.
        skip: compute the branches before DropPath and StochasticDepth for the rows that these keep.
        allow_batch_norm: with ``skip``, let a batch normalization of a branch take its statistics over the
            kept rows alone. These are no longer those of the masked branch.

    Returns:
        ``model``; the copy if ``inplace`` is false; the new module if ``model`` is itself a dropout.

    Warns:
        UserWarning: a pattern or a class matches no module of the model.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or given where a new module has no probability. Whatever is
            raised, the model is as it was.
        TypeError: ``model`` is no module, or ``include`` or ``exclude`` is none of these.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    >>> thinned.convert(model)
    Sequential(
      (0): Linear(in_features=4, out_features=4, bias=True)
      (1): thinned.Dropout(p=0.1, inplace=False)
    )
    >>> type(model[1])
    <class 'thinned.layers.dropout.Dropout'>

    With ``skip=True`` this layer attends in the rows alone that ``dropout1`` keeps:

    >>> layer = torch.nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    >>> layer.dropout1 = thinned.DropPath(0.4)
    >>> layer = thinned.convert(layer, skip=True)
    """
    check_model("convert", model)
    if p is not None:
        check_p(p)
    chosen = chooser(model, include, exclude)
    if not inplace:
        model = copy.deepcopy(model)
    news: dict[int, nn.Module] = {}
    origins: list[tuple[nn.Module, _Origin]] = []
    found = modules_with_paths(model)
    for module, paths in found:
        if is_ours(module) or not is_known(module) or not chosen(paths, module):
            continue
        try:
            new, rule = make(module)
        except ValueError:
            continue  # the log says why
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
    skips = plan(found, chosen, allow_batch_norm) if skip else Skips()
    numbers = 0 if p is None else _set_all(model, float(p), chosen, news)
    drops = {
        id(new)
        for old, paths in (found if fuse else ())
        if isinstance(new := news.get(id(old), old), Dropout) and chosen(paths, old)
    }
    # From here on nothing raises.
    for new, origin in origins:
        origin.carry_over(new)
    model = _replace(model, news)
    pairs = fused(model, drops)
    for old, new in pairs.values():
        _Origin(old, _raw_probability(old), _raw_probability(new), 1.0).carry_over(new)
        vars(new).pop("inplace", None)  # neither new module writes over its input
        if ORIGIN in vars(old):  # it comes back, and not a layer of ours between
            vars(new)[ORIGIN] = vars(old)[ORIGIN]
    twins = {key: new for key, (_, new) in pairs.items()}
    model = _replace(model, twins)
    news = {key: twins.get(id(new), new) for key, new in news.items()}
    for block, skipping in skips.classes:
        block.__class__ = skipping
    pairs_fused = sum(map(is_ours, twins.values()))
    report_converted(model, found, news, numbers, p, chosen, pairs_fused, skips if skip else None)
    return model


def _set_all(
    model: nn.Module, p: float, chosen: Callable[[tuple[str, ...], nn.Module], bool], swapped: Container[int]
) -> int:
    """Set the numbers that ``model`` drops with, but for modules that are swapped: all, or none and raise.

    Returns how many changed.
    """
    done: list[tuple[Rate, float]] = []
    try:
        for rate in rates_of(model):
            old = rate.value
            if (
                id(rate.owner) in swapped
                or (rate.stays_off and not old)
                or not chosen(rate.paths, rate.module)
            ):
                continue
            unit = unit_of(rate.module) if rate.of_module else 1.0
            new = p / unit if unit else old
            if new != old:
                done.append((rate, old))
                rate.value = new
    except Exception:
        for rate, old in done:
            rate.value = old
        raise
    for rate, old in done:
        # A module that convert made keeps its probability when it is swapped back.
        if not (rate.of_module and ORIGIN in vars(rate.module)):
            _remember(rate, old)
    return len(done)


class _Before(NamedTuple):
    """A number that ``convert(p=)`` set."""

    rate: Rate
    old: float
    new: float


def _remember(rate: Rate, old: float) -> None:
    """Keep what a number was, in a hidden attribute of the module that drops with it."""
    known: list[_Before] = vars(rate.module).setdefault(BEFORE, [])
    for i, before in enumerate(known):
        if before.rate.owner is rate.owner and before.rate.name == rate.name:
            del known[i]
            old = before.old if before.new == old else old
            break
    known.append(_Before(rate, old, rate.value))


def revert(model: Model) -> Model:
    """Undo :func:`convert`: the modules that were swapped come back, in all their places, and so do the
    numbers that ``p=`` set in place, and the forwards that ``skip=True`` changed.

    A number that was set again since, as by :class:`thinned.DropoutSchedule`, stays as it is.

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
    >>> thinned.revert(thinned.convert(model))[1]
    Dropout(p=0.1, inplace=False)
    >>> type(model[1])
    <class 'torch.nn.modules.dropout.Dropout'>
    """
    check_model("revert", model)
    modules = numbers = blocks = 0
    while True:
        for module in model.modules():
            blocks += unskip(module)
            for rate, before, now in vars(module).pop(BEFORE, ()):
                if rate.value == now:
                    rate.value = before
                    numbers += 1
        olds: dict[int, nn.Module] = {}
        for new in model.modules():
            origin = vars(new).get(ORIGIN)
            if origin is not None:
                olds[id(new)] = origin.give_back(new)
        if not olds:
            break
        model = _replace(model, olds)
        modules += len(olds)  # an old module may contain a module that was swapped, too
    report_reverted(model, modules, numbers, blocks)
    return model


def _raw_probability(module: nn.Module) -> Any:
    name = probability_name(module)
    return None if name is None else getattr(module, name)


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
            if name not in (skipped, BEFORE):
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
