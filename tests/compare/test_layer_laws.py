"""Each law that layers share catches the layer that is wrong in its way."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import thinned
from compare.culprits import BreaksGraphs, LosesGradient, OwnRandomNumbers, SharesCopies, example
from thinned.compare.laws import Verdict, examine
from thinned.compare.laws.every_layer import general_laws
from thinned.compare.laws.mask import Masked, masked_laws
from thinned.compare.layers import Example, Implementation, LayerLaw
from thinned.compare.settings import Settings
from thinned.compare.textbook import TextbookDropout

QUICK = Settings(quick=True)


class ScalesAtZero(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 1e-6)


class AnotherMaskUnderAutocast(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(0)).flip(0) if torch.is_autocast_enabled("cpu") else super().forward(x)


class LosesGradientOfParameter(nn.Dropout):
    """Compiled, its values and its input's gradient are right, and its parameter's gradient is zero."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)
        self.gain = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        gain = self.gain.detach() + 0 * self.gain if torch.compiler.is_compiling() else self.gain
        return super().forward(x) * gain


def general() -> tuple[LayerLaw, ...]:
    return general_laws(Example(lambda dtype: (torch.randn(6, 20, dtype=dtype),), {"p": 0.5}))


def masked(shared: tuple[int, ...] = ()) -> tuple[LayerLaw, ...]:
    return masked_laws(Masked((2000, 3, 4), shared))


SHARING = next(law for law in masked((1, 2)) if law.name == "sharing")
GENERAL = {
    "evaluation": example("ScalesInEvaluation").layer,
    "p = 0": ScalesAtZero,
    "p outside [0, 1]": TextbookDropout,
    "gradient": example("WrongGradient").layer,
    "dtype": TextbookDropout,
    "autocast": AnotherMaskUnderAutocast,
    "same seed": OwnRandomNumbers,
    "torch.compile": BreaksGraphs,
    "vmap": example("ReusesMask").layer,
    "copies": SharesCopies,
    "saved": nn.Dropout,
}
MASKED = {
    "rate": example("DropsTooOften").layer,
    "sharing": nn.Dropout,
    "independence": example("CorrelatesNeighbours").layer,
    "kept values": example("ForgetsToScale").layer,
    "mean, variance": example("DropsTooOften").layer,
    "mask of gradient": example("WrongGradient").layer,
    "p = 1": TextbookDropout,
    "dropped NaN": TextbookDropout,
}


def test_each_law_has_its_culprit() -> None:
    assert {law.name for law in general()} == set(GENERAL)
    assert {law.name for law in masked((1,))} == set(MASKED)


@pytest.mark.parametrize("law", [*general(), *masked()], ids=lambda law: law.name)
def test_law_holds_for_dropout(law: LayerLaw) -> None:
    found = examine(law, Implementation("thinned", thinned.Dropout), QUICK)
    assert found.verdict is Verdict.HOLDS, found.measured


@pytest.mark.parametrize("law", [*general(), *masked(), SHARING], ids=lambda law: law.name)
def test_law_catches_its_culprit(law: LayerLaw) -> None:
    culprit = (GENERAL | MASKED)[law.name]
    assert examine(law, Implementation("culprit", culprit), QUICK).verdict.is_breach


@pytest.mark.parametrize("culprit", [LosesGradient, LosesGradientOfParameter])
def test_a_gradient_that_is_lost_in_compiled_code_is_caught(culprit: type[nn.Module]) -> None:
    law = next(law for law in general() if law.name == "torch.compile")
    found = examine(law, Implementation("culprit", culprit), QUICK)
    assert found.measured == "another gradient than eager"
