"""Factors that change over training, for :class:`thinned.DropoutSchedule`: each is a function of the step.

Each function here returns one that can be pickled. A factor multiplies the ``p`` that each module has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

__all__ = ["Schedule", "cosine", "curriculum", "early", "late", "linear", "v_shape"]

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
