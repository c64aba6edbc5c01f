"""Lists every place at which a model drops: by its modules, by reading their forwards, and by a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from thinned.models.convert.rules import is_known, make, probability_of
from thinned.models.inspect.by_reading import calls_in_source
from thinned.models.inspect.by_running import TORCH, Event, run_once
from thinned.models.inspect.names import UNCONDITIONAL
from thinned.models.inspect.targets import ELSEWHERE, HAND_WRITTEN, OURS, Call, Kind
from thinned.models.text import Listing, Placed, count, format_p, format_paths
from thinned.models.walk import check_model, is_ours, modules_with_paths, qualified_name

__all__ = ["Inspection", "Site", "inspect"]

INTERCEPT = "thinned.intercept()"
IN_EVALUATION = "drops in evaluation too"
UNKNOWN = "not known to thinned.register"


@dataclass(frozen=True)
class Site(Placed):
    """One place at which a model drops.

    Attributes:
        paths: all places of the module in the model; ``path`` is the first.
        kind: ``"module"``, a dropout module; ``"argument"``, a module of torch.nn that drops by an argument;
            ``"call"``, a functional dropout in a forward; ``"random"``, random numbers in a forward that are
            or may be a dropout; ``"layer"``, a random number that decides whether a layer is skipped.
        type: the type of the module, or the function that is called.
        p: the probability; None if it is unknown.
        becomes: the type that :func:`thinned.convert` puts in its place, or ``thinned.intercept()``, which
            replaces it where convert cannot reach; empty if neither does.
        function, file, line: where a call stands.
        note: a warning, such as that it drops in evaluation too.
        calls: the number of times that it dropped in a run in training; None without a run, and for a module
            that is left, whose calls are sites of their own.
    """

    kind: Kind
    type: str
    p: float | None
    becomes: str
    function: str = ""
    file: str = ""
    line: int = 0
    note: str = ""
    calls: int | None = None

    @property
    def where(self) -> str:
        """``function, line 12 of file.py``; empty for a module."""
        return f"{self.function}, line {self.line} of {Path(self.file).name}" if self.line else ""

    def cells(self) -> list[str]:
        """The words of its row in the table."""
        calls = "" if self.calls is None else str(self.calls)
        return [
            format_paths(self.paths),
            self.type,
            format_p(self.p),
            self.becomes,
            calls,
            self.where,
            self.note,
        ]


class Inspection(Listing[Site]):
    """The result of :func:`inspect`: a sequence of :class:`Site`, which prints as a table."""

    headings = ("path", "type", "p", "becomes", "drops", "where", "note")

    def __init__(self, sites: Sequence[Site]) -> None:
        self._items = tuple(sites)

    @property
    def unreached(self) -> tuple[Site, ...]:
        """The sites that :func:`thinned.convert` does not reach."""
        return tuple(site for site in self if site.becomes in ("", INTERCEPT))

    def __repr__(self) -> str:
        sites = count(len(self), "dropout site")
        return self._print(f"{sites}, {len(self.unreached)} of them beyond thinned.convert")


def inspect(model: nn.Module, /, *args: Any, **kwargs: Any) -> Inspection:
    """List every place at which a model drops, including those that :func:`thinned.convert` cannot reach.

    Dropout modules and modules of torch.nn with a ``dropout`` argument are found by their types. Functional
    dropouts are found in the source of each forward, of the methods and of the functions in its own file
    that it mentions, and of the attention function that transformers chooses; ``p`` is read if it is plainly
    written. So is layerdrop, which skips layers at random. Given inputs,
    the model also runs once in training and once in evaluation: each function that drops and each other use
    of random numbers is reported with its module, its ``p`` and the number of its calls.

    Args:
        model: any module; it is not changed.
        *args: inputs to call it with.
        **kwargs: further inputs, by name.

    Returns:
        An :class:`Inspection`: :class:`Site` after :class:`Site`; printed, a table.

    Raises:
        TypeError: ``model`` is no module.
        Whatever ``model(*args, **kwargs)`` raises.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.LSTM(4, 4, 2, dropout=0.2))
    >>> thinned.inspect(model, torch.ones(3, 4))
    1 dropout site, 1 of them beyond thinned.convert
    path  type                    p    becomes              drops
    0     torch.nn.LSTM(dropout=) 0.2  thinned.intercept()  1
    """
    check_model("inspect", model)
    events = run_once(model, args, kwargs) if args or kwargs else None
    sites: list[Site] = []
    for module, paths in modules_with_paths(model):
        mine = events and [event for event in events if event.module is module]
        site = _of_module(module, paths)
        if site is not None and site.becomes:
            sites.append(_with_run(site, mine))
            continue
        if site is not None:
            sites.append(site)  # its calls are sites of their own
        is_torchs = type(module).__module__.startswith("torch.") and "forward" not in vars(module)
        calls = [] if is_torchs and site is None else calls_in_source(module)
        for event in mine or []:
            if not any(_is_at(event, call) for call in calls):
                calls.append(event.call)
        for call in calls:
            sites.append(_with_run(_of_call(call, paths), mine and [e for e in mine if _is_at(e, call)]))
            mine = mine and [event for event in mine if not _is_at(event, call)]
    return Inspection(sites)


def _of_module(module: nn.Module, paths: tuple[str, ...]) -> Site | None:
    kind, name, p = type(module), qualified_name(type(module)), probability_of(module)
    if is_ours(module):
        return Site(paths, "module", name, p, name)
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        # A recurrent layer drops between its layers, so not if there is only one.
        p = float(module.dropout) if getattr(module, "num_layers", 2) > 1 else 0.0
        return Site(paths, "argument", f"{name}(dropout=)", p, INTERCEPT) if p else None
    if is_known(module):
        try:
            new, _ = make(module)
        except ValueError as error:
            return Site(paths, "module", name, p, "", note=f"left: {error}")
        if new is not None:
            return Site(paths, "module", name, p, qualified_name(type(new)))
    if "drop" in kind.__name__.lower() and not list(module.parameters()) and not list(module.children()):
        return Site(paths, "module", name, p, "", note=UNKNOWN)
    return None


def _of_call(call: Call, paths: tuple[str, ...]) -> Site:
    beyond = call.note in (HAND_WRITTEN, ELSEWHERE) or call.name.startswith("aten.")
    becomes = "" if beyond else call.name if call.name.startswith(OURS) else INTERCEPT
    where = call.function, call.file, call.line
    return Site(paths, call.kind, call.name, call.p, becomes, *where, call.note)


def _with_run(site: Site, events: list[Event] | None) -> Site:
    """The site with the calls, the probability and the note that a run adds; None stands for no run."""
    if events is None or site.note == ELSEWHERE:  # which torch does not see
        return site
    calls = sum(event.calls for event in events if not event.evaluating)
    rates = [event.p for event in events if event.p]
    p = site.p if site.p is not None or not rates else max(rates)
    note = IN_EVALUATION if any(event.evaluating for event in events) else site.note
    return replace(site, p=p, calls=calls, note="" if note == UNCONDITIONAL and calls else note)


def _is_at(event: Event, call: Call) -> bool:
    at = event.call
    if at.name.rpartition(".")[2] != call.name.rpartition(".")[2]:
        return False
    # An event names the caller outside torch, so it has no line of torch's own forward.
    return call.file.startswith(TORCH) or (at.file == call.file and call.line <= at.line <= call.last_line)
