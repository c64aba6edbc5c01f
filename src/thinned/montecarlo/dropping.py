"""A context in which a model drops and is otherwise in evaluation; and dropout put before chosen modules."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from thinned import functional as F
from thinned.checks import did_you_mean, got
from thinned.layers._arguments import check_p
from thinned.models.inspect import Site, inspect
from thinned.models.walk import check_model, modules_in_containers, modules_with_paths
from thinned.torch_state import compiler_is_imported

__all__ = ["HEAD_P", "Dropouts", "Inject", "injected", "one_thread"]

Inject = Mapping[str, float] | str
HEAD_P = 0.1
# The status of places that inspect finds and no key reaches; such a place stays off.
UNREACHED = ("register", "perhaps", "beyond")

# The flags of modules and torch's generators are shared by all threads, so one predicts at a time.
one_thread = threading.RLock()

# The place of the running mean among the arguments; and, at place 5, the flag that says to update it.
NORMS: dict[Any, tuple[int, str]] = {
    nn.functional.batch_norm: (1, "training"),
    nn.functional.instance_norm: (1, "use_input_stats"),
    torch.batch_norm: (3, "training"),
    torch.instance_norm: (3, "use_input_stats"),
}


class _Evaluation(TorchFunctionMode):
    """Batch normalization uses its running statistics, also by a module whose flag says training."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in NORMS:
            place, flag = NORMS[func]
            if (args[place] if len(args) > place else kwargs.get("running_mean")) is not None:
                if len(args) > 5:
                    args = (*args[:5], False, *args[6:])
                else:
                    kwargs = {**kwargs, flag: False}
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
        self._chosen = {} if inject is None else injected(model, inject)
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

        At the end, also after an exception, every module's ``training`` flag, the buffers of modules that
        drop and torch's generators are what they were. Batch normalization uses its running statistics and
        does not change them. Code of :func:`torch.compile` runs without the compiler. Other threads wait to
        enter.
        """
        with one_thread, self.generators(), self._on():
            yield

    @contextmanager
    def generators(self) -> Iterator[None]:
        """Leave torch's generators as they were; that of the CPU goes on where the last context left it."""
        tensors = [*self._model.parameters(), *self._model.buffers()]
        devices = {each.device for each in tensors if each.device.type not in ("cpu", "meta")}
        kind = next((device.type for device in devices), "cuda")
        with torch.random.fork_rng([device.index for device in devices], device_type=kind):
            if self._state is not None:
                torch.set_rng_state(self._state)
            try:
                yield
            finally:
                self._state = torch.get_rng_state()

    @contextmanager
    def _on(self) -> Iterator[None]:
        flags = [(module, module.training) for module in self._modules.values()]
        buffers = [
            (self._modules[path], name, buffer, buffer.clone())
            for path in self._drop
            for name, buffer in self._modules[path].named_buffers(recurse=False)
        ]
        hooks: list[RemovableHandle] = []
        try:
            for path, module in self._modules.items():
                module.training = path in self._drop
            for path, p in self._chosen.items():
                hooks.append(self._modules[path].register_forward_pre_hook(_Drop(p)))
            eager = torch.compiler.set_stance("force_eager") if compiler_is_imported() else nullcontext()
            with eager, _Evaluation():
                yield
        finally:
            for module, training in flags:
                module.training = training
            for module, name, buffer, before in buffers:
                setattr(module, name, buffer)
                if not buffer.equal(before):
                    with torch.no_grad():
                        buffer.copy_(before)
            for hook in hooks:
                hook.remove()


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


def injected(model: nn.Module, inject: Inject) -> dict[str, float]:
    """Probabilities by path."""
    modules = dict(model.named_modules())
    if inject != "head" and not isinstance(inject, Mapping):
        kind = ValueError if isinstance(inject, str) else TypeError
        raise kind(f"inject must be 'head' or a mapping of path patterns to p, got {inject!r}")
    if isinstance(inject, str):
        heads = [path for path, module in modules.items() if isinstance(module, WEIGHTED)]
        if not heads:
            raise ValueError(
                f"inject='head': this {type(model).__name__} has no nn.Linear and no convolution"
            )
        return {heads[-1]: HEAD_P}
    found: dict[str, float] = {}
    for pattern, p in inject.items():
        check_p(p)
        if not isinstance(pattern, str):
            raise TypeError(f"inject must have patterns of paths as keys, {got(pattern)}")
        matches = [path for path in modules if fnmatchcase(path, pattern)]
        if not matches:
            raise ValueError(
                f"inject: no module of this {type(model).__name__} is at a path like {pattern!r}"
                f"{did_you_mean(pattern, modules)}"
            )
        for path in matches:
            found.setdefault(path, p)
    return {path: p for path, p in found.items() if p != 0}
