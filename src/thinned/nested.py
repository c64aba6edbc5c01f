"""Nested tensors: a batch of components that differ in size.

Under one key, mask indices go through the components one after the other, each in row-major order. They are
positions in ``values()`` if the tensor is jagged, without holes, and ragged in dimension 1. Under a key per
component, they start at 0 in each component.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from thinned import op
from thinned.geometry import Geometry, dims_of, shared
from thinned.keys import Key
from thinned.torch_state import compiling, ragged_dim, seqlens

__all__ = ["alike", "elementwise", "is_packed", "masked_affine", "of_values", "refuse", "shape_of"]


def shape_of(x: Tensor) -> tuple[Any, ...]:
    """``x``'s shape, in which "*" is the size of a strided nested tensor's ragged dimension."""
    if not x.is_nested or x.layout is torch.jagged:
        return tuple(x.shape)
    shapes = {tuple(component.shape) for component in x.unbind()}
    sizes = (size.pop() if len(size) == 1 else "*" for size in map(set, zip(*shapes, strict=True)))
    return (x.size(0), *sizes)


def alike(x: Tensor, y: Tensor) -> bool:
    """Whether both have the same shape, component by component if they are nested."""
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
    x: Tensor, bits: Tensor | None, broadcast_dims: Sequence[int], inplace: bool, *constants: Any
) -> Tensor:
    """:func:`thinned.op.masked_affine` under a mask shared along ``broadcast_dims``, for a nested ``x``."""
    shared_dims = sorted(dims_of(shape_of(x), broadcast_dims))
    if x.layout is torch.jagged:
        y = _jagged(x, bits, shared_dims, *constants)
    else:
        # Autograd saves the tensor that unbind() was called on, so that tensor must not be overwritten.
        saved = inplace and x.requires_grad and torch.is_grad_enabled()
        y = _strided(x.clone() if saved else x, bits, shared_dims, *constants)
    return x.copy_(y) if inplace else y


def elementwise(name: str, function: Callable[..., Tensor], x: Any, key: Key, *others: Tensor) -> Tensor:
    """``function(x, *others, key=key)`` for nested tensors that are alike and an element-wise function."""
    one, jagged = not key.bits.dim(), x.layout is torch.jagged
    if one and jagged and is_packed(x):
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
        flat = (torch.cat([part.flatten() for part in tensor]) for tensor in zip(*parts, strict=True))
        pieces = function(*flat, key=key).split([part.numel() for part, *_ in parts])
        rows = [piece.unflatten(0, part.shape) for piece, (part, *_) in zip(pieces, parts, strict=True)]
    else:
        keys = key.bits.unbind()
        rows = [function(*part, key=Key.from_bits(bits)) for part, bits in zip(parts, keys, strict=True)]
    return of_values(x, torch.cat(rows, ragged_dim(x) - 1)) if jagged else torch.nested.as_nested_tensor(rows)


def of_values(x: Any, values: Tensor) -> Tensor:
    """A jagged tensor of ``values`` with the offsets, lengths and sizes of ``x``."""
    shortest, longest = seqlens(x)
    return torch.nested.nested_tensor_from_jagged(
        values,
        x.offsets(),
        x.lengths(),
        jagged_dim=ragged_dim(x),
        min_seqlen=shortest,
        max_seqlen=longest,
    )


def is_packed(x: Any) -> bool:
    """Whether the components of a jagged tensor are consecutive rows of its values."""
    return ragged_dim(x) == 1 and x.lengths() is None


def _jagged(x: Tensor, bits: Tensor | None, shared_dims: list[int], *constants: Any) -> Tensor:
    key = op.key_tensor(bits, x)
    if 0 in shared_dims and ragged_dim(x) not in shared_dims and not key.dim():
        refuse(
            f"broadcast_dims {tuple(shared_dims)}",
            x,
            f"dimension 0 only together with the ragged dimension {ragged_dim(x)}, or a key for each row",
        )
    apply = _Jagged.apply if x.requires_grad and torch.is_grad_enabled() else _affine
    return apply(x, key, shared_dims, *constants)


def _affine(x: Any, key: Tensor, shared_dims: list[int], *constants: Any) -> Tensor:
    values = x.values()
    if not key.dim() and is_packed(x) and 0 not in shared_dims and 1 not in shared_dims:
        geometry = shared(values.shape, [dim - 1 for dim in shared_dims]) if shared_dims else None
        return of_values(x, op.masked_affine(values, key, geometry, *constants))
    components = x.offsets(), x.lengths(), ragged_dim(x)
    return of_values(x, torch.ops.thinned.jagged_affine(values, key, *components, shared_dims, *constants))


class _Jagged(torch.autograd.Function):
    """One autograd node for the nested tensor: torch has no second derivative through ``values()``."""

    @staticmethod
    def forward(x: Tensor, key: Tensor, shared_dims: list[int], *constants: Any) -> Tensor:
        return _affine(x, key, shared_dims, *constants)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG004
        _, key, *ctx.arguments, _, _ = inputs
        ctx.save_for_backward(key)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _jagged(grad, ctx.saved_tensors[0], *ctx.arguments, 0.0, 0.0), *(None,) * 6


def _strided(x: Tensor, bits: Tensor | None, shared_dims: list[int], *constants: Any) -> Tensor:
    parts = x.unbind()
    if not parts:
        return x.clone()
    key = op.key_tensor(bits, x)
    keys = key.unbind() if key.dim() else (key,) * len(parts)
    shapes = [tuple(part.shape) for part in parts]
    masks = {
        tuple(1 if dim + 1 in shared_dims else size for dim, size in enumerate(shape)) for shape in shapes
    }
    if 0 in shared_dims and not key.dim() and len(masks) > 1:
        refuse(
            f"broadcast_dims {tuple(shared_dims)}",
            x,
            "dimension 0 only together with those along which components differ, or a key for each row",
        )
    geometries = _geometries(shapes, shared_dims, key.dim() > 0)
    return torch.nested.as_nested_tensor(
        [
            op.masked_affine(part, key, geometry, *constants)
            for part, key, geometry in zip(parts, keys, geometries, strict=True)
        ]
    )


def _geometries(
    shapes: Iterable[tuple[int, ...]], shared_dims: list[int], own_keys: bool
) -> Iterator[Geometry]:
    """Each component's geometry; ``shared_dims`` counts the batch as dimension 0."""
    own_dims = [dim - 1 for dim in shared_dims if dim]
    base = 0
    for shape in shapes:
        yield Geometry(shared(shape, own_dims).strides, base)
        if not own_keys and 0 not in shared_dims:
            base += math.prod(size for dim, size in enumerate(shape) if dim not in own_dims)


# One node for a compiler, so that it needs no lengths of components.
_library = torch.library.Library("thinned", "FRAGMENT")
_library.define(
    "jagged_affine(Tensor values, Tensor key, Tensor offsets, Tensor? lengths, int ragged, "
    "int[] shared_dims, int T, float scale, float shift, float fill) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.impl(_library, "jagged_affine", "CompositeExplicitAutograd")
def _jagged_affine_impl(
    values: Tensor,
    key: Tensor,
    offsets: Tensor,
    lengths: Tensor | None,
    ragged: int,
    shared_dims: list[int],
    *constants: Any,
) -> Tensor:
    out = torch.empty_like(values).copy_(values)  # what lies in holes stays
    sizes = offsets.diff() if lengths is None else lengths
    parts = [
        out.narrow(ragged - 1, start, size)
        for start, size in zip(offsets.tolist(), sizes.tolist(), strict=False)
    ]
    keys = key.unbind() if key.dim() else (key,) * len(parts)
    geometries = _geometries((tuple(part.shape) for part in parts), shared_dims, key.dim() > 0)
    for part, key, geometry in zip(parts, keys, geometries, strict=True):
        op.masked_affine_(part, key, geometry, *constants)
    return out


@torch.library.register_fake("thinned::jagged_affine", lib=_library)
def _jagged_affine_fake(values: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(values)
