"""Each law catches the layer that is wrong in its way, and blames no other."""

from __future__ import annotations

from collections.abc import Container

import pytest
import torch
from torch import nn

from compare.culprits import CULPRITS, FailsOnEmpty, LosesGradient, changed, example
from thinned.compare.laws import LAWS, Finding, Law, Verdict, examine
from thinned.compare.settings import Settings
from thinned.compare.subjects import Subject, resolve

QUICK = Settings(quick=True)
NAMES = [law.name for law in LAWS]
MEANS = {f"mean in {dtype}" for dtype in ("float16", "bfloat16", "float32", "float64")}


def findings(subject: Subject, names: Container[str] = NAMES) -> dict[str, Finding]:
    return {law.name: examine(law, subject, QUICK) for law in LAWS if law.name in names}


def breaches(subject: Subject) -> set[str]:
    return {name for name, finding in findings(subject).items() if finding.verdict.is_breach}


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_law_holds_for_thinned_and_not_for_its_culprit(law: Law) -> None:
    kept = examine(law, resolve("thinned"), QUICK)
    assert kept.verdict is Verdict.HOLDS, kept.measured
    assert examine(law, CULPRITS[law.name], QUICK).verdict.is_breach


def test_names_of_laws_are_unique() -> None:
    assert len(set(NAMES)) == len(LAWS)


def test_a_correct_layer_breaks_nothing() -> None:
    assert breaches(example("Correct")) == set()


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
    subject = resolve("thinned")
    for law in LAWS:
        if law.family != "rate and mean":  # which brings its own p and shapes
            assert examine(law, subject, settings).verdict is Verdict.HOLDS, law.name


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("ForgetsToScale", {"kept values", *MEANS}),
        ("ScalesInEvaluation", {"evaluation"}),
        ("ReusesMask", {"calls", "0-d input", "same seed", "torch.compile", "vmap"}),
        ("CorrelatesNeighbours", {"neighbours", "lags"}),
        ("LooksAtValues", {"contents", "vmap"}),
        ("DropsTooOften", {*(f"drop rate at p = {p}" for p in (0.1, 0.3, 0.5, 0.9)), *MEANS}),
        ("WrongGradient", {"gradient", "second derivative", "torch.compile"}),
    ],
)
def test_broken_example_breaks_these_laws_only(name: str, broken: set[str]) -> None:
    assert breaches(example(name)) == broken


def test_a_gradient_that_is_lost_in_compiled_code_breaks_this_law_only() -> None:
    assert breaches(changed(LosesGradient)) == {"torch.compile"}


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
    assert found["mean in bfloat16"].figures["ratio"] == pytest.approx(0.9984, abs=4e-4)
    assert {name for name in MEANS if found[name].verdict.is_breach} == {"mean in bfloat16"}


def test_a_crash_is_a_finding_of_one_line() -> None:
    law = next(law for law in LAWS if law.name == "empty input")
    assert examine(law, changed(FailsOnEmpty), QUICK) == Finding(Verdict.CRASHED, "IndexError: no elements")


class WithoutInplace(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p


def test_a_missing_argument_is_no_breach() -> None:
    law = next(law for law in LAWS if law.name == "in place")
    assert examine(law, changed(WithoutInplace), QUICK).verdict is Verdict.NOT_OFFERED
