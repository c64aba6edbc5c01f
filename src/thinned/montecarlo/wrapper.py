"""A model whose prediction is a distribution."""

from __future__ import annotations

from typing import Any

from torch import nn

from thinned.checks import got
from thinned.montecarlo.draws import arguments_of
from thinned.montecarlo.predict import Settings, predict
from thinned.named import Named

__all__ = ["MonteCarlo"]


class MonteCarlo(Named):
    """A model that predicts distributions in evaluation, and is itself in training.

    In evaluation ``forward`` returns the :class:`~thinned.montecarlo.Prediction` of its inputs, in training
    the model's own output. Both take the model's arguments.

    Args:
        module: the model; its parameters are under ``module.`` in the ``state_dict``.
        samples: the number of draws.
        options: those of :func:`thinned.montecarlo.predict`, except ``ids``.

    Raises:
        TypeError: ``module`` is no module; there is no such option.
        ValueError: an option is none of those accepted.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(4, 3))
    >>> model = MonteCarlo(model, samples=50, seed=7)
    >>> model
    thinned.MonteCarlo(
      samples=50, seed=7
      (module): Sequential(
        (0): Dropout(p=0.5, inplace=False)
        (1): Linear(in_features=4, out_features=3, bias=True)
      )
    )
    >>> x = torch.randn(5, 4)
    >>> model(x).shape, model.eval()(x).mean.shape
    (torch.Size([5, 3]), torch.Size([5, 3]))
    """

    def __init__(self, module: nn.Module, samples: int = 100, **options: Any) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, {got(module)}")
        if "ids" in options:
            raise TypeError("ids are those of one call's inputs, so MonteCarlo has none; use predict(ids=)")
        self.module = module
        self.options = {"samples": samples, **options}
        Settings(**self.options)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output in training, a Prediction in evaluation."""
        if self.training:
            return self.module(*args, **kwargs)
        return predict(self.module, arguments_of(args, kwargs), **self.options)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())
