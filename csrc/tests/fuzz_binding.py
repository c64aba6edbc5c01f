"""Random calls of the kernel's binding, for a process under AddressSanitizer and UBSan: ``make sanitize``.

Valid calls read and write memory that is allocated to the byte, and equal the specification. A call with one
bad argument raises ValueError or TypeError. PyTorch is not loaded.

Usage: ``fuzz_binding.py MODULE SPECIFICATION``: the binding built with sanitizers, ``src/thinned/spec.py``.
"""

from __future__ import annotations

import ctypes
import importlib.util
import math
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CALLS = 3000
COMPARED = 10  # one call in so many

# The kernel's dtypes as NumPy's, bfloat16 as its bits.
DTYPES = [np.dtype(name) for name in ("f2", "u2", "f4", "f8", "c8", "c16", "?")]
BFLOAT16, MASK = 1, 6
LONG = np.dtype("i8")
MOST, LAST = 2**44, 2**63 - 1


def load(name: str, path: str) -> Any:
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


native = load("_native", sys.argv[1])
spec = load("spec", sys.argv[2])
rng = random.Random(7)
bits = np.random.default_rng(7)
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = (ctypes.c_size_t,)
libc.free.argtypes = (ctypes.c_void_p,)


class Memory:
    """So many items, and not a byte more: an access beside them is a report."""

    def __init__(self, items: int, dtype: np.dtype[Any]) -> None:
        self.at: int = libc.malloc(items * dtype.itemsize)
        memory = (ctypes.c_char * (items * dtype.itemsize)).from_address(self.at)
        self.items: NDArray[Any] = np.frombuffer(memory, dtype)

    def __del__(self) -> None:
        libc.free(self.at)


def numbers_of(items: int, dtype: np.dtype[Any]) -> Memory:
    memory = Memory(items, dtype)
    if dtype.kind == "i":
        memory.items[:] = bits.choice(bits.integers(-(2**63), 2**63 - 1, 3, np.int64), items)  # few keys
    elif dtype.kind in "bu":
        memory.items[:] = 1 if dtype.kind == "b" else 0x3F80  # bfloat16's one
    else:
        parts = memory.items.view(f"f{dtype.itemsize // 2}") if dtype.kind == "c" else memory.items
        parts[:] = bits.normal(size=len(parts))
    return memory


class Call:
    """A valid call: a function, its arguments by name, and the memory that they are addresses of."""

    def __init__(self, function: str, arguments: dict[str, Any], memory: tuple[Memory, ...]) -> None:
        self.function, self.arguments, self.memory = function, arguments, memory

    def run(self, **changed: Any) -> None:
        getattr(native, self.function)(*(self.arguments | changed).values())

    def __repr__(self) -> str:
        return f"{self.function}({', '.join(f'{name}={value!r}' for name, value in self.arguments.items())})"


def reach(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """The items from the first to the last."""
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    return 0 if 0 in shape else 1 + last


def strides_of(shape: tuple[int, ...], held: float) -> tuple[int, ...]:
    """Dimensions in any order in memory, with gaps; some, with the probability ``held``, in one place."""
    strides, step = [0] * len(shape), rng.choice([1, 1, 1, 2, 3])
    order = list(range(len(shape)))
    if rng.random() < 0.5:
        rng.shuffle(order)
    for dim in reversed(order):
        if rng.random() >= held:
            strides[dim] = step
            step *= max(shape[dim], 1) + rng.choice([0, 0, 0, 1, 3])
    return tuple(strides)


def any_shape() -> tuple[int, ...]:
    shape: list[int] = []
    for _ in range(rng.choice([0, 1, 2, 2, 3, 3, 4])):
        shape.append(min(rng.choice([1, 2, 3, 5, 8, 17, 63, 64, 65, 130, 257]), 3000 // math.prod(shape)))
    if shape and rng.random() < 0.03:
        shape[rng.randrange(len(shape))] = 0
    return tuple(shape)


def any_threshold() -> int:
    return rng.choice([0, 1, 2**24, 2**31, 3865470566, 2**32 - 1, 2**32, rng.randrange(2**32)])


def any_key() -> int:
    return rng.randrange(-(2**63), 2**63) >> rng.choice([0, 0, 32, 62])


def any_constants(dtype: int) -> dict[str, Any]:
    plain = dtype in (BFLOAT16, MASK) or rng.random() < 0.5
    scale = 1.0 if dtype in (BFLOAT16, MASK) else rng.choice([1.0, 1.25, 1e-5, 1.1111111])
    return {"scale": scale, "shift": 0.0 if plain else 0.25, "fill": 0.0 if plain else -1.5}


def flat() -> Call:
    dtype = rng.randrange(7)
    n = rng.choice([0, 1, 2, 63, 64, 65, 127, 128, 129, rng.randrange(5000), rng.randrange(5000)])
    if rng.random() < 0.01:
        n = 100_000  # by several threads
    x = numbers_of(n, DTYPES[dtype])
    y = x if rng.random() < 0.3 else numbers_of(n, DTYPES[dtype])
    arguments = {"x": x.at, "y": y.at, "dtype": dtype, "n": n, "T": any_threshold(), **any_constants(dtype)}
    return Call("flat", arguments | {"key": any_key()}, (x, y))


def strided() -> Call:
    dtype, shape = rng.randrange(7), any_shape()
    y_strides = strides_of(shape, 0)
    in_place = rng.random() < 0.3
    x_strides = y_strides if in_place else strides_of(shape, 0.2)
    key_strides = strides_of(shape[: rng.randrange(len(shape) + 1)], 0.2)
    x = numbers_of(reach(shape, x_strides), DTYPES[dtype])
    y = x if in_place else numbers_of(reach(shape, y_strides), DTYPES[dtype])
    keys = numbers_of(reach(shape[: len(key_strides)], key_strides), LONG)
    mask_strides = tuple(
        rng.choice([stride, stride, rng.randrange(500)]) for stride in strides_of(shape, 0.2)
    )
    if rng.random() < 0.1:  # as far apart as is accepted
        far = (2**59 // len(shape) // max(size - 1, 1) for size in shape)
        mask_strides = tuple(map(rng.choice, zip(mask_strides, far, strict=True)))
    base = rng.randrange(2**62) >> rng.choice([0, 20, 60])
    arguments = {
        "x": x.at, "y": y.at, "dtype": dtype, "shape": shape, "x_strides": x_strides, "y_strides": y_strides,
        "mask_strides": mask_strides, "base": base, "T": any_threshold(), **any_constants(dtype),
        "key": any_key(), "keys": keys.at if key_strides or rng.random() < 0.1 else 0,
        "key_shape": shape[: len(key_strides)], "key_strides": key_strides,
    }  # fmt: skip
    return Call("strided", arguments, (x, y, keys))


def numbers() -> Call:
    rows, count = rng.choice([0, 1, 2, 7, 40]), rng.choice([0, 1, 2, 127, 128, 129, 300])
    y, keys, starts = (
        Memory(rows * count, np.dtype("i4")),
        *(numbers_of(rows, LONG) for _ in range(2)),
    )
    starts.items[:] >>= rng.choice([1, 20, 55])
    starts.items[:] &= LAST
    arguments = {"y": y.at, "keys": keys.at, "starts": starts.at, "rows": rows, "count": count}
    return Call("numbers", arguments, (y, keys, starts))


def strata() -> Call:
    rows, count, source_rows = (
        rng.choice([0, 1, 2, 9]),
        rng.choice([0, 1, 31, 32, 100, 5000]),
        rng.choice([1, 3]),
    )
    y, u, v = (Memory(items * count, np.dtype("i4")) for items in (rows, source_rows, source_rows))
    u.items[:], v.items[:] = bits.integers(-(2**31), 2**31, (2, source_rows * count), np.int32)
    draws, sources = numbers_of(rows, LONG), Memory(rows, LONG)
    sources.items[:] = bits.integers(0, source_rows, rows)
    arguments = {
        "y": y.at, "u": u.at, "v": v.at, "draws": draws.at, "sources": sources.at,
        "rows": rows, "count": count, "source_rows": source_rows,
        "strata": rng.choice([1, 2, 3, 20, 24, 1000, 65520, 65521]),
    }  # fmt: skip
    return Call("strata", arguments, (y, u, v, draws, sources))


def choose() -> Call:
    dtype, n = rng.randrange(7), rng.choice([0, 1, 7, 63, 64, 65, 1000, 40_000])
    x, numbers = numbers_of(n, DTYPES[dtype]), Memory(n, np.dtype("i4"))
    y = x if rng.random() < 0.3 else numbers_of(n, DTYPES[dtype])
    numbers.items[:] = bits.integers(-(2**31), 2**31, n, np.int32)
    arguments = {"x": x.at, "y": y.at, "dtype": dtype, "n": n, "numbers": numbers.at, "T": any_threshold()}
    return Call("choose", arguments | any_constants(dtype), (x, y, numbers))


def fused() -> Call:
    function, dtype = rng.randrange(len(native.functions)), rng.randrange(4)
    rows, columns = rng.choice([0, 1, 1, 3, 40]), rng.choice([1, 3, 64, 77])
    n = columns * rng.choice([0, 1, 2, 9])
    if rng.random() < 0.01:
        n = columns * 2000  # by several threads
    x, y, other = (numbers_of(rows * n, DTYPES[dtype]) for _ in range(3))
    bias, keys = numbers_of(columns, DTYPES[dtype]), numbers_of(rows, LONG)
    add = native.functions.index("add")
    arguments = {
        "function": function, "x": x.at, "other": other.at if function >= add else 0,
        "bias": bias.at if function == add and rng.random() < 0.5 else 0, "y": y.at, "dtype": dtype,
        "rows": rows, "n": n, "columns": columns, "T": any_threshold(), "scale": 1.0, "key": any_key(),
        "keys": keys.at if rows != 1 or rng.random() < 0.5 else 0,
    }  # fmt: skip
    return Call("fused", arguments, (x, y, other, bias, keys))


def fold() -> Call:
    y, key = Memory(1, LONG), numbers_of(1, LONG)
    return Call("fold", {"y": y.at, "key": key.at, "data": any_key()}, (y, key))


def fold_many() -> Call:
    n, key_step, data_step = rng.choice([0, 1, 2, 9]), rng.randrange(2), rng.randrange(2)
    y, keys, data = (numbers_of(n if step else 1, LONG) for step in (1, key_step, data_step))
    arguments = {
        "y": y.at,
        "keys": keys.at,
        "key_step": key_step,
        "data": data.at,
        "data_step": data_step,
        "n": n,
    }
    return Call("fold_many", arguments, (y, keys, data))


def affine(x: NDArray[Any], keep: NDArray[np.bool_], scale: float, shift: float, fill: float) -> NDArray[Any]:
    """``keep ? x * scale + shift : fill``, one dimension, in the arithmetic of the specification."""
    if x.dtype.kind == "b":
        return keep
    if x.dtype.kind == "u":  # ones, multiplied by one
        return np.where(keep, x, np.uint16(0))
    if x.dtype.kind == "c":
        parts = x.view(f"f{x.dtype.itemsize // 2}")
        return affine(parts, keep.repeat(2), scale, shift, fill).view(x.dtype)
    opmath = np.float64 if x.dtype == np.float64 else np.float32
    value = x.astype(opmath) * opmath(scale)
    if shift:
        value = value + opmath(shift)
    return np.where(keep, value, opmath(fill)).astype(x.dtype)


def at(strides: tuple[int, ...], shape: tuple[int, ...]) -> NDArray[np.uint64]:
    """Where each element lies, in row-major order."""
    places = np.zeros(shape, np.uint64)
    for dim, stride in enumerate(strides):
        steps = np.arange(shape[dim], dtype=np.uint64) * np.uint64(stride)
        places += steps.reshape((-1,) + (1,) * (len(shape) - dim - 1))
    return places.ravel()


def uniform(keys: NDArray[np.int64], index: NDArray[np.uint64]) -> NDArray[np.uint64]:
    number = np.empty(index.shape, np.uint64)
    for key in np.unique(keys):
        number[keys == key] = spec.uniform(int(key) % 2**64, index[keys == key])
    return number


def expected(call: Call) -> NDArray[Any]:
    """All of the written memory after the call, from what it is before."""
    get = call.arguments.get
    if call.function in ("flat", "strided"):
        shape = get("shape", (get("n"),))
        dense = at(get("x_strides", (1,)), shape), at(get("y_strides", (1,)), shape)
        index = at(get("mask_strides", (1,)), shape) + np.uint64(get("base", 0))
        keys = np.full(index.shape, get("key"))
        if get("keys"):
            key_strides = get("key_strides")
            keys = call.memory[2].items[at((*key_strides, *(0,) * (len(shape) - len(key_strides))), shape)]
        keep = uniform(keys, index) < np.uint64(get("T"))
        y = call.memory[1].items.copy()
        y[dense[1]] = affine(call.memory[0].items[dense[0]], keep, get("scale"), get("shift"), get("fill"))
        return y
    if call.function == "fused":
        x, _, other, bias, keys = (memory.items for memory in call.memory)
        rows, n, function = get("rows"), get("n"), native.functions[get("function")]
        if function in ("relu", "add", "relu_slope"):
            if get("dtype") == BFLOAT16:  # all numbers are ones
                x, other, bias = (memory.astype(np.float32) / 0x3F80 for memory in (x, other, bias))
            each = keys if get("keys") else np.full(rows, get("key"))
            index = np.tile(np.arange(n, dtype=np.uint64), rows)
            keep = uniform(each.repeat(n), index) < np.uint64(get("T"))
            wide = np.float64 if x.dtype == np.float64 else np.float32
            x, other = x.astype(wide), other.astype(wide)
            if function == "relu":
                y = np.where(keep, np.where(x < 0, wide(0), x), wide(0))
            elif function == "relu_slope":
                y = np.where(x <= 0, wide(0), other)
            else:
                x = x + np.tile(bias.astype(wide), len(x) // max(get("columns"), 1)) if get("bias") else x
                y = other + np.where(keep, x, wide(0))
            if get("dtype") == BFLOAT16:
                return (y.view(np.uint32) >> 16).astype(np.uint16)
            return y.astype(call.memory[1].items.dtype)
        return call.memory[1].items[:0]  # csrc/tests/test_kernel.cpp has the values
    if call.function == "numbers":
        keys, starts = (memory.items.repeat(get("count")) for memory in call.memory[1:])
        columns = np.tile(np.arange(get("count"), dtype=np.uint64), get("rows"))
        return (uniform(keys, starts.view(np.uint64) + columns).astype(np.int64) - 2**31).astype(np.int32)
    if call.function == "choose":
        keep = call.memory[2].items.astype(np.int64) + 2**31 < get("T")
        return affine(call.memory[0].items, keep, get("scale"), get("shift"), get("fill"))
    if call.function == "strata":
        strata, count = get("strata"), get("count")
        u, v = (
            memory.items.reshape(get("source_rows"), count).astype(np.int64) + 2**31
            for memory in call.memory[1:3]
        )
        draws, sources = (memory.items for memory in call.memory[3:])
        rows = [
            spec.shifted(u[row].astype(np.uint32), v[row].astype(np.uint32), int(draw), strata)
            for draw, row in zip(draws, sources, strict=True)
        ]
        return (np.array(rows, np.uint32).astype(np.int64) - 2**31).astype(np.int32).ravel()
    if call.function == "fold":
        pairs = [(call.memory[1].items[0], get("data"))]
    else:
        pairs = [
            (call.memory[1].items[i * get("key_step")], call.memory[2].items[i * get("data_step")])
            for i in range(get("n"))
        ]
    folded = [spec.fold(int(key) % 2**64, int(data) % 2**64) for key, data in pairs]
    return np.array(folded, np.uint64).view(np.int64)


def changed(sizes: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def bad(call: Call) -> Iterator[dict[str, Any]]:
    """One bad argument each: the call has work to do, so that its memory counts."""
    arguments = call.arguments
    function = call.function
    item = call.memory[0].items.itemsize
    integers = {
        "flat": ("n",),
        "choose": ("n",),
        "numbers": ("rows", "count"),
        "fused": ("rows", "n"),
        "strata": ("rows", "count", "source_rows"),
        "fold_many": ("n",),
    }
    for name in integers.get(function, ()):
        yield from ({name: value} for value in (-1, -(2**63), MOST + 1, LAST, 2**63, 1.5, None))
    sizes = {memory.at: memory.items.nbytes for memory in call.memory}
    names = ("x", "y", "key", "keys", "starts", "data", "u", "v", "draws", "sources", "numbers")
    names += ("other", "bias")
    addresses = {name: sizes[arguments[name]] for name in names if arguments.get(name) in sizes}
    for name, size in addresses.items():
        yield from ({name: value} for value in (-1, 2**64, None))
        if size >= 8:
            yield {name: 2**64 - 8}
        one_key = function == "strided" and not arguments["key_strides"]
        one_key |= function == "fused" and arguments["rows"] == 1
        if not (name == "keys" and one_key) and name != "bias":
            yield {name: 0}
        if not (name in ("x", "y") and arguments.get("dtype") == MASK):
            yield {name: arguments[name] + 1}
    for name, size in addresses.items():  # the written memory begins within what is read
        if name == "x" and size > item:
            yield {"y": arguments[name] + size - item}
        elif name not in ("x", "y"):
            yield from ({"y": arguments[name] + offset} for offset in (0, max(size - 8, 0)))
    if "T" in arguments:
        yield from ({"T": value} for value in (-1, 2**32 + 1, 2**64 - 1, 2**64, 0.5))
        yield from ({"dtype": value} for value in (-1, 7, -(2**31), 2**31 - 1, 2**31))
    if function == "fold_many":
        yield from ({name: step} for name in ("key_step", "data_step") for step in (-1, 2, LAST))
    if function == "numbers":
        yield {"rows": 2**40, "count": 2**40}
    if function == "fused":
        yield from ({"function": value} for value in (-1, len(native.functions), 2**31))
        yield from ({"dtype": value} for value in (4, 5, 6))
        yield {"rows": 2**40, "n": 2**40}
        yield {"y": arguments["x"]}
        if not arguments["keys"]:
            yield {"rows": 2}
        if arguments["bias"]:
            yield from ({"columns": value} for value in (0, -1, arguments["n"] + 1, 2**63))
    if function == "strata":
        yield {"rows": 2**40, "count": 2**40}
        yield from ({"strata": value} for value in (0, -1, 65522, 2**63, 1.5))
        yield {"source_rows": 0}
        yield {"sources": arguments["draws"]}  # which lie far outside of the rows
    if function in ("flat", "fold"):
        name = "key" if function == "flat" else "data"
        yield from ({name: value} for value in (2**63, -(2**63) - 1, "7"))
    if function == "strided":
        yield from bad_strided(arguments)


def bad_strided(arguments: dict[str, Any]) -> Iterator[dict[str, Any]]:
    shape = arguments["shape"]
    for name in ("shape", "x_strides", "y_strides", "mask_strides", "key_shape", "key_strides"):
        yield {name: (*arguments[name], 1)}
        if arguments[name]:
            yield {name: arguments[name][:-1]}
    for keys in ((*shape, 2), changed(shape, 0, shape[0] + 1) if shape else (1,)):
        yield {"key_shape": keys, "key_strides": (0,) * len(keys)}
    yield {"shape": (1,) * 65, "x_strides": (0,) * 65, "y_strides": (1,) * 65, "mask_strides": (0,) * 65}
    yield from ({"base": base} for base in (-1, LAST, 2**63))
    for dim, size in enumerate(shape):
        yield from ({"shape": changed(shape, dim, value)} for value in (-1, -(2**63), MOST + 1, LAST, 2**63))
        if size == 1:
            continue
        for name in ("x_strides", "y_strides", "mask_strides", "key_strides"):
            if dim < len(arguments[name]):
                yield from (
                    {name: changed(arguments[name], dim, value)} for value in (-1, 2**60, LAST, 2**63)
                )
        yield {"y_strides": changed(arguments["y_strides"], dim, 0)}
        if arguments["x"] == arguments["y"]:
            yield {"x_strides": changed(arguments["x_strides"], dim, arguments["x_strides"][dim] + 1)}
    for size in (2**30, 2**40):  # too many together
        names = ("x_strides", "y_strides", "mask_strides")
        yield {"shape": (size, size), **dict.fromkeys(names, (1, 1)), "key_shape": (), "key_strides": ()}


def has_work(call: Call) -> bool:
    get = call.arguments.get
    return 0 not in (get("n"), get("rows"), get("count"), *get("shape", ()))


def main() -> None:
    compared = refused = 0
    make: tuple[Callable[[], Call], ...] = (
        flat,
        strided,
        strided,
        strided,
        numbers,
        strata,
        choose,
        fused,
        fold,
        fold_many,
    )
    for number in range(CALLS):
        native.set_isa(rng.choice(native.supported_isas()))
        call = rng.choice(make)()
        if has_work(call):
            for change in rng.choices(list(bad(call)), k=3):
                try:
                    call.run(**change)
                except (ValueError, TypeError):
                    refused += 1
                else:
                    raise SystemExit(f"accepted: {change} in {call}")
        after = expected(call) if number % COMPARED == 0 else None
        call.run()
        if after is not None:
            compared += 1
            written = call.memory[1 if "x" in call.arguments else 0].items
            if after.tobytes() != written[: len(after)].tobytes():
                raise SystemExit(f"differs from the specification under {native.isa()}: {call}")
        key, counter = rng.randrange(2**64), rng.randrange(2**64)
        words = spec.philox4x32((counter % 2**32, counter >> 32, 0, 0), (key % 2**32, key >> 32), 10)
        if native.philox(key, counter) != int(words[0]) | int(words[1]) << 32:
            raise SystemExit(f"differs from the specification: philox({key}, {counter})")
    try:
        native.set_isa("abacus")
    except ValueError:
        refused += 1
    else:
        raise SystemExit("accepted: set_isa('abacus')")
    sys.stdout.write(f"binding: {CALLS} calls, {compared} of them compared; {refused} bad calls refused\n")


main()
