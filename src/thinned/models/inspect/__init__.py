"""Every place at which a model drops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

from torch import nn

from thinned.models.convert import build_from, probability_of
from thinned.models.convert.rules import UnsupportedError, is_ours, qualified_name
from thinned.models.inspect.by_reading import UNCONDITIONAL, Call, calls_in_source
from thinned.models.inspect.by_running import TORCH, Event, run_once
from thinned.models.inspect.targets import HAND_WRITTEN
from thinned.models.text import count, format_p, merge_paths, to_text
from thinned.models.walk import modules_with_paths

__all__ = ["Inspection", "Site", "inspect"]

Kind = Literal["module", "argument", "call", "random"]
INTERCEPT = "thinned.intercept()"
IN_EVALUATION = "drops in evaluation too"
UNKNOWN = "not known to thinned.register"


@dataclass(frozen=True)
class Site:
    """One place at which a model drops.

    Attributes:
        paths: of the module, one for each of its places in the model; ``path`` is the first.
        kind: ``"module"``, a dropout module; ``"argument"``, a module of torch.nn that drops by an argument;
            ``"call"``, a functional dropout in a forward; ``"random"``, random numbers in a forward that may
            be a dropout.
        type: of the module, or what is called.
        p: the probability, if it is known.
        becomes: the type that :func:`thinned.convert` puts in its place, or ``thinned.intercept()``, which
            replaces it where convert cannot reach; empty if neither does.
        function, file, line: for a call, where it stands.
        note: such as that it drops in evaluation too.
        calls: how often it dropped in a run in training; None without a run, and for a module that is left,
            of which the calls in its forward are told.
    """

    paths: tuple[str, ...]
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
    def path(self) -> str:
        """Of the module's first place in the model; empty for the model itself."""
        return self.paths[0]

    @property
    def where(self) -> str:
        """``function, line 12 of file.py``; empty for a module."""
        return f"{self.function}, line {self.line} of {Path(self.file).name}" if self.line else ""

    def cells(self) -> list[str]:
        """As the table has it."""
        calls = "" if self.calls is None else str(self.calls)
        path = ", ".join(self.paths) or "(model)"
        return [path, self.type, format_p(self.p), self.becomes, calls, self.where, self.note]


class Inspection(Sequence[Site]):
    """What :func:`inspect` found: a sequence of sites, which prints as a table."""

    headings = ("path", "type", "p", "becomes", "drops", "where", "note")

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = tuple(sites)

    @overload
    def __getitem__(self, index: int) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Site]: ...

    def __getitem__(self, index: int | slice) -> Site | Sequence[Site]:
        return self._sites[index]

    def __len__(self) -> int:
        return len(self._sites)

    @property
    def unreached(self) -> tuple[Site, ...]:
        """The sites that :func:`thinned.convert` does not reach."""
        return tuple(site for site in self if site.kind != "module" or not site.becomes)

    def __repr__(self) -> str:
        beyond = len(self.unreached)
        summary = f"{count(len(self), 'dropout site')}, {beyond} of them beyond thinned.convert"
        rows = merge_paths([site.cells() for site in self])
        return f"{summary}\n{to_text(self.headings, rows)}" if rows else summary


def inspect(model: nn.Module, /, *args: Any, **kwargs: Any) -> Inspection:
    """List every place at which a model drops, those that swapping modules cannot reach among them.

    The dropout modules and the modules of torch.nn with a ``dropout`` argument are found by their types.
    Functional dropouts are found in the source of each module's forward, of the methods and functions that
    it mentions in its own file, and of the attention function that transformers chooses. What source does
    not show, a run does: given inputs, the model is called once in training and once in evaluation, and
    every function that drops, and every other drawing of random numbers, is told with its module.

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
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {model!r} of type {type(model).__name__}")
    events = run_once(model, args, kwargs) if args or kwargs else None
    sites: list[Site] = []
    for module, paths in modules_with_paths(model):
        mine = [] if events is None else [event for event in events if event.module is module]
        site = _of_module(module, paths)
        if site is not None:
            if site.becomes:
                sites.append(site if events is None else _with_run(site, mine))
                continue
            sites.append(site)  # what it calls is told of it, too
        torchs = site is None and type(module).__module__.startswith("torch.")
        calls = [] if torchs else calls_in_source(module)
        found = [(call, _of_call(call, paths)) for call in calls]
        if events is None:
            sites += [site for _, site in found]
            continue
        for call, site in found:
            here = [event for event in mine if _is_at(event, call)]
            mine = [event for event in mine if event not in here]
            sites.append(_with_run(site, here))
        sites += _of_events(mine, paths)
    return Inspection(sites)


def _of_module(module: nn.Module, paths: tuple[str, ...]) -> Site | None:
    kind = type(module)
    name = qualified_name(kind)
    if is_ours(module):
        return Site(paths, "module", name, probability_of(module), name)
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        # A recurrent layer drops between its layers, of which there may be one.
        p = float(module.dropout) if getattr(module, "num_layers", 2) > 1 else 0.0
        return Site(paths, "argument", f"{name}(dropout=)", p, INTERCEPT) if p else None
    try:
        new = build_from(module)
    except UnsupportedError as error:
        return Site(paths, "module", name, probability_of(module), "", note=f"left: {error}")
    if new is not None:
        return Site(paths, "module", name, probability_of(module), qualified_name(type(new)))
    if "drop" in kind.__name__.lower() and not list(module.parameters()) and not list(module.children()):
        return Site(paths, "module", name, probability_of(module), "", note=UNKNOWN)
    return None


def _of_call(call: Call, paths: tuple[str, ...]) -> Site:
    by_hand = call.note == HAND_WRITTEN
    kind: Kind = "random" if by_hand else "call"
    becomes = "" if by_hand else INTERCEPT
    return Site(paths, kind, call.name, call.p, becomes, call.function, call.file, call.line, call.note)


def _of_events(events: list[Event], paths: tuple[str, ...]) -> list[Site]:
    sites = []
    for (name, file, line), these in _grouped(events).items():
        first = these[0]
        kind: Kind = "random" if first.note else "call"
        becomes = "" if first.name.startswith("aten.") else INTERCEPT
        site = Site(paths, kind, name, None, becomes, first.function, file, line, first.note)
        sites.append(_with_run(site, these))
    return sites


def _grouped(events: list[Event]) -> dict[tuple[str, str, int], list[Event]]:
    groups: dict[tuple[str, str, int], list[Event]] = {}
    for event in events:
        groups.setdefault((event.name, event.file, event.line), []).append(event)
    return groups


def _with_run(site: Site, events: list[Event]) -> Site:
    """The site with what a run says of it."""
    calls = sum(event.calls for event in events if not event.evaluating)
    rates = [event.p for event in events if event.p]
    p = site.p if site.p is not None or not rates else max(rates)
    note = IN_EVALUATION if any(event.evaluating for event in events) else site.note
    if note == UNCONDITIONAL and calls:
        note = ""
    return replace(site, p=p, calls=calls, note=note)


def _is_at(event: Event, call: Call) -> bool:
    if event.name.rpartition(".")[2] != call.name.rpartition(".")[2]:
        return False
    # An event names the caller outside torch, which for torch's own forward is not the forward.
    return call.file.startswith(TORCH) or (
        event.file == call.file and call.line <= event.line <= call.last_line
    )
