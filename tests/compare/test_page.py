"""The page of a report: every statement on it follows from the report."""

from __future__ import annotations

import re

import pytest
import torch

from compare.test_effect import run
from pages import words
from thinned.compare import effect, plots
from thinned.compare.laws import LAWS, Finding, Law, Level, Verdict
from thinned.compare.page import to_html
from thinned.compare.report import Report, Sample
from thinned.compare.settings import Settings
from thinned.compare.textbook import TUTORIAL
from thinned.compare.training import WITHOUT, Run

SOURCES = {
    "https://jmlr.org/papers/v15/srivastava14a.html",
    "https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html",
    TUTORIAL.address,
}


def of_level(level: Level) -> Law:
    return next(law for law in LAWS if law.level is level and law.why)


def report_of(*breaches: Law, verdict: Verdict = Verdict.BROKEN, training: list[Run] | None = None) -> Report:
    """A report on two implementations under a law of each level, of which the second breaks ``breaches``."""
    laws = sorted((of_level(level) for level in Level), key=LAWS.index)
    report = Report(["ours", "theirs"], Settings(quick=training is None), laws, training=training or [])
    for law in laws:
        theirs = verdict if law in breaches else Verdict.HOLDS
        report.findings[law.name] = {
            "ours": Finding(Verdict.HOLDS, "fine"),
            "theirs": Finding(theirs, "seen"),
        }
    report.tutorial = dict.fromkeys(report.names, Sample(1.0, 1.0))
    report.masks = {"theirs": torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.5}
    return report


def test_effect_comes_first_and_from_the_runs() -> None:
    plain, ours = run(WITHOUT, training=3, test=400), run("ours", training=10, test=300)
    page = to_html(report_of(training=[plain, ours, Run("theirs", failure="IndexError: enough")]))
    said = " ".join(effect.sentences(plain, ours))
    assert said in words(page)
    assert page.index(said[:40]) < page.index('id="masks"') < page.index('id="laws"')
    assert "0.30% 10.00%" in words(page)
    assert "1.00% 7.50%" in words(page)
    assert "✗ crashed: IndexError: enough" in words(page)


def test_what_is_missing_is_said() -> None:
    quick = to_html(report_of())
    assert "This run trained no network: --quick leaves training out." in words(quick)
    assert "rows 1 to 3 of theirs's mask" in words(quick)
    failed = report_of(training=[run(WITHOUT, training=3, test=400), Run("ours", failure="no")])
    failed.masks = {}
    said = words(to_html(failed))
    assert "There are no errors to compare" in said
    assert "--quick" not in said
    assert "No implementation could draw one" in said
    assert "Drop rate over p" not in said


@pytest.mark.parametrize("verdict", [Verdict.BROKEN, Verdict.CRASHED])
@pytest.mark.parametrize("level", Level)
def test_a_broken_law_is_marked_by_its_level(level: Level, verdict: Verdict) -> None:
    law, css = of_level(level), level.value.replace(" ", "-")
    report = report_of(law, verdict=verdict)
    page = to_html(report)
    cells = re.findall(rf'<td class="{css}">(.*?)</td>', page)
    assert [words(cell) for cell in cells] == [
        f"✗ {'crashed: ' if verdict is Verdict.CRASHED else ''}seen {level.value}"
    ]
    assert page.count('<td class="holds">') == 5
    assert {why.why for why in report.laws if why.why in words(page)} == {law.why}
    assert f'<div class="card {css}"><h3>theirs</h3>' in page
    assert '<div class="card"><h3>ours</h3>' in page
    assert report.verdict("theirs") in words(page)


def test_a_card_has_the_colour_of_the_worst() -> None:
    broken = [of_level(Level.NICETY), of_level(Level.UNLIKE_TORCH)]
    assert '<div class="card unlike-torch"><h3>theirs</h3>' in to_html(report_of(*broken))


def test_page_stands_alone() -> None:
    page = to_html(report_of())
    assert set(re.findall(r'href="(http[^"]*)"', page)) == SOURCES
    assert set(re.findall(r'<a href="#(\w+)"', page)) == set(re.findall(r'<h2 id="(\w+)"', page))
    assert "<script" not in page
    assert "<link" not in page
    assert 'src="http' not in page
    assert f"({TUTORIAL.author}, {TUTORIAL.year})" in words(page)


def test_networks_have_the_units_of_the_mask() -> None:
    mask = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0, :12] = torch.tensor([1, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0]).bool()
    mask[1, :12], mask[2, :12] = True, False
    networks = plots.thinned_networks(mask)
    assert list(networks) == ["evaluation", "example 1", "example 2", "example 3"]
    for svg, row in zip(networks.values(), [torch.ones(12), *mask[:3, :12]], strict=True):
        lines, *units = svg.split('id="PathCollection_')
        drawn = [group.count("<use") for group in units]
        kept = int(row.sum())
        assert drawn == ([19] if kept == 12 else [7 + kept, 12 - kept])
        left, right = int(row[:6].sum()), int(row[6:].sum())
        edges = lines[lines.index('id="LineCollection') :].count("<path")
        assert edges == 4 * left + left * right + right * 3


def test_private_classes_are_in_the_legend() -> None:
    plain, ours = run(WITHOUT, training=3, test=400), run("_Ours", training=10, test=300)
    assert "_Ours" in plots.test_errors([plain, ours], ["_Ours"])
