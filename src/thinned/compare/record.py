"""The report for a program: JSON."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import torch

from thinned.compare.project import option_of
from thinned.compare.report import Report, machine

__all__ = ["to_json"]


def to_json(report: Report) -> str:
    """Findings under law and implementation, timings and training runs as lists, and where they come from."""
    content = {
        "machine": machine(),
        "settings": asdict(report.settings),
        "policy": {**asdict(report.policy), "level": option_of(report.policy.level)},
        "seconds": report.seconds,
        "verdicts": {
            name: {
                "line": report.verdict(name),
                "breaks": [law.name for law in report.breaches(name)],
                "fails": report.fails(name),
            }
            for name in report.names
        },
        "tutorial": {
            name: sample if isinstance(sample, str) else asdict(sample)
            for name, sample in report.tutorial.items()
        },
        "laws": [
            {
                "family": law.family,
                "name": law.name,
                "statement": law.statement,
                "level": option_of(law.level),
                "why": law.why,
                "findings": {name: asdict(found) for name, found in report.findings[law.name].items()},
            }
            for law in report.laws
        ],
        "load": report.load,
        "timings": [asdict(timing) for timing in report.timings],
        "bytes_saved": report.bytes_saved,
        "training": [asdict(run) for run in report.training],
    }
    return json.dumps(content, indent=2, default=_plain) + "\n"


def _plain(value: Any) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    raise TypeError(f"{value!r} has no place in JSON")
