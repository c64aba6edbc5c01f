"""Factors that change over training, for :class:`thinned.DropoutSchedule`: each is a function of the step.

Each function here returns one that can be pickled. A factor multiplies the ``p`` that each module has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

__all__ = ["DropoutSchedule", "Schedule", "cosine", "curriculum", "early", "late", "linear", "v_shape"]

Schedule = Callable[[int], float]

CURRICULUM_RATE = 10.0


def linear(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` to ``end`` in a straight line over ``steps``, then ``end``.

    Raises:
        ValueError: ``steps`` below 1.

    >>> [linear(0.0, 1.0, steps=4)(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return partial(_linear, start=start, end=end, steps=_positive("steps", steps))


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` to ``end`` along half a cosine over ``steps``, then ``end``.

    Raises:
        ValueError: ``steps`` below 1.

    >>> [round(cosine(1.0, 0.0, steps=4)(step), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return partial(_cosine, start=start, end=end, steps=_positive("steps", steps))


def early(until: int, decay: Literal["constant", "linear"] = "constant") -> Schedule:
    """Early dropout, against underfitting: 1 before step ``until``, 0 from then on.

    With ``decay="linear"`` the factor falls from 1 at step 0 to 0 at step ``until``; in the authors' code it
    is 0 one step before.

    Raises:
        ValueError: ``until`` below 1, or another ``decay``.

    Source: Liu et al., "Dropout reduces underfitting", ICML 2023, section 4.

    >>> [early(2)(step) for step in range(4)]
    [1.0, 1.0, 0.0, 0.0]
    >>> [early(2, "linear")(step) for step in range(4)]
    [1.0, 0.5, 0.0, 0.0]
    """
    if decay not in ("constant", "linear"):
        raise ValueError(f"decay has to be either 'constant' or 'linear', but got {decay!r}")
    _positive("until", until)
    if decay == "linear":
        return linear(1.0, 0.0, until)
    return partial(_switch, at=until, before=1.0, after=0.0)


def late(start: int) -> Schedule:
    """Late dropout, against overfitting: 0 before step ``start``, 1 from then on.

    Raises:
        ValueError: ``start`` below 1.

    Source: Liu et al., "Dropout reduces underfitting", ICML 2023, section 4.

    >>> [late(2)(step) for step in range(4)]
    [0.0, 0.0, 1.0, 1.0]
    """
    return partial(_switch, at=_positive("start", start), before=0.0, after=1.0)


def curriculum(steps: int) -> Schedule:
    r"""Curriculum dropout over a training of ``steps``: 0 at first, and soon close to 1.

    The paper's keep probability is :math:`\theta(t) = (1-\bar\theta)\,e^{-\gamma t} + \bar\theta` with
    :math:`\gamma = 10/T`, so that a ``p`` of :math:`1-\bar\theta` is multiplied by :math:`1 - e^{-\gamma t}`.

    Raises:
        ValueError: ``steps`` below 1.

    Source: Morerio et al., "Curriculum dropout", ICCV 2017, section 3.

    >>> [round(curriculum(10)(step), 3) for step in (0, 1, 5, 10)]
    [0.0, 0.632, 0.993, 1.0]
    """
    return partial(_curriculum, rate=CURRICULUM_RATE / _positive("steps", steps))


def v_shape(bottom: int, steps: int) -> Schedule:
    """From 1 down to 0 at step ``bottom`` and up to 1 again at ``steps``, in straight lines.

    Raises:
        ValueError: ``bottom`` below 1 or not below ``steps``.

    Source: Zhou et al., "Scheduled DropHead", Findings of EMNLP 2020, section 3.

    >>> [v_shape(2, 6)(step) for step in range(8)]
    [1.0, 0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    if not 1 <= bottom < steps:
        raise ValueError(f"bottom has to be from 1 to below steps, but got {bottom} and {steps}")
    return partial(_v_shape, bottom=bottom, steps=steps)


def _linear(step: int, start: float, end: float, steps: int) -> float:
    return start + (end - start) * min(step / steps, 1.0)


def _cosine(step: int, start: float, end: float, steps: int) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def _switch(step: int, at: int, before: float, after: float) -> float:
    return before if step < at else after


def _curriculum(step: int, rate: float) -> float:
    return -math.expm1(-rate * step)


def _v_shape(step: int, bottom: int, steps: int) -> float:
    if step < bottom:
        return _linear(step, 1.0, 0.0, bottom)
    return _linear(step - bottom, 0.0, 1.0, steps - bottom)


def _positive(name: str, steps: int) -> int:
    if steps < 1:
        raise ValueError(f"{name} has to be at least 1, but got {steps}")
    return steps


class DropoutSchedule:
    r"""Sets the drop probability of each dropout of a model to a factor of its own, a function of the step.

    .. math:: p_{module}(t) = p_{module}(0) \cdot \text{schedule}(t)

    It is made like :class:`torch.optim.lr_scheduler.LambdaLR`: from the model as it is built, with each ``p``
    at its full value. Step 0 is set at once, and each :meth:`step` goes on to the next. The functions of
    :mod:`thinned.schedules` make schedules; any function of the step will do.

    A layer reads its ``p`` at each call. Under :func:`torch.compile` ``p`` is a constant of the graph, and
    each new value compiles once more, up to ``torch._dynamo.config.recompile_limit`` (8) graphs: use a
    schedule with few values, such as ``early``, ``late`` or ``lambda step: min(4, step // 1000) / 4``.

    Args:
        model: whose dropouts it is for. A module in two places counts once.
        schedule: from the step to the factor.
        include: from a module's path and the module to whether it takes part. By default those do whose class
            is a dropout: torch.nn's, thinned's and whatever has "drop" in its name or is called
            "StochasticDepth", as in timm and torchvision.
        attributes: what the probability may be called; of a module that takes part, the first that it has as
            a number is set.

    Attributes:
        last_step: the step whose probabilities are set.

    Raises:
        ValueError: ``model`` has no such module, or ``schedule`` leads outside [0, 1].

    Source: the interface is LambdaLR's; the papers are named at each function of :mod:`thinned.schedules`.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), thinned.Dropout(0.2), torch.nn.Dropout(0.4))
    >>> schedule = thinned.DropoutSchedule(model, thinned.schedules.linear(1.0, 0.0, steps=4))
    >>> schedule.step()
    >>> schedule.step()
    >>> schedule.last_p
    {'1': 0.1, '2': 0.2}
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        *,
        include: Callable[[str, nn.Module], bool] | None = None,
        attributes: Sequence[str] = ("p", "drop_prob"),
    ) -> None:
        self.schedule = schedule
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for path, module in model.named_modules():
            if is_dropout(module) if include is None else include(path, module):
                name = next((name for name in attributes if _is_number(getattr(module, name, None))), None)
                if name is not None:
                    self._places[path] = module, name
        if not self._places:
            raise ValueError(
                f"found nothing to schedule in {type(model).__name__}: no module that takes part has a "
                f"number called {' or '.join(attributes)}"
            )
        self.initial_p = self.last_p
        self.last_step = 0
        self._set(0)

    @property
    def last_p(self) -> dict[str, float]:
        """Each module's probability now, by its path."""
        return {path: getattr(module, name) for path, (module, name) in self._places.items()}

    def step(self) -> None:
        """Set the probabilities of the next step.

        Raises:
            ValueError: the schedule leads outside [0, 1]; nothing has changed.
        """
        self._set(self.last_step + 1)

    def state_dict(self) -> dict[str, Any]:
        """The step, and the probabilities at full value by the modules' paths; not the schedule."""
        return {"last_step": self.last_step, "initial_p": dict(self.initial_p)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another schedule for such a model stood: its probabilities are set at once.

        Raises:
            RuntimeError: the state is of a model with other dropouts.
            ValueError: the schedule leads outside [0, 1]; nothing has changed.
        """
        initial_p = state_dict["initial_p"]
        if differ := sorted(initial_p.keys() ^ self.initial_p.keys()):
            raise RuntimeError(f"the state is of a model with other dropouts; only one of them has {differ}")
        before, self.initial_p = self.initial_p, dict(initial_p)
        try:
            self._set(state_dict["last_step"])
        except ValueError:
            self.initial_p = before
            raise

    def _set(self, step: int) -> None:
        factor = self.schedule(step)
        p = {path: initial * factor for path, initial in self.initial_p.items()}
        for path, value in p.items():
            if not 0 <= value <= 1:
                raise ValueError(
                    f"dropout probability has to be between 0 and 1, but the factor {factor} of step {step} "
                    f"makes {self.initial_p[path]} of {path or 'the model'} {value}"
                )
        for path, (module, name) in self._places.items():
            setattr(module, name, p[path])
        self.last_step = step


_TORCHS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def is_dropout(module: nn.Module) -> bool:
    """Whether a module's class makes it a dropout: torch.nn's, thinned's, or one by its name."""
    name = type(module).__name__.lower()
    return (
        isinstance(module, _TORCHS)
        or type(module).__module__.startswith("thinned.layers.")
        or "drop" in name
        or name == "stochasticdepth"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
