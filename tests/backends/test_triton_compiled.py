"""The Triton kernels compiled for GPUs that are not there: spills, widths and instructions an element."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from math import log2
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch

from process import output

pytest.importorskip("triton", reason="Triton is not installed")

from benchmarks.machine_code import TARGETS, Instruction, executed, expected_trips
from benchmarks.specialisations import cases
from thinned.backends import triton_kernels

NVIDIA = [target for target in TARGETS if target.startswith("sm_")]
EVERYWHERE = [
    "flat, bfloat16, p = 0.5",
    "flat, bfloat16, p = 0.1",
    "channels, channels_last, bfloat16, p = 0.5",
    "elements, channels_last, bfloat16, p = 0.5",
]
HEADLINE = [
    *EVERYWHERE,
    "flat, float32, p = 0.1",
    "flat, complex128, p = 0.5",
    "key for each row, bfloat16, p = 0.1",
    "odd shard, float32, p = 0.1",
    "shift and fill, bfloat16, p = 0.1",
    "keep_mask, bool, p = 0.5",
    "uniform, int32",
    "fold, keys and ids, int64",
]
# A copy of bfloat16 at the bandwidth of an H100 leaves time for 19.
AT_MOST = {"flat, bfloat16, p = 0.5": 8, "flat, bfloat16, p = 0.1": 12}
# Bytes that only Triton 3.6 spills.
SPILLED = {("odd shard, float32, p = 0.1", "sm_90"): 24} if version("triton").startswith("3.6.") else {}


Facts: TypeAlias = dict[str, dict[str, Any]]  # of the kernel of each case


def compiled(names: dict[str, list[str]], cache: Path) -> dict[str, Facts]:
    """Facts by target, compiled in a process where kernels are not interpreted."""
    code = f"""
        import json
        from benchmarks.specialisations import measured

        def facts(kernel):
            loads, stores = (sorted(kernel.bytes_moved(name)) for name in ("LDG", "STG"))
            return dict(constants=kernel.constants, spilled=kernel.spilled, registers=kernel.registers,
                        loads=loads, stores=stores, instructions=kernel.instructions_an_element)

        print(json.dumps({{target: {{name: facts(measured(name, target)) for name in names}}
                          for target, names in {names!r}.items()}}))
    """
    return json.loads(output(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(cache)))  # type: ignore[no-any-return]


def broken(name: str, target: str, kernel: dict[str, Any]) -> list[str]:
    """What a kernel promises and does not keep."""
    found = []
    if kernel["spilled"] > SPILLED.get((name, target), 0):
        found.append(f"spills {kernel['spilled']} bytes")
    if not kernel["instructions"] > 0:
        found.append(f"no way through the kernel: {kernel['instructions']}")
    if target in NVIDIA:
        if kernel["instructions"] > AT_MOST.get(name, float("inf")):
            found.append(f"{kernel['instructions']:.3g} instructions an element")
        if "LOG_VECTOR" in kernel["constants"]:
            found += narrow(name, kernel)
    return found


def narrow(name: str, kernel: dict[str, Any]) -> list[str]:
    """Loads and stores that move fewer bytes than the launch says they may; a load of a key moves 8."""
    constants, dtype = kernel["constants"], getattr(torch, name.split(", p =")[0].rpartition(", ")[2])
    wide = 2 ** constants["LOG_VECTOR"] * dtype.itemsize // (2 if dtype.is_complex else 1)
    found = []
    if constants["OUT_UNIT"] and kernel["stores"] != [wide]:
        found.append(f"stores {kernel['stores']} bytes, not {wide}")
    loads = dtype.is_floating_point or dtype.is_complex
    if (
        loads
        and constants["X_UNIT"]
        and "address of 1" not in name
        and not {wide} <= {*kernel["loads"]} <= {wide, 8}
    ):
        found.append(f"loads {kernel['loads']} bytes, not {wide}")
    return found


def all_broken(kernels: Facts, target: str) -> dict[str, list[str]]:
    return {name: found for name, kernel in kernels.items() if (found := broken(name, target, kernel))}


@pytest.fixture(scope="module")
def headlines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Facts]:
    names = dict.fromkeys(TARGETS, EVERYWHERE) | {"sm_90": HEADLINE}
    return compiled(names, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("target", TARGETS)
def test_headline_kernels(headlines: dict[str, Facts], target: str) -> None:
    assert all_broken(headlines[target], target) == {}


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel(target: str, tmp_path: Path) -> None:
    kernels = compiled({target: [str(case) for case in cases()]}, tmp_path)
    assert all_broken(kernels[target], target) == {}


class Recorder:
    """A kernel that writes down the constants of its launches."""

    __name__ = "recorder"

    def __init__(self) -> None:
        self.seen: dict[str, set[Any]] = defaultdict(set)

    def __getitem__(self, grid: object) -> Callable[..., None]:
        return self.launch

    def launch(self, *_: object, **constants: Any) -> None:
        for name, value in constants.items():
            self.seen[name].add(value)


def test_cases_reach_every_value_of_each_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    tile = Recorder()
    monkeypatch.setattr(triton_kernels, "tile", tile)
    monkeypatch.setattr(triton_kernels, "fold", Recorder())
    for case in cases():
        case.call()
    either = {name for name, values in tile.seen.items() if values <= {False, True}} - {"enable_fp_fusion"}
    assert either >= {"ALL", "MORE", "PLAIN", "NUMBERS", "LEAD", "LONG", "OUT_UNIT"}
    assert {name for name in either if tile.seen[name] != {False, True}} == set()
    assert tile.seen["HEAD"] == {0, 1, 2, 8}
    assert tile.seen["DIMS"] == {0, 1, 2, 3, 4}
    assert tile.seen["LOG_VECTOR"] == {0, 1, 2, 3, 4}
    assert tile.seen["PARTS"] == {1, 2}


def test_names_are_unique() -> None:
    names = [str(case) for case in cases()]
    assert len(names) == len(set(names))
    assert set(HEADLINE) <= set(names)


def test_expected_trips() -> None:
    assert expected_trips(1, 8) == pytest.approx(2**-7)  # 2**-8 + 2**-9 + ...
    # The maximum of n geometric numbers: the last undecided element is decided after log2(n) + 1.33 planes.
    assert expected_trips(4096, 0) == pytest.approx(log2(4096) + 1.33, abs=0.01)
    assert expected_trips(4096, 8) == pytest.approx(expected_trips(4096, 0) - 8, abs=1e-4)
    assert expected_trips(2**50, 30) == pytest.approx(2)  # there are 32 planes


STEP, CALL, END = Instruction("IADD3"), Instruction("CALL.REL.NOINC"), Instruction("EXIT")


def to(target: int) -> Instruction:
    return Instruction("BRA", target)


def perhaps(target: int) -> Instruction:
    return Instruction("BRA", target, conditional=True)


@pytest.mark.parametrize(
    ("code", "executed_at_3"),
    [
        pytest.param([STEP, STEP, END], 3, id="no loop"),
        pytest.param([STEP, END, to(2)], 2, id="padding"),
        pytest.param([perhaps(3), STEP, STEP, END], 4, id="the longer way"),
        pytest.param([perhaps(3), CALL, STEP, END], 2, id="no call"),
        pytest.param([perhaps(3), STEP, END, STEP, to(1)], 3, id="code behind the exit"),
        pytest.param([Instruction("EXIT", conditional=True), STEP, END], 3, id="an exit that is not taken"),
        pytest.param([STEP, STEP, perhaps(1), END], 1 + 3 * 2 + 1, id="tested at its end"),
        pytest.param([STEP, perhaps(4), STEP, perhaps(2), END], 3 + 3 * 2, id="tested before it"),
        pytest.param([STEP, perhaps(4), STEP, to(1), END], 3 + 3 * 3, id="tested at its beginning"),
        pytest.param([to(3), STEP, perhaps(5), STEP, to(1), END], 2 + 3 * 4, id="entered in its middle"),
    ],
)
def test_executed(code: list[Instruction], executed_at_3: float) -> None:
    assert executed(code, 3) == executed_at_3


def test_the_shift_of_stratified_draws_compiles(tmp_path: Path) -> None:
    code = """
        import triton
        from triton.compiler import ASTSource
        from benchmarks.machine_code import TARGETS
        from thinned.backends.triton_kernels import shift

        types = dict.fromkeys(shift.arg_names, "i64") | dict.fromkeys(("out_ptr", "u_ptr", "v_ptr"), "*i32")
        source = ASTSource(shift, types | {"draw_ptr": "*i64", "SIZE": "constexpr"}, {"SIZE": 1024})
        for name, target in TARGETS.items():
            binary = triton.compile(source, target=target).asm
            print(name, len(binary["cubin" if "cubin" in binary else "hsaco"]) > 0)
    """
    lines = output(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path)).splitlines()
    assert lines == [f"{target} True" for target in TARGETS]
