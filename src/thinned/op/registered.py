"""``torch.ops.thinned``: schemas, kernels, shapes for compilers, and rules for vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinned import backends
from thinned.backends.arguments import is_product
from thinned.backends.inductor import show_kernel
from thinned.geometry import Geometry
from thinned.keys import Key, draw, on_device
from thinned.op.partitioner import repeat_draws
from thinned.op.vmap_keys import key_per_call
from thinned.torch_state import compiling, is_eager, tracing, transforming, without_transforms

__all__ = ["call_backend", "choose_on_backend", "keep_mask", "key_tensor", "library", "stacked", "uniform"]

library = torch.library.Library("thinned", "FRAGMENT")
for _schema, *_tags in (
    (
        "masked_affine(Tensor x, Tensor key, SymInt[] strides, SymInt base, int T, float scale, float shift, "
        "float fill) -> Tensor",
    ),
    ("keep_mask(Tensor key, SymInt[] shape, SymInt[] strides, SymInt base, int T) -> Tensor",),
    (
        "uniform(Tensor key, SymInt[] shape, SymInt[] strides, SymInt base, Tensor? draw=None, "
        "int strata=1) -> Tensor",
    ),
    ("choose(Tensor x, Tensor numbers, int T, float scale, float shift, float fill) -> Tensor",),
    ("draw_key(Tensor place) -> Tensor", torch.Tag.nondeterministic_seeded),
):
    # Conservative: else TorchScript would fold a draw, whose input is constant, into a constant key.
    alias_analysis = "CONSERVATIVE" if _tags else ""
    library.define(_schema, alias_analysis=alias_analysis, tags=(torch.Tag.pt2_compliant_tag, *_tags))


def keep_mask(key: Tensor, shape: Sequence[int], geometry: Geometry, T: int) -> Tensor:
    """``keep(m(i))`` as a bool tensor of ``shape`` on the key's device."""
    _refuse_trace(shape)
    return torch.ops.thinned.keep_mask(key, shape, *geometry, T)  # type: ignore[no-any-return]


def uniform(
    key: Tensor, shape: Sequence[int], geometry: Geometry, draw: Tensor | None = None, strata: int = 1
) -> Tensor:
    """``u(m(i)) - 2**31`` as an int32 tensor of ``shape`` on the key's device.

    With a draw, an int64 tensor of the key's shape or one number, it is ``u' - 2**31``: the numbers of that
    one of ``strata`` stratified draws.
    """
    _refuse_trace(shape)
    return torch.ops.thinned.uniform(key, shape, *geometry, draw, strata)  # type: ignore[no-any-return]


def _refuse_trace(shape: Sequence[int]) -> None:
    """Raise NotImplementedError for the sizes of a tensor in a trace, which are tensors themselves."""
    if tracing() and any(isinstance(size, Tensor) for size in shape):
        raise NotImplementedError(
            "torch.jit.trace would make the shape of this mask a constant; call the layer's module without a "
            "key, or torch.ops.thinned.NAME in place of thinned.functional.NAME, or use torch.export"
        )


def key_tensor(key: int | Tensor | None, x: Tensor) -> Tensor:
    """The key as a tensor on ``x``'s device, also under compile, vmap and export; None draws one."""
    if isinstance(key, Tensor):
        # A batch of keys has to be there already, as any other tensor.
        return key if key.dim() else on_device(key, x.device)
    if key is not None:
        return torch.full((), key, dtype=torch.int64, device=x.device)
    if is_eager(x):
        return draw(x.device)
    if transforming() and not compiling():
        with without_transforms():
            bits = draw(x.device)
    else:
        # Without this argument CSE would merge two draws; a fresh empty tensor keeps them distinct. Inductor
        # fills one of a single element by a kernel.
        bits = torch.ops.thinned.draw_key(torch.empty((0,), dtype=torch.int64, device=x.device))
    return key_per_call(Key.from_bits(bits), is_random=True).bits


def call_backend(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float = 0.0,
    fill: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """:meth:`thinned.backends.Backend.masked_affine` of the backend for ``x``'s device."""
    if x.is_neg():
        x = x.resolve_neg()
    backend = backends.for_device_type("cpu" if x.is_cpu else x.device.type)
    return backend.masked_affine(x, key, geometry, T, scale, shift, fill, out)


def _masked_affine(x: Tensor, key: Tensor, strides: list[int], base: int, *constants: Any) -> Tensor:
    return call_backend(x, key, Geometry(tuple(strides), base), *constants)


def _keep_mask(key: Tensor, shape: list[int], strides: list[int], base: int, T: int) -> Tensor:
    return backends.for_device(key.device).keep_mask(key, tuple(shape), Geometry(tuple(strides), base), T)


def _uniform(
    key: Tensor, shape: list[int], strides: list[int], base: int, draw: Tensor | None = None, strata: int = 1
) -> Tensor:
    backend = backends.for_device(key.device)
    return backend.uniform(key, tuple(shape), Geometry(tuple(strides), base), draw, strata)


def choose_on_backend(x: Tensor, numbers: Tensor, *constants: Any) -> Tensor:
    """:meth:`thinned.backends.Backend.choose` of the backend for ``x``'s device."""
    return backends.for_device_type(x.device.type).choose(x.resolve_neg(), numbers, *constants)


def _rounds_once(x: Tensor, *arguments: Any) -> bool:
    return x.is_floating_point() and is_product(*arguments[-3:])


for _name, _kernel, _fake in (
    ("masked_affine", _masked_affine, lambda x, *_: torch.empty_like(x)),
    ("keep_mask", _keep_mask, lambda key, shape, *_: key.new_empty(shape, dtype=torch.bool)),
    ("uniform", _uniform, lambda key, shape, *_: key.new_empty(shape, dtype=torch.int32)),
    ("choose", choose_on_backend, lambda x, *_: torch.empty_like(x)),
    ("draw_key", lambda place: draw(place.device), lambda place: place.new_empty(())),
):
    library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"thinned::{_name}", _fake, lib=library)
repeat_draws(torch.ops.thinned.draw_key.default)
show_kernel(library, "masked_affine", _masked_affine, _rounds_once)
show_kernel(library, "keep_mask", _keep_mask)
show_kernel(library, "uniform", _uniform, lambda *arguments: len(arguments) < 5 or arguments[4] is None)


def stacked(x: Tensor, dim: int | None, size: int) -> Tensor:
    """The tensors of ``size`` calls under vmap, along dimension 0; they share one if ``dim`` is None."""
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)


def _vmap_keep_mask(
    info: Any, in_dims: tuple[Any, ...], key: Tensor, shape: list[int], strides: list[int], *rest: int
) -> tuple[Tensor, int]:
    size = info.batch_size
    keys = stacked(key, in_dims[0], size)
    return torch.ops.thinned.keep_mask(keys, (size, *shape), (0, *strides), *rest), 0


def _vmap_uniform(
    info: Any,
    in_dims: tuple[Any, ...],
    key: Tensor,
    shape: list[int],
    strides: list[int],
    base: int,
    draw: Tensor | None = None,
    strata: int = 1,
) -> tuple[Tensor, int]:
    size = info.batch_size
    keys = stacked(key, in_dims[0], size)
    if draw is not None:
        draw = stacked(draw, in_dims[4], size)
        draw = draw.reshape(size, *(1,) * (keys.dim() - draw.dim()), *draw.shape[1:]).expand(keys.shape)
    return torch.ops.thinned.uniform(keys, (size, *shape), (0, *strides), base, draw, strata), 0


def _vmap_choose(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, numbers: Tensor, *constants: Any
) -> tuple[Tensor, int]:
    x_dim, numbers_dim, *_ = in_dims
    x = stacked(x, x_dim, info.batch_size)
    if numbers_dim is not None:
        numbers = numbers.movedim(numbers_dim, 0)
        numbers = numbers.reshape(len(numbers), *(1,) * (x.dim() - numbers.dim()), *numbers.shape[1:])
    return torch.ops.thinned.choose(x, numbers, *constants), 0


torch.library.register_vmap("thinned::choose", _vmap_choose, lib=library)
torch.library.register_vmap("thinned::keep_mask", _vmap_keep_mask, lib=library)
torch.library.register_vmap("thinned::uniform", _vmap_uniform, lib=library)
