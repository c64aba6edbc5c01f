"""The sites of a model: hooks that know which of its modules is running."""

from __future__ import annotations

from typing import Any

from torch import nn

from thinned.sites import current

__all__ = ["Sites", "sites_of"]


# What PyTorch puts around modules is no part of their paths.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_AROUND_A_MODEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


class Sites:
    """The paths of the modules of one model that are running, the innermost last.

    Modules and hooks are copied and pickled with the model, and what is running is not.
    """

    def __init__(self) -> None:
        self.stack: list[str] = []

    def __reduce__(self) -> tuple[type[Sites], tuple[()]]:
        return Sites, ()


class _Enter:
    def __init__(self, sites: Sites, path: str) -> None:
        self.sites, self.path = sites, path

    def __call__(self, *_: Any) -> None:
        if current.source is not None:
            self.sites.stack.append(self.path)


class _Leave:
    def __init__(self, sites: Sites) -> None:
        self.sites = sites

    def __call__(self, *_: Any) -> None:
        if current.source is not None and self.sites.stack:
            self.sites.stack.pop()


def _inside(model: nn.Module) -> str | None:
    """Where the model itself is, if this is only what PyTorch puts around one."""
    if type(model) in _AROUND_A_MODEL:
        return "module"
    return "_orig_mod" if hasattr(model, "_orig_mod") else None


def sites_of(model: nn.Module) -> Sites:
    """The model's sites, with hooks on each module from the first time on."""
    while (name := _inside(model)) is not None:
        model = model.get_submodule(name)
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _Enter) and not hook.path:
            return hook.sites
    sites = Sites()
    for name, module in model.named_modules():
        path = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        module.register_forward_pre_hook(_Enter(sites, path), prepend=True)
        module.register_forward_hook(_Leave(sites), always_call=True)
    return sites
