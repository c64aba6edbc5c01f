"""The measurements run; what they find is for `make bench`."""

from __future__ import annotations

import torch

import thinned
from benchmarks.case import Bound, Case
from benchmarks.cases import cases
from thinned.backends import _native


def test_every_case_has_a_name_of_its_own() -> None:
    names = [(case.group, case.setting, case.threads, case.isa) for case in cases()]
    assert len(names) == len(set(names))


def test_a_case_leaves_threads_and_instruction_set_as_they_were() -> None:
    x, layer, before = torch.ones(100), thinned.Dropout(0.5), (torch.get_num_threads(), _native.isa())
    seen: set[tuple[int, str]] = set()

    def call() -> None:
        seen.add((torch.get_num_threads(), _native.isa()))
        layer(x)

    case = Case("a", "b", lambda: {"thinned": call}, (), threads=2, isa="baseline", rounds=2, elements=100)
    result = case.run()
    assert seen == {(2, "baseline")}
    assert (torch.get_num_threads(), _native.isa()) == before
    assert result.nanoseconds("thinned") > 0
    assert result.ratio("thinned", "thinned") == 1


def test_a_bound_says_what_it_promises() -> None:
    assert str(Bound("x * 2", 1.2)) == "at most 1.2x of x * 2"
    assert str(Bound("nn.Dropout", 1 / 60)) == "60x faster than nn.Dropout"
