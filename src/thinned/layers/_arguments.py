"""The checks that all functions of layers share, and the call of the operation."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from thinned import nested, op
from thinned.backends.arguments import DTYPES
from thinned.checks import got, integers
from thinned.distributed.shards import is_dtensor
from thinned.geometry import Geometry, dims_of, shared, shared_cached
from thinned.key_source import active, refuse_rows
from thinned.keys import Key, RowsKey, StratifiedKey, as_key, savable
from thinned.op.from_key import apply_linear
from thinned.op.noise import numbers
from thinned.torch_state import compiling, tracing

__all__ = [
    "apply",
    "autocasts",
    "bits_for",
    "broadcasts",
    "check_device",
    "check_key",
    "check_p",
    "check_parameter",
    "check_tensor",
    "drops",
    "flat_key",
    "kept",
    "key_for",
    "number",
    "refuse_activations",
    "refuse_nested",
    "threshold_and_scale",
]


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; :func:`torch.is_autocast_enabled` raises for ``meta``."""
    return device != "meta" and torch.is_autocast_enabled(device)


def apply(
    input: Tensor,
    key: Key | None,
    broadcast_dims: Sequence[int],
    inplace: bool,
    T: int,
    scale: float,
    shift: float = 0.0,
    fill: float = 0.0,
    *,
    sample_dim: int | None = 0,
    elementwise: bool = False,
) -> Tensor:
    """``keep ? input * scale + shift : fill`` under a mask shared along ``broadcast_dims``.

    ``sample_dim`` is as for :func:`key_for`. An ``elementwise`` layer has no sample dimension of its own, so
    the active key source names it.
    """
    if type(broadcast_dims) is not tuple:
        broadcast_dims = integers("broadcast_dims", broadcast_dims)
    if key is None and active.key_source is not None:
        shared_dims: set[int] = set()
        if broadcast_dims and not input.is_nested:
            # Raises before the key source counts this call.
            shared_dims = dims_of(input.shape, broadcast_dims)
        if elementwise:
            sample_dim = active.key_source.sample_dim(input)
        key = active.key_source.key_for(input, None if sample_dim in shared_dims else sample_dim)
        if sample_dim and key is not None and type(key) is not RowsKey and key.shape:
            ndim = input.dim()
            order = [sample_dim, *(d for d in range(ndim) if d != sample_dim)]
            # A batch of keys belongs to dimension 0.
            moved = tuple(order.index(d % ndim) for d in broadcast_dims)
            y = apply(input.movedim(sample_dim, 0), key, moved, inplace, T, scale, shift, fill)
            return input if inplace else y.movedim(0, sample_dim)
    bits = None
    if key is not None:
        if type(key) is Key:
            bits = bits_for(key, input)
        else:
            key = as_key(key)
            if isinstance(key, RowsKey):
                y = _of_rows(input, key, broadcast_dims, T, scale, shift, fill)
                return input.copy_(y) if inplace else y
            bits = bits_for(key, input)
            if isinstance(key, StratifiedKey) and not input.is_nested and input.layout is torch.strided:
                y = _stratified(input, key, broadcast_dims, T, scale, shift, fill)
                return input.copy_(y) if inplace else y
    if input.is_nested:
        return nested.masked_affine(input, bits, broadcast_dims, inplace, T, scale, shift, fill)
    geometry = None
    if broadcast_dims or (bits is not None and bits.dim()):
        geometry = _geometry(input.shape, broadcast_dims, 0 if bits is None else bits.dim())
    if inplace:
        return op.masked_affine_(input, bits, geometry, T, scale, shift, fill)
    return op.masked_affine(input, bits, geometry, T, scale, shift, fill)


def _stratified(
    input: Tensor, key: Key, broadcast_dims: tuple[int, ...], T: int, scale: float, shift: float, fill: float
) -> Tensor:
    op.accept(input, key.bits)

    def affine(x: Tensor, key: Key, shift: float = 0.0, fill: float = 0.0) -> Tensor:
        return op.choose(x, numbers(key, x, broadcast_dims), T, scale, shift, fill)

    return apply_linear(affine, input, key.to(input.device), partial(affine, shift=shift, fill=fill))


def _of_rows(
    input: Tensor,
    key: RowsKey,
    broadcast_dims: tuple[int, ...],
    T: int,
    scale: float,
    shift: float,
    fill: float,
) -> Tensor:
    keep = kept(key, input, broadcast_dims, T)
    return op.masked_affine(input, 0, None, 2**32, scale, shift).masked_fill(~keep, fill)


def kept(key: Key, like: Tensor | Sequence[int], broadcast_dims: Sequence[int], T: int) -> Tensor:
    """The mask that :func:`apply` makes for a dense tensor, or a shape, in a shape that broadcasts to it."""
    if isinstance(key, StratifiedKey) or (isinstance(like, Tensor) and is_dtensor(like)):
        return numbers(key, like, broadcast_dims).to(torch.int64) < T - 2**31
    shape = like.shape if isinstance(like, Tensor) else like
    if isinstance(key, RowsKey):
        batch = (*shape[: key.dim], key.size, *shape[key.dim + 1 :])
        keep = kept(key.of, batch, broadcast_dims, T)
        return keep if keep.shape[key.dim] == 1 != key.size else keep.index_select(key.dim, key.index)
    once = dims_of(shape, broadcast_dims).difference(range(key.bits.dim()))
    drawn = tuple(1 if dim in once else size for dim, size in enumerate(shape))
    return op.keep_mask(key.bits, drawn, shared(shape, broadcast_dims, key.bits.dim()), T)


def number(p: float, name: str = "p") -> float:
    """``p`` as a float; TypeError for what is no number, and for a tensor with a gradient, as in PyTorch.

    ``name`` is that of the argument, for the messages.
    """
    if isinstance(p, Tensor):
        if p.dim() or p.requires_grad or p.is_meta:
            learned = f" that requires grad; {name} gets no gradient, except in ConcreteDropout"
            raise TypeError(
                f"{name} must be a float, got a {type(p).__name__} of shape {tuple(p.shape)}"
                f"{' on the meta device' if p.is_meta else ''}{learned if p.requires_grad else ''}"
            )
        p = op.whole(p)  # float() of a DTensor is its shard's number, here a summand
    # float() accepts strings, and arrays of one element, which have a length.
    elif not isinstance(p, float | int) and (not hasattr(p, "__float__") or hasattr(p, "__len__")):
        raise TypeError(f"{name} must be a float, {got(p)}")
    return float(p)


def check_p(p: float, name: str = "p") -> None:
    """Raise ValueError for a probability outside [0, 1], or NaN; TypeError for no number."""
    p = number(p, name)
    if not 0 <= p <= 1:
        # For p the text is torch's.
        which = "" if name == "p" else f" {name}"
        raise ValueError(f"dropout probability{which} has to be between 0 and 1, but got {p}")


def _compute(p: float, name: str) -> tuple[int, float]:
    check_p(p, name)
    T = round((1 - p) * 2**32)
    return T, 2**32 / T if T else 0.0


_compute_cached = lru_cache(maxsize=1024)(_compute)


def threshold_and_scale(p: float, name: str = "p") -> tuple[int, float]:
    """``T`` and ``1/q`` of the mask's specification; the errors are those of :func:`check_p`."""
    if type(p) is not float:
        p = number(p, name)
    # Dynamo ignores lru_cache and warns when it traces a cached function.
    return _compute(p, name) if compiling() else _compute_cached(p, name)


def _geometry(shape: Sequence[int], broadcast_dims: tuple[int, ...], key_dims: int) -> Geometry:
    if compiling() or tracing():
        return shared(shape, broadcast_dims, key_dims)
    try:
        return shared_cached(shape, broadcast_dims, key_dims)
    except TypeError:  # torch.export's symbolic sizes have no hash
        return shared(shape, broadcast_dims, key_dims)


def drops(
    name: str,
    input: Tensor,
    p: float,
    training: bool,
    key: Key | None,
    *,
    dense: bool = False,
    argument: str = "input",
) -> bool:
    """Whether the call drops; ``dense`` refuses nested tensors.

    In the messages, ``name`` is the function, and ``argument`` the parameter that ``input`` was passed as.

    A call that drops needs an ``input`` of a dtype that has a mask. Any other call is the identity, which
    accepts any dtype, layout and shape, as in PyTorch. Both need a tensor, and a ``key`` that fits it.
    """
    active = training and p != 0
    if getattr(input, "dtype", None) not in DTYPES:
        check_tensor(name, argument, input)
        if active:
            raise RuntimeError(
                f"{name} needs a floating-point or complex tensor, got {input.dtype} of shape "
                f"{nested.shape_of(input)}; accepted: {', '.join(sorted(str(dtype) for dtype in DTYPES))}"
            )
    if dense and active:
        refuse_nested(name, input)
    if key is not None:
        check_key(key, nested.shape_of(input) if input.is_nested else input.shape)
    return active


def flat_key(input: Tensor, key: Key | None) -> tuple[bool, Key | None]:
    """The key that :func:`apply` would take for an elementwise layer without shared dimensions.

    Returns:
        Whether the mask is that of the key, or of a key for each row, in the order of ``input``'s elements;
        and the key, which the layer has to go on with in either case.
    """
    if key is None and active.key_source is not None:
        if active.key_source.sample_dim(input):
            return False, None
        key = active.key_source.key_for(input, 0)
    elif key is not None:
        key = as_key(key)
    return not isinstance(key, RowsKey | StratifiedKey), key


def check_tensor(function: str, name: str, value: Any) -> None:
    """Raise torch's TypeError for the argument ``name`` if it is no tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{function}(): argument {name!r} must be Tensor, not {type(value).__name__}")


def check_device(name: str, value: Tensor, input: Tensor, other: str = "input") -> None:
    """Raise torch's RuntimeError unless ``value`` is on ``input``'s device, or a 0-d tensor on the CPU."""
    if value.device != input.device and (value.dim() or not value.is_cpu):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} is on {value.device} and {other} is "
            f"on {input.device}"
        )


def refuse_activations(name: str, weight: Tensor, key: Key | None) -> None:
    """Raise for a weight that has as many rows as the residual branch around it, and so may be of samples."""
    if active.rows is None or key is not None or compiling() or isinstance(weight, nn.Parameter):
        return
    if weight.dim() and weight.shape[0] == active.rows.index.shape[0]:
        refuse_rows(f"{name} of a tensor of {weight.shape[0]} rows, which is no parameter,")


def refuse_nested(name: str, input: Tensor) -> None:
    """Raise NotImplementedError for a nested tensor."""
    if input.is_nested:
        nested.refuse(name, input, "a plain tensor, such as input.to_padded_tensor(0.0)")


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` broadcasts to another shape."""
    sizes = zip(reversed(shape), reversed(to), strict=False)
    return len(shape) <= len(to) and all(size in (1, wanted) for size, wanted in sizes)


def check_parameter(function: str, name: str, parameter: Tensor, input: Tensor) -> Tensor:
    """The learned parameter in a shape that broadcasts to ``input``'s; raise if it has no such shape."""
    check_tensor(function, name, parameter)
    if not parameter.is_floating_point():
        raise RuntimeError(f"{name} has to be a floating-point tensor, got {parameter.dtype}")
    if parameter.dim() == 1 and parameter.shape[0] == 1:
        parameter = parameter.reshape(())  # fits a 0-d input too
    check_device(name, parameter, input)
    if not parameter.dim():
        return parameter
    shape = nested.shape_of(input)
    if not broadcasts(parameter.shape, shape):
        raise RuntimeError(
            f"{name} of shape {tuple(parameter.shape)} does not broadcast to an input of shape {shape}"
        )
    return parameter


def check_key(key: Key, shape: Sequence[int]) -> Key:
    """:func:`as_key`; raise if it is no key, or a batch of keys that does not fit a tensor of ``shape``."""
    if not isinstance(key, Key):
        key = as_key(key)
    if isinstance(key, RowsKey):
        return key
    if key.bits.dim() > 1 or (key.bits.dim() and key.shape[:1] != tuple(shape[:1]) and not tracing()):
        batch = f", or a batch of shape ({shape[0]},), one for each row" if shape else ""
        raise RuntimeError(
            f"keys of shape {tuple(key.shape)} do not fit a tensor of shape {tuple(shape)}; "
            f"accepted: one key of shape (){batch}"
        )
    return key


def bits_for(key: Key, input: Tensor) -> Tensor:
    """The bits of one key, on any device, or of a batch; RuntimeError for one on another than ``input``'s."""
    bits = key.bits
    if not bits.dim():
        return bits
    if bits.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but the keys are on {bits.device} and the "
            f"tensor is on {input.device}; move them with key.to({str(input.device)!r})"
        )
    return savable(bits)  # autograd saves a batch itself


def key_for(
    input: Tensor,
    key: Key | None,
    *,
    sample_dim: int | None = 0,
    shared_dims: Collection[int] = (),
    elementwise: bool = False,
) -> Key:
    """``key`` on ``input``'s device; without one, the active key source's, else one from torch's generator.

    Compiled code draws what eager code draws, and under :func:`torch.vmap` the draw follows ``randomness``.
    The key source may have a key for each sample along ``sample_dim``. It has one for all samples where that
    is one of ``shared_dims``, or None, as for a weight.

    Raises:
        NotImplementedError: ``input`` has no strides, as a sparse tensor; or the key source finds the samples
            of an ``elementwise`` layer along another dimension than 0.
    """
    op.refuse_layout(input)
    if key is None and active.key_source is not None:
        if elementwise and (dim := active.key_source.sample_dim(input)):
            raise NotImplementedError(
                f"this layer has its samples in dimension 0, got dimension {dim} of shape "
                f"{tuple(input.shape)}; transpose its input, or give it a key"
            )
        key = active.key_source.key_for(input, None if sample_dim in shared_dims else sample_dim)
    bits = None
    if key is not None:
        if type(key) is not Key:
            key = as_key(key)
        if isinstance(key, RowsKey):
            return key
        bits = bits_for(key, input)
    op.accept(input, bits)
    if isinstance(key, StratifiedKey):
        return key.to(input.device)
    return Key.from_bits(op.key_tensor(bits, input))
