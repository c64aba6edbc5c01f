"""Nested tensors: a batch of components, each of which has sizes of its own.

Under one key the mask indices of the components follow each other, each component in row-major order; in a
jagged tensor without holes, whose dimension 1 is the ragged one, they are positions in ``values()``. Under a
key for each row, which is a component, they start at 0 in each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thinned import op
from thinned.geometry import Geometry, shared
from thinned.keys import Key
from thinned.torch_state import compiling, ragged_dim, seqlens

__all__ = ["alike", "elementwise", "masked_affine", "of_values", "refuse", "shape_of"]


def shape_of(x: Tensor) -> tuple[Any, ...]:
    """``x``'s shape, in which "*" is the size of a strided nested tensor's ragged dimension."""
    if not x.is_nested or x.layout is torch.jagged:
        return tuple(x.shape)
    shapes = {tuple(component.shape) for component in x.unbind()}
    sizes = (each.pop() if len(each) == 1 else "*" for each in map(set, zip(*shapes, strict=True)))
    return (x.size(0), *sizes)


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether both have one shape, which in nested tensors is that of each component."""
    if x.is_nested != y.is_nested or x.layout != y.layout:
        return False
    if not x.is_nested or x.layout is torch.jagged:
        return x.shape == y.shape
    return [part.shape for part in x.unbind()] == [part.shape for part in y.unbind()]


def refuse(name: str, x: Tensor, accepted: str) -> None:
    """Raise NotImplementedError for a nested tensor."""
    raise NotImplementedError(
        f"{name} got a nested tensor with layout={x.layout} of shape {shape_of(x)}; accepted: {accepted}"
    )


def masked_affine(
    x: Tensor,
    bits: Tensor | None,
    broadcast_dims: Sequence[int],
    inplace: bool,
    T: int,
    scale: float,
    shift: float,
    fill: float,
) -> Tensor:
    """:func:`thinned.op.masked_affine` under a mask shared along ``broadcast_dims``, for a nested ``x``."""
    ndim = x.dim()
    for dim in broadcast_dims:
        if not -ndim <= dim < ndim:
            raise IndexError(
                f"broadcast_dims {tuple(broadcast_dims)} names dimension {dim}, but for shape {shape_of(x)} "
                f"dimensions are in {-ndim} .. {ndim - 1}"
            )
    held = sorted({dim % ndim for dim in broadcast_dims})
    if x.layout is torch.jagged:
        y = _jagged(x, bits, held, T, scale, shift, fill)
    else:
        # Autograd keeps the tensor that unbind() was called on, so that it must not be written over.
        keeps = inplace and x.requires_grad and torch.is_grad_enabled()
        y = _strided(x.clone() if keeps else x, bits, held, T, scale, shift, fill)
    return x.copy_(y) if inplace else y


def elementwise(name: str, function: Callable[..., Tensor], x: Any, key: Key, *others: Tensor) -> Tensor:
    """``function(x, *others, key=key)`` for nested tensors that are alike and an element-wise function."""
    one, jagged = not key.bits.dim(), x.layout is torch.jagged
    if one and jagged and _packed(x):
        return of_values(x, function(x.values(), *(other.values() for other in others), key=key))
    if compiling() or (jagged and x.lengths() is not None):
        refuse(
            name,
            x,
            "a jagged one without holes, and under torch.compile one key and a ragged dimension 1; or a "
            "strided one, outside of torch.compile",
        )
    parts = list(zip(*(tensor.unbind() for tensor in (x, *others)), strict=True))
    if not parts:
        return x.clone()  # type: ignore[no-any-return]
    if one:
        flat = (torch.cat([part.flatten() for part in each]) for each in zip(*parts, strict=True))
        pieces = function(*flat, key=key).split([part.numel() for part, *_ in parts])
        rows = [piece.unflatten(0, part.shape) for piece, (part, *_) in zip(pieces, parts, strict=True)]
    else:
        keys = key.bits.unbind()
        rows = [function(*part, key=Key.from_bits(each)) for part, each in zip(parts, keys, strict=True)]
    return of_values(x, torch.cat(rows, ragged_dim(x) - 1)) if jagged else torch.nested.as_nested_tensor(rows)


def of_values(x: Any, values: Tensor) -> Tensor:
    """The jagged tensor that has ``values`` where ``x`` has its own, and all else as ``x`` has it."""
    shortest, longest = seqlens(x)
    return torch.nested.nested_tensor_from_jagged(
        values,
        x.offsets(),
        x.lengths(),
        jagged_dim=ragged_dim(x),
        min_seqlen=shortest,
        max_seqlen=longest,
    )


def _packed(x: Any) -> bool:
    """Whether a jagged tensor's components are rows of its values, one after the other."""
    return ragged_dim(x) == 1 and x.lengths() is None


def _jagged(x: Tensor, bits: Tensor | None, held: list[int], *constants: Any) -> Tensor:
    key = op.draw_for(x) if bits is None else bits
    if 0 in held and ragged_dim(x) not in held and not key.dim():
        refuse(
            f"broadcast_dims {tuple(held)}",
            x,
            f"dimension 0 only together with the ragged dimension {ragged_dim(x)}, or a key for each row",
        )
    apply = _Jagged.apply if x.requires_grad and torch.is_grad_enabled() else _affine
    return apply(x, key, held, *constants)


def _affine(x: Any, key: Tensor, held: list[int], *constants: Any) -> Tensor:
    values = x.values()
    if not key.dim() and _packed(x) and 0 not in held and 1 not in held:
        geometry = shared(values.shape, [dim - 1 for dim in held]) if held else None
        return of_values(x, op.masked_affine(values, key, geometry, *constants))
    components = x.offsets(), x.lengths(), ragged_dim(x)
    return of_values(x, torch.ops.thinned.jagged_affine(values, key, *components, held, *constants))


class _Jagged(torch.autograd.Function):
    """One node for the whole nested tensor: torch has no second derivative of ``values()`` and back."""

    @staticmethod
    def forward(
        x: Tensor, key: Tensor, held: list[int], T: int, scale: float, shift: float, fill: float
    ) -> Tensor:
        return _affine(x, key, held, T, scale, shift, fill)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, key, ctx.held, ctx.T, ctx.scale, _, _ = inputs
        ctx.save_for_backward(key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _jagged(grad, ctx.saved_tensors[0], ctx.held, ctx.T, ctx.scale, 0.0, 0.0), *(None,) * 6


def _strided(x: Tensor, bits: Tensor | None, held: list[int], *constants: Any) -> Tensor:
    parts = x.unbind()
    if not parts:
        return x.clone()
    key = op.draw_for(x) if bits is None else bits
    keys = key.unbind() if key.dim() else (key,) * len(parts)
    shapes = [tuple(part.shape) for part in parts]
    masks = {tuple(1 if dim + 1 in held else size for dim, size in enumerate(shape)) for shape in shapes}
    if 0 in held and not key.dim() and len(masks) > 1:
        refuse(
            f"broadcast_dims {tuple(held)}",
            x,
            "dimension 0 only together with those along which components differ, or a key for each row",
        )
    geometries = _geometries(shapes, held, key.dim() > 0)
    return torch.nested.as_nested_tensor(
        [
            op.masked_affine(part, each, geometry, *constants)
            for part, each, geometry in zip(parts, keys, geometries, strict=True)
        ]
    )


def _geometries(shapes: Iterable[tuple[int, ...]], held: list[int], own_keys: bool) -> Iterator[Geometry]:
    """Each component's geometry, ``held`` being dimensions of the batch."""
    shared_dims = [dim - 1 for dim in held if dim]
    base = 0
    for shape in shapes:
        yield Geometry(shared(shape, shared_dims).strides, base)
        if not own_keys and 0 not in held:
            base += math.prod(size for dim, size in enumerate(shape) if dim not in shared_dims)


# One node for a compiler, which has not to know how long the components are.
_library = torch.library.Library("thinned", "FRAGMENT")
_library.define(
    "jagged_affine(Tensor values, Tensor key, Tensor offsets, Tensor? lengths, int ragged, int[] held, "
    "int T, float scale, float shift, float fill) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "jagged_affine", "CompositeExplicitAutograd")
def _jagged_affine_impl(
    values: Tensor,
    key: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    ragged: int,
    held: list[int],
    T: int,
    scale: float,
    shift: float,
    fill: float,
) -> Tensor:
    out = torch.empty_like(values).copy_(values)  # what lies in holes stays
    sizes = offsets.diff() if lengths is None else lengths
    parts = [
        out.narrow(ragged - 1, start, size)
        for start, size in zip(offsets.tolist(), sizes.tolist(), strict=False)
    ]
    keys = key.unbind() if key.dim() else (key,) * len(parts)
    geometries = _geometries((tuple(part.shape) for part in parts), held, key.dim() > 0)
    for part, each, geometry in zip(parts, keys, geometries, strict=True):
        op.masked_affine_(part, each, geometry, T, scale, shift, fill)
    return out


@torch.library.register_fake("thinned::jagged_affine", lib=_library)
def _jagged_affine_fake(values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)
