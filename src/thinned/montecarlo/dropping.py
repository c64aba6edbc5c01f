"""A context in which a model drops and is otherwise in evaluation; and dropout put before chosen modules."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from thinned import functional as F
from thinned.checks import did_you_mean
from thinned.layers._arguments import check_p
from thinned.models.inspect import Site, inspect
from thinned.models.walk import check_model, modules_in_containers, modules_with_paths

__all__ = ["HEAD_P", "Dropouts", "Inject"]

Inject = Mapping[str, float] | str
HEAD_P = 0.1
# What inspect finds but no key reaches; such a place stays off.
UNREACHED = ("register", "perhaps", "beyond")


class _Evaluation(TorchFunctionMode):
    """Batch normalization uses its running statistics, also by a module whose flag says training."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is nn.functional.batch_norm:
            names = ("input", "running_mean", "running_var", "weight", "bias", "training")
            kwargs |= dict(zip(names, args, strict=False))
            args = args[len(names) :]
            if kwargs.get("running_mean") is not None:
                kwargs["training"] = False
            if args:
                kwargs |= dict(zip(("momentum", "eps"), args, strict=False))
            args = (kwargs.pop("input"),)
        return func(*args, **kwargs)


class Dropouts:
    """Where a model drops, and a context in which it does, and is in evaluation otherwise.

    Args:
        model: the model.
        inject: probabilities by patterns of paths (:mod:`fnmatch`), of which the first match holds: the first
            input of these modules is dropped too. ``"head"`` stands for the last ``nn.Linear`` or convolution
            of the model, with p = 0.1.

    Raises:
        ValueError: the model drops nowhere; no module is at a path that ``inject`` names; p outside [0, 1].
    """

    def __init__(self, model: nn.Module, inject: Inject | None = None) -> None:
        check_model("montecarlo", model)
        self._chosen = {} if inject is None else _chosen(model, inject)
        found = modules_with_paths(model)
        modules = {paths[0]: module for module, paths in [*found, *modules_in_containers(found)]}
        sites = [site for site in inspect(model) if site.status != "off" and site.p != 0]
        reached = [site for site in sites if site.status not in UNREACHED]
        if not reached and not self._chosen:
            raise ValueError(_nothing(model, sites))
        if left := [f"{site.type} at {site.path!r}" for site in sites if site.status in UNREACHED]:
            warnings.warn(
                f"no key reaches {', '.join(left)}, which stays off; see thinned.inspect(model)",
                UserWarning,
                stacklevel=4,
            )
        self.paths = tuple(dict.fromkeys([*(site.path for site in reached), *self._chosen]))
        self._modules = modules
        self._drop = {site.path for site in reached}
        self._model = model
        self._state: Tensor | None = None

    @contextmanager
    def on(self) -> Iterator[None]:
        """Let the model drop.

        At the end, also after an exception, every module's ``training`` flag and torch's generators are what
        they were. Batch normalization uses its running statistics and does not change them. The generator
        of the CPU goes on where the last such context left it, for a data loader that draws from it.
        """
        flags = [(module, module.training) for module in self._modules.values()]
        hooks: list[RemovableHandle] = []
        tensors = [*self._model.parameters(), *self._model.buffers()]
        devices = {each.device for each in tensors if each.device.type not in ("cpu", "meta")}
        kind = next((device.type for device in devices), "cuda")
        with torch.random.fork_rng([device.index for device in devices], device_type=kind):
            if self._state is not None:
                torch.set_rng_state(self._state)
            try:
                for path, module in self._modules.items():
                    module.training = path in self._drop
                for path, p in self._chosen.items():
                    hooks.append(self._modules[path].register_forward_pre_hook(_Drop(p)))
                with _Evaluation():
                    yield
            finally:
                for module, training in flags:
                    module.training = training
                for hook in hooks:
                    hook.remove()
                self._state = torch.get_rng_state()


def _nothing(model: nn.Module, sites: Sequence[Site]) -> str:
    looked = (
        "dropout modules, F.dropout and its like in a forward, scaled_dot_product_attention(dropout_p=), "
        "nn.MultiheadAttention, nn.LSTM, nn.GRU and nn.RNN with dropout="
    )
    near = "".join(f"; {site.type} at {site.path!r} is out of reach" for site in sites)
    return (
        f"this {type(model).__name__} drops nowhere, so all draws would be equal; looked for {looked}, with "
        f"p > 0{near}. To put dropout in, give inject={{path pattern: p}} or inject='head'"
    )


class _Drop:
    """A forward pre-hook."""

    def __init__(self, p: float) -> None:
        self.p = p

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if not args or not isinstance(args[0], Tensor):
            raise TypeError(
                f"inject drops the first positional input of {type(module).__name__}, which is no tensor"
            )
        return F.dropout(args[0], self.p), *args[1:]


WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _chosen(model: nn.Module, inject: Inject) -> dict[str, float]:
    """Probabilities by path."""
    modules = dict(model.named_modules())
    if isinstance(inject, str):
        if inject != "head":
            raise ValueError(f"inject must be 'head' or a mapping of path patterns to p, got {inject!r}")
        heads = [path for path, module in modules.items() if isinstance(module, WEIGHTED)]
        if not heads:
            raise ValueError(
                f"inject='head': this {type(model).__name__} has no nn.Linear and no convolution"
            )
        return {heads[-1]: HEAD_P}
    found: dict[str, float] = {}
    for pattern, p in inject.items():
        check_p(p)
        matches = [path for path in modules if fnmatchcase(path, pattern)]
        if not matches:
            raise ValueError(
                f"inject: no module of this {type(model).__name__} is at a path like {pattern!r}"
                f"{did_you_mean(pattern, modules)}"
            )
        for path in matches:
            found.setdefault(path, p)
    return found
