"""DropoutSchedule, and schedules for it: functions from the training step to a factor of each probability.

The schedules made here can be pickled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from thinned.models.sites import Rate, is_dropout, is_number, rates_of

__all__ = ["DropoutSchedule", "Schedule", "cosine", "curriculum", "early", "late", "linear", "v_shape"]

Schedule = Callable[[int], float]


def __dir__() -> list[str]:
    return __all__


class DropoutSchedule:
    r"""Changes the drop probabilities of a model over training: multiplies each by a factor of the step.

    .. math:: p_{site}(t) = p_{site}(0) \cdot \text{schedule}(t)

    It schedules the probabilities of dropout modules and the other numbers that the model drops with:
    ``nn.MultiheadAttention.dropout``, that of ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, attributes such as
    ``attention_dropout`` and ``layerdrop`` of transformers' models, and those of their config that are read
    at each call. A config is one object for all models that were built from it, and is saved with a model.

    Use it like :class:`torch.optim.lr_scheduler.LambdaLR`: build it from the model while each ``p`` has its
    full value, then call :meth:`step` after each training step. The constructor sets step 0. A schedule is
    any function of the step; the functions of :mod:`thinned.schedules` make some.

    Layers read their ``p`` at each call. Under :func:`torch.compile` ``p`` is a constant of the graph: each
    new value recompiles, up to ``torch._dynamo.config.recompile_limit`` (8) graphs. Use a schedule with few
    values there, such as ``early``, ``late`` or ``lambda step: min(4, step // 1000) / 4``.

    Args:
        model: the model with the dropouts. A module under two paths counts once.
        schedule: a function from the step to the factor.
        include: decides from a module's path and the module whether to schedule it. A module that it chooses
            needs no known number: one that is called "p" or "drop_prob" will do. Default: every module that
            drops.
        attributes: schedule these attributes only: the first that a module has as a number. A key of
            ``last_p`` is then the path alone.

    Attributes:
        last_step: the step whose probabilities are set.

    Raises:
        ValueError: ``model`` has no such module, or ``schedule`` gives a probability outside [0, 1].

    Source: the interface is LambdaLR's; each function of :mod:`thinned.schedules` names its paper.

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
        attributes: Sequence[str] | None = None,
    ) -> None:
        self.schedule = schedule
        chosen = (lambda *_: True) if include is None else include
        names = ("p", "drop_prob") if attributes is None else attributes
        rates = [rate for rate in rates_of(model) if rate.value or not rate.stays_off]
        self._scheduled: dict[str, Rate] = {}
        if attributes is None:
            chosen_rates = (rate for rate in rates if any(chosen(path, rate.module) for path in rate.paths))
            self._scheduled = {rate.key: rate for rate in chosen_rates}
            taken = {id(rate.owner) for rate in rates}
            candidates = {id(module) for module in model.modules()} - taken if include else set()
        else:
            candidates = {id(rate.owner) for rate in rates if rate.name in names}
            candidates |= {id(module) for module in model.modules() if include or is_dropout(module)}
        for path, module in model.named_modules():
            name = next((name for name in names if is_number(getattr(module, name, None))), None)
            if name is not None and id(module) in candidates and chosen(path, module):
                self._scheduled[path] = Rate(module, (path,), module, name, path)
        if not self._scheduled:
            raise ValueError(
                f"found nothing to schedule in {type(model).__name__}: no module that takes part has a "
                f"number called {' or '.join(names)}" + ", or another to drop with" * (attributes is None)
            )
        self._set(0, self.last_p)

    @property
    def last_p(self) -> dict[str, float]:
        """The current probabilities: by the path of a dropout module, or by path and attribute."""
        return {key: rate.value for key, rate in self._scheduled.items()}

    def step(self) -> None:
        """Set the probabilities of the next step.

        Raises:
            ValueError: the schedule gives a probability outside [0, 1]; nothing has changed.
        """
        self._set(self.last_step + 1, self.initial_p)

    def state_dict(self) -> dict[str, Any]:
        """The step and the full probabilities by the keys of ``last_p``, without the schedule."""
        return {"last_step": self.last_step, "initial_p": dict(self.initial_p)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the saved step, and set its probabilities.

        A state may have the probabilities of dropout modules alone, as earlier versions saved it: the other
        numbers then start from what they were when this schedule was made.

        Raises:
            RuntimeError: the state is of a model with other dropouts.
            ValueError: the schedule gives a probability outside [0, 1]; nothing has changed.
        """
        initial_p = state_dict["initial_p"]
        others = {key: self.initial_p[key] for key, rate in self._scheduled.items() if not rate.of_module}
        if others.keys().isdisjoint(initial_p):
            initial_p = {**others, **initial_p}
        if differ := sorted(initial_p.keys() ^ self.initial_p.keys()):
            raise RuntimeError(f"the state is of a model with other dropouts; only one of them has {differ}")
        self._set(state_dict["last_step"], dict(initial_p))

    def _set(self, step: int, initial_p: dict[str, float]) -> None:
        factor = self.schedule(step)
        p = {path: initial * factor for path, initial in initial_p.items()}
        for path, value in p.items():
            if not 0 <= value <= 1:
                raise ValueError(
                    f"dropout probability has to be between 0 and 1, but the factor {factor} of step {step} "
                    f"makes {initial_p[path]} of {path or 'the model'} {value}"
                )
        for key, rate in self._scheduled.items():
            rate.value = p[key]
        self.initial_p, self.last_step = initial_p, step


def linear(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` to ``end`` in a straight line over ``steps``, then ``end``.

    Raises:
        ValueError: ``steps`` below 1.

    >>> [linear(0.0, 1.0, steps=4)(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    return partial(_linear, start=start, end=end, steps=_positive("steps", steps))


def _linear(step: int, start: float, end: float, steps: int) -> float:
    return start + (end - start) * min(step / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """From ``start`` to ``end`` along half a cosine over ``steps``, then ``end``.

    Raises:
        ValueError: ``steps`` below 1.

    >>> [round(cosine(1.0, 0.0, steps=4)(step), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    return partial(_cosine, start=start, end=end, steps=_positive("steps", steps))


def _cosine(step: int, start: float, end: float, steps: int) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def early(until: int, decay: Literal["constant", "linear"] = "constant") -> Schedule:
    """Early dropout, against underfitting: 1 before step ``until``, then 0.

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
    return linear(1.0, 0.0, until) if decay == "linear" else partial(_switch, at=until, before=1.0, after=0.0)


def late(start: int) -> Schedule:
    """Late dropout, against overfitting: 0 before step ``start``, then 1.

    Raises:
        ValueError: ``start`` below 1.

    Source: Liu et al., "Dropout reduces underfitting", ICML 2023, section 4.

    >>> [late(2)(step) for step in range(4)]
    [0.0, 0.0, 1.0, 1.0]
    """
    return partial(_switch, at=_positive("start", start), before=0.0, after=1.0)


def _switch(step: int, at: int, before: float, after: float) -> float:
    return before if step < at else after


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
    return partial(_curriculum, rate=10.0 / _positive("steps", steps))


def _curriculum(step: int, rate: float) -> float:
    return -math.expm1(-rate * step)


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


def _v_shape(step: int, bottom: int, steps: int) -> float:
    return max(1 - step / bottom, _linear(step - bottom, 0.0, 1.0, steps - bottom))


def _positive(name: str, steps: int) -> int:
    if steps < 1:
        raise ValueError(f"{name} has to be at least 1, but got {steps}")
    return steps
