"""A GPU that is not there, for a process of its own without ``TRITON_INTERPRET``.

Triton compiles for an H100 and records its launches. AOTAutograd traces tensors without elements: those of
"meta", which Triton serves here, and fake ones of "cuda", whose backward pass needs a build for CUDA.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config
import triton
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._functorch.aot_autograd import aot_module_simplified
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import mangle_type

from thinned import backends

launches: list[tuple[Any, ...]] = []  # three numbers of programs, five things of Triton's, the arguments
loaded: list[str] = []  # the name of each compiled kernel


class _Utils:
    @staticmethod
    def load_binary(name: str, *_: Any) -> tuple[int, int, int, int, int]:
        loaded.append(name)
        return 0, 0, 32, 0, 1024  # module, function, registers, spills, threads

    @staticmethod
    def unload_module(_: int) -> None:
        pass

    @staticmethod
    def get_device_properties(_: int) -> dict[str, int]:
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class _Driver:
    utils = _Utils()

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: int) -> int:
        return 0

    def launcher_cls(self, *_: Any) -> Callable[..., None]:
        return lambda *arguments: launches.append(arguments)


def install() -> None:
    """Put the GPU into this process, for good."""
    triton.runtime.driver.set_active(_Driver())
    torch.accelerator.current_device_index = lambda: -1
    serves = {"cpu": "the CPU"}
    backends.why_not_triton = lambda device_type: serves.get(device_type, "")  # type: ignore[assignment]


def tensors_on(device: str) -> AbstractContextManager[Any]:
    """A context in which tensors can be made on a device that is not there."""
    return nullcontext() if device == "meta" else FakeTensorMode()


def graphs(function: Callable[..., Any], *inputs: Tensor, **options: Any) -> list[GraphModule]:
    """The graphs that Inductor would get: the forward pass, then the backward pass if there is one."""
    found: list[GraphModule] = []

    def keep(graph: GraphModule, _: Any) -> Any:
        found.append(graph)
        return make_boxed_func(graph)

    def backend(graph: GraphModule, inputs: Any) -> Any:
        return aot_module_simplified(graph, inputs, fw_compiler=keep, bw_compiler=keep)

    torch.compiler.reset()
    with torch._functorch.config.patch(enable_autograd_cache=False):
        out = torch.compile(function, backend=backend, fullgraph=True, **options)(*inputs)
        if out.requires_grad:
            out.sum().backward()
    return found


def calls(graph: GraphModule) -> list[str]:
    """The calls of a graph by name; ``triton:NAME`` is a launch that writes to ``out_ptr`` alone."""
    return [_name(node) for node in graph.graph.nodes if node.op == "call_function"]


def _name(node: Node) -> str:
    if "tensors_to_clone" not in node.kwargs:
        return str(node.target)
    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])  # type: ignore[arg-type]
    written = "" if node.kwargs["tensors_to_clone"] == ["out_ptr"] else f" {node.kwargs['tensors_to_clone']}"
    return f"triton:{getattr(kernel, 'fn', kernel).__name__}{written}"


def compile_as_inductor(graph: GraphModule) -> None:
    """Compile the kernels of a graph with Inductor's types: 1 is a constant, what is below 2**31 an int32."""
    for node in graph.graph.nodes:
        if "tensors_to_clone" not in node.kwargs:
            continue
        kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        function = getattr(kernel, "fn", kernel) if hasattr(kernel, "configs") else kernel
        constants = {param.name for param in function.params if param.is_constexpr}
        given = node.kwargs["kwargs"] | kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
        constants |= {name for name, value in given.items() if value is None or value == 1}
        signature = {
            name: "constexpr"
            if name in constants
            else mangle_type(torch.empty(1, dtype=given[name].meta["val"].dtype, device="cpu"))
            if isinstance(given[name], Node)
            else "i32"
            if given[name] < 2**31
            else "i64"
            for name in function.arg_names
        }
        values = {(function.arg_names.index(name),): given[name] for name in constants}
        triton.compile(triton.compiler.ASTSource(function, signature, values), GPUTarget("cuda", 90, 32))


def places(graph: GraphModule) -> list[str]:
    """The devices of all tensors in a graph; "host" where a number is read from one."""
    values = [node.meta.get("val") for node in graph.graph.nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    numbers = [value for value in values if isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)]
    reads = any("local_scalar" in name or "item" in name.split(".") for name in calls(graph))
    return sorted({tensor.device.type for tensor in tensors} | ({"host"} if reads or numbers else set()))
