"""Models with the key as an input, so that an exported graph draws nothing."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from thinned.key_source import active
from thinned.keys import Key, as_key, not_a_key
from thinned.layers._overrides import module_node
from thinned.models.address import address
from thinned.models.address.hooks import hooks_of
from thinned.models.intercept import Intercepted
from thinned.models.walk import check_model, is_ours
from thinned.named import Named
from thinned.torch_state import constant_when_compiled

__all__ = ["Keyed"]

_PACKAGES = str(Path(torch.__file__).parent), str(Path(__file__).parents[2])


class Keyed(Named):
    r"""A module that calls another with masks that are a function of a further input, the key.

    .. math:: \text{mask key} = \text{Key}(key).\text{fold}(0).\text{fold}(site)
        \;[.\text{fold}(sample) \text{ for each row}]

    That is ``address(model, seed=Key.from_bits(key), step=0, samples=samples, data_parallel=None)``: see
    :func:`thinned.address` for ``site``, and for ``mask_of``, which gives the mask of any site. A graph
    of this module by :func:`torch.export.export` or :func:`torch.compile` uses no random number
    generator. Equal keys give equal results, bit for bit those of eager mode. The graph drops where a
    module is in training mode, or where a call has no mode, at the time of the export. A call in which no
    mask depends on the key warns and says why: all of ``model`` is in evaluation, or has no layer of
    thinned.

    Only thinned's layers and functions have these masks; see :func:`thinned.convert` for torch's modules, and
    use ``Keyed(thinned.Intercepted(model))`` for torch's functions. An exported graph names the model's
    positional inputs ``args_0``, ``args_1`` and so on, and ``dynamic_shapes`` takes them as ``args``. PyTorch
    has no dynamic shapes for inputs given by name, except the key and the samples.

    Args:
        model: the module to call; its parameters are under ``model.`` in the ``state_dict``.

    Shape:
        - ``key``: a :class:`~thinned.Key`, or its bits: an int64 tensor of shape ``()``. Exported programs
          and ``torch.func`` take the bits.
        - ``samples``: ``(n,)``, int64, an id for each row of dimension 0 of the sites' inputs, or None. A
          row's mask is then a function of the key and the row's id, at any place in the batch. The draws of a
          Monte-Carlo prediction are a batch of copies with different ids.
        - Other inputs and the output: those of ``model``.

    Raises:
        TypeError: ``key`` is neither a :class:`~thinned.Key` nor an int64 tensor, or ``samples`` are no int64
            tensor.
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
        check_model("Keyed", model)
        self.model = model
        hooks_of(model)  # now: compiled and exported code cannot register hooks

    def forward(self, *args: Any, key: Key | Tensor, samples: Tensor | None = None, **kwargs: Any) -> Any:
        if (node := module_node(self, *args, key=key, samples=samples, **kwargs)) is not None:
            return node
        seed = _key(key)
        if seed.shape:
            raise ValueError(
                f"key must be one key, a tensor of shape (), got one of shape {tuple(seed.shape)}; a key for "
                "each row is what samples= makes of it"
            )
        with address(self.model, seed=seed, step=0, samples=samples, data_parallel=None):
            source: Any = active.key_source
            result = self.model(*args, **kwargs)
        if not source.calls:
            modules = list(self.model.modules())
            layers = [module for module in modules if is_ours(module) or isinstance(module, Intercepted)]
            # A layer in training mode may have p = 0, or a key of its own.
            if not any(layer.training for layer in layers):
                _warn(len(layers) > 0, self.model.training)
        return result


def _key(key: Any) -> Key:
    if isinstance(key, Key) or getattr(key, "dtype", None) == torch.uint64:
        return as_key(key)
    if isinstance(key, Proxy) or getattr(key, "dtype", None) == torch.int64:
        return Key.from_bits(key)
    raise not_a_key(key, ", or its bits as an int64 tensor")


@constant_when_compiled
def _warn(has_layers: bool, training: bool) -> None:
    if has_layers:
        reason = "the layers of thinned are in evaluation mode; call train() on those that are to drop"
    else:
        mode = "" if training else " and is in evaluation mode"
        reason = f"the model has no layer of thinned{mode}; see thinned.convert and thinned.Intercepted"
    warnings.warn(f"no mask depends on the key of thinned.Keyed: {reason}", stacklevel=_level())


def _level() -> int:
    """The level of the code that called the model: a warning is shown once for each such place."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PACKAGES):
        level, frame = level + 1, frame.f_back
    return level
