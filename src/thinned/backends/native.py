"""The operations by the compiled kernel: the CPU's backend.

:func:`fused` is this backend's own: where it does not serve, :mod:`thinned.op.fused` composes the same values
of the operations that every backend has.

``THINNED_ISA`` in the environment forces a lower instruction set than the processor has; the bits are equal.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

import thinned.backends._native as _native
from thinned.backends.arguments import check_draw, check_dtype, check_key, check_mask, check_out
from thinned.backends.rows import by_rows
from thinned.backends.strata import name, once
from thinned.geometry import Geometry, shared_cached

__all__ = ["choose", "fold", "fused", "instruction_set", "keep_mask", "masked_affine", "uniform"]


def _force_isa(wanted: str) -> str:
    """Forces an instruction set, named in any case, and returns what `thinned doctor` says about it."""
    name, accepted = wanted.strip().lower(), _native.supported_isas()
    if not name:
        return "not set"
    if name in accepted:
        _native.set_isa(name)
        return name
    lacks = "this processor" if name in _native.compiled_isas() else "thinned"
    ignored = (
        f"{wanted!r} is ignored: {lacks} has no such instruction set, accepted are {', '.join(accepted)}"
    )
    # No error, as the masks are the same. The user's import is five frames up.
    warnings.warn(f"THINNED_ISA={ignored}; thinned uses {_native.isa()}", stacklevel=5)
    return ignored


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Until its end, the kernel runs under this instruction set, in all threads."""
    before = _native.isa()
    _native.set_isa(name)
    try:
        yield
    finally:
        _native.set_isa(before)


WANTED_ISA = _force_isa(os.environ.get("THINNED_ISA", ""))

_MASK = _native.dtypes.index("bool")
_CODES = {getattr(torch, name): code for code, name in enumerate(_native.dtypes) if code != _MASK}
_FUNCTIONS = {name: code for code, name in enumerate(_native.functions)}
_COMPLEX = frozenset(code for dtype, code in _CODES.items() if dtype.is_complex)


def masked_affine(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    out: Tensor | None = None,
) -> Tensor:
    """See :meth:`thinned.backends.Backend.masked_affine`."""
    try:
        code = _CODES[x.dtype]
    except KeyError:
        check_dtype(x.dtype)
        raise
    if code in _COMPLEX and x.is_conj():
        x = x.resolve_conj()
    if out is None:
        target = torch.empty_like(x)
    else:
        if out is not x and (out.dtype is not x.dtype or out.shape != x.shape or not out.is_cpu):
            check_out(x, out)  # raises with the reason, and takes twice as long
        target = out
    if (
        geometry is None
        and isinstance(key, int)
        and x.is_contiguous()
        and (out is None or out.is_contiguous())
    ):
        # Positions in memory are mask indices: shape and strides are not needed.
        _native.flat(x.data_ptr(), target.data_ptr(), code, x.numel(), T, scale, shift, fill, key)
    else:
        _strided(x, target, code, key, geometry, T, scale, shift, fill)
    return target


def _strided(
    x: Tensor,
    target: Tensor,
    code: int,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float = 1.0,
    shift: float = 0.0,
    fill: float = 0.0,
) -> None:
    shape = x.shape
    strides, base = shared_cached(shape) if geometry is None else geometry
    one_key, keys = 0, 0
    key_shape: tuple[int, ...] = ()
    key_strides: tuple[int, ...] = ()
    if isinstance(key, int):
        one_key = key
    elif key.dtype is not torch.int64 or not key.is_cpu:
        check_key(key, shape, x.device)
    elif key.dim():
        keys, key_shape, key_strides = key.data_ptr(), key.shape, key.stride()
    else:
        one_key = int(key.item())
    try:
        _native.strided(
            x.data_ptr(), target.data_ptr(), code, shape, x.stride(), target.stride(), strides, base, T,
            scale, shift, fill, one_key, keys, key_shape, key_strides,
        )  # fmt: skip
    except ValueError:
        # The kernel checks in 0.1 us what takes Python 1.4 us; these raise the message of every backend.
        check_mask(shape, Geometry(strides, base), T)
        if isinstance(key, Tensor):
            check_key(key, shape, x.device)
        raise


def fold(keys: Tensor, data: int | Tensor) -> Tensor:
    """See :meth:`thinned.backends.Backend.fold`."""
    if isinstance(data, int):
        if keys.nbytes != 8:  # cheaper to ask than shape and dtype, 65 ns and not 170
            check_key(keys, ())
        out = torch.empty_like(keys)
        _native.fold(out.data_ptr(), keys.data_ptr(), data)
        return out
    if keys.dtype != torch.int64 or data.dtype != torch.int64:
        raise RuntimeError(f"keys and ids must be int64, got {keys.dtype} and {data.dtype}")
    keys, ids = torch.broadcast_tensors(keys, data) if keys.dim() and data.dim() else (keys, data)
    keys, ids = keys.contiguous(), ids.contiguous()
    out = torch.empty_like(ids if ids.dim() else keys)
    steps = int(keys.dim() > 0), int(ids.dim() > 0)
    _native.fold_many(out.data_ptr(), keys.data_ptr(), steps[0], ids.data_ptr(), steps[1], out.numel())
    return out


def keep_mask(key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
    """See :meth:`thinned.backends.Backend.keep_mask`."""
    out = torch.empty(shape, dtype=torch.bool, device="cpu")
    _strided(out, out, _MASK, key, geometry, T)
    return out


def choose(x: Tensor, numbers: Tensor, T: int, scale: float, shift: float, fill: float) -> Tensor:
    """See :meth:`thinned.backends.Backend.choose`."""
    check_dtype(x.dtype)
    x, target = x.resolve_conj(), torch.empty_like(x)
    if x.stride() != target.stride():  # gaps, or elements in one place
        x = torch.empty_like(target).copy_(x)
    if numbers.shape != x.shape or numbers.stride() != x.stride():
        numbers = torch.empty_like(x, dtype=torch.int32).copy_(numbers)
    _native.choose(
        x.data_ptr(), target.data_ptr(), _CODES[x.dtype], x.numel(), numbers.data_ptr(), T, scale, shift, fill
    )
    return target


def fused(
    function: str,
    x: Tensor,
    other: Tensor | None,
    bias: Tensor | None,
    key: int | Tensor,
    T: int,
    scale: float,
) -> Tensor:
    """An activation, its derivative or a sum, and a mask, in one pass; csrc/kernel.h has the formulas.

    Args:
        function: one of ``_native.functions``.
        x: a contiguous real tensor.
        other: the residual or the gradient, like ``x``.
        bias: of ``x``'s dtype and last dimension.
        key: one key, or an int64 tensor of one for each row.
        T: the threshold.
        scale: the factor of what is kept.
    """
    y = torch.empty_like(x)
    rows, keys = 1, 0
    if isinstance(key, Tensor):
        key = key.contiguous()
        rows, keys, key = key.shape[0], key.data_ptr(), 0
    beside = 0 if other is None else other.data_ptr()
    biases, columns = (0, 0) if bias is None else (bias.data_ptr(), bias.shape[0])
    _native.fused(
        _FUNCTIONS[function], x.data_ptr(), beside, biases, y.data_ptr(), _CODES[x.dtype], rows,
        x.numel() // max(rows, 1), columns, T, scale, key, keys,
    )  # fmt: skip
    return y


def uniform(
    key: Tensor, shape: tuple[int, ...], geometry: Geometry, draw: Tensor | None = None, strata: int = 1
) -> Tensor:
    """See :meth:`thinned.backends.Backend.uniform`."""
    check_key(key, shape)
    check_mask(shape, geometry)
    if not math.prod(shape):
        return torch.empty(shape, dtype=torch.int32, device="cpu")
    return (
        by_rows(key, shape, geometry, _numbers)
        if draw is None
        else _shifted(key, shape, geometry, draw, strata)
    )


def _shifted(key: Tensor, shape: tuple[int, ...], geometry: Geometry, draw: Tensor, strata: int) -> Tensor:
    check_draw(draw, strata, key)
    draw, dims = draw.expand(key.shape).contiguous(), key.dim()
    out = torch.empty(shape, dtype=torch.int32, device="cpu")
    keys, count = key, out.numel() // draw.numel()
    if any(geometry.strides[:dims]):
        sources = torch.arange(key.numel(), device="cpu")
    else:  # the draws of one key have their numbers in common
        keys, sources = once(key, shape, geometry)[0].unique(return_inverse=True)
        sources = sources.expand(key.shape).contiguous()
        shape = (len(keys), *shape[dims:])
        geometry = Geometry((0, *geometry.strides[dims:]), geometry.base)
    u, v = (by_rows(each, shape, geometry, _numbers) for each in (keys, fold(keys, name(keys))))
    _native.strata(
        out.data_ptr(), u.data_ptr(), v.data_ptr(), draw.data_ptr(), sources.data_ptr(), draw.numel(), count,
        u.numel() // count, strata,
    )  # fmt: skip
    return out


def _numbers(first: Tensor, key: Tensor, count: int) -> Tensor:
    out = torch.empty((*first.shape, count), dtype=torch.int32, device="cpu")
    first, key = first.contiguous(), key.contiguous()
    _native.numbers(out.data_ptr(), key.data_ptr(), first.data_ptr(), first.numel(), count)
    return out
