"""``masked_affine``: its code paths, listed in :mod:`thinned.op`, and its derivatives in both modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from thinned import cuda_draws
from thinned.backends import portable
from thinned.geometry import Geometry, shared, shared_cached
from thinned.key_source import active
from thinned.keys import draw_int
from thinned.op.dtensor import accept
from thinned.op.inplace import count_write, refuse_leaf, refuse_overlap
from thinned.op.registered import call_backend, choose_on_backend, keep_mask, key_tensor, library, stacked
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
    tracing,
    transforming,
)

__all__ = ["choose", "masked_affine", "masked_affine_", "refuse_layout"]


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
    if is_eager(x):
        if key is None and x.is_cpu:
            key = draw_int()
        elif not isinstance(key, int):
            key = eager_key(key, x)
        if x.requires_grad and torch.is_grad_enabled():
            return _apply_eager(x, (key, geometry, T, scale, shift, fill))  # type: ignore[no-any-return]
        return call_backend(x, key, geometry, T, scale, shift, fill)
    accept(x, key)
    if not compiling() and x.layout is not torch.strided:
        return _sparse(x, key, geometry, T, scale, shift, fill)
    if is_legacy_batched(x):
        return portable.masked_affine(x, key_tensor(key, x), geometry, T, scale, shift, fill)
    if tracing():
        return _traced(x, key, geometry, T, scale, shift, fill)
    traced = is_traced(x) or functionalizing()
    apply: Any = torch.ops.thinned.masked_affine if traced else _BothModes.apply
    strides, base = shared(x.shape) if geometry is None else geometry
    return apply(x, key_tensor(key, x), strides, base, T, scale, shift, fill)  # type: ignore[no-any-return]


def _traced(x: Tensor, key: int | Tensor | None, geometry: Geometry | None, *constants: float) -> Tensor:
    """The operation as one node of :func:`torch.jit.trace`, which computes the geometry of each call."""
    # A size is a tensor in a trace; the stride of a shared dimension is a number.
    strides = geometry.strides if geometry else ()
    dims = [dim for dim, stride in enumerate(strides) if isinstance(stride, int) and stride == 0]
    bits = None if key is None else key_tensor(key, x)
    return torch.ops.thinned.masked_affine_of(x, bits, dims, *constants)  # type: ignore[no-any-return]


def _of_shape(x: Tensor, key: Tensor | None, dims: list[int], *constants: Any) -> Tensor:
    if key is None and active.key_source is not None:
        raise RuntimeError(
            "a traced call of a function such as thinned.functional.dropout knows no thinned.address or "
            "intercept(key=); trace a layer, such as thinned.Dropout, in its place"
        )
    geometry = shared_cached(x.shape, tuple(dims), 0 if key is None else key.dim())
    return masked_affine(x, key, geometry, *constants)


library.define(
    "masked_affine_of(Tensor x, Tensor? key, int[] broadcast_dims, int T, float scale, float shift, "
    "float fill) -> Tensor",
    alias_analysis="CONSERVATIVE",
)
library.impl("masked_affine_of", _of_shape, "CompositeImplicitAutograd")


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
    key = eager_key(key, x)
    if torch.is_grad_enabled() and x.requires_grad:
        refuse_leaf(x)
        # Autograd checks x within this call; the data is written once the checks have passed.
        x = _InPlace.apply(x, (key, geometry, T, scale))  # type: ignore[attr-defined]
    else:
        count_write(x)
    data = x.detach()
    call_backend(data, key, geometry, T, scale, shift, fill, data)
    return x


def choose(x: Tensor, numbers: Tensor, T: int, scale: float, shift: float = 0.0, fill: float = 0.0) -> Tensor:
    """``number + 2**31 < T ? x * scale + shift : fill`` under int32 numbers that broadcast to ``x``'s shape.

    Not differentiable in a plain tensor: :func:`thinned.op.from_key.apply_linear` is for that.
    """
    if is_eager(x):
        return choose_on_backend(x.detach(), numbers, T, scale, shift, fill)
    if transforming() and not (compiling() or forward_mode() or torch.is_grad_enabled()):  # vmap alone
        return torch.ops.thinned.choose(x, numbers, T, scale, shift, fill)  # type: ignore[no-any-return]
    dropped = numbers.to(torch.int64) >= T - 2**31
    return masked_affine(x, 0, None, 2**32, scale, shift).masked_fill(dropped, fill)


def refuse_layout(x: Tensor) -> None:
    """Raise NotImplementedError, as torch's dropouts do, if ``x`` is neither strided nor jagged."""
    if x.layout not in (torch.strided, torch.jagged):
        raise NotImplementedError(
            f"this dropout needs a strided tensor, got layout {x.layout} of shape {tuple(x.shape)} and "
            f"{x.dtype}; write input.to_dense()"
        )


def eager_key(key: int | Tensor | None, x: Tensor) -> int | Tensor:
    if key is None:
        return draw_int() if x.is_cpu else cuda_draws.draw(x.device)
    if isinstance(key, int) or key.dim():
        return key
    return int(key.item()) if key.is_cpu or x.is_cpu else key_tensor(key, x)


def _sparse(
    x: Tensor,
    key: int | Tensor | None,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float,
    fill: float,
) -> Tensor:
    """The operation on the stored elements of a COO tensor, such as an embedding's gradient.

    The other elements are zero, and remain zero if ``shift`` and ``fill`` are.
    """
    if x.layout is not torch.sparse_coo or shift or fill:
        refuse_layout(x)
    x = x.coalesce()
    indices = x.indices()
    keep = keep_mask(key_tensor(key, x), x.shape, geometry or shared(x.shape), T)[tuple(indices)]
    kept = torch.where(keep, masked_affine(x.values(), 0, None, 2**32, scale), 0)
    return torch.sparse_coo_tensor(indices, kept, x.shape, is_coalesced=True, check_invariants=False)


def derivative(
    grad: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    layout: tuple[int, ...] | None,
) -> Tensor:
    """The derivative of any order, ``keep ? grad * scale : 0``, with the strides ``layout``.

    A gradient takes the input's memory format and not that of the incoming gradient. None stands for
    contiguous; under transforms, where strides mean nothing, it stands for any.
    """
    if grad.layout is not torch.strided:
        return masked_affine(grad, key, geometry, T, scale)
    differs = not grad.is_contiguous() if layout is None else grad.stride() != layout
    if is_eager(grad) and not (grad.requires_grad and torch.is_grad_enabled()):
        out = _empty(grad, layout) if differs else None
        return call_backend(grad, key, geometry, T, scale, 0.0, 0.0, out)
    if differs and not transforming():
        grad = _empty(grad, layout).copy_(grad)
    return masked_affine(grad, key, geometry, T, scale)


def _empty(x: Tensor, layout: tuple[int, ...] | None) -> Tensor:
    return x.new_empty(x.shape) if layout is None else x.new_empty_strided(x.shape, layout)


def _layout(x: Tensor) -> tuple[int, ...] | None:
    return None if x.is_contiguous() else x.stride()


def _save(ctx: Any, arguments: tuple[Any, ...], output: Tensor) -> None:
    key, geometry, T, scale, *_ = arguments
    if isinstance(key, Tensor):
        ctx.save_for_backward(key)  # so that autograd notices a write to it
        key = None
    ctx.derivative = key, geometry, T, scale, _layout(output)


class _ReverseMode(SingleLevelFunction):
    """Fast path: plain tensors, reverse mode only. Saves the key, not the mask."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        out = call_backend(x, *arguments)
        _save(ctx, arguments, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        key, geometry, T, scale, layout = ctx.derivative
        key = ctx.saved_tensors[0] if key is None else key
        return derivative(grad, key, geometry, T, scale, layout), None


# Skips the functorch checks of torch.autograd.Function.apply, 1.4 us; no transform is active for eager calls.
_apply_eager = _ReverseMode.apply  # type: ignore[attr-defined]


class _InPlace(SingleLevelFunction):
    """Reports to autograd that ``x`` is about to be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, arguments: tuple[Any, ...]) -> Tensor:
        _save(ctx, arguments, x)
        ctx.mark_dirty(x)
        return x

    backward = _ReverseMode.backward


class _BothModes(torch.autograd.Function):
    """The code path of functorch's transforms and of forward-mode differentiation."""

    @staticmethod
    def forward(x: Tensor, key: Tensor, strides: tuple[int, ...], base: int, *constants: Any) -> Tensor:
        if is_traced(x):
            return torch.ops.thinned.masked_affine(x, key, strides, base, *constants)  # type: ignore[no-any-return]
        return call_backend(x, key, Geometry(strides, base), *constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, key, strides, base, T, scale, *_ = inputs
        ctx.save_for_backward(key)
        ctx.save_for_forward(key)
        ctx.derivative = Geometry(strides, base), T, scale, _layout(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return derivative(grad, ctx.saved_tensors[0], *ctx.derivative), *(None,) * 7

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return derivative(tangent, ctx.saved_tensors[0], *ctx.derivative)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        x: Tensor,
        key: Tensor,
        strides: Sequence[int],
        base: int,
        *constants: Any,
    ) -> tuple[Tensor, int]:
        x_dim, key_dim, *_ = in_dims
        x = stacked(x, x_dim, info.batch_size)
        if key_dim is not None or key.dim():
            key = stacked(key, key_dim, info.batch_size)
        return masked_affine(x, key, Geometry((0, *strides), base), *constants), 0


torch.library.register_vmap("thinned::masked_affine", _BothModes.vmap, lib=library)


class _Registered(SingleLevelFunction):
    """The derivatives of the registered operation, for compilers and for tensors that are not plain."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        out = _below_autograd(*inputs)
        _BothModes.setup_context(ctx, inputs, out)
        return out

    backward = _BothModes.backward
    jvp = _BothModes.jvp


@torch.library.impl(library, "masked_affine", "Autograd")
def _with_autograd(x: Tensor, key: Tensor, strides: list[int], *rest: Any) -> Tensor:
    if (x.requires_grad and torch.is_grad_enabled()) or forward_mode():
        with single_level_functions():  # the dispatcher has chosen the level already
            return _Registered.apply(x, key, tuple(strides), *rest)  # type: ignore[no-any-return,attr-defined]
    return _below_autograd(x, key, strides, *rest)


def _below_autograd(*arguments: Any) -> Tensor:
    with below_autograd():
        return torch.ops.thinned.masked_affine(*arguments)  # type: ignore[no-any-return]
