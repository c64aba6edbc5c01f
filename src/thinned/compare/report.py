"""Everything that a comparison finds."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
from torch import Tensor

import thinned
from thinned.backends.describe import processor
from thinned.compare.laws import Finding, Law, Level, Verdict
from thinned.compare.project import Policy
from thinned.compare.settings import Settings
from thinned.compare.timing import Timing, load
from thinned.compare.training import Run

__all__ = ["Report", "Sample"]

PACKAGES = ("torch", "numpy", "scipy")


@dataclass(frozen=True)
class Sample:
    """Mean and standard deviation of the tutorial's ``torch.ones(1000, 100)`` at p = 0.5."""

    mean: float
    deviation: float


@dataclass
class Report:
    """Filled part by part, each part a mapping from an implementation's name or a list of results.

    Attributes:
        names: the implementations, in the order of their columns.
        laws: of the layer that ``layer`` names, one row each, as far as the policy chooses them.
        tutorial: a sample for each, or what it raised.
        masks: a small mask of each that can draw one, True where kept.
        findings: a finding for each, under the name of the law.
        load: programs that wanted to run for each core, before the comparison began; None if unknown.
        bytes_saved: bytes an element kept for backward, None where it cannot be run.
    """

    names: list[str]
    settings: Settings
    laws: Sequence[Law]
    layer: str = "dropout"
    policy: Policy = field(default_factory=Policy)
    tutorial: dict[str, Sample | str] = field(default_factory=dict)
    masks: dict[str, Tensor] = field(default_factory=dict)
    findings: dict[str, dict[str, Finding]] = field(default_factory=dict)
    timings: list[Timing] = field(default_factory=list)
    load: float | None = field(default_factory=load)
    bytes_saved: dict[str, float | None] = field(default_factory=dict)
    training: list[Run] = field(default_factory=list)
    seconds: float = 0.0

    def breaches(self, name: str) -> list[Law]:
        """The laws that ``name`` breaks or crashes in, in the order of the table."""
        return [law for law in self.laws if self.findings[law.name][name].verdict.is_breach]

    def broken(self, name: str) -> dict[Level, list[Law]]:
        """The same laws under their levels, the worst first; a level without any is left out."""
        breaches = self.breaches(name)
        of_level = {level: [law for law in breaches if law.level is level] for level in Level}
        return {level: laws for level, laws in of_level.items() if laws}

    def fails(self, name: str) -> bool:
        """Whether a check of ``name`` fails at the policy's level."""
        return any(self.policy.level.includes(level) for level in self.broken(name))

    @property
    def is_loaded(self) -> bool:
        """Whether other programs wanted every core before the comparison began.

        The load is the average of a minute, in which a set-up that has just ended may have used each core.
        """
        return self.load is not None and self.load > 1.5

    def is_rough(self, timing: Timing) -> bool:
        """Whether something else ran while this was timed: the reference of its rounds was not steady."""
        of_its_rounds = (timing.reference, timing.elements, timing.direction)
        return self.is_loaded or not all(
            found.is_steady
            for found in self.timings
            if (found.subject, found.elements, found.direction) == of_its_rounds
        )

    def verdict(self, name: str) -> str:
        """One line: which laws are broken, the worst first, and how many hold."""
        broken = self.broken(name)
        parts = [
            f"{level.value} ({len(laws)}): {', '.join(law.name for law in laws)}"
            for level, laws in broken.items()
        ]
        if parts and Level.WRONG not in broken:
            parts.insert(0, "nothing wrong")
        verdicts = [findings[name].verdict for findings in self.findings.values()]
        held, missing = verdicts.count(Verdict.HOLDS), verdicts.count(Verdict.NOT_OFFERED)
        parts.append(f"{held} of {len(verdicts)} laws hold" + (f", {missing} not offered" if missing else ""))
        return "; ".join(parts)


def machine() -> dict[str, str]:
    """Where the figures come from."""
    return {
        "thinned": thinned.__version__,
        **{package: version(package) for package in PACKAGES},
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "threads": str(torch.get_num_threads()),
    }
