"""A model whose masks are functions of an argument, so that they still are when it has been exported."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from thinned.keys import Key
from thinned.models.address import address
from thinned.models.address.hooks import sites_of

__all__ = ["Keyed"]


class Keyed(nn.Module):
    r"""A module that calls another with masks that are a function of a key, which is one more input.

    .. math:: \text{mask key} = \text{Key}(key).\text{fold}(0).\text{fold}(site)
        \;[.\text{fold}(sample) \text{ for each row}]

    That is ``address(model, seed=Key.from_bits(key), step=0, samples=samples)``, where ``site`` is defined;
    its ``mask_of`` gives the mask of any site. A graph of it that :func:`torch.export.export` or
    :func:`torch.compile` makes asks no random number generator: equal keys give equal results, bit for bit
    those of eager mode, and other keys give other draws. What drops is what is in training mode, or is
    without one, when the graph is made.

    It is about thinned's layers and functions; for those of torch see :func:`thinned.convert`, and
    ``Keyed(thinned.Intercepted(model))`` for those that are no modules. An exported graph names the inputs
    after ``model``'s own ``args_0``, ``args_1`` and so on, and ``dynamic_shapes`` takes them as ``args``;
    PyTorch has no dynamic shapes for those given by name, the key and the samples apart.

    Args:
        model: what is called; its parameters are under ``model.`` in the ``state_dict``.

    Shape:
        - ``key``: ``()``, an int64 tensor, any 64 bits.
        - ``samples``: ``(n,)``, int64, an id for each row of dimension 0 of what the sites are given, or
          None. A row's mask is then a function of the key and its id, whatever its place in the batch: the
          draws of a Monte-Carlo prediction are a batch of copies with ids of their own.
        - All else, and what comes back, is the model's.

    Raises:
        TypeError: ``key`` or ``samples`` are no int64 tensors.
        ValueError: ``key`` is more than one key.

    >>> import torch, thinned
        >>> model = thinned.Keyed(torch.nn.Sequential(torch.nn.Linear(4, 4), thinned.Dropout(0.5)))
    >>> x, key = torch.ones(2, 4), torch.tensor(7)
    >>> program = torch.export.export(model, (x,), {"key": key}, strict=False).module()
    >>> program(x, key=key).equal(model(x, key=key))
    True
    >>> program(x, key=key + 1).equal(model(x, key=key))
    False
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        sites_of(model)  # now, as its hooks are not to be added while a graph is made

    def forward(self, *args: Any, key: Tensor, samples: Tensor | None = None, **kwargs: Any) -> Any:
        seed = Key.from_bits(key)
        if key.dim():
            raise ValueError(
                f"key must be one key, a tensor of shape (), got one of shape {tuple(key.shape)}; a key for "
                "each row is what samples= makes of it"
            )
        with address(self.model, seed=seed, step=0, samples=samples):
            return self.model(*args, **kwargs)
