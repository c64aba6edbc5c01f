"""Models with the key as an input, so that an exported graph draws nothing."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from thinned.keys import Key
from thinned.layers._named import Named
from thinned.layers._overrides import module_node
from thinned.models.address import address
from thinned.models.address.hooks import hooks_of

__all__ = ["Keyed"]


class Keyed(Named):
    r"""A module that calls another with masks that are a function of a further input, the key.

    .. math:: \text{mask key} = \text{Key}(key).\text{fold}(0).\text{fold}(site)
        \;[.\text{fold}(sample) \text{ for each row}]

    That is ``address(model, seed=Key.from_bits(key), step=0, samples=samples)``: see :func:`thinned.address`
    for ``site``, and for ``mask_of``, which gives the mask of any site. A graph of this module by
    :func:`torch.export.export` or :func:`torch.compile` uses no random number generator. Equal keys give
    equal results, bit for bit those of eager mode. The graph drops where a module is in training mode, or
    where a call has no mode, at the time of the export.

    Only thinned's layers and functions have these masks; see :func:`thinned.convert` for torch's modules, and
    use ``Keyed(thinned.Intercepted(model))`` for torch's functions. An exported graph names the model's
    positional inputs ``args_0``, ``args_1`` and so on, and ``dynamic_shapes`` takes them as ``args``. PyTorch
    has no dynamic shapes for inputs given by name, except the key and the samples.

    Args:
        model: the module to call; its parameters are under ``model.`` in the ``state_dict``.

    Shape:
        - ``key``: ``()``, an int64 tensor, any 64 bits.
        - ``samples``: ``(n,)``, int64, an id for each row of dimension 0 of the sites' inputs, or None. A
          row's mask is then a function of the key and the row's id, at any place in the batch. The draws of a
          Monte-Carlo prediction are a batch of copies with different ids.
        - Other inputs and the output: those of ``model``.

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
        hooks_of(model)  # now: compiled and exported code cannot register hooks

    def forward(self, *args: Any, key: Tensor, samples: Tensor | None = None, **kwargs: Any) -> Any:
        if (node := module_node(self, *args, key=key, samples=samples, **kwargs)) is not None:
            return node
        seed = Key.from_bits(key)
        if key.dim():
            raise ValueError(
                f"key must be one key, a tensor of shape (), got one of shape {tuple(key.shape)}; a key for "
                "each row is what samples= makes of it"
            )
        with address(self.model, seed=seed, step=0, samples=samples):
            return self.model(*args, **kwargs)
