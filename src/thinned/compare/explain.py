"""A law in words: what has to hold, why, how it is measured, for which layers, and what breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from thinned.compare.laws import LAWS, Law, Level
from thinned.compare.layers import ENTRIES, Entry
from thinned.compare.project import Policy

__all__ = ["BROKEN_BY", "explain", "measure_of"]

LEVELS = {
    Level.WRONG: "a layer that breaks it is no dropout, or trains another network than it says",
    Level.UNLIKE_TORCH: "a layer that breaks it is a dropout that PyTorch's users stumble over",
    Level.NICETY: "a layer that breaks it does its work, and could do it better",
}
FEW = 6  # a law with at most so many exceptions has its layers listed as "all but ..."
BROKEN = "examples/broken_dropout.py"
BROKEN_BY = {  # arguments of `thinned compare`
    **{f"drop rate at p = {p}": f"{BROKEN}:DropsTooOften" for p in (0.1, 0.3, 0.5, 0.9)},
    **{f"mean in {dtype}": f"{BROKEN}:ForgetsToScale" for dtype in ("float16", "bfloat16")},
    **{f"mean in {dtype}": f"{BROKEN}:DropsTooOften" for dtype in ("float32", "float64")},
    "kept values": f"{BROKEN}:ForgetsToScale",
    "exact mean in bfloat16": "torch",
    "mean, variance": f"{BROKEN}:DropsTooOften",
    "sharing": "torch.nn:Dropout --layer LockedDropout",
    "neighbours": f"{BROKEN}:CorrelatesNeighbours",
    "lags": f"{BROKEN}:CorrelatesNeighbours",
    "counts": f"{BROKEN}:DropsRows",
    "calls": f"{BROKEN}:ReusesMask",
    "contents": f"{BROKEN}:LooksAtValues",
    "evaluation": f"{BROKEN}:ScalesInEvaluation",
    **dict.fromkeys(("p = 1", "p outside [0, 1]", "p = NaN", "dropped NaN or inf", "dtype"), "textbook"),
    "other devices": f"{BROKEN}:MakesMaskOnCPU",
    **dict.fromkeys(("gradient", "mask of gradient", "second derivative"), f"{BROKEN}:WrongGradient"),
    "saved": "torch.nn:Dropout --layer LockedDropout",
    "vmap": f"{BROKEN}:ReusesMask",
}


def explain(name: str, entries: Sequence[Entry] = ENTRIES) -> dict[str, dict[str, str]]:
    """Describe the laws called ``name``; else those of a family called so, or those that match a pattern.

    Returns:
        for each law, under its name and statement, paragraphs under their headings.

    Raises:
        ValueError: with one line, for a name that no law has.
    """
    everything = [law for entry in entries for law in entry.laws]
    policy = Policy(only=(name,))
    named = {law.name for law in everything if _letters(law.name) == _letters(name)}
    if not named:
        policy.require_known(everything)
    found: dict[str, Law] = {}
    layers: dict[str, list[str]] = {}
    for entry in entries:
        for law in entry.laws:
            if law.name in named if named else policy.chooses(law):
                title = f"{law.name}: {law.statement}"
                found.setdefault(title, law)
                layers.setdefault(title, []).append(entry.name)
    return {title: _paragraphs(law, layers[title], entries) for title, law in found.items()}


def _letters(name: str) -> str:
    return "".join(name.casefold().split())


def _paragraphs(law: Law, layers: list[str], entries: Sequence[Entry]) -> dict[str, str]:
    measured = (inspect.getdoc(measure_of(law)) or "").replace("``", "")
    others = [entry.name for entry in entries if entry.name not in layers]
    few_others = len(others) < len(layers) > 1 and len(others) <= FEW
    exempt: dict[str, list[str]] = {}
    for entry in entries:
        if reason := entry.exempt.get(law.name):
            exempt.setdefault(reason, []).append(entry.name)
    return {
        "why": law.why,
        "level": f"{law.level.value}: {LEVELS[law.level]}",
        "measured": f"{' '.join(measured.split())}{_given(law.check)}",
        "layers": (f"all but {', '.join(others)}" if others else "all") if few_others else ", ".join(layers),
        **{f"not for {', '.join(names)}": reason for reason, names in exempt.items()},
        **_broken_by(law),
    }


def measure_of(law: Law) -> Callable[..., Any]:
    """The function behind a law, whose docstring says how it measures."""
    check: Any = law.check
    while isinstance(check, partial):
        inner = check.keywords.get("law")  # of for_mask
        check = inner.check if inner else check.func
    return check  # type: ignore[no-any-return]


def _given(check: Any) -> str:
    """The arguments that tell a law from others with the same check."""
    plain = {
        name: value
        for name, value in getattr(check, "keywords", {}).items()
        if isinstance(value, int | float | str | tuple) or "dtype" in name
    }
    return f" Here {', '.join(f'{name} = {value}' for name, value in plain.items())}." if plain else ""


def _broken_by(law: Law) -> dict[str, str]:
    is_shared = any((law.name, law.statement) == (other.name, other.statement) for other in LAWS)
    if not is_shared or law.name not in BROKEN_BY:
        return {}
    return {"broken by": f'thinned compare {BROKEN_BY[law.name]} --only "{law.name}"'}
