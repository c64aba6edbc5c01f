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
    return torch.empty(shape, dtype=dtype, requires_grad=True)


def keys(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.int64)


def on_a_gpu(code: str) -> str:
    """What a process prints whose Triton compiles for a GPU, and which has this module's names."""
    imports = f"import json\nfrom {__name__} import *\nfrom {__name__} import _graphs\n"
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
    "Gaussian": Case(lambda x: F.gaussian_dropout(x, 0.3), lambda: (floats(8, 64),), 1, 0),
    "mask": Case(lambda bits: thinned.keep_mask(Key.from_bits(bits), (8, 64), 0.5), lambda: (keys(),)),
}
FUNCTIONS = FAKED | {
    "in place": Case(lambda x: F.dropout(x * 2, 0.3, inplace=True), lambda: (floats(8, 64),)),
    "DropBlock": Case(lambda x: F.drop_block2d(x, 0.1, 3), lambda: (floats(2, 3, 8, 8),), 1, 0),
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
    "alpha": Case(lambda x: F.alpha_dropout(x, 0.3, training=True), lambda: (floats(8, 64),)),
    "p = 1": Case(lambda x: F.dropout(x, 1.0), lambda: (floats(8, 64),)),
    "complex": Case(
        lambda x: F.dropout(x, 0.3).abs(), lambda: (floats(8, 64, dtype=torch.complex64),)
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
        except Exception as error:
            return repr(error)
    return [(fake_gpu.calls(graph), fake_gpu.places(graph)) for graph in found]


@pytest.fixture(scope="module")
def traced() -> dict[str, Any]:
    return json.loads(on_a_gpu("print(json.dumps({name: _graphs(name) for name in CASES}))"))  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_compilers_see_one_launch_for_each_mask(traced: dict[str, Any], name: str) -> None:
    """It writes to its result alone, and no number leaves the device."""
    assert isinstance(traced[name], list), traced[name]
    wanted = CASES[name][2:] if len(traced[name]) == 2 else CASES[name][2:3]
    kernel = "thinned.masked_affine.default" if name.startswith("opaque") else "triton:tile"
    assert tuple(calls.count(kernel) for calls, _ in traced[name]) == wanted
    for calls, places in traced[name]:
        assert places == [name.rpartition(" ")[2]]
        ours = {call for call in calls if call.startswith(("thinned.", "triton:"))}
        assert ours <= {kernel, "triton:fold", "thinned.draw_key.default"}
