"""The installation in words: versions, backends, which one serves a device, how the kernel was built."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

import torch

from thinned import backends

__all__ = ["NEWEST_TESTED", "describe", "devices", "processor"]

Value: TypeAlias = str | int | list[str] | None

NEWEST_TESTED = "2.15"  # the newest PyTorch on which the tests pass; docs/versions.md has their counts


def describe() -> dict[str, Mapping[str, Value]]:
    """Sections of names and values, for a person to read and to paste into a report, or for JSON.

    >>> describe()["serves"]["cpu"] in backends.available()
    True
    """
    sections: dict[str, Mapping[str, Value]] = {
        "versions": {"thinned": _version("thinned"), "torch": _torch(), "numpy": _version("numpy")}
        | {"python": platform.python_version()},
        "machine": {
            "platform": platform.platform(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "torch threads": torch.get_num_threads(),
        },
        "backends": dict.fromkeys(backends.available(), "available")
        | {name: f"missing: {reason}" for name, reason in backends.missing().items()},
        "serves": {device: _serving(device) for device in devices()},
    }
    if "native" in backends.available():
        sections["native"] = _native()
    return sections


def _serving(device: str) -> str:
    """The backend that serves a device; for a slow one on an accelerator, with the reason."""
    name = backends.name_for(device)
    return f"portable: {backends.why_not_triton(device)}" if name == "portable" and device != "cpu" else name


def _native() -> dict[str, Value]:
    from thinned.backends import _native, native

    return {
        "compiler": _native.compiler,
        "flags": _native.flags,
        "instruction sets compiled": _native.compiled_isas(),
        "instruction sets found": _native.supported_isas(),
        "instruction set used": _native.isa(),
        "THINNED_ISA": native.WANTED_ISA,
        "threads": _native.threads(),
    }


def devices() -> list[str]:
    """The types of devices that torch finds."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return ["cpu"] + ([accelerator.type] if accelerator else [])


def _torch() -> str:
    found = _version("torch")
    tested, this = (tuple(map(int, name.split(".")[:2])) for name in (NEWEST_TESTED, torch.__version__))
    return f"{found}, untested (newest tested: {NEWEST_TESTED})" if this > tested else found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def processor() -> str:
    """The processor's name: in a file on Linux, else what `platform` answers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
