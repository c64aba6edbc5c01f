"""What compilers and Triton's launcher get for tensors on a GPU, on machines without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import thinned
import thinned.functional as F
from process import output
from thinned import Key

pytest.importorskip("triton")


def floats(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, requires_grad=torch.is_grad_enabled())


def keys(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def on_a_gpu(code: str) -> str:
    """What a process prints whose Triton compiles for a GPU, and which has this module's names."""
    imports = "import json, fake_gpu\nfake_gpu.install()\n"
    imports += f"from {__name__} import *\nfrom {__name__} import _eager, _graphs\n"
    return output(imports + code, TRITON_INTERPRET="0")


class Case(NamedTuple):
    function: Callable[..., Any]
    inputs: Callable[[], tuple[Tensor, ...]]
    forward: int = 1  # launches
    backward: int = 1


def _keyed(x: Tensor, bits: Tensor) -> Tensor:
    return F.dropout(x, 0.3, key=Key.from_bits(bits))


def _folded(x: Tensor, bits: Tensor, ids: Tensor) -> Tensor:
    return F.dropout(x, 0.3, key=Key.from_bits(bits).fold(3).fold("name").fold(ids))


# With what a build of torch for the CPU can do with fake tensors of another device.
FAKED = {
    "drawn": Case(lambda x: F.dropout(x, 0.3), lambda: (floats(8, 64),)),
    "bfloat16": Case(lambda x: F.dropout(x * 2, 0.5) + 1, lambda: (floats(8, 64, dtype=torch.bfloat16),)),
    "float64": Case(lambda x: F.dropout(x, 0.5), lambda: (floats(8, 64, dtype=torch.float64),)),
    "permuted": Case(lambda x: F.dropout(x.permute(2, 0, 1), 0.3), lambda: (floats(8, 3, 64),)),
    "expanded": Case(lambda x: F.dropout(x.expand(8, 64), 0.3), lambda: (floats(1, 64),)),
    "channels": Case(lambda x: F.dropout2d(x, 0.3), lambda: (floats(8, 3, 4, 5),)),
    "five dimensions": Case(lambda x: F.dropout3d(x, 0.3), lambda: (floats(8, 3, 4, 5, 6),)),
    "empty": Case(lambda x: F.dropout(x, 0.3), lambda: (floats(0, 64),), 0, 0),
    "one key": Case(_keyed, lambda: (floats(8, 64), keys())),
    "a key for each row": Case(_keyed, lambda: (floats(8, 64), keys(8))),
    "folded keys": Case(_folded, lambda: (floats(8, 64), keys(), keys(8))),
    "Gaussian": Case(lambda x: F.gaussian_dropout(x, 0.3), lambda: (floats(8, 64),)),
    "mask": Case(lambda bits: thinned.keep_mask(Key.from_bits(bits), (8, 64), 0.5), lambda: (keys(),)),
}
FUNCTIONS = FAKED | {
    "in place": Case(lambda x: F.dropout(x * 2, 0.3, inplace=True), lambda: (floats(8, 64),)),
    "DropBlock": Case(lambda x: F.drop_block2d(x, 0.1, 3), lambda: (floats(2, 3, 8, 8),)),
    "checkpoint": Case(
        lambda x, bits: checkpoint(lambda x: _keyed(x.sin(), bits).sin(), x, use_reentrant=False),
        lambda: (floats(8, 64), keys()),
        backward=2,
    ),
}
MODELS = {
    "layers": Case(
        lambda: nn.Sequential(nn.Linear(64, 64), thinned.Dropout(0.5), nn.ReLU(), thinned.Dropout(0.1)),
        lambda: (floats(8, 64),),
        2,
        2,
    ),
    "channels": Case(
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), thinned.Dropout2d(0.5), nn.ReLU(), thinned.DropPath(0.1)),
        lambda: (floats(8, 3, 9, 9),),
        2,
        2,
    ),
    "transformer": Case(
        lambda: thinned.convert(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)),
        lambda: (floats(2, 16, 64),),
        3,
        3,
    ),
}
OPAQUE = {
    "alpha": Case(lambda x: F.alpha_dropout(x, 0.3, training=True), lambda: (floats(8, 64),), 1, 0),
    "p = 1": Case(lambda x: F.dropout(x, 1.0), lambda: (floats(8, 64),)),
    "complex": Case(
        lambda x: F.dropout(x, 0.3).abs(), lambda: (floats(8, 64, dtype=torch.complex64),)
    ),
    "five dimensions in five steps": Case(
        lambda x: F.dropout(x, 0.3), lambda: (floats(2, 3, 2, 3, 2).permute(3, 1, 0, 2, 4).detach(),)
    ),
    "six dimensions": Case(
        lambda x: F.dropout(x, 0.3), lambda: (floats(2, 3, 2, 3, 2, 3).permute(5, 3, 1, 0, 2, 4).detach(),)
    ),
}  # fmt: skip
CASES = {
    **{f"{name} on meta": case for name, case in FUNCTIONS.items()},
    **{f"{name} on cuda": case for name, case in FAKED.items()},
    **{f"model of {name} on meta": case for name, case in MODELS.items()},
    **{f"opaque: {name} on meta": case for name, case in OPAQUE.items()},
}


def _graphs(name: str) -> list[tuple[list[str], list[str]]] | str:
    """The calls in the forward and the backward graph of a case, and where its tensors are; or the error."""
    import fake_gpu

    function, inputs, *_ = CASES[name]
    device = name.rpartition(" ")[2]
    # A build for the CPU differentiates no fake tensor of another device.
    with fake_gpu.tensors_on(device), torch.device(device), torch.set_grad_enabled(device == "meta"):
        if name.startswith("model"):
            function = function()
        try:
            with redirect_stdout(sys.stderr):
                found = fake_gpu.graphs(function, *inputs())
            if name.removesuffix(" on meta") in FAKED:
                for graph in found:
                    fake_gpu.compile_as_inductor(graph)
        except Exception as error:
            return repr(error)
    return [(fake_gpu.calls(graph), fake_gpu.places(graph)) for graph in found]


def _eager(name: str) -> str:
    """The device of the result of a call of fake tensors, or the error."""
    import fake_gpu

    case = FAKED[name]
    with fake_gpu.tensors_on("cuda"), torch.device("cuda"), torch.no_grad():
        try:
            return str(case.function(*case.inputs()).device.type)
        except Exception as error:
            return repr(error)


class Found(NamedTuple):
    traced: dict[str, Any]
    eager: dict[str, str]


@pytest.fixture(scope="module")
def found() -> Found:
    """Graphs and eager results of all cases, from one process: its imports take 4 s."""
    printed = on_a_gpu("""
print(json.dumps([{name: _graphs(name) for name in CASES}, {name: _eager(name) for name in FAKED}]))
""")
    return Found(*json.loads(printed))


@pytest.mark.parametrize("name", CASES)
def test_compilers_see_one_launch_for_each_mask(found: Found, name: str) -> None:
    """It writes to its result alone, compiles with Inductor's types, and no number leaves the device."""
    traced = found.traced
    assert isinstance(traced[name], list), traced[name]
    wanted = CASES[name][2:] if len(traced[name]) == 2 else CASES[name][2:3]
    kernel = "thinned.masked_affine.default" if name.startswith("opaque") else "triton:tile"
    assert tuple(calls.count(kernel) for calls, _ in traced[name]) == wanted
    for calls, places in traced[name]:
        assert places == [name.rpartition(" ")[2]]
        ours = {call for call in calls if call.startswith(("thinned.", "triton:"))}
        assert ours <= {kernel, "triton:tile", "triton:fold", "thinned.draw_key.default"}


@pytest.mark.parametrize("name", FAKED)
def test_eager_calls_of_fake_tensors_read_no_number(found: Found, name: str) -> None:
    """A FakeTensor refuses to be read."""
    assert found.eager[name] == "cuda"


def test_a_backend_that_reads_its_key_is_found() -> None:
    """The tests above would be red for it."""
    found = on_a_gpu("""
from thinned.backends import triton
launch = triton.masked_affine
for read in (lambda key: int(key.item()), lambda key: key + key.cpu()):
    triton.masked_affine = lambda x, key, *rest: launch(x, read(key), *rest)
    print(json.dumps(_graphs("one key on cuda")))
""")
    error, graphs = map(json.loads, found.splitlines())
    assert "GuardOnDataDependentSymNode" in error
    assert [places for _, places in graphs] == [["cpu", "cuda"]]


def test_opaque_with_symbols_and_in_exported_programs() -> None:
    found = on_a_gpu("""
import torch, fake_gpu
layer = thinned.Dropout(0.3)
for device in ("meta", "cuda"):
    with fake_gpu.tensors_on(device), torch.no_grad():
        x = torch.empty(8, 64, device=device)
        (graph,) = fake_gpu.graphs(layer, x, dynamic=True)
        program = torch.export.export(layer, (x,), strict=False)
        for each in (graph, program.graph_module, program.run_decompositions().graph_module):
            print(*(call for call in fake_gpu.calls(each) if call.startswith(("thinned.masked", "triton:"))))
""")
    assert found.split() == ["thinned.masked_affine.default"] * 6


def test_compiled_code_is_cached_by_the_kernels_source() -> None:
    """Else torch's cache would keep the kernels of an earlier thinned."""
    found = on_a_gpu("""
import torch
from torch._inductor.codegen import wrapper
from torch._library.triton import get_triton_kernels_for_op

source = wrapper.user_defined_triton_kernel_transitive_closure_source_code
torch.accelerator.current_accelerator = lambda: torch.device("cuda")
for name in ("masked_affine", "keep_mask", "uniform", "fold"):
    print(all("def _philox" in source(kernel) for kernel in get_triton_kernels_for_op(f"thinned::{name}")))
    print(len(list(get_triton_kernels_for_op(f"thinned::{name}"))))
""")
    assert found.split() == ["True", "2"] * 4


def test_a_launch_is_the_plans_and_compiled_once() -> None:
    """One compiled kernel serves all keys, positions, thresholds and scales."""
    found = on_a_gpu("""
import torch, fake_gpu
from thinned.backends import triton
from thinned.geometry import Geometry

x = torch.empty(8, 300, dtype=torch.bfloat16, device="meta")
def launch(key, base, T, scale):
    fake_gpu.launches.clear()
    triton.masked_affine(x, key, Geometry((1024, 1), base), T, scale, 0.0, 0.0)
    (found,) = fake_gpu.launches
    print(json.dumps([*found[:3], *found[12:18], len(fake_gpu.loaded)]))

launch(7, 0, 3 * 2**22, 2.0)
launch(-2, 2**40, 2**32 - 5, 1.0)
launch(2**62 + 1, 2**62, 2**31 + 1, 1.0)
launch(x.new_empty(8, dtype=torch.int64), 0, 3 * 2**22, 2.0)
launch(x.new_empty(8, dtype=torch.int64), 2**40, 2**32 - 5, 1.0)
""")
    one, two = 0x3F800000, 0x40000000  # the bits of scales
    # Programs, the key's halves, the base, the threshold and two more numbers, and compiled kernels.
    assert [json.loads(line) for line in found.splitlines()] == [
        [4, 1, 1, 7, 0, 0, 3 * 2**22, two, 0, 1],
        [4, 1, 1, 2**32 - 2, 2**32 - 1, 2**40, -5, one, 0, 1],
        [4, 1, 1, 1, 2**30, 2**62, 1 - 2**31, one, 0, 1],
        [4, 1, 1, 0, 0, 0, 3 * 2**22, two, 0, 2],
        [4, 1, 1, 0, 0, 2**40, -5, one, 0, 2],
    ]


def test_a_compiled_kernel_is_found_again_by_all_that_it_was_compiled_for() -> None:
    """Triton specializes on the dtype and alignment of pointers and on which are None, but on no number."""
    found = on_a_gpu("""
import torch, fake_gpu
from thinned.backends import triton
from thinned.geometry import shared

whole = torch.empty(4096, device="meta")
rows = torch.empty(16, dtype=torch.int64, device="meta")
one = torch.empty((), dtype=torch.int64)
wanted = 0
for launch, is_new in (
    (lambda: triton.masked_affine(whole[:1024], 7, None, 2**31, 2.0, 0.0, 0.0), True),
    (lambda: triton.masked_affine(whole[1024:2048], 8, None, 2**31, 2.0, 0.0, 0.0), False),
    (lambda: triton.masked_affine(whole[1:1025], 7, None, 2**31, 2.0, 0.0, 0.0), True),
    (lambda: triton.masked_affine(whole[:1024], 7, None, 2**31, 2.0, 0.0, 0.0, whole[2049:3073]), True),
    (lambda: triton.masked_affine(whole[:1024].half(), 7, None, 2**31, 2.0, 0.0, 0.0), True),
    (lambda: triton.masked_affine(whole[:1024], 7, None, 2**31, 2.0, 1.0, 0.0), True),
    (lambda: triton.masked_affine(whole[:1024], 7, None, 3 * 2**29, 2.0, 0.0, 0.0), True),
    (lambda: triton.keep_mask(rows, (16, 128), shared((16, 128)), 2**31), True),
    (lambda: triton.uniform(rows, (16, 128), shared((16, 128))), True),
    (lambda: triton.fold(rows, one), True),
    (lambda: triton.fold(one, rows), True),
    (lambda: triton.fold(rows, one + 1), False),
    (lambda: triton.fold(rows, rows), True),
):
    fake_gpu.launches.clear()
    launch()
    wanted += is_new
    print(len(fake_gpu.launches), len(fake_gpu.loaded) - wanted)
for compiled, _ in triton._started.values():
    source = compiled.src
    numbers = [name for name in source.fn.arg_names if name.islower() and not name.endswith("_ptr")]
    assert {source.signature[name] for name in numbers} == {"i64"}, source.signature
    specialized = {source.fn.arg_names[at] for (at, *_), known in source.attrs.items() if known}
    assert not specialized & {*numbers}, specialized
""")
    assert found.split() == ["1", "0"] * 13


def test_a_launch_by_memory_is_the_launch_by_its_arguments() -> None:
    """A call whose like was launched before looks nothing up; calls that differ are not taken for alike."""
    found = on_a_gpu("""
from thinned.backends import triton
from thinned.geometry import Geometry

x = torch.empty(16, 256, dtype=torch.bfloat16, device="meta")
half, keys = x[:, :128], torch.empty(32, dtype=torch.int64, device="meta")
one = dict(x=x, key=7, geometry=None, T=2**31, scale=2.0, shift=0.0, fill=0.0)
calls = [one | change for change in (
    {}, dict(x=x.float()), dict(x=x[:8]), dict(x=x.t()), dict(x=x[::2]), dict(x=x.view(8, 2, 256)),
    dict(key=8), dict(key=keys[:16]), dict(key=keys[::2]), dict(key=keys.view(16, 2)[:, 0]),
    dict(geometry=Geometry((1024, 1))), dict(geometry=Geometry((1024, 1), 128)), dict(T=2**30), dict(T=2**32),
    dict(scale=3.0), dict(shift=1.0), dict(fill=1.0), dict(fill=-0.0), dict(scale=-2.0, fill=-0.0),
    dict(x=half), dict(x=half, out=x[:, 128:]), dict(x=half, out=half), dict(x=x[:8], out=x[8:]),
    dict(x=x.to(torch.complex64)), dict(x=x.to(torch.complex64).conj()),
)]

def launched(call):
    fake_gpu.launches.clear()
    triton.masked_affine(**call)
    (found,) = fake_gpu.launches
    return [*found[:3], *found[12:]]  # without the pointers, which are all 0

def launched_first(call):
    triton._repeats.clear()
    return launched(call)

expected = [launched_first(call) for call in calls]
print(json.dumps([[launched(call) for call in calls] == expected for _ in range(3)]))
print(json.dumps(len(triton._repeats)))
""")
    equal, kinds = map(json.loads, found.splitlines())
    assert equal == [True] * 3
    # Two differ in the key's number, two pairs in their memory, and a conjugate one is resolved.
    assert kinds == 25 - 4


def test_triton_calls_its_hooks() -> None:
    """A profiler's hooks get each launch; without hooks nothing is passed."""
    found = on_a_gpu("""
import triton.knobs
from thinned.backends import triton as backend

x, hooks = torch.empty(4096, device="meta"), triton.knobs.runtime
def launch():
    backend.masked_affine(x, 7, None, 2**31, 2.0, 0.0, 0.0)
    print(json.dumps([argument is None for argument in fake_gpu.launches[-1][6:9]]))
launch()  # compiles
launch()
for hook in (hooks.launch_enter_hook, hooks.launch_exit_hook):
    hook.add(print)
    launch()
    hook.remove(print)
    launch()
""")
    none, all_three = [True] * 3, [False] * 3
    assert [json.loads(line) for line in found.splitlines()][1:] == [none, all_three, none, all_three, none]
