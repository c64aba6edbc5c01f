"""The effect of dropout on a network, in sentences whose numbers and verbs follow from its training."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

from thinned.compare.training import TEST_DIGITS, TRAINING_DIGITS, WITHOUT, Run

__all__ = ["pair", "sentences"]


def pair(runs: Sequence[Run]) -> tuple[Run, Run] | None:
    """The network without dropout and the first with it; None unless both finished training."""
    finished = [run for run in runs if run.failure is None]
    plain = next((run for run in finished if run.name == WITHOUT), None)
    dropped = next((run for run in finished if run.name != WITHOUT), None)
    return (plain, dropped) if plain and dropped else None


def sentences(plain: Run, dropped: Run) -> list[str]:
    """Errors of both networks, the difference beside chance, and the gap that overfitting opens.

    Chance is two standard errors of the difference between two shares of the test digits. It is less where
    both networks are wrong on the same digits, so that "more than chance" errs on the side of caution.
    """
    epoch = max(plain.test_error)
    training = [round(run.training_error[epoch] * TRAINING_DIGITS) for run in (plain, dropped)]
    test = [round(run.test_error[epoch] * TEST_DIGITS) for run in (plain, dropped)]
    gaps = [(run.test_error[epoch] - run.training_error[epoch]) * 100 for run in (plain, dropped)]
    return [
        f"After {epoch} epochs, the network without dropout gets {training[0]:,} of its {TRAINING_DIGITS:,} "
        f"training digits wrong, and {test[0]:,} of {TEST_DIGITS:,} test digits "
        f"({test[0] / TEST_DIGITS:.1%}).",
        f"With the dropout of {dropped.name}, it gets {training[1]:,} and {test[1]:,} wrong "
        f"({test[1] / TEST_DIGITS:.1%}).",
        _difference(*test),
        "Test error minus training error, the gap that overfitting opens, "
        f"is {gaps[0]:.1f} percentage points without dropout and {gaps[1]:.1f} with it.",
    ]


def _difference(plain: int, dropped: int) -> str:
    if plain == dropped:
        return "In this run dropout changes the number of wrong test digits by none."
    chance = 2 * sqrt(sum(wrong * (1 - wrong / TEST_DIGITS) for wrong in (plain, dropped)))
    verb = "lowers" if dropped < plain else "raises"
    beside = "more" if abs(plain - dropped) > chance else "no more"
    return (
        f"In this run dropout {verb} the number of wrong test digits by {abs(plain - dropped):,}, "
        f"{beside} than the choice of the test digits explains (±{chance:.0f} at two standard errors)."
    )
