"""The implementations and laws that options and a project's file ask for, checked before anything runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from thinned.compare.implementation import Implementation
from thinned.compare.layers import ENTRIES, Entry, entry_of
from thinned.compare.loading import ALIASES, resolve, resolve_all
from thinned.compare.project import Policy, Project, parse_kwargs
from thinned.compare.settings import Settings

__all__ = ["Request", "requested"]


@dataclass(frozen=True)
class Request:
    """Implementations that can be made and called, and the laws that they are held to.

    Attributes:
        implementations: those that were named, else the defaults; none for a layer, which brings its own.
        policy: the laws to examine, of which at least one is left.
        is_default: whether neither options nor file name an implementation.
    """

    implementations: list[Implementation]
    policy: Policy
    is_default: bool


def requested(
    start: Path,
    settings: Settings,
    layer: Entry | None = None,
    *,
    implementations: Sequence[str] = (),
    level: str = "",
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    kwargs: str = "",
) -> Request:
    """The request of options, which override the pyproject.toml of ``start`` or of a folder above it.

    Args:
        start: where the search for a pyproject.toml begins.
        settings: of the call by which each implementation is tried.
        layer: examine this layer. The file's implementations, which are of Dropout, do not count then.
        implementations: as :func:`thinned.compare.loading.resolve` takes them.
        level: as ``--level`` takes it; empty for the file's.
        only: names or patterns of laws, in place of the file's.
        skip: the same, of laws that are left out.
        kwargs: as ``--kwargs`` takes them, for all of ``implementations``.

    Raises:
        ValueError: with one line that says what is wrong.
    """
    project = Project.found_from(start)
    if layer:
        project = replace(project, implementations=())
    project.policy.require_known([law for each in ENTRIES for law in each.laws])
    examined = layer or entry_of("Dropout")
    Policy(only=tuple(only), skip=tuple(skip)).require_known(examined.laws)
    project = project.overridden(implementations, level, only, skip, parse_kwargs(kwargs) if kwargs else None)
    project.policy.chosen(examined.laws)  # raises where only and skip leave no law
    known = layer.known if layer else {}
    if layer and layer.case.takes_any_shape:
        known = {alias: resolve(alias) for alias in ALIASES} | layer.known
    if kwargs and (aliases := [each for each in implementations if each in (known or ALIASES)]):
        raise ValueError(f"--kwargs is for implementations of your own, and not for {aliases[0]}")
    if project.folder:
        sys.path.insert(0, str(project.folder))  # from where the file's modules are imported
    texts = project.implementations or (() if layer else tuple(ALIASES))
    found = resolve_all(texts, project.kwargs, examined.case, settings, known)
    return Request(found, project.policy, is_default=not project.implementations)
