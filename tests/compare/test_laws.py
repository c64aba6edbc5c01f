"""Each law catches the layer that is wrong in its way, and blames no other."""

from __future__ import annotations

from collections.abc import Container

import pytest
import torch
from torch import nn

from compare.culprits import (
    CULPRITS,
    EXAMPLES,
    MORE,
    FailsOnEmpty,
    LosesGradient,
    LosesGradientOfParameter,
    Masks,
    changed,
    example,
)
from thinned.compare.implementation import Implementation
from thinned.compare.laws import LAWS, Finding, Level, Verdict, examine
from thinned.compare.laws.values import departure
from thinned.compare.layers import ENTRIES, entry_of
from thinned.compare.loading import load, resolve
from thinned.compare.settings import Settings

QUICK = Settings(quick=True)
DROPOUT = {law.name: law for law in entry_of("Dropout").laws}
# Two that are none of Dropout, as laws of a layer that takes Dropout's arguments.
ALL = {law.name: law for law in entry_of("LockedDropout").laws} | DROPOUT
MEANS = {f"mean in {dtype}" for dtype in ("float16", "float32", "float64")} | {"exact mean in bfloat16"}


def findings(implementation: Implementation, names: Container[str] = DROPOUT) -> dict[str, Finding]:
    return {name: examine(law, implementation, QUICK) for name, law in DROPOUT.items() if name in names}


def breaches(implementation: Implementation) -> set[str]:
    return {name for name, finding in findings(implementation).items() if finding.verdict.is_breach}


def test_each_law_has_its_culprit_and_a_layer() -> None:
    assert list(CULPRITS) == [law.name for law in LAWS]
    assert set(ALL) == set(CULPRITS)


def test_each_law_says_why_it_matters() -> None:
    for entry in ENTRIES:
        for law in entry.laws:
            assert law.why.endswith("."), law.name


@pytest.mark.parametrize("name", CULPRITS)
def test_law_catches_its_culprit(name: str) -> None:
    """tests/layers/test_every_layer.py holds each layer of thinned to it."""
    assert examine(ALL[name], CULPRITS[name], QUICK).verdict.is_breach


@pytest.mark.parametrize(("name", "culprit"), MORE, ids=lambda each: getattr(each, "name", each))
def test_law_catches_what_is_wrong_in_a_corner(name: str, culprit: Implementation) -> None:
    assert examine(ALL[name], culprit, QUICK).verdict is Verdict.BROKEN


def test_a_law_that_a_layer_is_exempt_from_has_a_name_and_a_reason() -> None:
    for entry in ENTRIES:
        assert set(entry.exempt) <= set(CULPRITS), entry.name
        assert all(entry.exempt.values())


def test_a_correct_layer_breaks_nothing() -> None:
    assert breaches(example("Correct")) == set()
    assert {name for name in breaches(changed(Masks)) if DROPOUT[name].level is Level.WRONG} == set()


@pytest.mark.parametrize(
    "settings",
    [
        Settings(shape=(1,), quick=True),
        Settings(shape=(1000,), dtype=torch.float64, quick=True),
        Settings(shape=(1, 300, 1), dtype=torch.bfloat16, quick=True),
        Settings(p=1e-6, shape=(40, 50), quick=True),
        Settings(p=0.999999, shape=(40, 50), seed=1, quick=True),
    ],
    ids=str,
)
def test_any_shape_dtype_and_p_will_do(settings: Settings) -> None:
    for law in DROPOUT.values():
        if law.family != "rate and mean":  # which brings its own p and shapes
            assert examine(law, resolve("thinned"), settings).verdict is Verdict.HOLDS, law.name


RATES = {f"drop rate at p = {p}" for p in (0.1, 0.3, 0.5, 0.9)}


WRONG = {
    "ForgetsToScale": {"kept values", "mean, variance", "mean in bfloat16", *MEANS},
    "ScalesInEvaluation": {"evaluation"},
    "ReusesMask": {"calls"},
    "CorrelatesNeighbours": {"neighbours", "lags"},
    "DropsRows": {"neighbours", "lags", "rows", "counts"},
    "LooksAtValues": {"contents"},
    "DropsTooOften": {"mean, variance", *RATES, *MEANS},
    "WrongGradient": {"gradient", "mask of gradient"},
    "StraightThrough": {"gradient", "mask of gradient"},
    "DropsInEvaluation": {"evaluation"},
    "MakesMaskOnCPU": {"other devices"},
    "DrawsFromNumPy": {"gradient", "checkpoint"},
}
TOO_FEW = {
    "DropsRows": {
        *RATES,
        *MEANS,
        "drop rate at p = 0.001",
        "mean, variance",
        "calls",
        "sliced input",
        "every dtype",
    }
}  # too few decisions


@pytest.mark.parametrize("name", WRONG)
def test_each_broken_example_is_wrong_by_these_laws_only(name: str) -> None:
    found = {law for law in breaches(example(name)) if DROPOUT[law].level is Level.WRONG}
    assert found - TOO_FEW.get(name, set()) == WRONG[name] - {"exact mean in bfloat16"}


def test_the_examples_are_all_examined() -> None:
    module = load(str(EXAMPLES))
    assert set(WRONG) == {each.__name__ for each in module.Correct.__subclasses__()}


HOME_MADE = [
    "Plain",
    "OfProbabilities",
    "Fills",
    "Chooses",
    "WritesACopy",
    "HoldsPInABuffer",
    "HoldsALambda",
    "OwnFunction",
    "always",
]


@pytest.mark.parametrize(
    "honest",
    ["torch", "textbook", "torch.nn.functional:dropout", *(f"compare.honest:{name}" for name in HOME_MADE)],
)
def test_an_honest_layer_is_not_wrong(honest: str) -> None:
    assert not [law for law in breaches(resolve(honest)) if DROPOUT[law].level is Level.WRONG]


def test_a_gradient_that_is_lost_in_compiled_code_breaks_this_law_only() -> None:
    assert breaches(changed(LosesGradient)) == {"torch.compile"}


@pytest.mark.parametrize("culprit", [LosesGradient, LosesGradientOfParameter])
def test_which_gradient_is_lost_in_compiled_code(culprit: type[nn.Module]) -> None:
    found = examine(DROPOUT["torch.compile"], changed(culprit), QUICK)
    assert found.measured == "another gradient than eager"


def test_faults_of_the_textbook() -> None:
    names = "p = 1", "dtype", "p outside [0, 1]", "dropped NaN or inf", "complex"
    found = findings(resolve("textbook"), names)
    assert found["p = 1"].measured == "NaN; gradients NaN"
    assert "bfloat16 → float32" in found["dtype"].measured
    assert "accepted for 1.5" in found["p outside [0, 1]"].measured
    assert found["dropped NaN or inf"].measured == "NaN"
    assert found["complex"].verdict is Verdict.NOT_OFFERED


def test_bias_of_torch_in_bfloat16() -> None:
    """The CPU kernel multiplies by 1/0.9 rounded to bfloat16, 1.109375: E[y] = 0.99844 x."""
    found = findings(resolve("torch"), MEANS)
    assert found["exact mean in bfloat16"].figures["ratio"] == pytest.approx(0.9984, abs=4e-4)
    assert {name for name in MEANS if found[name].verdict.is_breach} == {"exact mean in bfloat16"}


def test_a_crash_is_a_finding_of_one_line() -> None:
    found = examine(DROPOUT["empty input"], changed(FailsOnEmpty), QUICK)
    assert found == Finding(Verdict.CRASHED, "IndexError: no elements")


class WithoutInplace(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p


def test_a_missing_argument_is_no_breach() -> None:
    found = examine(DROPOUT["in place"], changed(WithoutInplace), QUICK)
    assert found == Finding(Verdict.NOT_OFFERED, "NotOfferedError: no inplace argument")


def test_a_complaint_has_no_exponent() -> None:
    x = torch.tensor([1.0, 2.0, 3.0])
    assert departure(torch.tensor([1.0, 2.0, 9.0]), x) == "kept values 25,165,824 ulp off"
    assert departure(x * 1e6, x, scale=1.0) == "scaled by 1,000,000, not 1.000"
