"""The laws of dropout: small functions that each measure one consequence of what a layer promises."""

from thinned.compare.laws import backward, dtype_layout, edges, independence, rate, transforms
from thinned.compare.laws.law import Finding, Law, Level, Verdict, examine

__all__ = ["LAWS", "Finding", "Law", "Level", "Verdict", "examine"]

LAWS: list[Law] = [
    *rate.LAWS,
    *independence.LAWS,
    *edges.LAWS,
    *dtype_layout.LAWS,
    *backward.LAWS,
    *transforms.LAWS,
]
