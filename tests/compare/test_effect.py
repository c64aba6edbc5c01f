"""The sentences that a page begins with: their numbers and their verbs are those of the training."""

from __future__ import annotations

import pytest

from thinned.compare.effect import pair, sentences
from thinned.compare.training import TEST_DIGITS, TRAINING_DIGITS, WITHOUT, Run


def run(name: str, *, training: int, test: int) -> Run:
    """A run that ends with so many digits wrong."""
    return Run(
        name,
        training_error={1: 0.5, 7: training / TRAINING_DIGITS},
        test_error={1: 0.6, 7: test / TEST_DIGITS},
    )


@pytest.mark.parametrize(
    ("plain", "dropped", "difference"),
    [
        (397, 278, "lowers the number of wrong test digits by 119, more than "),
        (278, 397, "raises the number of wrong test digits by 119, more than "),
        (300, 290, "lowers the number of wrong test digits by 10, no more than "),
        (290, 300, "raises the number of wrong test digits by 10, no more than "),
        (290, 290, "changes the number of wrong test digits by none."),
        (0, 3_600, "raises the number of wrong test digits by 3,600, more than "),
    ],
)
def test_difference(plain: int, dropped: int, difference: str) -> None:
    said = " ".join(sentences(run(WITHOUT, training=0, test=plain), run("ours", training=12, test=dropped)))
    assert f"In this run dropout {difference}" in said


def test_numbers() -> None:
    first, second, third, last = sentences(
        run(WITHOUT, training=0, test=397), run("ours", training=40, test=278)
    )
    assert first.startswith("After 7 epochs, the network without dropout gets 0 of its 1,000 training digits")
    assert "397 of 4,000 test digits (9.9%)" in first
    assert second == "With the dropout of ours, it gets 40 and 278 wrong (7.0%)."
    assert "(±50 at two standard errors)" in third  # 2 sqrt(397 * 0.90075 + 278 * 0.9305)
    assert last.endswith("is 9.9 percentage points without dropout and 3.0 with it.")


def test_the_first_network_with_dropout_that_finished() -> None:
    plain, ours, theirs = (run(name, training=1, test=2) for name in (WITHOUT, "ours", "theirs"))
    assert pair([plain, ours, theirs]) == (plain, ours)
    ours.failure = "IndexError: enough"
    assert pair([plain, ours, theirs]) == (plain, theirs)
    theirs.failure = "IndexError: enough"
    assert pair([plain, ours, theirs]) is None
    assert pair([]) is None
