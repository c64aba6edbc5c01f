"""What :func:`thinned.convert` and :func:`thinned.revert` tell the logger ``thinned``."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from thinned.layers import ConcreteDropout, VariationalDropout
from thinned.models.convert.rules import is_dropout, probability_name, probability_of, refusal
from thinned.models.convert.skip import Skips
from thinned.models.inspect import NO_CHILD, WORDS, Site, Status, inspect
from thinned.models.sites import rates_of
from thinned.models.text import count, format_p, format_paths, merge_paths
from thinned.models.walk import (
    is_ours,
    modules_in_containers,
    modules_with_paths,
    other_references,
    qualified_name,
)

__all__ = ["report_converted", "report_reverted"]

LOG = logging.getLogger("thinned")
Chosen = Callable[[tuple[str, ...], nn.Module], bool]
NAMED = 6  # places or types in one line


@contextmanager
def _never_raises() -> Iterator[None]:
    try:
        yield
    except Exception:
        LOG.debug("thinned.convert could not say what it left", exc_info=True)


@_never_raises()
def report_converted(
    model: nn.Module,
    found: Sequence[tuple[nn.Module, tuple[str, ...]]],
    news: Mapping[int, nn.Module],
    numbers: int,
    p: float | None,
    chosen: Chosen,
    skips: Skips | None = None,
) -> None:
    """Log what a conversion did, at INFO, and what still drops, at WARNING; never raises.

    Args:
        model: the converted model.
        found: :func:`modules_with_paths` before the conversion.
        news: what took the place of a module, by the old one's id.
        numbers: how many numbers ``p`` set.
        p: the probability that was asked for.
        chosen: whether a module takes part.
        skips: what was found by ``skip=True``; None without it.
    """
    if not LOG.isEnabledFor(logging.WARNING):
        return  # the reading of the source takes the most time

    def is_chosen(paths: tuple[str, ...], module: nn.Module) -> bool:
        try:
            return chosen(paths, module)
        except Exception:  # a function that reads module.p, of a module that calls F.dropout
            return True

    caller = f"thinned.convert({type(model).__name__})"
    made = {id(new) for new in news.values()}
    # A module within another that was swapped is gone unless the new one has it too.
    swapped = sum(id(module) in made for module in model.modules())
    ours = sum(is_ours(module) and is_chosen(paths, module) for module, paths in found)
    done = [f"{count(swapped, 'dropout module')} became thinned's"]
    done += [f"{count(ours, 'module')} already {'was' if ours == 1 else 'were'} thinned's"] * bool(ours)
    done += [f"{count(numbers, 'number')} set to p={p}"] * bool(numbers)
    if skips is not None and (n := len(skips.done)):
        done.append(f"{n} {'branches compute their' if n > 1 else 'branch computes its'} kept rows alone")
    LOG.info("%s: %s", caller, ", ".join(done))

    modules = dict(model.named_modules(remove_duplicate=False))
    sites = inspect(model)
    mine = [site for site in sites if site.path in modules and is_chosen(site.paths, modules[site.path])]
    left = [site for site in mine if site.status not in ("thinned", "convert", "off")]
    stayed = {site.path: why for site in left if (why := refusal(modules[site.path]))}
    told = [
        *_stayed(stayed, modules, {site.path for site in left if site.status == "intercept"}),
        *_are_no_modules([site for site in left if site.path not in stayed], swapped),
        *_old_ones(found, news),
        *_no_children(model, news, is_chosen),
    ]
    if skips is not None:
        told += _computed_in_full(skips)
    if p is not None:
        others = (site for site in mine if site.status != "perhaps")
        told += _with_another_p([site for site in others if not _has(site, modules[site.path], p)], p)
    if told:
        LOG.warning("%s: %s; thinned.inspect(model) lists all", caller, "; ".join(told))
    elif not (swapped or ours or numbers):
        if sites and not mine:
            LOG.warning("%s: include and exclude choose none of its dropouts", caller)
        elif rates_of(model) or sites:
            LOG.info("%s: its dropouts are no modules and have p=0", caller)
        else:
            LOG.warning("%s: found no dropout in its modules and their source", caller)


def _stayed(
    reasons: Mapping[str, str], modules: Mapping[str, nn.Module], intercepted: Collection[str]
) -> Iterator[str]:
    """The dropout modules that no rule swaps, and why, by their paths."""
    if reasons:
        names = _counted(f"{qualified_name(type(modules[path]))} ({why})" for path, why in reasons.items())
        n = sum(path in intercepted for path in reasons)
        yield (
            f"{count(len(reasons), 'dropout module')} stayed: {names}; thinned.register adds a type"
            + f", thinned.intercept() reaches the calls in {n} of them" * bool(n)
        )


def _are_no_modules(left: Sequence[Site], swapped: int) -> Iterator[str]:
    reached = [site for site in left if site.status == "intercept"]
    if reached:
        n, names = len(reached), _counted(site.type for site in reached)
        drop = "drop and are no modules" if n > 1 else "drops and is no module"
        what = f"{count(n, 'more place' if swapped else 'place')} {drop}"
        yield f"{what}: {names}; thinned.intercept() reaches {'them' if n > 1 else 'it'}"
    statuses: tuple[Status, ...] = ("perhaps", "beyond")
    for status in statuses:
        sites = [site for site in left if site.status == status]
        if sites:
            names = _counted(f"{site.type}" + f" ({site.note})" * bool(site.note) for site in sites)
            yield f"{count(len(sites), 'place')} {WORDS[status][len(sites) > 1]}: {names}"


def _old_ones(
    found: Sequence[tuple[nn.Module, tuple[str, ...]]], news: Mapping[int, nn.Module]
) -> Iterator[str]:
    """The lists and attributes that are no children and still hold a module that was swapped."""
    elsewhere = other_references(found)
    for module, paths in found:
        if id(module) in news and id(module) in elsewhere:
            names = elsewhere[id(module)]
            hold = "hold" if len(names) > 1 else "holds"
            yield f"{', '.join(names)} still {hold} the old module of {format_paths(paths)}"


def _no_children(model: nn.Module, news: Mapping[int, nn.Module], is_chosen: Chosen) -> Iterator[str]:
    """The dropouts in lists and attributes that never were children."""
    for module, paths in modules_in_containers(modules_with_paths(model)):
        drops = is_dropout(module) and probability_of(module) != 0
        if drops and not is_ours(module) and id(module) not in news and is_chosen(paths, module):
            yield f"{paths[0]} is {NO_CHILD}"


def _computed_in_full(skips: Skips) -> Iterator[str]:
    """The branches that do not skip, and why."""
    if skips.left:
        shown = [f"{path} ({reason})" for path, reason in merge_paths(skips.left)]
        compute = "branches compute" if len(skips.left) > 1 else "branch computes"
        yield f"{len(skips.left)} {compute} all rows: {_listed(shown)}"
    elif not skips.done:
        yield "skip=True found no DropPath"


def _has(site: Site, module: nn.Module, p: float) -> bool:
    """Whether a site drops with ``p`` or not at all, as far as the source says."""
    if isinstance(module, ConcreteDropout | VariationalDropout):
        return False  # it learns its probability
    if site.p in (p, 0) or (site.kind == "module" and is_ours(module)):
        return True
    # A module called a dropout draws with its own probability, unless the site is a call of torch's
    # dropouts. None stands for 0.
    name = probability_name(module) if site.kind != "call" and is_dropout(module) else None
    return name is not None and isinstance(getattr(module, name), int | float | None)


def _with_another_p(sites: Sequence[Site], p: float) -> Iterator[str]:
    rows = [(format_paths(site.paths), f"{site.type}, p={format_p(site.p) or 'unknown'}") for site in sites]
    if rows:
        shown = [f"{path} ({what})" for path, what in merge_paths(rows)]
        keep = "places keep" if len(rows) > 1 else "place keeps"
        yield f"{len(rows)} {keep} another p than {p:g}: {_listed(shown)}"


def _counted(names: Iterable[str]) -> str:
    """``F.dropout (2), torch.rand``."""
    return _listed([name + f" ({n})" * (n > 1) for name, n in Counter(names).most_common()])


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + f" and {len(names) - NAMED} more" * (len(names) > NAMED)


def report_reverted(model: nn.Module, modules: int, numbers: int, blocks: int) -> None:
    """Log what a revert undid, at INFO."""
    done = f"{count(modules, 'module')} and {count(numbers, 'number')} came back"
    done += f", {count(blocks, 'block')} no longer {'skips' if blocks == 1 else 'skip'}" * bool(blocks)
    LOG.info("thinned.revert(%s): %s", type(model).__name__, done)
