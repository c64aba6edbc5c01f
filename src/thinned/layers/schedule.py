"""Drop probabilities that change over training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from thinned.schedules import Schedule

__all__ = ["DropoutSchedule"]


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
