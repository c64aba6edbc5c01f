"""The tests: an item of pytest for each implementation and law."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from thinned.compare.implementation import Implementation
from thinned.compare.laws import Law, Verdict, examine
from thinned.compare.layers import entry_of
from thinned.compare.project import Policy
from thinned.compare.request import requested
from thinned.compare.settings import Settings

__all__ = ["collect"]


def collect(session: pytest.Session, config: pytest.Config) -> list[pytest.Item]:
    """The tests of all implementations that the options name.

    Raises:
        pytest.UsageError: with one line, for an implementation, law, level or file that is not as it has to
            be; pytest prints it and exits with status 4.
    """
    try:
        request = requested(
            config.rootpath,
            Settings(quick=True),
            implementations=config.getoption("thinned"),
            level=config.getoption("thinned_level"),
        )
        if request.is_default:
            raise ValueError("--thinned-project finds no implementations in [tool.thinned]")
    except ValueError as error:
        raise pytest.UsageError(f"--thinned: {error}") from error
    items = []
    for each in request.implementations:
        layer = Layer.from_parent(
            session, name=each.name, nodeid=each.name, implementation=each, policy=request.policy
        )
        report = layer.ihook.pytest_make_collect_report(collector=layer)
        layer.ihook.pytest_collectreport(report=report)  # by which pytest counts what was collected
        items += report.result
    return items


class Layer(pytest.Collector):
    """The node above the laws of one implementation."""

    def __init__(self, *, implementation: Implementation, policy: Policy, **kwargs: Any):
        super().__init__(**kwargs)
        self.implementation, self.policy = implementation, policy

    def collect(self) -> Iterator[LawItem]:
        for law in self.policy.chosen(entry_of("Dropout").laws):
            yield LawItem.from_parent(self, name=law.name, law=law)


class BrokenLawError(AssertionError):
    """Its text is all that a person needs: pytest shows no traceback."""


class LawItem(pytest.Item):
    """One law as a test of one implementation."""

    parent: Layer

    def __init__(self, *, law: Law, **kwargs: Any):
        super().__init__(**kwargs)
        self.law = law

    def runtest(self) -> None:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # Where a project has warnings as errors, one from torch.compile would count as a crash.
            warnings.simplefilter("default")
            found = examine(self.law, self.parent.implementation, Settings(quick=True))
        if found.verdict is Verdict.NOT_OFFERED:
            pytest.skip(found.measured)
        if found.verdict is Verdict.HOLDS:
            return
        level = self.law.level
        if not self.parent.policy.level.includes(level):
            pytest.xfail(f"{level.value}: {found.measured}. {self.law.why}")
        raise BrokenLawError(
            f"{self.parent.name} breaks the law {self.name!r} ({level.value}): {found.measured}\n"
            f"What has to hold: {self.law.statement}.\nWhy: {self.law.why}"
        )

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], *args: Any) -> Any:
        if isinstance(excinfo.value, BrokenLawError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, *args)

    def reportinfo(self) -> tuple[os.PathLike[str] | str, int | None, str]:
        return Path(self.parent.name), None, f"{self.parent.name}: {self.name}"
