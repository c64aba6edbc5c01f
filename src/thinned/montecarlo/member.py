"""One draw of a model as a module: a fixed thinned network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from thinned.checks import check_integer
from thinned.keys import Key
from thinned.models.intercept import intercept
from thinned.montecarlo.draws import arguments_of, draw_of
from thinned.montecarlo.dropping import Dropouts, Inject
from thinned.montecarlo.predict import Method, Settings, rows_of
from thinned.named import Named
from thinned.torch_state import outside_graphs

__all__ = ["Member", "member"]


def member(
    model: nn.Module,
    draw: int,
    *,
    seed: int | Key = 0,
    method: Method = "stratified",
    strata: int = 20,
    inject: Inject | None = None,
) -> Member:
    """One thinned network: the model under the masks that draw number ``draw`` has for all examples.

    It gives the outputs of that draw in :func:`~thinned.montecarlo.predict` with ``consistent=True`` and the
    same options, in which ``strata`` is at most ``samples``. It shares its parameters with ``model``, is
    deterministic and can be trained, saved, copied and moved to another device. Batch normalization is in
    evaluation. The model's flags and torch's generators stay as they are.

    Args:
        model: the model; its parameters are under ``module.`` in the ``state_dict``.
        draw: the number of the draw, from 0.
        seed: as for :func:`~thinned.montecarlo.predict`, like the other arguments.
        method: see there.
        strata: see there.
        inject: see there.

    Raises:
        ValueError: the model drops nowhere, or an argument is none of those accepted.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(4, 3))
    >>> network = member(model, 17)
    >>> x = torch.randn(5, 4)
    >>> network(x).equal(network(x)), network(x[:2]).allclose(network(x)[:2])
    (True, True)
    """
    settings = Settings(seed=seed, method=method, strata=strata, inject=inject, samples=max(strata, 1))
    check_integer("draw", draw, least=0)
    return Member(model, draw, settings)


class Member(Named):
    """The result of :func:`member`."""

    def __init__(self, module: nn.Module, draw: int, settings: Settings) -> None:
        super().__init__()
        self._dropouts = Dropouts(module, settings.inject)
        self.module = module
        self.draw = draw
        self.settings = settings

    @outside_graphs
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own output."""
        ids = torch.zeros(rows_of(arguments_of(args, kwargs)), dtype=torch.int64)
        draw = draw_of(self.module, self.settings.seed, self.draw, ids, self.settings.set_size)
        draw.recomputing = self._dropouts.on  # type: ignore[method-assign]
        with draw.recomputing(), intercept(), draw:
            return self.module(*args, **kwargs)

    def extra_repr(self) -> str:
        settings = self.settings
        shown: dict[str, Any] = {"seed": settings.seed, "method": settings.method}
        if settings.method == "stratified":
            shown["strata"] = settings.strata
        if settings.inject is not None:
            shown["inject"] = settings.inject
        return ", ".join([f"draw={self.draw}", *(f"{name}={value!r}" for name, value in shown.items())])
