"""What is true of every layer in the catalogue."""

from __future__ import annotations

import pytest

from thinned.compare.catalogue import ENTRIES, Entry, LayerLaw
from thinned.compare.laws import Verdict, examine
from thinned.compare.settings import Settings

QUICK = Settings(quick=True)


@pytest.mark.parametrize(
    ("entry", "law"),
    [pytest.param(entry, law, id=f"{entry.name}: {law.name}") for entry in ENTRIES for law in entry.laws],
)
def test_law_holds(entry: Entry, law: LayerLaw) -> None:
    found = examine(law, entry.own, QUICK)
    assert found.verdict is Verdict.HOLDS, found.measured
