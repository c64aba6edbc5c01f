"""DropoutSchedule, and schedules for it: functions from the training step to a factor of each probability.

A schedule gives factors, not probabilities: with ``linear(0.0, 1.0, steps=1000)`` a dropout of ``p=0.1`` goes
from 0 to 0.1. The schedules made here can be pickled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from thinned.checks import check_integer, check_real, got
from thinned.models.convert.rules import is_dropout, is_number
from thinned.models.sites import Place, Rate, RatesByPath, own_attribute, rates_of
from thinned.models.walk import Choice, check_model, chooser, modules_with_paths, unwrapped
from thinned.torch_state import WRAPPERS

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
    any function from the step to a factor, so ``lambda step: 1.0`` leaves each ``p`` as it is. The functions
    of :mod:`thinned.schedules` make some.

    Each step looks the numbers up by path. The schedule therefore goes on in modules that replace others, as
    :func:`thinned.convert`, :func:`thinned.revert` or wrappers such as :func:`torch.compile` do; such a
    module has the full probability of the one before. It does not follow a copy of the model, or a model that
    is itself a dropout and is converted.

    Layers read their ``p`` at each call. Under :func:`torch.compile` ``p`` is a constant of the graph: each
    new value recompiles, up to ``torch._dynamo.config.recompile_limit`` (8) graphs. Use a schedule with few
    values there, such as ``early``, ``late`` or ``lambda step: min(4, step // 1000) / 4``.

    Args:
        model: the model with the dropouts. A module under two paths counts once.
        schedule: a function from the step to the factor.
        include: schedule these modules only: a choice as that of :func:`thinned.convert`. A module that it
            chooses needs no known number: one from 0 to 1 that is called "p" or "drop_prob" will do.
            Default: every module that drops.
        attributes: schedule these attributes only: the first that a module has as a number. A key of
            ``last_p`` is then the path alone.

    Attributes:
        last_step: the step whose probabilities are set.

    Raises:
        ValueError: ``model`` has no such module, or ``schedule`` gives a probability outside [0, 1].
        TypeError: ``model`` is no module, ``schedule`` no function of numbers, or ``include`` no choice of
            modules.

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
        include: Choice | None = None,
        attributes: Sequence[str] | None = None,
    ) -> None:
        check_model("DropoutSchedule", model)
        if not callable(schedule):
            raise TypeError(
                "schedule must be a function of the step, such as thinned.schedules.linear(1.0, 0.0, "
                f"steps=1000), {got(schedule)}"
            )
        model = unwrapped(model)
        self.schedule = schedule
        chosen = chooser(model, include, None)
        names = ("p", "drop_prob") if attributes is None else _names(attributes)
        rates = [rate for rate in rates_of(model) if rate.value or not rate.stays_off]
        scheduled: list[tuple[Rate, tuple[str | None, ...]]] = []
        if attributes is None:
            for rate in rates:
                if chosen(rate.paths, rate.module):
                    scheduled.append((rate, (None, rate.name) if rate.of_module else (rate.name,)))
            taken = {id(rate.owner) for rate in rates}
            candidates = set() if include is None else {id(module) for module in model.modules()} - taken
        else:
            candidates = {id(rate.owner) for rate in rates if rate.name in names}
            candidates |= {
                id(module) for module in model.modules() if include is not None or is_dropout(module)
            }
        for module, paths in modules_with_paths(model):
            name = next((name for name in names if is_number(getattr(module, name, None))), None)
            if name is None or (attributes is None and not 0 <= getattr(module, name) <= 1):
                continue  # such as the p of nn.TripletMarginLoss
            if id(module) in candidates and chosen(paths, module):
                places = tuple(Place(path) for path in paths)
                rate = Rate(module, paths, module, name, paths[0], places=places)
                scheduled.append((rate, (*names, None) if own_attribute(module) == name else names))
        if not scheduled:
            raise ValueError(
                f"found nothing to schedule in the model, a {type(model).__name__}: no module that takes "
                f"part has a number called {' or '.join(names)}"
                + ", or another to drop with" * (attributes is None)
                + "; include= takes other modules, such as include='encoder.*', and attributes= other numbers"
            )
        self._rates = RatesByPath(model, scheduled)
        self._set(0, self.last_p)

    @property
    def last_p(self) -> dict[str, float]:
        """The current probabilities: by the path of a dropout module, or by path and attribute.

        Raises:
            RuntimeError: a module is gone, or another without such a number is in its place.
        """
        p: dict[str, float] = {}
        for key, found in self._rates.look():
            p.setdefault(key, found.number * found.unit)
        return p

    def step(self) -> None:
        """Set the probabilities of the next step.

        Warns:
            UserWarning: each probability was 0 when the schedule was made, as another schedule may leave it.

        Raises:
            ValueError: the schedule gives a probability outside [0, 1]; nothing has changed.
            RuntimeError: as for :attr:`last_p`; nothing has changed.
        """
        if not any(self.initial_p.values()):  # not in the constructor, as load_state_dict may follow
            warnings.warn(
                "nothing drops at any step: each probability was 0 when the DropoutSchedule was made, and a "
                "schedule multiplies it; make one schedule of a model, while each p has its full value",
                stacklevel=2,
            )
        self._set(self.last_step + 1, self.initial_p)

    def state_dict(self) -> dict[str, Any]:
        """The step and the full probabilities by the keys of ``last_p``, without the schedule."""
        return {"last_step": self.last_step, "initial_p": dict(self.initial_p)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the saved step, and set its probabilities.

        A state may have the probabilities of dropout modules alone, as earlier versions saved it: the other
        numbers then start from what they were when this schedule was made.

        Raises:
            RuntimeError: the state is of a model with other dropouts; or as for :attr:`last_p`.
            ValueError: the schedule gives a probability outside [0, 1]; nothing has changed.
        """
        if not isinstance(state_dict, Mapping) or not {"last_step", "initial_p"} <= state_dict.keys():
            raise TypeError(f"state_dict must be that of a DropoutSchedule, {got(state_dict)}")
        initial_p = {self._key(key): p for key, p in state_dict["initial_p"].items()}
        others = {key: self.initial_p[key] for key, is_one in self._rates.of_module.items() if not is_one}
        if others.keys().isdisjoint(initial_p):
            initial_p = {**others, **initial_p}
        if differ := sorted(initial_p.keys() ^ self.initial_p.keys()):
            raise RuntimeError(f"the state is of a model with other dropouts; only one of them has {differ}")
        self._set(state_dict["last_step"], initial_p)

    def _key(self, saved: str) -> str:
        """A key as it is now: earlier versions had the names of wrapped models in it."""
        key = ".".join(part for part in saved.split(".") if part not in WRAPPERS)
        return key if key in self.initial_p else key.removeprefix("module.")

    def _set(self, step: int, initial_p: dict[str, float]) -> None:
        given = self.schedule(step)
        check_real(f"schedule({step})", given)
        factor = float(given)  # a tensor as a p would be no number for the next schedule
        for key, initial in initial_p.items():
            if not 0 <= initial * factor <= 1:
                raise ValueError(
                    f"dropout probability has to be between 0 and 1, but the factor {factor} of step {step} "
                    f"makes {initial * factor} of the {initial} of {key or 'the model'}; a schedule gives "
                    "factors, not probabilities: 1.0 is for the full probability of each dropout"
                )
        numbers = [
            (found, found.number, initial_p[key] * factor / found.unit) for key, found in self._rates.look()
        ]
        try:
            for found, before, number in numbers:
                if number != before:
                    found.set(number)
        except Exception:
            for found, before, _ in numbers:
                found.set(before)
            raise
        self.initial_p, self.last_step = initial_p, step


def linear(start: float, end: float, steps: int) -> Schedule:
    """A factor that goes from ``start`` to ``end`` in a straight line over ``steps``, and then stays.

    With ``linear(0.0, 1.0, steps)`` each dropout goes from 0 to its own ``p``.

    Raises:
        ValueError: ``steps`` below 1.

    >>> [linear(0.0, 1.0, steps=4)(step) for step in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    _check_ends(start, end)
    return partial(_linear, start=start, end=end, steps=_positive("steps", steps))


def _linear(step: int, start: float, end: float, steps: int) -> float:
    return start + (end - start) * min(step / steps, 1.0)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """A factor that goes from ``start`` to ``end`` along half a cosine over ``steps``, and then stays.

    Raises:
        ValueError: ``steps`` below 1.

    >>> [round(cosine(1.0, 0.0, steps=4)(step), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    _check_ends(start, end)
    return partial(_cosine, start=start, end=end, steps=_positive("steps", steps))


def _cosine(step: int, start: float, end: float, steps: int) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def early(until: int, decay: Literal["constant", "linear"] = "constant") -> Schedule:
    """Early dropout, against underfitting: each probability times 1 before step ``until``, then 0.

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
    """Late dropout, against overfitting: each probability times 0 before step ``start``, then 1.

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
    r"""Curriculum dropout over a training of ``steps``: a factor that is 0 at first, and soon close to 1.

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
    """A factor from 1 down to 0 at step ``bottom`` and up to 1 again at ``steps``, in straight lines.

    Raises:
        ValueError: ``bottom`` below 1 or not below ``steps``.

    Source: Zhou et al., "Scheduled DropHead", Findings of EMNLP 2020, section 3.

    >>> [v_shape(2, 6)(step) for step in range(8)]
    [1.0, 0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    check_integer("bottom", bottom)
    check_integer("steps", steps)
    if not 1 <= bottom < steps:
        raise ValueError(f"bottom has to be from 1 to below steps, but got {bottom} and {steps}")
    return partial(_v_shape, bottom=bottom, steps=steps)


def _v_shape(step: int, bottom: int, steps: int) -> float:
    return max(1 - step / bottom, _linear(step - bottom, 0.0, 1.0, steps - bottom))


def _positive(name: str, steps: int) -> int:
    check_integer(name, steps, least=1)
    return steps


def _check_ends(start: float, end: float) -> None:
    check_real("start", start)
    check_real("end", end)


def _names(attributes: Sequence[str]) -> tuple[str, ...]:
    is_one = isinstance(attributes, str | Tensor) or not isinstance(attributes, Iterable)
    if is_one or not all(isinstance(name, str) for name in attributes):
        raise TypeError(f'attributes must be names, such as ("drop_prob",), {got(attributes)}')
    return tuple(attributes)
