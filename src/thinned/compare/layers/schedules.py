"""DropoutSchedule: the drop rate of each step, and going on where another run stood."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from thinned import schedules
from thinned.compare.implementation import Case, Example, Implementation, NotOfferedError, normal, ones
from thinned.compare.laws.chance import binomial_bounds
from thinned.compare.laws.law import Finding, Law, holds_if
from thinned.compare.layers._entry import Entry, Workload
from thinned.compare.settings import Settings
from thinned.layers.dropout import Dropout
from thinned.schedules import DropoutSchedule, Schedule

__all__ = ["ENTRIES"]

STEPS = 10
ELEMENTS = 1_000_000
SCHEDULES: dict[str, Schedule] = {
    "linear": schedules.linear(0.0, 1.0, STEPS),
    "cosine": schedules.cosine(1.0, 0.0, STEPS),
    "early": schedules.early(4),
    "late": schedules.late(4),
    "curriculum": schedules.curriculum(STEPS),
    "v_shape": schedules.v_shape(3, STEPS),
}


class Scheduled(nn.Module):
    """A model of one dropout under a schedule of thinned's."""

    def __init__(self, p: float, schedule: Schedule = SCHEDULES["linear"]) -> None:
        super().__init__()
        self.dropout = Dropout(p)
        self.schedule = DropoutSchedule(self, schedule)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x)  # type: ignore[no-any-return]

    def step(self) -> None:
        self.schedule.step()


class ScheduledFormula(nn.Module):
    """The loop that sets ``p`` by hand."""

    def __init__(self, p: float, schedule: Schedule = SCHEDULES["linear"]) -> None:
        super().__init__()
        self.p, self.factor, self.last_step = p, schedule, 0
        self.dropout = nn.Dropout(p * schedule(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x)  # type: ignore[no-any-return]

    def step(self) -> None:
        self.last_step += 1
        self.dropout.p = self.p * self.factor(self.last_step)


def rates(layer: Case, settings: Settings, name: str) -> Finding:
    """Dropped elements of each step are binomial with the scheduled probability."""
    schedule = SCHEDULES[name]
    model: Any = layer.make(p=0.4, schedule=schedule)
    x = torch.ones(ELEMENTS // STEPS, device=settings.device)
    for step in range(STEPS + 2):
        p = 0.4 * schedule(step)
        dropped = int((model(x) == 0).sum())
        low, high = binomial_bounds(x.numel(), p) if p else (0, 0)
        if not low <= dropped <= high:
            return holds_if(False, f"{dropped / x.numel():.4f} and not {p:.4f} at step {step}")
        model.step()
    return holds_if(True, f"{STEPS + 2} steps")


def resumes(layer: Case, settings: Settings) -> Finding:
    """A new model that loads the state of step 3 has the first model's probabilities from there."""
    del settings
    first, second = (layer.make(p=p, schedule=SCHEDULES["cosine"]) for p in (0.4, 0.9))
    if not hasattr(first, "schedule"):
        raise NotOfferedError("no state_dict")
    schedule: Any = first.schedule
    for _ in range(3):
        schedule.step()
    resumed: Any = second.schedule
    resumed.load_state_dict(schedule.state_dict())
    for _ in range(3):
        if schedule.last_p != resumed.last_p:
            return holds_if(False, f"{resumed.last_p} and not {schedule.last_p}")
        schedule.step()
        resumed.step()
    return holds_if(True, "the same")


FAMILY = "schedule"

ENTRIES = [
    Entry(
        DropoutSchedule,
        mask="that of each module",
        source="Morerio et al. 2017, section 3; Liu et al. 2023, section 4",
        peer=Implementation("formula", ScheduledFormula),
        example=Example(normal(6, 20), {"p": 0.5, "schedule": SCHEDULES["early"]}),
        workload=Workload(ones(1_000_000), {"p": 0.4, "schedule": schedules.linear(1.0, 0.0, STEPS)}),
        special=[
            *(
                Law(
                    FAMILY,
                    name,
                    f"{name}: the drop rate of each step is p times its factor",
                    partial(rates, name=name),
                    why="The network trains at another p than the plan says.",
                )
                for name in SCHEDULES
            ),
            Law(
                FAMILY,
                "resumed",
                "a resumed schedule has the first one's probabilities",
                resumes,
                why="A resumed run starts its schedule anew, or goes on at another p.",
            ),
        ],
        make=Scheduled,
        functional=", ".join(f"schedules.{name}" for name in SCHEDULES),
    )
]
