"""A law in words."""

from __future__ import annotations

import re

import pytest

from compare.culprits import CULPRITS
from thinned.compare.explain import BROKEN_BY, explain, measure_of
from thinned.compare.layers import ENTRIES, entry_of


def test_every_law_can_be_explained() -> None:
    for entry in ENTRIES:
        for law in entry.laws:
            paragraphs = explain(law.name, [entry])[f"{law.name}: {law.statement}"]
            assert measure_of(law).__doc__, law.name
            assert all(paragraphs.values()), law.name
            assert "\n" not in "".join(paragraphs.values())


def test_a_law_of_the_layers_that_have_it() -> None:
    ((title, paragraphs),) = explain("SHARING").items()
    assert title == "sharing: along shared dimensions all are kept or all dropped"
    assert paragraphs["layers"].startswith("Dropout1d, Dropout2d, Dropout3d, FeatureAlphaDropout, DropPath")
    assert paragraphs["level"].startswith("wrong: ")
    assert (
        explain("dtype")["dtype: float16, bfloat16, float32 and float64 stay what they are"]["layers"]
        == "all"
    )


def test_what_tells_it_from_laws_with_the_same_check() -> None:
    for p in (0.001, 0.9):
        (paragraphs,) = explain(f"drop rate at p = {p}", [entry_of("Dropout")]).values()
        assert f"Here p = {p}." in paragraphs["measured"]


def test_a_layer_that_is_exempt_says_why() -> None:
    (paragraphs,) = explain("neighbours").values()
    assert paragraphs["not for DropBlock1d, DropBlock2d, DropBlock3d"].startswith("a block drops neighbours")


def test_a_name_comes_before_a_family_and_a_pattern_before_none() -> None:
    assert all(title.startswith("independence: ") for title in explain("independence"))
    assert len(explain("transforms")) == 5
    assert len(explain("drop rate*")) >= 5
    assert explain("P=1").keys() == explain("p = 1").keys()


def test_one_law_of_many_layers_with_their_own() -> None:
    of_dropout, *_, of_samples = explain("evaluation").values()
    assert "ScalesInEvaluation" in of_dropout["broken by"]
    assert "broken by" not in of_samples


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("menas", "mean in float16"), ("dtpye", "dtype"), ("drop rate", "drop rate at p = 0.1")],
)
def test_an_unknown_law_gets_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"called {name!r}; did you mean .*{re.escape(nearest)}"):
        explain(name)


def test_what_breaks_a_law_is_its_culprit() -> None:
    """tests/compare/test_laws.py runs each."""
    for law, arguments in BROKEN_BY.items():
        name = arguments.partition(" ")[0].rpartition(":")[2]
        culprit = CULPRITS[law]
        assert name in (culprit.name, culprit.make.__name__), law
    named = {law for law, culprit in CULPRITS.items() if "<locals>" not in repr(culprit.make)}
    assert set(BROKEN_BY) <= named
