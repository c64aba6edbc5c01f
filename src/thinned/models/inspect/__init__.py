"""Lists every place at which a model drops: by its modules, by reading their forwards, and by a run."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, overload

import torch
from torch import nn

from thinned.models.convert.rules import is_dropout, is_known, make, numbers_of, probability_of, refusal
from thinned.models.inspect.branches import branches_of
from thinned.models.inspect.by_reading import calls_in_source
from thinned.models.inspect.by_running import TORCH, Event, run_once
from thinned.models.inspect.names import UNCONDITIONAL
from thinned.models.inspect.targets import ELSEWHERE, HAND_WRITTEN, Call, Kind
from thinned.models.intercept import Intercepted, is_intercepted
from thinned.models.text import WIDTH, count, format_p, format_paths, merge_paths, to_text
from thinned.models.walk import (
    check_model,
    is_ours,
    modules_in_containers,
    modules_with_paths,
    original,
    qualified_name,
)

__all__ = ["Inspection", "Site", "Status", "inspect"]

Status = Literal["thinned", "convert", "intercept", "register", "off", "perhaps", "beyond"]
# The words that follow one site and several; those of a row have no "is".
WORDS: dict[Status, tuple[str, str]] = {
    "thinned": ("is thinned's", "are thinned's"),
    "convert": ("becomes thinned's by thinned.convert()", "become thinned's by thinned.convert()"),
    "intercept": ("needs thinned.intercept()", "need thinned.intercept()"),
    "register": ("needs thinned.register()", "need thinned.register()"),
    "off": ("is off (p = 0)", "are off (p = 0)"),
    "perhaps": ("is perhaps a dropout", "are perhaps dropouts"),
    "beyond": ("is out of reach", "are out of reach"),
}
HEADINGS = ("path", "type", "p", "drops", "status")
IN_EVALUATION = "drops in evaluation too"
INTERCEPTED = "by thinned.intercept()"
SCRIPTED = "TorchScript: convert before torch.jit.script"
NO_CHILD = "no child of a module, so convert() and eval() do not reach it"


@dataclass(frozen=True)
class Site:
    """One place at which a model drops.

    Attributes:
        paths: all places of the module in the model; ``path`` is the first. A module that is no child, but in
            a list or a dictionary, has the path ``drops[0]``.
        kind: ``"module"``, a dropout module; ``"argument"``, a module of torch.nn that drops by an argument;
            ``"call"``, a functional dropout in a forward; ``"random"``, random numbers in a forward that are
            or may be a dropout; ``"layer"``, a random number that decides whether a layer is skipped.
        type: the type of the module, or the function that is called.
        p: the probability; None if it is unknown or learned, or if the module has several.
        status: whose it is, and how to reach it: ``"thinned"``, it draws from thinned; ``"convert"``,
            ``"intercept"`` or ``"register"``, it will with :func:`thinned.convert`, with
            :func:`thinned.intercept` or, as convert leaves it, with a rule by :func:`thinned.register`;
            ``"off"``, it would need one of the last two but drops nothing; ``"perhaps"``, random numbers that
            are perhaps a dropout written by hand; ``"beyond"``, nothing of thinned reaches it.
        becomes: the type that :func:`thinned.convert` puts in its place; empty if it puts none.
        was: the type that :func:`thinned.convert` put it in place of; empty if it did not.
        function, file, line: where a call stands.
        note: a warning, such as that it drops in evaluation too, or the reason why convert leaves it.
        calls: the number of times that it dropped in a run in training; None without a run.
        skip: what :func:`thinned.convert` with ``skip=True`` does to a DropPath: ``"can skip norm1, attn"``,
            after it ``"skips norm1, attn"``, or ``"cannot skip: "`` and the reason. Empty for other sites.
        saves: the share of a forward pass's floating-point operations that skipping saves on average:
            ``p`` times the share of the modules in ``skip``. None without a run, and where nothing can skip.
    """

    paths: tuple[str, ...]
    kind: Kind
    type: str
    p: float | None
    status: Status
    becomes: str = ""
    was: str = ""
    function: str = ""
    file: str = ""
    line: int = 0
    note: str = ""
    calls: int | None = None
    skip: str = ""
    saves: float | None = None

    @property
    def path(self) -> str:
        """The module's first place in the model; empty for the model itself."""
        return self.paths[0]

    @property
    def where(self) -> str:
        """``file.py:12``, where a call stands; empty for a module."""
        return f"{Path(self.file).name}:{self.line}" if self.line else ""

    def cells(self) -> list[str]:
        """The words of its row in the table."""
        status = f"was {self.was}" if self.was else f"becomes {self.becomes}" if self.becomes else ""
        status = status or WORDS[self.status][0].removeprefix("is ")
        skip = self.skip if self.saves is None else f"{self.skip} ({_percent(self.saves)} of the FLOPs)"
        notes = "" if self.status == "off" else "; ".join(filter(None, [self.note, skip]))
        return [
            format_paths(self.paths),
            ", ".join(filter(None, [self.type, self.where])),
            format_p(self.p),
            "" if self.calls is None else str(self.calls),
            ": ".join(filter(None, [status, notes])),
        ]


class Inspection(Sequence[Site]):
    """The result of :func:`inspect`: a sequence of :class:`Site`, which prints as a table."""

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

    def table(self, width: int = WIDTH) -> str:
        """A line with the numbers of sites, and the table, wrapped to ``width`` characters."""
        counts = Counter(site.status for site in self)
        parts = [f"{n} {WORDS[status][n > 1]}" for status in WORDS if (n := counts[status])]
        summary = count(len(self), "dropout site") + f": {', '.join(parts)}" * bool(parts)
        if saves := sum(site.saves or 0.0 for site in self):
            summary += f"; skipping saves {_percent(saves)} of the FLOPs"
        rows = merge_paths([site.cells() for site in self])
        return "\n".join([textwrap.fill(summary, width), *([to_text(HEADINGS, rows, width)] if rows else [])])

    def __repr__(self) -> str:
        return self.table()


def inspect(model: nn.Module, /, *args: Any, **kwargs: Any) -> Inspection:
    """List every place at which a model drops: if it is thinned's, what it was, and how thinned reaches it.

    Dropout modules and modules of torch.nn with a ``dropout`` argument are found by their types, also those
    in a list. Functional dropouts, torch's and thinned's, are found in the source of each forward, of the
    methods and of the functions in its own file that it mentions, and of the attention function that
    transformers chooses; ``p`` is read if it is plainly written. So is layerdrop, which skips layers at
    random. Given inputs, the model also runs once in training and once in evaluation: each function that
    drops and each other use of random numbers is reported with its module, its ``p`` and the number of its
    calls. For a DropPath it says which modules ``convert(model, skip=True)`` skips, or why it cannot; given
    inputs also which share of the floating-point operations of a forward pass that saves.

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
    1 dropout site: 1 needs thinned.intercept()
    path  type                     p    drops  status
    0     torch.nn.LSTM(dropout=)  0.2  1      needs thinned.intercept()
    """
    check_model("inspect", model)
    found = modules_with_paths(model)
    hidden = modules_in_containers(found)
    orphans = {id(module) for module, _ in hidden}
    branches, flops = branches_of(module for module, _ in found), Counter[int]()
    counted = flops if branches else None
    events = run_once(model, args, kwargs, orphans, counted) if args or kwargs else None
    wrapped = {id(inner) for each, _ in found if isinstance(each, Intercepted) for inner in each.modules()}
    sites: list[Site] = []
    for module, paths in [*found, *hidden]:
        mine = events and [event for event in events if event.module is module]
        for site in _sites_of(module, paths, mine):
            if site.status in ("convert", "intercept") and (is_intercepted() or id(module) in wrapped):
                site = _noted(replace(site, status="thinned", becomes=""), INTERCEPTED)
            if id(module) in orphans:
                status = "intercept" if site.status == "convert" else site.status
                site = _noted(replace(site, status=status, becomes=""), NO_CHILD)
            if (branch := branches.get(id(module))) is not None:
                site = replace(
                    site, skip=str(branch), saves=_saved(site.p, branch.flops(flops), flops[id(model)])
                )
            is_off = site.p == 0 and site.status not in ("thinned", "convert")
            sites.append(replace(site, status="off") if is_off else site)
    return Inspection(sites)


def _saved(p: float | None, skipped: int, whole: int) -> float | None:
    return p * skipped / whole if p is not None and skipped else None


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _sites_of(module: nn.Module, paths: tuple[str, ...], events: list[Event] | None) -> Iterator[Site]:
    """The sites of one module, given the events of a run."""
    site = _of_module(module, paths)
    if site is not None and site.status != "register":
        yield _with_run(site, events)
        return
    is_torchs = type(module).__module__.startswith("torch.") and "forward" not in vars(module)
    calls = [] if is_torchs and site is None else calls_in_source(module)
    for event in events or []:
        if not any(_is_at(event, call) for call in calls):
            calls.append(event.call)
    if site is not None and not calls:
        yield _with_run(site, events)
    for call in calls:
        at_call = _of_call(call, paths)
        if isinstance(module, torch.jit.ScriptModule) and at_call.status != "thinned":
            at_call = _noted(replace(at_call, status="beyond"), SCRIPTED)
        if site is not None:  # the module stays, and drops here
            p = site.p if at_call.p is None and call.kind != "call" else at_call.p
            at_call = _noted(replace(at_call, p=p), site.note)
        yield _with_run(at_call, events and [event for event in events if _is_at(event, call)])
        events = events and [event for event in events if not _is_at(event, call)]


def _of_module(module: nn.Module, paths: tuple[str, ...]) -> Site | None:
    name, p, numbers = qualified_name(type(module)), probability_of(module), numbers_of(module)
    if is_ours(module) and is_dropout(module):
        was = original(module)
        several = ", ".join(f"{each}={value:g}" for each, value in numbers.items() if value)
        return Site(
            paths,
            "module",
            name,
            p,
            "thinned",
            was="" if was is module else qualified_name(type(was)),
            note=several if p is None else "",
        )
    if isinstance(module, nn.MultiheadAttention | nn.RNNBase):
        return Site(paths, "argument", f"{name}(dropout=)", p, "intercept") if numbers else None
    if reason := refusal(module):
        return Site(paths, "module", name, p, "register", note=reason)
    new = make(module)[0] if is_known(module) else None
    if new is None or new is module:
        return None
    return Site(paths, "module", name, probability_of(new), "convert", qualified_name(type(new)))


def _of_call(call: Call, paths: tuple[str, ...]) -> Site:
    status: Status = "intercept"
    if call.name.startswith("thinned."):
        status = "thinned"
    elif call.note == HAND_WRITTEN:
        status = "perhaps"
    elif call.note == ELSEWHERE or call.name.startswith("aten."):
        status = "beyond"
    where = call.function, call.file, call.line
    return Site(paths, call.kind, call.name, call.p, status, "", "", *where, call.note)


def _noted(site: Site, note: str) -> Site:
    return replace(site, note="; ".join(filter(None, [site.note, note])))


def _with_run(site: Site, events: list[Event] | None) -> Site:
    """The site with the calls, the probability and the note that a run adds; None stands for no run."""
    if events is None or site.note == ELSEWHERE:  # which torch does not see
        return site
    calls = sum(event.calls for event in events if not event.evaluating)
    rates = [event.p for event in events if event.p]
    p = site.p if site.p or not rates else max(rates)
    site = replace(site, p=p, calls=calls, note="" if site.note == UNCONDITIONAL and calls else site.note)
    return _noted(site, IN_EVALUATION) if any(event.evaluating for event in events) else site


def _is_at(event: Event, call: Call) -> bool:
    at = event.call
    if at.name.rpartition(".")[2] != call.name.rpartition(".")[2]:
        return False
    # An event names the caller outside torch, so it has no line of torch's own forward.
    return call.file.startswith(TORCH) or (at.file == call.file and call.line <= at.line <= call.last_line)
