"""The operations that every layer is made of, for PyTorch: eager, compiled, differentiated, mapped.

``masked_affine`` is ``y_i = keep(m(i)) ? x_i * scale + shift : fill``; ``keep_mask`` is the mask itself, and
``uniform`` the random numbers that it is decided by, for the layers whose noise is no mask.
``m`` is a :class:`~thinned.geometry.Geometry`; ``keep(m)`` holds when the 32-bit number of mask index ``m``
under the key is below ``T``. The key is an int64 tensor whose shape is that of ``x``'s leading dimensions,
``()`` for one key and ``(n,)`` for one for each of ``n`` rows, or the int64 number that is one key.

Plain tensors in eager mode go straight to a backend, since a call through torch's dispatcher from Python
costs more than the work on a small tensor. Whatever must be traced or dispatched goes through
``torch.ops.thinned``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinned import backends
from thinned.backends import portable
from thinned.geometry import Geometry, shared
from thinned.keys import Key, draw, draw_int
from thinned.op.inplace import count_write, refuse_leaf, refuse_overlap
from thinned.op.partitioner import mark_draws
from thinned.op.vmap_keys import for_each_member
from thinned.torch_state import (
    SingleLevelFunction,
    below_autograd,
    compiling,
    forward_mode,
    functionalizing,
    is_eager,
    is_legacy_batched,
    is_traced,
    single_level_functions,
    transforming,
    without_transforms,
)

__all__ = ["draw_for", "keep_mask", "masked_affine", "masked_affine_", "refuse_layout", "uniform"]

_library = torch.library.Library("thinned", "DEF")
_library.define(
    "masked_affine(Tensor x, Tensor key, SymInt[] strides, SymInt base, int T, float scale, float shift, "
    "float fill) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "keep_mask(Tensor key, SymInt[] shape, SymInt[] strides, SymInt base, int T) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "uniform(Tensor key, SymInt[] shape, SymInt[] strides, SymInt base) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "draw_key(Tensor place) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.nondeterministic_seeded),
)


def masked_affine(
    x: Tensor,
    key: int | Tensor | None,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float = 0.0,
    fill: float = 0.0,
) -> Tensor:
    """``keep(m(i)) ? x_i * scale + shift : fill``, in a tensor of ``x``'s dtype and memory format.

    The arithmetic is float32 for half-precision and float32 tensors, float64 for float64; a complex number
    counts as its two parts. Differentiable in ``x`` to any order, in both modes.

    Without a key one is drawn from the default generator of ``x``'s device: compiled code draws what eager
    code draws, and under :func:`torch.vmap` the draw follows its ``randomness``. Without a geometry the mask
    indices are ``x``'s own positions.
    """
    if not is_eager(x):
        if not compiling() and x.layout is not torch.strided:
            return _sparse(x, key, geometry, T, scale, shift, fill)
        if is_legacy_batched(x):
            return portable.masked_affine(x, _key_tensor(key, x), geometry, T, scale, shift, fill)
        known = not is_traced(x) and not functionalizing()
        apply = _Transformed.apply if known else _traced
        strides, base = shared(x.shape) if geometry is None else geometry
        return apply(x, _key_tensor(key, x), strides, base, T, scale, shift, fill)
    if key is None and x.is_cpu:
        key = draw_int()
    elif not isinstance(key, int):
        key = _eager_key(key, x)
    if x.requires_grad and torch.is_grad_enabled():
        return _apply_eager(x, (key, geometry, T, scale, shift, fill))  # type: ignore[no-any-return]
    return _run(x, key, geometry, T, scale, shift, fill)


def masked_affine_(
    x: Tensor,
    key: int | Tensor | None,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float = 0.0,
    fill: float = 0.0,
) -> Tensor:
    """:func:`masked_affine` written over ``x``. A refused call has changed no element."""
    if not is_eager(x) or x.is_conj() or x.is_neg():
        return x.copy_(masked_affine(x, key, geometry, T, scale, shift, fill))
    refuse_overlap(x)
    key = _eager_key(key, x)
    if torch.is_grad_enabled() and x.requires_grad:
        refuse_leaf(x)
        # Autograd's own checks all come with this call; the data is written once they have passed.
        x = _Written.apply(x, (key, geometry, T, scale))  # type: ignore[attr-defined]
    else:
        count_write(x)
    data = x.detach()
    _run(data, key, geometry, T, scale, shift, fill, data)
    return x


def keep_mask(key: Tensor, shape: Sequence[int], geometry: Geometry, T: int) -> Tensor:
    """``keep(m(i))`` as a bool tensor of ``shape`` on the key's device."""
    return torch.ops.thinned.keep_mask(key, shape, *geometry, T)  # type: ignore[no-any-return]


def uniform(key: Tensor, shape: Sequence[int], geometry: Geometry) -> Tensor:
    """``u(m(i)) - 2**31`` as an int32 tensor of ``shape`` on the key's device: in order, and in 32 bits."""
    return torch.ops.thinned.uniform(key, shape, *geometry)  # type: ignore[no-any-return]


def refuse_layout(x: Tensor) -> None:
    """Raise NotImplementedError, as torch's dropouts do, if ``x`` is sparse or in another way not strided."""
    if x.layout not in (torch.strided, torch.jagged):
        raise NotImplementedError(
            f"this dropout needs a strided tensor, got layout {x.layout} of shape {tuple(x.shape)} and "
            f"{x.dtype}; write input.to_dense()"
        )


def draw_for(x: Tensor) -> Tensor:
    """One key's bits from the default generator of ``x``'s device, whatever is done around the call."""
    return _key_tensor(None, x) if not is_eager(x) else draw(x.device)


def _sparse(
    x: Tensor,
    key: int | Tensor | None,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float,
    fill: float,
) -> Tensor:
    """The operation on a COO tensor, as the gradient of an embedding can be one: on what it holds.

    That is all of it if zeros stay zeros, since what a COO tensor does not hold is zero.
    """
    if x.layout is not torch.sparse_coo or shift or fill:
        refuse_layout(x)
    x = x.coalesce()
    indices = x.indices()
    keep = keep_mask(_key_tensor(key, x), x.shape, geometry or shared(x.shape), T)[tuple(indices)]
    kept = torch.where(keep, masked_affine(x.values(), 0, None, 2**32, scale), 0)
    return torch.sparse_coo_tensor(indices, kept, x.shape, is_coalesced=True, check_invariants=False)


def _traced(x: Tensor, *arguments: Any) -> Tensor:
    return torch.ops.thinned.masked_affine(x, *arguments)  # type: ignore[no-any-return]


def _eager_key(key: int | Tensor | None, x: Tensor) -> int | Tensor:
    if key is None:
        return draw_int() if x.is_cpu else draw(x.device)
    if isinstance(key, Tensor) and key.is_cpu and not key.dim():
        return int(key.item())
    return key


def _key_tensor(key: int | Tensor | None, x: Tensor) -> Tensor:
    if isinstance(key, Tensor):
        return key
    if key is not None:
        return torch.tensor(key, dtype=torch.int64, device=x.device)
    return for_each_member(Key.from_bits(_draw(x.device)), drawn=True).bits


def _draw(device: torch.device) -> Tensor:
    if not compiling() and transforming():
        with without_transforms():
            return draw(device)
    # Compilers take calls with the same arguments for one, except where one of them is an empty tensor.
    place = torch.empty((), dtype=torch.int64, device=device)
    return torch.ops.thinned.draw_key(place)  # type: ignore[no-any-return]


def _run(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float = 0.0,
    fill: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    if x.is_neg():
        x = x.resolve_neg()
    backend = backends.for_device_type("cpu" if x.is_cpu else x.device.type)
    return backend.masked_affine(x, key, geometry, T, scale, shift, fill, out)


def _linear(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    layout: tuple[int, ...] | None,
) -> Tensor:
    """The operation's linear part, which is its derivative of any order, in the memory format ``layout``.

    A gradient takes the input's memory format, whatever that of the gradient that comes in. None stands for
    the contiguous one, and, under transforms, where strides mean nothing, for any.
    """
    if x.layout is not torch.strided:
        return masked_affine(x, key, geometry, T, scale)
    differs = not x.is_contiguous() if layout is None else x.stride() != layout
    if is_eager(x) and not (x.requires_grad and torch.is_grad_enabled()):
        out = _empty(x, layout) if differs else None
        return _run(x, key, geometry, T, scale, 0.0, 0.0, out)
    if differs and not transforming():
        x = _empty(x, layout).copy_(x)
    return masked_affine(x, key, geometry, T, scale)


def _empty(x: Tensor, layout: tuple[int, ...] | None) -> Tensor:
    return x.new_empty(x.shape) if layout is None else x.new_empty_strided(x.shape, layout)


def _layout(x: Tensor) -> tuple[int, ...] | None:
    return None if x.is_contiguous() else x.stride()


class _Eager(SingleLevelFunction):
    """The short way to autograd. Nothing of the tensor's size is kept: the key gives the mask again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        out = _run(x, *arguments)
        _keep(ctx, arguments, _layout(out))
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        key, geometry, T, scale, layout = ctx.linear
        return _linear(grad, ctx.saved_tensors[0] if key is None else key, geometry, T, scale, layout), None


def _keep(ctx: Any, arguments: tuple[Any, ...], layout: tuple[int, ...] | None) -> None:
    key, geometry, T, scale, *_ = arguments
    if isinstance(key, Tensor):
        ctx.save_for_backward(key)  # which notices if it is written over
        key = None
    ctx.linear = key, geometry, T, scale, layout


# Eager code is in no functorch transform, for which alone torch.autograd.Function.apply does more than this.
_apply_eager = _Eager.apply  # type: ignore[attr-defined]


class _Written(SingleLevelFunction):
    """Tells autograd that x is about to be written over."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        _keep(ctx, arguments, _layout(x))
        ctx.mark_dirty(x)
        return x

    backward = _Eager.backward


class _Transformed(torch.autograd.Function):
    """The way through functorch's transforms and forward-mode differentiation."""

    @staticmethod
    def forward(
        x: Tensor,
        key: Tensor,
        strides: tuple[int, ...],
        base: int,
        T: int,
        scale: float,
        shift: float,
        fill: float,
    ) -> Tensor:
        if is_traced(x):
            return _traced(x, key, strides, base, T, scale, shift, fill)
        return _run(x, key, Geometry(strides, base), T, scale, shift, fill)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, key, strides, base, T, scale, *_ = inputs
        ctx.save_for_backward(key)
        ctx.save_for_forward(key)
        ctx.linear = Geometry(strides, base), T, scale, _layout(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _linear(grad, ctx.saved_tensors[0], *ctx.linear), *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _linear(tangent, ctx.saved_tensors[0], *ctx.linear)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, int]:
        return _vmap_masked_affine(info, in_dims, x, key, *rest)


@torch.library.impl(_library, "masked_affine", "CompositeExplicitAutograd")
def _masked_affine_impl(
    x: Tensor, key: Tensor, strides: list[int], base: int, T: int, scale: float, shift: float, fill: float
) -> Tensor:
    return _run(x, key, Geometry(tuple(strides), base), T, scale, shift, fill)


@torch.library.register_fake("thinned::masked_affine", lib=_library)
def _masked_affine_fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


@torch.library.impl(_library, "keep_mask", "CompositeExplicitAutograd")
def _keep_mask_impl(key: Tensor, shape: list[int], strides: list[int], base: int, T: int) -> Tensor:
    return backends.for_device(key.device).keep_mask(key, tuple(shape), Geometry(tuple(strides), base), T)


@torch.library.register_fake("thinned::keep_mask", lib=_library)
def _keep_mask_fake(key: Tensor, shape: list[int], *_: Any) -> Tensor:
    return torch.empty(shape, dtype=torch.bool, device=key.device)


@torch.library.impl(_library, "uniform", "CompositeExplicitAutograd")
def _uniform_impl(key: Tensor, shape: list[int], strides: list[int], base: int) -> Tensor:
    return backends.for_device(key.device).uniform(key, tuple(shape), Geometry(tuple(strides), base))


@torch.library.register_fake("thinned::uniform", lib=_library)
def _uniform_fake(key: Tensor, shape: list[int], *_: Any) -> Tensor:
    return torch.empty(shape, dtype=torch.int32, device=key.device)


@torch.library.impl(_library, "draw_key", "CompositeExplicitAutograd")
def _draw_key_impl(place: Tensor) -> Tensor:
    return draw(place.device)


@torch.library.register_fake("thinned::draw_key", lib=_library)
def _draw_key_fake(place: Tensor) -> Tensor:
    return torch.empty_like(place)


mark_draws(torch.ops.thinned.draw_key.default)


@torch.library.impl(_library, "masked_affine", "Autograd")
def _masked_affine_autograd(x: Tensor, key: Tensor, strides: list[int], *rest: Any) -> Tensor:
    if (x.requires_grad and torch.is_grad_enabled()) or forward_mode():
        with single_level_functions():  # the dispatcher has chosen the level already
            return _Registered.apply(x, key, tuple(strides), *rest)  # type: ignore[no-any-return,attr-defined]
    return _below_autograd(x, key, strides, *rest)


def _below_autograd(x: Tensor, *arguments: Any) -> Tensor:
    with below_autograd():
        return _traced(x, *arguments)


class _Registered(SingleLevelFunction):
    """The derivatives of the registered operation, for compilers and tensors that are not plain."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _below_autograd(*inputs)
        _Transformed.setup_context(ctx, inputs, out)
        return out

    backward = _Transformed.backward
    jvp = _Transformed.jvp


def _batch_key(key: Tensor, dim: int | None, size: int) -> Tensor:
    return key.movedim(dim, 0) if dim is not None else key.expand(size, *key.shape)


def _vmap_masked_affine(
    info: Any, in_dims: tuple[Any, ...], x: Tensor, key: Tensor, strides: Sequence[int], base: int, *rest: Any
) -> tuple[Tensor, int]:
    x_dim, key_dim, *_ = in_dims
    x = x.movedim(x_dim, 0) if x_dim is not None else x.expand(info.batch_size, *x.shape)
    if key_dim is not None or key.dim():
        key = _batch_key(key, key_dim, info.batch_size)
    return masked_affine(x, key, Geometry((0, *strides), base), *rest), 0


def _vmap_keep_mask(
    info: Any, in_dims: tuple[Any, ...], key: Tensor, shape: Sequence[int], strides: Sequence[int], *rest: Any
) -> tuple[Tensor, int]:
    key = _batch_key(key, in_dims[0], info.batch_size)
    base, T = rest
    return keep_mask(key, (info.batch_size, *shape), Geometry((0, *strides), base), T), 0


def _vmap_uniform(
    info: Any, in_dims: tuple[Any, ...], key: Tensor, shape: Sequence[int], strides: Sequence[int], base: int
) -> tuple[Tensor, int]:
    key = _batch_key(key, in_dims[0], info.batch_size)
    return uniform(key, (info.batch_size, *shape), Geometry((0, *strides), base)), 0


torch.library.register_vmap("thinned::masked_affine", _vmap_masked_affine, lib=_library)
torch.library.register_vmap("thinned::keep_mask", _vmap_keep_mask, lib=_library)
torch.library.register_vmap("thinned::uniform", _vmap_uniform, lib=_library)
