"""The operations as one Triton kernel a call: the backend of GPUs, and of CPU tensors under the interpreter.

``plan`` turns a tensor's shape, its strides and the mask's geometry into the arguments of one launch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor

from thinned.backends import triton_kernels
from thinned.backends.arguments import check_draw, check_key, check_mask, checked_out, is_product
from thinned.backends.portable import choose
from thinned.backends.strata import name, once, prime_for
from thinned.geometry import Geometry, shared_cached
from thinned.philox import high32, low32
from thinned.torch_state import is_functional

__all__ = ["choose", "fold", "keep_mask", "masked_affine", "uniform"]

if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
    raise ImportError(f"thinned needs Triton 3.6 or later, and this is {triton.__version__}")

_INTERPRETED = triton.knobs.runtime.interpret
_WARP = 32
# Elements from which each thread has a block of its own. Fewer need smaller tiles, to occupy all of a GPU.
# The interpreter takes 0.05 s a tile.
_LARGE = 2**11 if _INTERPRETED else 2**20
_MAX_DIMS = 4  # dimensions that number a tile's rows
_BYTES_A_THREAD = 512  # 128 registers: 4 warps of such threads and more share a multiprocessor


class Dim(NamedTuple):
    """A dimension of a tensor: its size, and the strides of what is read and written along it."""

    size: int
    x: int
    out: int
    mask: int
    key: int

    def continues(self, inner: Dim) -> bool:
        """Whether this dimension and the next inner one are one longer dimension."""
        return self[1:] == tuple(stride * inner.size for stride in inner[1:])


class Plan(NamedTuple):
    """One launch: the dimensions that number the rows, innermost first, and the one along a row."""

    rows: tuple[Dim, ...]
    cols: Dim
    shares: bool  # whether a row's elements share one decision


def plan(dims: Sequence[Dim]) -> Plan:
    """Which dimension is a tile's columns: one along which mask indices are consecutive, or shared."""
    merged: list[Dim] = []
    for dim in sorted((dim for dim in dims if dim.size != 1), key=lambda dim: (-dim.out, -dim.x)):
        if merged and merged[-1].continues(dim):
            dim = Dim(merged.pop().size * dim.size, *dim[1:])
        merged.append(dim)
    one = Dim(1, 1, 1, 0, 0)
    inner = merged[-1] if merged else one
    consecutive = [dim for dim in merged if dim.mask == 1 and not dim.key and dim.size >= 4]
    shares = not consecutive or (inner.size >= 16 and not inner.mask and not inner.key)
    if not shares:
        cols = max(consecutive, key=lambda dim: dim.size)
    else:
        cols = inner if not inner.mask and not inner.key else one
    return Plan(tuple(dim for dim in reversed(merged) if dim is not cols), cols, shares)


class Launch(NamedTuple):
    """Arguments of :func:`thinned.backends.triton_kernels.tile` that neither pointers nor ``T`` decide."""

    grid: tuple[int]
    integers: tuple[int, ...]
    constants: dict[str, Any]


@lru_cache(maxsize=4096)
def launch(
    shape: tuple[int, ...],
    x_strides: tuple[int, ...],
    out_strides: tuple[int, ...],
    geometry: Geometry,
    key_strides: tuple[int, ...],
    itemsize: int,
    parts: int,
    numbers: bool,
) -> Launch | None:
    """The launch for tensors of ``parts`` numbers of ``itemsize`` bytes an element; strides count numbers.

    None if the rows have more dimensions than the kernel takes.
    """
    key_strides += (0,) * (len(shape) - len(key_strides))
    dims = tuple(map(Dim, shape, x_strides, out_strides, geometry.strides, key_strides))
    rows, cols, shares = plan(dims)
    if len(rows) > _MAX_DIMS:
        return None
    count, row_count = math.prod(shape), math.prod(dim.size for dim in rows)
    starts = () if shares else (geometry.base, *(dim.mask for dim in rows))
    lead = any(start % 128 for start in starts)
    lanes = _WARP if count >= _LARGE and not numbers else _WARP // 4
    unit = cols.x == cols.out == parts
    if shares:
        blocks, tile_cols = 0, min(_power(cols.size), lanes * 128)
        tile_rows = min(_power(row_count), lanes * 128 // tile_cols, 16 * _WARP)
    else:
        most = lanes if unit else max(1, lanes // _power(row_count))
        blocks = min(_power(-(-(cols.size + 127 * lead) // 128)), most)
        tile_cols = blocks * 128
        tile_rows = min(_power(row_count), lanes // blocks)
    vector = math.gcd(
        16 // itemsize, cols.size * parts, *(start * parts for start in starts if lead),
        *(stride for dim in rows for stride in (dim.x, dim.out)),
    )  # fmt: skip
    # Narrow loads and stores need an address each, and so two registers more; in rows across memory, four.
    wide = vector * itemsize >= 8
    at_most = (_BYTES_A_THREAD // itemsize if wide else 32) if unit else 16
    decisions = tile_rows if shares else 1
    warps = max(1, tile_rows * tile_cols * parts // (_WARP * at_most), decisions // _WARP)
    row_unit = parts == 1 and bool(rows) and rows[0].x == rows[0].out == 1
    col_tiles = -(-(cols.size + 127 * lead) // tile_cols)
    padded = rows + (Dim(1, 0, 0, 0, 0),) * (_MAX_DIMS - len(rows))
    integers = (
        cols.size, col_tiles, cols.x, cols.out, row_count, *(dim.size for dim in padded[:-1]),
        *(stride for strides in list(zip(*padded, strict=True))[1:] for stride in strides),
    )  # fmt: skip
    constants = {
        "DIMS": len(rows),
        "ROWS": tile_rows,
        "BLOCKS": blocks,
        "COLS": tile_cols,
        "PARTS": parts,
        "NUMBERS": numbers,
        "LEAD": lead,
        "LOG_VECTOR": _log2(vector),
        "X_UNIT": cols.x == parts,
        "OUT_UNIT": cols.out == parts,
        "ROW_UNIT": row_unit,
        "LOG_ROWS": _log2(math.gcd(16, rows[0].size)) if row_unit else 0,
        "LONG": row_count >= 2**31,
        "num_warps": warps,
    }
    return Launch((-(-row_count // tile_rows) * col_tiles,), integers, constants)


def _power(number: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << (number - 1).bit_length()


def _log2(power: int) -> int:
    return power.bit_length() - 1


@lru_cache(maxsize=1024)
def decision(T: int) -> dict[str, Any]:
    """How many bit planes decide for a threshold."""
    planes = 0 if T in (0, 2**32) else 33 - (T & -T).bit_length()
    return {"HEAD": planes if planes <= 2 else 8, "MORE": planes > 8, "ALL": T == 2**32}


@lru_cache(maxsize=1024)
def _bits(double: bool, numbers: bytes) -> tuple[int, ...]:
    """The bits of floating-point arguments, which Triton would round to float32.

    The doubles come as bytes, since a cache takes 0.0 and -0.0 for one number.
    """
    with np.errstate(over="ignore"):
        values = np.frombuffer(numbers).astype(np.float64 if double else np.float32)
    return tuple(values.view(np.int64 if double else np.int32).tolist())


_NO_NUMBERS = {"PLAIN": True, "DOUBLE": False}


def _run(
    x: Tensor | None,
    out: Tensor,
    key: int | Tensor,
    geometry: Geometry,
    T: int = 0,
    reals: tuple[int, ...] = (0, 0, 0),
    numbers: bool = False,
    kinds: dict[str, Any] = _NO_NUMBERS,
) -> Repeat | None:
    shape = tuple(out.shape)
    if not out.numel():
        return None
    key_low = key_high = 0
    pointer: Tensor | None = None
    key_strides: tuple[int, ...] = ()
    if isinstance(key, int):
        key_low, key_high = low32(key), high32(key)
    else:
        pointer, key_strides = key, key.stride()
    to, of, parts = out, x, 1
    if out.is_complex():
        to, of, parts = torch.view_as_real(out), None if x is None else torch.view_as_real(x), 2
    elif _INTERPRETED and out.dtype == torch.bfloat16:  # which the interpreter rounds towards zero
        to, of = out.view(torch.int16), None if x is None else x.view(torch.int16)
    strides = to.stride()[: len(shape)]
    found = launch(
        shape, strides if of is None else of.stride()[: len(shape)], strides, geometry, key_strides,
        to.itemsize, parts, numbers,
    )  # fmt: skip
    if found is None:
        if is_functional(out):
            raise NotImplementedError("a compiler's tensor has one launch")
        dim = min((size, dim) for dim, size in enumerate(shape) if size > 1)[1]
        strides = (*geometry.strides[:dim], *geometry.strides[dim + 1 :])
        for i in range(shape[dim]):
            _run(
                None if x is None else x.select(dim, i), out.select(dim, i),
                key if isinstance(key, int) or key.dim() <= dim else key.select(dim, i),
                Geometry(strides, geometry.base + i * geometry.strides[dim]), T, reals, numbers, kinds,
            )  # fmt: skip
        return None
    # Inductor passes what is below 2**31 as 32 bits.
    threshold = (T + 2**31) % 2**32 - 2**31
    same = geometry.base, threshold, *reals, *found.integers
    arguments = of, to, pointer, key_low, key_high, *same
    started = _start(triton_kernels.tile, out, found.grid, arguments, found.constants | decision(T) | kinds)
    return started and Repeat(started[0], (*found.grid, 1, 1), (*same, *started[1]))


class Repeat(NamedTuple):
    """A launch of a compiled kernel, with all but its first arguments: the pointers and the key's halves."""

    compiled: Any
    programs: tuple[int, int, int]
    arguments: tuple[Any, ...]


# Compiled kernels, and the constants among their arguments, by all that Triton compiles for on NVIDIA's GPUs.
_started: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def _start(
    kernel: Any, out: Tensor, grid: tuple[int], arguments: tuple[Any, ...], constants: dict[str, Any]
) -> tuple[Any, tuple[Any, ...]] | None:
    """Launch a kernel that writes to ``out``; for a compiler's tensor, show it the launch.

    Returns what ``_started`` holds.
    """
    if is_functional(out):  # Inductor takes no enable_fp_fusion
        torch.library.wrap_triton(kernel)[grid](*arguments, **constants)
        return None
    pointers = (
        (arg.dtype, arg.data_ptr() % 16) if isinstance(arg, Tensor) else arg is None for arg in arguments[:5]
    )
    index = out.get_device()
    key = kernel.__name__, index, *pointers, *constants.values()
    started = _started.get(key)
    if started:  # Triton's own look-up takes 40 us for these arguments.
        _launch(Repeat(started[0], (*grid, 1, 1), started[1]), index, *arguments)
        return started
    with _on(index):
        compiled = kernel[grid](*arguments, **constants, enable_fp_fusion=False)
    if compiled is None or torch.version.hip is not None or out.device.type == "xpu":
        return None
    names = kernel.arg_names[len(arguments) :]
    return _started.setdefault(key, (compiled, tuple(constants[name] for name in names)))


def _on(index: int) -> Any:
    """A context in which kernels start on the device of that index, which is -1 for the CPU."""
    if index < 0:
        return np.errstate(all="ignore")  # the interpreter computes with NumPy
    return torch.accelerator.device_index(index)


_hooks, _driver = triton.knobs.runtime, triton.runtime.driver


def _launch(repeat: Repeat, index: int, *arguments: Any) -> None:
    """The launch with its first arguments, on the device of that index.

    ``compiled[programs](*arguments)`` takes 4 us more: it calls two lists of hooks even if they are empty.
    """
    if index != torch.accelerator.current_device_index():
        with _on(index):
            _launch(repeat, index, *arguments)
        return
    compiled, programs, others = repeat
    try:
        hooked = _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    except AttributeError:  # another version of Triton
        hooked = True
    if hooked:
        compiled[programs](*arguments, *others)
    else:
        stream = _driver.active.get_current_stream(index)
        run(*programs, stream, function, metadata, None, None, None, *arguments, *others)


# Launches of masked_affine by all that they depend on, for pointers that are multiples of 16.
_repeats: dict[tuple[Any, ...], Repeat] = {}


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
    x = x.resolve_conj()
    if _INTERPRETED or is_functional(x):
        return _affine(x, key, geometry, T, scale, shift, fill, out)[0]
    if isinstance(key, int):
        kind_of_key, to_key, low, high = None, None, low32(key), high32(key)
    else:
        kind_of_key, to_key, low, high = _kind(key), key.data_ptr(), 0, 0
    numbers = struct.pack("3d", scale, shift, fill)  # bytes, since a dict takes 0.0 and -0.0 for one number
    call = _kind(x), None if out is None else _kind(out), kind_of_key, geometry, T, numbers
    if out is None:
        out = torch.empty_like(x)
    to_x, to_out = x.data_ptr(), out.data_ptr()
    aligned = not (to_x | to_out | (to_key or 0)) % 16
    repeat = _repeats.get(call) if aligned else None
    if repeat:
        _launch(repeat, x.get_device(), to_x, to_out, to_key, low, high)
        return out
    out, repeat = _affine(x, key, geometry, T, scale, shift, fill, out)
    if repeat and aligned:
        if len(_repeats) == 4096:
            _repeats.clear()
        _repeats[call] = repeat
    return out


def _kind(x: Tensor) -> tuple[Any, ...]:
    return x.dtype, x.get_device(), x.shape, x.stride()


def _affine(
    x: Tensor,
    key: int | Tensor,
    geometry: Geometry | None,
    T: int,
    scale: float,
    shift: float,
    fill: float,
    out: Tensor | None,
) -> tuple[Tensor, Repeat | None]:
    """:func:`masked_affine` with all its checks, and how to launch it again."""
    out = checked_out(x, key, out)
    geometry = geometry or shared_cached(x.shape)
    check_mask(x.shape, geometry, T)
    double = x.dtype in (torch.float64, torch.complex128)
    plain = is_product(scale, shift, fill)
    # Adding -0.0 changes no number; adding 0.0 would change -0.0.
    reals = _bits(double, struct.pack("3d", scale, *((0.0, 0.0) if plain else (shift or -0.0, fill))))
    return out, _run(x, out, key, geometry, T, reals, kinds={"PLAIN": plain, "DOUBLE": double})


def keep_mask(key: int | Tensor, shape: tuple[int, ...], geometry: Geometry, T: int) -> Tensor:
    """See :meth:`thinned.backends.Backend.keep_mask`."""
    if isinstance(key, Tensor):
        check_key(key, shape)
    check_mask(shape, geometry, T)
    mask = torch.empty(shape, dtype=torch.bool, device=key.device if isinstance(key, Tensor) else "cpu")
    _run(None, mask if is_functional(mask) else mask.view(torch.uint8), key, geometry, T)
    return mask


def uniform(
    key: Tensor, shape: tuple[int, ...], geometry: Geometry, draw: Tensor | None = None, strata: int = 1
) -> Tensor:
    """See :meth:`thinned.backends.Backend.uniform`."""
    check_key(key, shape)
    check_mask(shape, geometry)
    out = torch.empty(shape, dtype=torch.int32, device=key.device)
    if draw is None:
        _run(None, out, key, geometry, numbers=True)
        return out
    check_draw(draw, strata, key)
    if out.numel():
        row, its_shape, _ = once(key, shape, geometry)
        u, v = (uniform(each, its_shape, geometry) for each in (row, fold(row, name(row))))
        draw = draw.expand(key.shape).contiguous()
        arguments = (
            out,
            u,
            v,
            draw,
            out.numel() // draw.numel(),
            u.numel(),
            out.numel(),
            strata,
            prime_for(strata),
        )
        _start(triton_kernels.shift, out, (-(-out.numel() // _SHIFTS),), arguments, {"SIZE": _SHIFTS})
    return out


_FOLDS = 256  # keys a program
_SHIFTS = 2**14 if _INTERPRETED else 1024  # numbers a program


def fold(keys: Tensor, data: int | Tensor) -> Tensor:
    """See :meth:`thinned.backends.Backend.fold`."""
    if isinstance(data, int):
        check_key(keys, ())
        out = torch.empty_like(keys)
    else:
        if keys.dtype != torch.int64 or data.dtype != torch.int64:
            raise RuntimeError(f"keys and ids must be int64, got {keys.dtype} and {data.dtype}")
        shape = torch.broadcast_shapes(keys.shape, data.shape)
        out = torch.empty(shape, dtype=torch.int64, device=(data if keys.is_cpu else keys).device)
    if out.numel():
        arguments = out, *_operand(keys, out), *_operand(data, out), out.numel()
        _start(triton_kernels.fold, out, (-(-out.numel() // _FOLDS),), arguments, {"SIZE": _FOLDS})
    return out


def _operand(value: int | Tensor, out: Tensor) -> tuple[Tensor | None, int, int]:
    """What a program of ``fold`` reads: a pointer and its step, or one number."""
    if isinstance(value, int):
        return None, value, 0
    if value.dim():
        return value.expand(out.shape).contiguous(), 0, 1
    # One number on the CPU may meet a tensor on a GPU.
    return (value, 0, 0) if value.device == out.device else (None, int(value), 0)
