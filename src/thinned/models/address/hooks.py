"""Forward hooks on a model's modules, which report to the active key source what is running."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import Graph

from thinned.checks import got
from thinned.distributed.ranks import DataParallel, Replica, has_peers, replica_of
from thinned.key_source import KeySource, active
from thinned.keys import Key
from thinned.models.walk import PARALLEL_WRAPPERS
from thinned.torch_state import (
    COMPILED,
    WRAPPERS,
    compiling,
    forward_hooks_of,
    graph_task_is_running,
    has_backward_hooks,
    is_replica,
    outside_graphs,
    post_hooks_of,
    pre_hooks_of,
)

__all__ = ["ModuleHooks", "call_as", "has_only_hooks_of_address", "has_other_hooks", "hooks_of", "module_at"]

Result = TypeVar("Result")


class Joinable(Protocol):
    """A context that other threads can join."""

    def join(self) -> KeySource:
        """Activate a key source of this context in this thread, and return it."""


class ModuleHooks:
    """The state that all hooks of one model share. It is copied and pickled with the model.

    Attributes:
        id: unique in this process. A string, because Dynamo has guards for strings but none for identity.
        paths: of the modules that have hooks; a module that several paths lead to has the first.
        sample_dims: for modules with ``batch_first`` and those inside them, by path: the samples' dimension.
        addressed: whether the last call of a module was within an address.
        context: the active address of the thread that called :class:`torch.nn.DataParallel`. Its replicas run
            in threads of their own, and join it.
    """

    def __init__(self, paths: Iterable[str] = (), sample_dims: Mapping[str, int] | None = None) -> None:
        self.id = str(next(_numbers))
        self.paths = set(paths)
        self.sample_dims = dict(sample_dims or {})
        self.addressed = False
        self.context: Joinable | None = None
        self._found: tuple[Replica | None] | None = None

    def __reduce__(self) -> tuple[type[ModuleHooks], tuple[set[str], dict[str, int]]]:
        return ModuleHooks, (self.paths, self.sample_dims)

    def replica_of(self, model: nn.Module, data_parallel: DataParallel) -> Replica | None:
        """As :func:`thinned.distributed.ranks.replica_of`; compiled code takes what eager code found last."""
        if not isinstance(data_parallel, str):
            return replica_of(model, data_parallel)
        if compiling() and has_peers():
            if self._found is None:
                raise RuntimeError(
                    "thinned.address looks for the data-parallel replica that this process computes, which "
                    "compiled code cannot; call thinned.address(model, seed=0, step=0) once before"
                )
            return self._found[0]
        replica = replica_of(model, data_parallel)
        if not compiling():
            self._found = (replica,)
        return replica


_numbers = itertools.count()


class _Hook:
    def __init__(self, hooks: ModuleHooks, path: str) -> None:
        self.hooks, self.path = hooks, path

    @property
    def __name__(self) -> str:  # torch.jit.script looks for it
        raise AttributeError(
            "torch.jit.script compiles the forward hooks of a model, and cannot compile those of "
            "thinned.address; script the model before its first address, or a new one with its state_dict"
        )


class _OnEnter(_Hook):
    def __call__(self, module: nn.Module, *_: Any) -> None:
        source = active.key_source
        if source is None:
            source = self._source_without_address(module)
        elif not self.path:
            source = source.called(self.hooks.id)
        if source is not None and source.hooks_id == self.hooks.id:
            source.stack.append(self.path)

    def _source_without_address(self, module: nn.Module) -> KeySource | None:
        if self.hooks.addressed and not compiling():
            if graph_task_is_running():
                active.key_source = _RefusingSource(self.hooks)
                return active.key_source
            self.hooks.addressed = False
        context = self.hooks.context
        if context is None or self.path or not is_replica(module):
            return None
        return context.join()


class _OnLeave(_Hook):
    def __call__(self, *_: Any) -> None:
        source = active.key_source
        if source is None or source.hooks_id != self.hooks.id:
            return
        if source.stack:
            source.stack.pop()
        if source.joined and not source.stack:
            if compiling():
                _end(source)
            else:
                source.end()


@outside_graphs
def _end(source: KeySource) -> None:
    source.end()


class _RefusingSource:
    """Refuses to give keys, while a backward pass recomputes a module after its address has ended.

    :mod:`thinned.models.checkpoint` resumes the address of every recomputation that it can recognise. In any
    other, a dropout would draw another mask than in the forward pass.
    """

    joined = True

    def __init__(self, hooks: ModuleHooks) -> None:
        self.hooks_id = hooks.id
        self.stack: list[str] = []

    def called(self, hooks_id: str) -> KeySource:  # noqa: ARG002
        return self

    def end(self) -> None:
        active.key_source = None

    def sample_dim(self, input: Tensor) -> int:  # noqa: ARG002
        return 0

    def key_for(self, input: Tensor, sample_dim: int | None) -> Key:  # noqa: ARG002
        raise RuntimeError(
            f"a dropout in {self.stack[-1]!r} is called while a backward pass runs, after the "
            "thinned.address that its forward pass was within, whose mask it would not have. Recompute by "
            "torch.utils.checkpoint, or by a torch.autograd.Function whose forward takes ctx"
        )


def _without_wrappers(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if type(model) in PARALLEL_WRAPPERS:
            model = model.get_submodule("module")
        elif hasattr(model, COMPILED):
            model = model.get_submodule(COMPILED)
        else:
            return model


def _path(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def module_at(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The first path of the module at ``path``, under which its calls are counted, and the module.

    Raises:
        ValueError: there is none, or it was added later than the hooks.
    """
    if not isinstance(path, str):
        raise TypeError(f"path must be a string, {got(path)}")
    modules: dict[str, nn.Module] = {
        _path(name): module for name, module in _without_wrappers(model).named_modules(remove_duplicate=False)
    }
    if path not in modules:
        raise ValueError(f"no module of this {type(model).__name__} is at {path!r}, which path names")
    module, hooks = modules[path], hooks_of(model)
    for hook in pre_hooks_of(module).values():
        if isinstance(hook, _OnEnter) and hook.hooks is hooks:
            return hook.path, module
    raise ValueError(
        f"the module at {path!r} was added after the first thinned.address of this {type(model).__name__}, "
        "and counts as a part of the one around it"
    )


def _sample_dim(module: nn.Module) -> int | None:
    """The dimension of the samples in ``module``'s inputs, or None for a module without ``batch_first``."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    batch_first = getattr(module, "batch_first", None)
    return int(not batch_first) if isinstance(batch_first, bool) else None


def _draws(module: nn.Module) -> bool:
    """Whether this is a graph with nodes that draw keys."""
    graph = getattr(module, "graph", None)
    return isinstance(graph, Graph) and bool(
        graph.find_nodes(op="call_function", target=torch.ops.thinned.draw_key.default)
    )


def _last_first(hooks: dict[int, Any]) -> None:
    """Move the last hook to the front.

    ``prepend=True`` would do so by ``move_to_end``, after which Dynamo 2.11 takes one hook for another.
    """
    for number in list(hooks)[:-1]:
        hooks[number] = hooks.pop(number)


def hooks_of(model: nn.Module) -> ModuleHooks:
    """The model's hooks, which the first call registers on each module."""
    model = _without_wrappers(model)
    for hook in pre_hooks_of(model).values():
        if isinstance(hook, _OnEnter) and not hook.path:
            return hook.hooks
    if compiling():
        raise RuntimeError(
            "thinned.address gives a model hooks on first use, which compiled code cannot; call "
            "thinned.address(model, seed=0, step=0) once before"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "thinned.address needs a model of Python modules, got a ScriptModule, which takes no hooks; "
            "put it into a module, as in torch.nn.Sequential(scripted)"
        )
    hooks = ModuleHooks()
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):  # takes no hooks, and counts as part of the one around
            continue
        if _draws(module):
            raise TypeError(
                f"the model's {name or type(module).__name__!r} is a graph that draws its keys and asks no "
                "thinned.address; torch.export and torch.distributed.pipelining.pipeline make such graphs. "
                "Make pipeline stages of modules, or export thinned.Keyed(model), whose input is the key"
            )
        path = _path(name)
        hooks.paths.add(path)
        dim = _sample_dim(module)
        if dim is None:
            dim = hooks.sample_dims.get(path.rpartition(".")[0])
        if dim is not None:
            hooks.sample_dims[path] = dim
        _register(module, hooks, path)
    return hooks


def hook_wrapper(model: nn.Module) -> None:
    """Let a call of a wrapper be one of its model. Compiled code does not see who calls it."""
    if not any(isinstance(hook, _OnEnter) for hook in pre_hooks_of(model).values()):
        _register(model, hooks_of(model), "")


def _register(module: nn.Module, hooks: ModuleHooks, path: str) -> None:
    module.register_forward_pre_hook(_OnEnter(hooks, path))
    _last_first(pre_hooks_of(module))
    module.register_forward_hook(_OnLeave(hooks, path), always_call=True)


def has_other_hooks(module: nn.Module) -> bool:
    """Whether ``module`` has forward hooks that are none of an address."""
    return not all(isinstance(hook, _Hook) for hook in forward_hooks_of(module))


def has_only_hooks_of_address(module: nn.Module) -> bool:
    """Whether a call of ``module`` does nothing but its forward and the hooks of an address."""
    return not has_other_hooks(module) and not has_backward_hooks(module)


def call_as(module: nn.Module, function: Callable[..., Result], *args: Any) -> Result:
    """Call a function as if ``module`` called it, for the address that is active."""
    for hook in pre_hooks_of(module).values():
        hook(module)
    try:
        return function(*args)
    finally:
        for hook in post_hooks_of(module).values():
            hook(module)
