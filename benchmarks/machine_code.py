"""Compile what a call would launch for a GPU that is not there, and read the machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from thinned.backends import triton_kernels

__all__ = ["TARGETS", "Compiled", "Instruction", "compiled", "executed", "expected_trips"]

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Instruction(NamedTuple):
    """An instruction, and for a branch the position that it may go on at."""

    text: str
    target: int | None = None
    conditional: bool = False


@dataclass(frozen=True)
class Compiled:
    """The machine code of one launch; ``constants`` are the arguments that the kernel is specialised on."""

    constants: dict[str, Any]
    warp: int
    warps: int
    registers: int
    spilled: int
    shared: int
    code: list[Instruction]

    @property
    def elements(self) -> int:
        """Elements of a tile."""
        size: int = self.constants.get("SIZE") or self.constants["ROWS"] * self.constants["COLS"]
        return size

    @property
    def instructions_an_element(self) -> float:
        """Instructions that the threads of a full tile execute, an element of the tile.

        Planes that a loop reads are counted as often as the law expects (:func:`expected_trips`).
        """
        return executed(self.code, self._trips()) * self.warp * self.warps / self.elements

    def _trips(self) -> float:
        c = self.constants
        if c.get("MORE"):
            return expected_trips(c["ROWS"] * (c["BLOCKS"] * 128 or 1), c["HEAD"])
        return 32 / _planes_a_trip(self.code) if c.get("NUMBERS") else 0

    def bytes_moved(self, instruction: str) -> set[int]:
        """How many bytes each of NVIDIA's ``LDG`` or ``STG`` moves."""
        opcodes = {step.text.split()[0] for step in self.code if step.text.startswith(instruction)}
        widths = (re.search(r"\.[US]?(8|16|64|128)$", opcode) for opcode in opcodes)
        return {int(width[1]) // 8 if width else 4 for width in widths}


def expected_trips(elements: int, planes: int) -> float:
    """How often a tile is expected to read another plane, when it has read some for all of its elements.

    Each plane leaves an element undecided with probability 1/2. After ``l`` planes some of ``elements`` are
    undecided with probability ``1 - (1 - 2**-l)**elements``, and then plane ``l`` is read::

        sum over l from planes to 31 of 1 - (1 - 2**-l)**elements
    """
    return sum(1 - (1 - 2.0**-plane) ** elements for plane in range(planes, 32))


def _planes_a_trip(code: Sequence[Instruction]) -> int:
    """How many planes one trip of a loop over all planes reads: compilers unroll it.

    Philox multiplies a block's number by one of its constants before the loop, and 6 times in each plane.
    AMD's compiler does not write the constant where it multiplies, and does not unroll.
    """
    loop = _loop(code)
    products = [
        i in loop for i, step in enumerate(code) if re.search(r"MUL|IMAD", step.text) and _M0 in step.text
    ]
    return sum(products) // (6 * products.count(False)) if products else 1


_M0 = f"{0xD2511F53 - 2**32:#x}"


def _ends(code: Sequence[Instruction]) -> set[int]:
    """The branches backward to what leads to them again; others return from code behind the exit."""
    backward = [i for i, step in enumerate(code) if step.target is not None and step.target < i]
    return {i for i in backward if i in _reached(code, code[i].target or 0)}


def _reached(code: Sequence[Instruction], start: int) -> set[int]:
    found, ahead = set(), [start]
    while ahead:
        i = ahead.pop()
        if i in found:
            continue
        found.add(i)
        text, target, conditional = code[i]
        if target is not None:
            ahead.append(target)
        if conditional or (target is None and not text.startswith(("EXIT", "s_endpgm", "RET"))):
            ahead.append(i + 1)
    return found


def _loop(code: Sequence[Instruction]) -> range:
    """The instructions of the only loop, which begins where the farthest of its ends leads."""
    ends = _ends(code)
    return range(min(code[end].target or 0 for end in ends), max(ends) + 1)


def executed(code: Sequence[Instruction], trips: float) -> float:
    """How many instructions a thread of a full tile executes.

    A branch backward is the loop that reads planes: it counts ``trips`` times the longest way through it. The
    rest is the longest way from the first instruction to the exit, without a ``CALL`` and without code behind
    the exit: 64-bit divisions take these only where an operand is 2**32 or more.
    """
    exits = {
        i
        for i, step in enumerate(code)
        if step.text.startswith(("EXIT", "s_endpgm")) and not step.conditional
    }
    ends = _ends(code)
    if not ends:
        return _longest(code, 0, exits)
    loop = _loop(code)
    trip = _longest(code, loop.start, ends)
    beside = _longest(code, 0, exits, loop)
    if beside > 0:
        return beside + trips * trip
    through = _longest(code, 0, exits)
    if through > 0:  # one trip is on this way if the loop's end decides whether there is another
        return through + (trips - code[loop[-1]].conditional) * trip
    return _longest(code, 0, ends) + _longest(code, loop.start, exits) + (trips - 1) * trip


def _longest(code: Sequence[Instruction], start: int, goals: set[int], without: range = range(0)) -> float:
    """Instructions on the longest way forward from ``start`` to a goal; minus infinity if there is none."""
    ways = [-inf] * (len(code) + 1)
    for i in reversed(range(start, len(code))):
        text, target, conditional = code[i]
        if i in goals:
            ways[i] = 1
        elif i not in without and not text.startswith(("CALL", "RET")):
            onward = -inf if target is None or target <= i else ways[target]
            ways[i] = 1 + (onward if target is not None and not conditional else max(onward, ways[i + 1]))
    return ways[start]


class _Absent:
    """A driver without a GPU: Triton asks it what to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # Triton keeps what it has compiled by device

    def get_current_stream(self, _: str) -> int:
        return 0


def compiled(call: Callable[[], object], target: str) -> list[Compiled]:
    """The kernels that ``call`` would launch on a GPU, in that order; they are compiled instead.

    ``call`` takes CPU tensors, of which only shapes, strides and alignment matter.
    """
    found: list[Compiled] = []
    with ExitStack() as stack:
        stack.enter_context(patch.object(driver, "_active", _Absent(TARGETS[target])))
        for kernel in (triton_kernels.tile, triton_kernels.fold):
            stack.enter_context(_compiling(kernel, TARGETS[target], found))
        call()
    return found


@contextmanager
def _compiling(kernel: Any, target: GPUTarget, found: list[Compiled]) -> Iterator[None]:
    run = kernel.run

    def only_compile(*args: Any, **constants: Any) -> None:
        made = run(*args, **constants | {"warmup": True})
        read = _read_amd if target.backend == "hip" else _read_nvidia
        found.append(Compiled(constants, target.warp_size, made.metadata.num_warps, *read(made.asm)))

    with patch.object(kernel, "run", only_compile):
        yield


def _read_nvidia(asm: dict[str, Any]) -> tuple[int, int, int, list[Instruction]]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(?:@(!?U?P\w+) +)?([^;]*?) *;", text)
    at = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    code = []
    for _, predicate, instruction in lines:
        branch = re.match(r"U?BRA\S* (?:(!?U?P\w+), )?.*?(0x[0-9a-f]+)", instruction)
        target = at[int(branch[2], 16)] if branch else None
        code.append(Instruction(instruction, target, bool(predicate or (branch and branch[1]))))
    return usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"], code


def _read_amd(asm: dict[str, Any]) -> tuple[int, int, int, list[Instruction]]:
    text = asm["amdgcn"]
    usage = {name: int(number) for name, number in re.findall(r"\.(\w+): +(\d+)\n", text)}
    at: dict[str, int] = {}
    lines: list[str] = []
    for label, instruction in re.findall(r"^(\.LBB\w+):|^\t([a-z]\w+ ?[^;\n]*)", text, re.MULTILINE):
        if label:
            at[label] = len(lines)
        else:
            lines.append(instruction)
    code = []
    for instruction in lines:
        branch = re.match(r"s_(c?)branch\w* (\.LBB\w+)", instruction)
        code.append(
            Instruction(instruction, at[branch[2]], bool(branch[1])) if branch else Instruction(instruction)
        )
    return usage["vgpr_count"], usage["private_segment_fixed_size"], usage["group_segment_fixed_size"], code
