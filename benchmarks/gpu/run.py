"""Check, measure, append to results.csv, and print the targets beside what was found."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Annotated, Any, TypeVar
from unittest import mock

import torch
import triton
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

import thinned
from benchmarks import record
from benchmarks.case import Result
from benchmarks.gpu.cases import DTYPES, cases, compilations, peak_setting, peaks
from benchmarks.gpu.place import DRY_RUN, GPU, Place
from benchmarks.gpu.targets import MASK, TARGETS, mask_saved, verdict
from thinned import backends
from thinned.backends.verify import bits
from thinned.compare.figures import duration, significant

__all__ = ["main"]

T = TypeVar("T")

NOTHING = "DRY RUN: Triton's interpreter computes on the CPU. These timings mean nothing. No row is saved."
LEFT_OUT = (
    "left out: CUDA graphs; CUDA events (the CPU's clock instead); Inductor (aot_eager instead); peak memory "
    f"(the bytes that stay for backward instead); more than {DRY_RUN.large} elements"
)


def main(
    only: Annotated[str, typer.Option(help="run only cases whose group or setting contains this")] = "",
    save: Annotated[bool, typer.Option(help="append to benchmarks/results.csv")] = True,
) -> None:
    """Time thinned on a GPU against its peers by turns; print whether each target is met.

    Without a GPU, or with TRITON_INTERPRET=1, this is a dry run on tiny sizes.
    """
    console = Console(
        width=None if sys.stdout.isatty() else 130, highlight=False, markup=False, soft_wrap=True
    )
    dry = os.environ.get("TRITON_INTERPRET") == "1"
    place = DRY_RUN if dry else GPU
    if dry:
        console.print(NOTHING)
        console.print(LEFT_OUT)
    elif reason := backends.why_not_triton(place.device):
        console.print(f"no kernel to measure: {reason}")
        raise typer.Exit(1)
    if different := _different(place):
        console.print(f"not the CPU's bits: {', '.join(different)}")
        raise typer.Exit(1)
    console.print("outputs and gradients have the CPU's bits")
    with _served(place):
        whole = _measure(console, place, only, save and not dry)
    if dry:
        console.print(NOTHING)
    raise typer.Exit(0 if whole else 1)


def _served(place: Place) -> AbstractContextManager[Any]:
    """Until the end of the context the Triton backend serves the place, a CPU too."""
    if place.device != "cpu":
        return nullcontext()
    kernel = backends.available()["triton"]
    return mock.patch.object(backends, "for_device_type", return_value=kernel)


def _different(place: Place) -> list[str]:
    """The shapes and dtypes whose output or gradient differs from the CPU's in any bit."""
    found = []
    for shape, dtype, p in product(((place.large + 5,), (3, 50)), DTYPES, (0.5, 0.1)):
        x, grad = torch.randn(2, *shape, dtype=dtype)
        expected = _both(x, grad, p)
        with _served(place):
            results = _both(x.to(place.device), grad.to(place.device), p)
        if any(not torch.equal(bits(a), bits(b)) for a, b in zip(results, expected, strict=True)):
            found.append(f"{dtype} {shape} p = {p}")
    return found


def _both(x: Tensor, grad: Tensor, p: float) -> tuple[Tensor, Tensor]:
    x = x.requires_grad_()
    y = thinned.functional.dropout(x, p, key=thinned.Key(7))
    return y, torch.autograd.grad(y, x, grad)[0]


def _measure(console: Console, place: Place, only: str, save: bool) -> bool:
    """Whether everything could be measured. Each result is saved at once, whatever fails after it."""
    start, results, whole = time.perf_counter(), [], True
    chosen = [case for case in cases(place) if only in f"{case.group} {case.setting}"]
    console.print(f"{len(chosen)} cases; all of them compile {compilations(place)} times with torch.compile")
    for number, case in enumerate(chosen, 1):
        about = f"{number}/{len(chosen)}, {time.perf_counter() - start:.0f} s: {case.group}, {case.setting}:"
        result = _attempt(console, about, case.run)
        if result is None:
            whole = False
            continue
        results.append(result)
        console.print(about, _times(result))
        if save:
            record.append(record.timed(result, _where()))
    needed = None if only else _attempt(console, "peak memory:", lambda: peaks(place))
    if save and needed:
        record.append(_peak_rows(place, needed))
    console.print(_table(place, results, needed or {}))
    console.print(f"{time.perf_counter() - start:.0f} s")
    return whole and (needed is not None or bool(only))


def _attempt(console: Console, about: str, function: Callable[[], T]) -> T | None:
    try:
        return function()
    except Exception as error:
        console.print(about, f"FAILED: {type(error).__name__}: {error}")
        return None


def _times(result: Result) -> str:
    case = result.case
    return ", ".join(
        f"{name} {duration(result.nanoseconds(name) * case.elements / 1e9)}" for name in result.seconds
    )


def _where() -> dict[str, object]:
    major, minor = torch.cuda.get_device_capability()
    return {
        "machine": torch.cuda.get_device_name(),
        "instruction set": f"sm_{major}{minor}",
        "triton": triton.__version__,
    }


def _peak_rows(place: Place, needed: Mapping[str, float]) -> list[dict[str, object]]:
    about = {**_where(), "group": "peak memory, forward", "setting": peak_setting(place)}
    return [
        {**about, "subject": name, "peak bytes an element": f"{size:.4g}"} for name, size in needed.items()
    ]


def _table(place: Place, results: Sequence[Result], needed: Mapping[str, float]) -> Table:
    table = Table("target", "at least", "worst", "where", "met")
    answers = {True: "yes", False: "no"} if place is GPU else dict.fromkeys((True, False), "dry run")
    for target in TARGETS:
        found = verdict(target, results, place.large)
        at_least = f"{significant(1 / target.bound.limit)}x as fast"
        if found is None:
            table.add_row(target.words, at_least, "", "not measured")
        else:
            speed, case = f"{significant(found.speed)}x", found.worst
            table.add_row(
                target.words, at_least, speed, f"{case.group}, {case.setting}", answers[found.is_met]
            )
    if needed:
        saved, is_met = mask_saved(needed)
        where = peak_setting(place)
        table.add_row(MASK, "1 byte an element", significant(saved), where, answers[is_met])
    return table
