"""A model named on the command line."""

from __future__ import annotations

from torch import nn

from thinned.compare.errors import one_line
from thinned.compare.loading import load

__all__ = ["model_of"]


def model_of(text: str) -> nn.Module:
    """The model behind ``package.module:factory`` or ``path/to/file.py:factory``.

    Args:
        text: names a function or a class to call without arguments, or a model itself.

    Raises:
        ValueError: with one line that says what was given and what is wrong.

    >>> model_of("torch.nn:Dropout")
    Dropout(p=0.5, inplace=False)
    """
    module_name, colon, name = text.rpartition(":")
    if not (colon and name and module_name):
        raise ValueError(
            f"unknown model {text!r}; accepted are package.module:factory or path/to/file.py:factory"
        )
    module = load(module_name)
    factory = getattr(module, name, None)
    if factory is None:
        raise ValueError(f"{module_name} has nothing called {name!r}")
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ValueError(f"{text} is neither a model nor a function that makes one, but {factory!r}")
    try:
        model = factory()
    except Exception as error:  # whatever a stranger's function raises
        raise ValueError(f"{text} cannot be called without arguments: {one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"{text} gave no torch.nn.Module, but a {type(model).__name__}")
    return model
