"""The law of dropout, as a list of small functions that each measure one consequence of it."""

from thinned.compare.laws import backward, dtype_layout, edges, independence, rate, transforms
from thinned.compare.laws.law import Finding, Law, Verdict, examine
from thinned.compare.subjects import Subject

__all__ = ["LAWS", "Finding", "Law", "Verdict", "examine"]

LAWS: list[Law[Subject]] = [
    *rate.LAWS,
    *independence.LAWS,
    *edges.LAWS,
    *dtype_layout.LAWS,
    *backward.LAWS,
    *transforms.LAWS,
]
