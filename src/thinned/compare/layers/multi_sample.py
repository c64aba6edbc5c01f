"""Several dropout samples of the same features: MultiSampleDropout."""

from __future__ import annotations

import math
from functools import partial
from itertools import combinations

import torch
from torch import Tensor, nn

from thinned.compare.implementation import Case, Example, Implementation, Masked, P, normal, ones
from thinned.compare.laws.chance import DEVIATIONS, associate, strongest
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.multi_sample import MultiSampleDropout

__all__ = ["ENTRIES"]


class MultiSampleDropoutFormula(nn.Module):
    """A dropout and a call of the head for each sample."""

    def __init__(self, head: nn.Module, p: float = 0.5, samples: int = 8, reduction: str = "mean") -> None:
        super().__init__()
        self.head, self.reduction = head, reduction
        self.dropouts = nn.ModuleList(nn.Dropout(p) for _ in range(samples))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.head(x)  # type: ignore[no-any-return]
        outputs = torch.stack([self.head(dropout(x)) for dropout in self.dropouts])
        return outputs.mean(0) if self.reduction == "mean" else outputs


def _head(inputs: int = 0, outputs: int = 0) -> nn.Module:
    """A linear head with weights that are the same in every call, or none at all."""
    if not inputs:
        return nn.Identity()
    head = nn.Linear(inputs, outputs)
    with torch.no_grad():
        for i, parameter in enumerate(head.parameters()):
            steps = torch.arange(parameter.numel(), dtype=parameter.dtype).view(parameter.shape)
            parameter.copy_(torch.cos(steps * (i + 2)) / math.sqrt(inputs))
    return head


def _own(inputs: int = 0, outputs: int = 0, **arguments: object) -> nn.Module:
    return MultiSampleDropout(_head(inputs, outputs), **arguments)  # type: ignore[arg-type]


def _formula(inputs: int = 0, outputs: int = 0, **arguments: object) -> nn.Module:
    return MultiSampleDropoutFormula(_head(inputs, outputs), **arguments)  # type: ignore[arg-type]


SAMPLES = 5


def evaluation(layer: Case, settings: Settings) -> Finding:
    """After eval() the output equals that of the head bit for bit."""
    x = settings.normal(20, 6, dtype=torch.float32)
    module = layer.make(inputs=6, outputs=3, p=P, samples=SAMPLES).eval().to(x)
    same = torch.equal(module(x), _head(6, 3).to(x)(x))
    return holds_if(same, "head(x)" if same else "another")


def independence(layer: Case, settings: Settings) -> Finding:
    """Fisher's exact test on the masks of each two of 5 samples, 100,000 elements each."""
    x = torch.ones(100, 1000, device=settings.device)
    dropped = layer.make(p=P, samples=SAMPLES, reduction="none")(x) == 0
    return strongest(
        [
            associate(dropped[a], dropped[b], f"samples {a} and {b}")
            for a, b in combinations(range(SAMPLES), 2)
        ]
    )


def mean_of_samples(layer: Case, settings: Settings) -> Finding:
    """Under one seed, with all outputs or their mean, and with the head behind the mean of the features."""
    x = settings.normal(30, 6, dtype=torch.float64)

    def call(**arguments: object) -> Tensor:
        module = layer.make(p=P, samples=SAMPLES, **arguments).to(x)
        torch.manual_seed(settings.seed)  # after the parameters have drawn from it
        y: Tensor = module(x)
        return y

    mean = call(inputs=6, outputs=3)
    of_all = call(inputs=6, outputs=3, reduction="none")
    features = call()
    head = _head(6, 3).to(x)
    same = of_all.shape == (SAMPLES, 30, 3) and torch.allclose(of_all.mean(0), mean)
    linear = torch.allclose(head(features), mean)
    return holds_if(same and linear, "equal" if same and linear else "differs")


def expectation(layer: Case, settings: Settings) -> Finding:
    """A linear head on N equal rows: the variance of its mean is sum((w x)²) p / (1-p) / samples / N."""
    n = 20_000
    x = settings.normal(1, 6, dtype=torch.float64)
    module = layer.make(inputs=6, outputs=3, p=P, samples=SAMPLES).to(x)
    head = _head(6, 3).to(x)
    with torch.no_grad():
        expected, weight = head(x)[0], head.get_parameter("weight")
        mean = module(x.expand(n, 6)).mean(0)
        deviation = ((weight * x).square().sum(1) * P / (1 - P) / SAMPLES / n).sqrt()
    off = float(((mean - expected) / deviation).abs().max())
    return holds_if(off <= DEVIATIONS, f"{off:.2f} σ", deviations=off)


FAMILY = "samples"
_law = partial(Law, FAMILY)

ENTRIES = [
    Entry(
        MultiSampleDropout,
        mask="(samples, N, *)",
        source="Inoue 2019, section 3",
        peer=Implementation("formula", _formula, "a dropout and a head a sample in plain torch"),
        example=Example(
            normal(40, 5),
            {"p": 0.5, "samples": 4, "inputs": 5, "outputs": 3},
            identity_in_evaluation=False,
            saved_bytes=4 * 4,  # the head's own inputs
        ),
        workload=Workload(ones(256, 512), {"p": 0.5, "samples": 8, "inputs": 512, "outputs": 10}),
        masked=Masked((400, 500), arguments={"samples": 1}),
        exempt={"permuted input": "the output is contiguous"},
        special=[
            _law(
                "evaluation",
                "the head of the input itself",
                evaluation,
                why="Predictions are random, or cost several passes of the head.",
            ),
            _law(
                "independent samples",
                "the masks of samples are independent of each other",
                independence,
                why="Several samples bring no more than one does.",
            ),
            _law(
                "mean of samples",
                "the mean is that of all outputs, and for a linear head that of the mean of the features",
                mean_of_samples,
                why="The loss is that of another average than the head's outputs.",
            ),
            _law(
                "expectation",
                "of a linear head: its value in evaluation",
                expectation,
                why="The head's mean output differs between training and evaluation.",
            ),
        ],
        make=_own,
    )
]
