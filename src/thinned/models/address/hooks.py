"""The sites of a model: hooks that know which of its modules is running."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import Tensor, nn

from thinned.key_source import KeySource, active
from thinned.keys import Key
from thinned.torch_state import COMPILED, WRAPPERS, compiling, graph_task_is_running, is_replica, pre_hooks_of

__all__ = ["Sites", "module_at", "sites_of"]


_AROUND_A_MODEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Joinable(Protocol):
    """A context that further threads can be a part of."""

    def join(self) -> KeySource:
        """Make this thread a part, and give what is its source now."""

    def leave(self) -> None:
        """End that."""


class Sites:
    """The modules of one model, which tell of themselves when they run.

    Modules and hooks are copied and pickled with the model, and what is running is not.

    Attributes:
        name: its own in this process; a string, which Dynamo has guards for, as it does not for identity.
        paths: of the modules that have hooks; a module at several places has that of the first.
        sample_dims: of paths whose modules say that their inputs are sequence first, 1, or batch first, 0.
        addressed: whether the last call of a module was within an address.
        context: what the replicas of :class:`torch.nn.DataParallel` join, which run in threads of their own.
    """

    def __init__(self, paths: Iterable[str] = (), sample_dims: Mapping[str, int] | None = None) -> None:
        self.name = str(next(_numbers))
        self.paths = set(paths)
        self.sample_dims = dict(sample_dims or {})
        self.addressed = False
        self.context: Joinable | None = None

    def __reduce__(self) -> tuple[type[Sites], tuple[set[str], dict[str, int]]]:
        return Sites, (self.paths, self.sample_dims)


_numbers = itertools.count()


class _Enter:
    def __init__(self, sites: Sites, path: str) -> None:
        self.sites, self.path = sites, path

    def __call__(self, module: nn.Module, *_: Any) -> None:
        source = active.key_source
        if source is None:
            source = self._source_of(module)
            if source is None:
                return
        if source.hooks_id == self.sites.name:
            source.stack.append(self.path)

    def _source_of(self, module: nn.Module) -> KeySource | None:
        """What gives the keys of a call that is within no address."""
        if self.sites.addressed and not compiling():
            if graph_task_is_running():
                active.key_source = _Unknown(self.sites)
                return active.key_source
            self.sites.addressed = False
        context = self.sites.context
        if context is None or self.path or not is_replica(module):
            return None
        return context.join()


class _Unknown:
    """The source within a module that a backward pass calls after the address of its forward pass.

    It is a recomputation by means that nothing tells of, whose dropouts would have other masks.
    """

    joined = False

    def __init__(self, sites: Sites) -> None:
        self.hooks_id = sites.name
        self.stack: list[str] = []

    def sample_dim(self, input: Tensor) -> int:  # noqa: ARG002
        return 0

    def key_for(self, input: Tensor, sample_dim: int | None) -> Key:  # noqa: ARG002
        raise RuntimeError(
            f"a dropout in {self.stack[-1]!r} is called while a backward pass runs, after the "
            "thinned.address that its forward pass was within, whose mask it would not have. Recompute by "
            "torch.utils.checkpoint, or by a torch.autograd.Function whose forward takes ctx"
        )


class _Leave:
    def __init__(self, sites: Sites, path: str) -> None:
        self.sites, self.path = sites, path

    def __call__(self, *_: Any) -> None:
        source = active.key_source
        if source is None or source.hooks_id != self.sites.name:
            return
        if source.stack:
            source.stack.pop()
        if isinstance(source, _Unknown) and not source.stack:
            active.key_source = None
        if source.joined and not self.path and self.sites.context is not None:
            self.sites.context.leave()


def _inside(model: nn.Module) -> str | None:
    """Where the model itself is, if this is only what PyTorch puts around one."""
    if type(model) in _AROUND_A_MODEL:
        return "module"
    return COMPILED if hasattr(model, COMPILED) else None


def _without_wrappers(model: nn.Module) -> nn.Module:
    while (name := _inside(model)) is not None:
        model = model.get_submodule(name)
    return model


def _path(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def module_at(model: nn.Module, path: str) -> tuple[str, nn.Module]:
    """The module at ``path``, and the path that its calls have: the first, if it has several places.

    Raises:
        ValueError: there is none, or it was added later than the hooks.
    """
    modules: dict[str, nn.Module] = {
        _path(name): module for name, module in _without_wrappers(model).named_modules(remove_duplicate=False)
    }
    if path not in modules:
        raise ValueError(f"no module of this {type(model).__name__} is at {path!r}")
    module, sites = modules[path], sites_of(model)
    for hook in pre_hooks_of(module).values():
        if isinstance(hook, _Enter) and hook.sites is sites:
            return hook.path, module
    raise ValueError(
        f"the module at {path!r} was added after the first thinned.address of this {type(model).__name__}, "
        "and counts as a part of the one around it"
    )


def _sample_dim(module: nn.Module) -> int | None:
    """The dimension of the samples in what ``module`` is given, if it says so by ``batch_first``."""
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        module = module.self_attn
    batch_first = getattr(module, "batch_first", None)
    return int(not batch_first) if isinstance(batch_first, bool) else None


def _last_first(hooks: dict[int, Any]) -> None:
    """As ``prepend=True`` does, after whose ``move_to_end`` Dynamo 2.11 takes one hook for another."""
    for number in list(hooks)[:-1]:
        hooks[number] = hooks.pop(number)


def sites_of(model: nn.Module) -> Sites:
    """The model's sites, with hooks on each module from the first time on."""
    model = _without_wrappers(model)
    for hook in pre_hooks_of(model).values():
        if isinstance(hook, _Enter) and not hook.path:
            return hook.sites
    if compiling():
        raise RuntimeError(
            "thinned.address gives a model hooks on first use, which compiled code cannot; call "
            "thinned.address(model, seed=0, step=0) once before"
        )
    sites = Sites()
    for name, module in model.named_modules():
        path = _path(name)
        sites.paths.add(path)
        dim = _sample_dim(module)
        if dim is None:
            dim = sites.sample_dims.get(path.rpartition(".")[0])
        if dim is not None:
            sites.sample_dims[path] = dim
        module.register_forward_pre_hook(_Enter(sites, path))
        _last_first(pre_hooks_of(module))
        module.register_forward_hook(_Leave(sites, path), always_call=True)
    return sites
