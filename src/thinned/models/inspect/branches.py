"""The branches before DropPaths: which are skipped, which could be, and their share of the model's work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from thinned.layers import Residual
from thinned.models.convert.skip import skippable, skipped_calls
from thinned.torch_state import children_of

__all__ = ["Branches", "branches_of"]


@dataclass
class Branches:
    """What one DropPath drops, call by call.

    Attributes:
        skipped: the modules whose dropped rows are not computed, by their names in the block.
        others: those for which :func:`thinned.convert` with ``skip=True`` can do so.
        reasons: why it cannot for the other calls.
    """

    skipped: dict[str, nn.Module]
    others: dict[str, nn.Module]
    reasons: list[str]

    def __str__(self) -> str:
        parts = [f"skips {', '.join(self.skipped)}"] if self.skipped else []
        parts += [f"can skip {', '.join(self.others)}"] if self.others else []
        return "; ".join([*parts, *(f"cannot skip: {reason}" for reason in dict.fromkeys(self.reasons))])

    def flops(self, counted: Mapping[int, int]) -> int:
        """The floating-point operations of the modules that are or can be skipped."""
        return sum(
            counted[key] for key in {id(each) for each in (*self.skipped.values(), *self.others.values())}
        )


def branches_of(modules: Iterable[nn.Module]) -> dict[int, Branches]:
    """The branches of each DropPath that is a child of one of these modules, by the DropPath's id."""
    found: dict[int, Branches] = {}
    for block in modules:
        children = children_of(block)
        if isinstance(block, Residual):
            found[id(block)] = Branches({"branch": block.branch}, {}, [])
        skipped = skipped_calls(block)
        # A branch that skips may have a batch normalization.
        lenient = {each.call: each for each in skippable(block, allow_batch_norm=True)} if skipped else {}
        for skip in skippable(block):
            branches = found.setdefault(id(children[skip.path]), Branches({}, {}, []))
            if skip.call in skipped:
                names, to = lenient[skip.call].modules, branches.skipped
            else:
                names, to = skip.modules, branches.others
                branches.reasons += [skip.reason] * bool(skip.reason)
            to.update((name, child) for name in names if (child := children[name]) is not None)
    return found
