"""Every specialisation of the Triton kernels, compiled for GPUs that are not there."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain, groupby, product
from typing import Annotated, NamedTuple

import torch
import triton
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.machine_code import TARGETS, Compiled, compiled
from thinned import spec
from thinned.backends import triton as backend
from thinned.geometry import Geometry, shared

__all__ = ["Case", "cases", "measured"]

LARGE = (2**24,)
IMAGES = (64, 256, 56, 56)
TEXT = (32, 512, 768)
B = torch.bfloat16
DTYPES = (B, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128)


class Case(NamedTuple):
    """A call in words, its output's dtype, and how to make it."""

    name: str
    dtype: str
    p: float | None
    call: Callable[[], object]

    def __str__(self) -> str:
        return f"{self.name}, {self.dtype}" + ("" if self.p is None else f", p = {self.p}")


def cases() -> Iterator[Case]:
    """Every call, in the order in which they are shown."""
    for dtype, p in product(DTYPES, (0.5, 0.25, 0.1, 0.0, 1.0)):
        yield _affine("flat", LARGE, p, dtype)
    for dtype in (B, torch.float32):
        halves, tenths = _layouts(0.5, dtype), _layouts(0.1, dtype)
        yield from chain.from_iterable(zip(halves, tenths, strict=True))
    for shape in ((), (1000,), (100_000,), (300, 50)):
        yield _affine(f"small, {shape}", shape, 0.1)
    for dtype, p in product((B, torch.float32, torch.complex64), (0.5, 0.1)):
        yield _affine("shift and fill", LARGE, p, dtype, shift=0.5, fill=-1.0)
    yield from _numbers()


def _layouts(p: float, dtype: torch.dtype) -> Iterator[Case]:
    affine = partial(_affine, p=p, dtype=dtype)
    yield affine("key for each row", (64, 256, 4096), keys=1)
    yield affine("key for each short row", (65536, 64), keys=1)
    yield affine("key for each odd row", (4096, 1001), keys=1)
    yield affine("keys for two dimensions", (32, 64, 4096), keys=2)
    yield affine("channels", IMAGES, broadcast=(2, 3))
    yield affine("channels, channels_last", IMAGES, broadcast=(2, 3), layout=_channels_last)
    yield affine("channels, keys", IMAGES, broadcast=(2, 3), keys=1)
    yield affine("channels, keys, channels_last", IMAGES, broadcast=(2, 3), keys=1, layout=_channels_last)
    yield affine("elements, channels_last", IMAGES, layout=_channels_last)
    yield affine("elements, channels_last, keys", IMAGES, layout=_channels_last, keys=1)
    yield affine("elements, transposed", (4096, 4096), layout=Tensor.t)
    yield affine("elements, permuted", IMAGES, layout=lambda x: x.permute(3, 1, 0, 2))
    yield affine("paths", (256, 197, 768), broadcast=(1, 2))
    yield affine("paths, keys", (256, 197, 768), broadcast=(1, 2), keys=1)
    yield affine("tokens", TEXT, broadcast=(2,))
    yield affine("tokens, keys", TEXT, broadcast=(2,), keys=1)
    yield affine("locked", TEXT, broadcast=(1,))
    yield affine("locked, keys", TEXT, broadcast=(1,), keys=1)
    yield affine("locked, time first", (512, 32, 768), broadcast=(0,))
    yield affine("embedding rows", (50_000, 300), broadcast=(1,))
    yield affine("base of 8", LARGE, geometry=Geometry((1,), 8))
    yield affine("base of 3", LARGE, geometry=Geometry((1,), 2**40 + 3))
    yield affine("address of 1 element", LARGE, layout=lambda x: x.new_empty(x.numel() + 1)[1:])
    yield affine("shard", (4096, 512), geometry=Geometry((4096, 1), 512))
    yield affine("odd shard", (4096, 500), geometry=Geometry((4001, 1), 500))
    yield affine(
        "odd shard in 4 dimensions", (16, 99, 77, 133), geometry=Geometry((10**7, 10**5, 1001, 1), 7)
    )
    yield affine("every second", LARGE, layout=lambda x: x.new_empty(2 * x.numel())[::2])
    yield affine("expanded", (4096, 4096), layout=lambda x: x[:1].expand(4096, -1))
    yield affine("any strides", (1000, 1000), geometry=Geometry((3, 7)))
    yield affine(
        "any strides, 2**32 rows", (1, 1), layout=_many_rows, geometry=Geometry((3, 7)), inplace=True
    )
    yield affine("any strides in 4 dimensions", (64, 64, 64, 64), geometry=Geometry((3, 70, 300, 7)))
    yield affine("shared in part", (64, 64, 64, 64), geometry=Geometry((3, 0, 300, 0)))


def _numbers() -> Iterator[Case]:
    key, keys = torch.tensor(7), torch.arange(64)
    shapes = {
        "": (key, LARGE, shared(LARGE)),
        ", channels": (key, IMAGES, shared(IMAGES, (2, 3))),
        ", key for each row": (keys, IMAGES, shared(IMAGES, (), 1)),
    }
    for (name, asked), p in product(shapes.items(), (0.5, 0.1)):
        yield Case(f"keep_mask{name}", "bool", p, partial(backend.keep_mask, *asked, spec.threshold(p)))
    for name, asked in shapes.items():
        yield Case(f"uniform{name}", "int32", None, partial(backend.uniform, *asked))
    operands: dict[str, tuple[Tensor, int | Tensor]]
    operands = {"a key and an int": (key, 5), "a key and ids": (key, keys), "keys and an id": (keys, key)}
    for name, operand in (operands | {"keys and ids": (keys, keys)}).items():
        yield Case(f"fold, {name}", "int64", None, partial(backend.fold, *operand))


def _channels_last(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.channels_last)


def _many_rows(x: Tensor) -> Tensor:
    return x.expand(2**16, 2**16)


def _affine(
    name: str,
    shape: tuple[int, ...],
    p: float,
    dtype: torch.dtype = torch.bfloat16,
    *,
    broadcast: tuple[int, ...] = (),
    keys: int = 0,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    geometry: Geometry | None = None,
    shift: float = 0.0,
    fill: float = 0.0,
    inplace: bool = False,
) -> Case:
    def call() -> None:
        x = layout(torch.empty(shape, dtype=dtype))
        key = torch.zeros(x.shape[:keys], dtype=torch.int64)
        mask = geometry or shared(x.shape, broadcast, keys)
        T = spec.threshold(p)
        backend.masked_affine(x, key, mask, T, 2**32 / max(T, 1), shift, fill, x if inplace else None)

    return Case(name, str(dtype).removeprefix("torch."), p, call)


@cache
def measured(case: str, target: str) -> Compiled:
    """The first kernel that a case launches; a case of more than 5 dimensions launches it again and again."""
    return compiled(next(each.call for each in cases() if str(each) == case), target)[0]


def main(
    only: Annotated[str, typer.Option(help="compile only cases whose text matches this expression")] = "",
    target: Annotated[list[str] | None, typer.Option(help="such as sm_90; by default all")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="print it as docs/gpu.md has it")] = False,
) -> None:
    """Print instructions an element and registers of each specialisation, and what spills."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    targets = target or list(TARGETS)
    chosen = [case for case in cases() if re.search(only, str(case))]
    work = track(list(product(chosen, targets)), "compiling", console=Console(stderr=True))
    found = {(str(case), target): measured(str(case), target) for case, target in work}
    header = ["call", "dtype", "p", *targets]
    lines = []
    for _, same in groupby(chosen, lambda case: case[:2]):
        group = list(same)
        p = ", ".join(f"{case.p:g}" for case in group if case.p is not None)
        cells = (_cell([found[str(case), target] for case in group]) for target in targets)
        lines.append([group[0].name, group[0].dtype, p, *cells])
    caption = f"Triton {triton.__version__}: instructions an element in the order of p (most registers)"
    if markdown:
        rows = (header, ["---"] * len(header), *lines)
        typer.echo("\n".join((f"{caption}\n", *(f"| {' | '.join(row)} |" for row in rows))))
        return
    table = Table(*header, caption=caption)
    for line in lines:
        table.add_row(*line)
    console.print(table)


def _cell(kernels: list[Compiled]) -> str:
    spilled = max(kernel.spilled for kernel in kernels)
    counts = ", ".join(f"{kernel.instructions_an_element:.3g}" for kernel in kernels)
    return f"{counts} ({max(kernel.registers for kernel in kernels)})" + f", spills {spilled} bytes" * (
        spilled > 0
    )


if __name__ == "__main__":
    typer.run(main)
