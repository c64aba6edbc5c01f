"""What a DTensor costs: thinned and torch's own dispatch, on a mesh of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import thinned
from benchmarks.case import MULTIPLY, Bound, Case, Work
from benchmarks.peers import backward

__all__ = ["dtensor_cases"]

SHARDED = f"{MULTIPLY}, DTensor"


def dtensor_cases() -> Iterator[Case]:
    """Forward, and forward with backward, of tensors so small that the dispatch is all that they cost."""
    for name, differentiated in (("forward", False), ("forward + backward", True)):
        yield Case(
            f"DTensor, {name}",
            "float32, 16 x 16 elements, p = 0.1",
            partial(_beside_multiply, differentiated),
            (Bound(SHARDED, 2, "thinned, DTensor"),),
        )


def _beside_multiply(differentiated: bool) -> Work:
    if not dist.is_initialized():
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    plain = torch.randn(16, 16)
    sharded = distribute_tensor(plain, DeviceMesh("cpu", [0]), [Shard(0)])
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        MULTIPLY: lambda x: x * 2,
        "nn.Dropout": nn.Dropout(0.1),
        "thinned": thinned.Dropout(0.1),
    }
    work: dict[str, Callable[[], object]] = {}
    for name, function in functions.items():
        for which, x in ((name, plain), (f"{name}, DTensor", sharded)):
            if differentiated:
                work[which] = backward(function, x.detach().requires_grad_())
            else:
                work[which] = partial(function, x)
    return work
