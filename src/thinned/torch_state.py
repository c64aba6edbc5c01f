"""The active machinery of PyTorch (compiler, vmap, forward AD, tracing), and every private name of PyTorch.

No other file uses a private name; ``tests/test_torch_state.py`` searches the source tree for them. Each name
was seen in PyTorch 2.11, 2.13, 2.14.1 and 2.15, unless a comment says otherwise. A missing name has one of
these consequences:

needed
    ``import thinned`` raises ImportError with the name and the supported versions.
guarded
    The feature raises RuntimeError with the same message when it is used; ``MISSING`` lists such names.
tested
    A mark or a name that PyTorch reads or sets, which cannot be looked up. A test uses it.

====================================  =======  =========================================================
name in here                          missing  used for
====================================  =======  =========================================================
transforming, tracing                 needed   the code path of each call
is_traced, is_eager                   needed   the code path of each call
is_legacy_batched, is_batched         needed   tensors of both vmaps
unwrap_if_dead                        needed   tensors that outlive a transform
functionalizing, vmaps                needed   the active transforms
without_transforms, below_autograd    needed   a random draw under a transform; the registered operation
SingleLevelFunction                   needed   autograd, 1.4 us faster than ``Function.apply``
single_level_functions                needed   the same within the dispatcher
forward_mode                          needed   forward-mode differentiation
base_of, is_odd_view, version_of      needed   in-place checks
on_proxies, node_of, budget_of        needed   the tag on random draws in compiled graphs
graph_task_is_running                 needed   the refusal of dropouts called within a backward pass
assume                                needed   a fact about a size that compiled code cannot know
MODULE_CALL                           needed   frames of running modules
children_of ... load_hooks_of         needed   dictionaries of a module
is_replica                            needed   modules of ``DataParallel``
arguments_of, TorchDispatchMode       needed   ``thinned.inspect`` with a run
add_batch_dim                         guarded  keys under ``torch.vmap(randomness="different")``
modes_of_thread, pop_mode, push_mode  guarded  ``thinned.intercept`` beside other function modes
mha_shape_check ... safe_softmax      guarded  ``thinned.intercept`` of attention
ragged_dim, seqlens                   guarded  jagged tensors
cached_parametrizations               guarded  ``thinned.WeightDrop`` of a parametrized weight
checkpoint_generator                  guarded  ``thinned.address`` and ``thinned.intercept``
fake_tensors                          guarded  a law of ``thinned compare``
fully_sharded_mesh                    guarded  ``thinned.address`` of a model of ``fully_shard``
local_of, with_local                  tested   shards of DTensors, 10 and 40 us faster than the public names
real_object                           tested   the check of a DTensor's key in compiled code
localized_mesh                        tested   ``thinned.address`` of a tensor-parallel model within DDP
infers_shapes                         tested   ``thinned.address`` around a schedule of pipeline stages
function_of                           tested   ``thinned.address`` in a reentrant checkpoint
constant_when_compiled                tested   functions that Dynamo calls while it traces
never_inlined                         tested   functions that Dynamo calls outside of its graphs
breaks_graph                          tested   LayerDrop in compiled code: skipped layers cost nothing
traces_symbolically                   tested   LayerDrop in a symbolic trace of torch.fx
let_compiled_checkpoints_count        tested   ``thinned.address`` in a compiled checkpoint
on_functionalization, is_functional   tested   Triton kernels that Inductor sees
traced_lines                          tested   draws of random numbers that ``thinned.intercept`` compiles
SeenByTracer, ScriptedForward         tested   ``torch.jit.trace`` and ``torch.jit.script`` of layers
script_as                             tested   ``torch.jit.script`` within ``thinned.intercept``
WRAPPERS, REPRESENTATION              tested   wrappers in module paths; methods that only print
====================================  =======  =========================================================
"""

from __future__ import annotations

import builtins
import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import wraps
from importlib import metadata
from operator import attrgetter
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils.checkpoint as torch_checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.jit import frontend
from torch.nn import Parameter
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

SUPPORTED = "PyTorch 2.11 to 2.15"  # the oldest and the newest that are tested
MISSING: list[str] = []

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _lacks(feature: str, error: object) -> str:
    have = f"PyTorch {torch.__version__}"
    return f"{feature} needs a private name that {have} has not: {error}; use {SUPPORTED}"


def _guarded(feature: str, holder: Any, name: str) -> Any:
    """``holder.name``, or a function that refuses ``feature``."""
    try:
        return getattr(holder, name)
    except AttributeError as error:
        MISSING.append(name)
        words = _lacks(feature, error)

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError(words)

    return refuse


# Needed. Functions that every call uses are bound to names of this module: torch._C.name costs 20 ns more.
compiling = torch.compiler.is_dynamo_compiling  # public
try:
    from torch._C._functorch import (
        TransformType,
        get_unwrapped,
        is_batchedtensor,
        is_functorch_wrapped_tensor,
        is_legacy_batchedtensor,
    )
    from torch._C._functorch import unwrap_if_dead as unwrap_if_dead
    from torch._functorch.pyfunctorch import VmapInterpreter, retrieve_all_functorch_interpreters
    from torch._functorch.utils import enable_single_level_autograd_function
    from torch.autograd.function import _SingleLevelFunction
    from torch.fx import traceback
    from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, get_proxy_slot, proxy_call
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode  # for by_running.py

    is_batched, single_level_functions = is_batchedtensor, enable_single_level_autograd_function
    SingleLevelFunction = _SingleLevelFunction
    transforming = torch._C._are_functorch_transforms_active
    _graph_task_id = torch._C._current_graph_task_id
    without_transforms = torch._C._DisableFuncTorch
    below_autograd = torch._C._AutoDispatchBelowAutograd
    _creation_meta = torch._C._autograd._get_creation_meta
    _made_plainly = torch._C._autograd.CreationMeta.DEFAULT
    _modes = torch._C._len_torch_dispatch_stack
    _is_wrapped = torch._C._dispatch_isTensorSubclassLike
    _mode_of = torch._C._get_dispatch_mode
    _kinds_of_modes = torch._C._TorchDispatchModeKey
    _TRACERS = _kinds_of_modes.FAKE, _kinds_of_modes.PROXY, _kinds_of_modes.FUNCTIONAL
    _tracing = torch._C._is_tracing
    assume: Callable[[bool], None] = torch._check
    MODULE_CALL = nn.Module._call_impl.__code__  # the code object of a frame that calls a module's forward
    # From 2.13 on; PyTorch 2.11 has no budgets of regions.
    _budget_of_region: Callable[[Any], Any]
    if torch.__version__ >= "2.13":
        _budget_of_region = traceback._get_memory_budget_annotation
    else:
        _budget_of_region = getattr(traceback, "_get_memory_budget_annotation", lambda _: None)
    # The other names are used only later; a missing one has to be noticed now.
    forward_ad._current_level  # noqa: B018
    attrgetter("_base", "_is_view", "_is_zerotensor", "_version")(Tensor)
    _module = nn.Module()
    attrgetter(
        "_modules",
        "_parameters",
        "_buffers",
        "_forward_pre_hooks",
        "_forward_hooks",
        "_load_state_dict_pre_hooks",
        "_get_name",
    )(_module)
    _module._replicate_for_data_parallel()._is_replica  # noqa: B018
    torch.ops.aten.native_dropout.default.py_impl  # noqa: B018
    # The arguments in an operation's schema, each with ``name`` and ``default_value``.
    arguments_of: Callable[[Any], Any] = attrgetter("_schema.arguments")
    arguments_of(torch.ops.aten.native_dropout.default)
except (AttributeError, ImportError) as error:
    version = next((found.version for found in metadata.distributions(name="thinned")), "")
    raise ImportError(_lacks(f"thinned {version}", error)) from error

_PLAIN = (Tensor, Parameter)


def tracing() -> bool:
    """Whether :func:`torch.jit.trace` is recording; there sizes are tensors."""
    return not compiling() and _tracing()  # Dynamo cannot call the latter


def is_traced(x: Tensor) -> bool:
    """Whether PyTorch must see the operation itself: under a compiler or a mode, or if ``x`` is not plain.

    A plain tensor is a strided ``Tensor`` or ``Parameter`` with its elements in memory. Sparse, mkldnn and
    meta tensors are not plain, nor is the ZeroTensor that autograd makes for some gradients.
    """
    return bool(
        compiling()
        or type(x) not in _PLAIN
        or x.layout is not torch.strided
        or x.is_meta
        or x._is_zerotensor()
        or _modes()
        or _tracing()
    )


def is_eager(x: Tensor) -> bool:
    """Whether ``x`` is plain and nothing but reverse-mode autograd is active."""
    if (
        compiling()
        or type(x) not in _PLAIN
        or transforming()
        or _modes()
        or _tracing()
        or forward_ad._current_level >= 0
    ):
        return False
    try:
        # This suffices for a plain tensor: 58 ns, against 270 ns for the layout and the rest of is_traced.
        if x.data_ptr():
            return True
    except RuntimeError:  # sparse, mkldnn, or of the legacy vmap
        return False
    return not (is_traced(x) or _is_wrapped(x))  # without elements, or freed


def forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is active."""
    return forward_ad._current_level >= 0


def dense(grad: Tensor) -> Tensor:
    """The gradient as a dense tensor; ``F.embedding(sparse=True)`` gives a COO tensor."""
    # Compiled code has no COO gradients, and Dynamo refuses is_sparse in a backward function.
    return grad.to_dense() if not compiling() and grad.is_sparse else grad


# Transforms.


def is_legacy_batched(x: Tensor) -> bool:
    """Whether ``x`` belongs to the vmap of ``torch.autograd.grad(is_grads_batched=True)``.

    ``torch.autograd.functional.jacobian(vectorize=True)`` uses it too. It has no rule for our operations.
    """
    return not compiling() and is_legacy_batchedtensor(x)


def functionalizing() -> bool:
    """Whether ``torch.func.functionalize`` is among the active transforms."""
    return any(level.key() == TransformType.Functionalize for level in retrieve_all_functorch_interpreters())


def vmaps() -> list[VmapInterpreter]:
    """Every active vmap, outermost first: ``level()``, ``batch_size()`` and ``randomness()``."""
    return [level for level in retrieve_all_functorch_interpreters() if isinstance(level, VmapInterpreter)]


# (tensor, dimension, level) -> the tensor as one call under vmap sees it.
add_batch_dim: Callable[[Tensor, int, int], Tensor] = _guarded(
    'torch.vmap(randomness="different")', sys.modules.get("torch._functorch.vmap"), "_add_batch_dim"
)


# In-place writes.


base_of: Callable[[Tensor], Tensor | None] = attrgetter("_base")  # the tensor of which another is a view
version_of: Callable[[Tensor], int] = attrgetter("_version")  # how often a tensor was overwritten


def is_odd_view(x: Tensor) -> bool:
    """Whether autograd may refuse to overwrite ``x``: a view from ``unbind``, or made under ``no_grad``."""
    return x._is_view() and bool(_creation_meta(x) != _made_plainly)


# DTensors.


def local_of(x: Any) -> Tensor:
    """The shard of a DTensor that this process holds, without autograd; 10 us faster than ``to_local``."""
    return x._local_tensor if hasattr(x, "_local_tensor") else x.to_local()  # type: ignore[no-any-return]


def with_local(x: Any, local: Tensor) -> Any:
    """``x`` with another shard, without autograd; 40 us faster than ``from_local``."""
    kind: Any = type(x)
    same = hasattr(x, "_spec") and local.stride() == x._local_tensor.stride()
    if same and 0 not in x.stride():  # an expanded tensor's result is not expanded
        # Not by a call of the class, whose __init__ does nothing in 10 us.
        return kind.__new__(kind, local, x._spec, requires_grad=False)
    strides = torch.empty_like(torch.empty_strided(x.shape, x.stride(), device="meta")).stride()
    return kind.from_local(local, x.device_mesh, x.placements, run_check=False, shape=x.shape, stride=strides)


def unwrapped(x: Tensor) -> Tensor:
    """``x`` without the wrappers of torch.func, such as a DTensor."""
    while not compiling() and is_functorch_wrapped_tensor(x):
        x = get_unwrapped(x)
    return x


def differs_by_example(x: Tensor) -> bool:
    """Whether the examples of an active vmap have values of their own in ``x``."""
    while not compiling() and is_functorch_wrapped_tensor(x):
        if is_batched(x):
            return True
        x = get_unwrapped(x)
    return False


def computes_values() -> bool:
    """Whether operations compute, and neither a compiler nor a FakeTensorMode only traces them."""
    return not compiling() and not any(map(_mode_of, _TRACERS))


def real_object(x: Any) -> Any:
    """``x``, such as a mesh, without the FakeScriptObject that Dynamo wraps it in from PyTorch 2.13 on."""
    return getattr(x, "real_obj", x)


# Compiled code.


def constant_when_compiled(function: _Function) -> _Function:
    """Let Dynamo call a function while it traces; the result becomes a constant of the graph.

    ``torch.compiler.assume_constant_result`` sets the same mark, and imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def never_inlined(function: _Function) -> _Function:
    """Let Dynamo break its graph at a function, whose own frame may still be compiled.

    ``torch.compiler.disable`` sets the same mark, and imports the compiler.
    """
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def outside_graphs(function: _Function) -> _Function:
    """Let Dynamo break its graph at a function, and call it and what it calls without the compiler."""

    @never_inlined
    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        run = torch.compiler.disable(function) if compiler_is_imported() else function
        return run(*args, **kwargs)

    return call  # type: ignore[return-value]


def breaks_graph(function: Callable[..., Any]) -> bool:
    """Whether Dynamo, which is tracing, can break its graph here at a :func:`never_inlined` function.

    It cannot under ``fullgraph=True``, in an export and within a higher-order operator such as a checkpoint.
    From now on Dynamo leaves ``function`` to Python, and compiles the functions that it calls.
    """
    dynamo: Any = sys.modules.get("torch._dynamo")
    try:
        tracer = dynamo.symbolic_convert.InstructionTranslator.current_tx()
        breaks = tracer.should_compile_partial_graph() and not tracer.error_on_graph_break
        if breaks:
            dynamo.decorators.skip(function)
    except AttributeError:
        return False
    return bool(breaks)


def traced_lines() -> list[tuple[str, int, str]]:
    """File, line and function of what Dynamo traces in this thread, innermost first; empty if unknown."""
    context = getattr(sys.modules.get("torch._guards"), "TracingContext", None)
    frames: Any = getattr(context, "extract_stack", list)()
    return [(frame.filename, frame.lineno or 0, frame.name) for frame in reversed(frames)]


def fake_tensors() -> AbstractContextManager[Any]:
    """A context in which calls compute no values, and refuse tensors of two devices as a GPU does."""
    try:
        from torch._subclasses.fake_tensor import FakeTensorMode
    except ImportError as error:
        raise RuntimeError(_lacks("the law of other devices", error)) from error
    return FakeTensorMode(allow_non_fake_inputs=True)


def compiler_is_imported() -> bool:
    """Whether this process can have compiled code."""
    return "torch._dynamo" in sys.modules


def on_proxies(draw: Any, trace: Callable[..., Any]) -> None:
    """Let ``trace(mode, *args)`` add the node of an operation to every graph that is traced."""
    draw.py_impl(ProxyTorchDispatchMode)(trace)


_functional: Any = sys.modules.get("torch._subclasses.functional_tensor")
_FunctionalTensor: Any = getattr(_functional, "FunctionalTensor", ())


def is_functional(x: Tensor) -> bool:
    """Whether AOTAutograd traces a call with this tensor."""
    return isinstance(x, _FunctionalTensor)


def on_functionalization(
    library: torch.library.Library, name: str, trace: Callable[..., Any], kernels: Iterable[Any]
) -> None:
    """Let ``trace(*args)`` stand for an operation in compiled code, except where it returns NotImplemented.

    Exported programs keep the operation. ``kernels`` are those of Triton that ``trace`` may launch. Without
    the private names all compiled code keeps the operation.
    """
    registry = getattr(sys.modules.get("torch._library.triton"), "triton_ops_to_kernels", None)
    mode_class = getattr(_functional, "FunctionalTensorMode", None)
    if mode_class is None or registry is None:
        return
    registry[f"thinned::{name}"] = kernels

    def rule(mode: Any, operation: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        config = sys.modules.get("torch._functorch.config")
        exports = mode.export or not getattr(config, "decompose_custom_triton_ops", True)
        if not exports and all(issubclass(each, _FunctionalTensor) for each in types):
            with mode:
                result = trace(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return mode.__torch_dispatch__(operation, types, args, kwargs)

    torch.library.register_torch_dispatch(f"thinned::{name}", mode_class, rule, lib=library)


def node_of(draw: Any, mode: Any, args: tuple[Any, ...]) -> tuple[Any, torch.fx.Node]:
    """Trace an operation; its result and its node in the graph."""
    result: Any = proxy_call(mode, draw, mode.pre_dispatch, args, {})
    return result, get_proxy_slot(result, mode.tracer).proxy.node


def budget_of(node: torch.fx.Node) -> float:
    """The share of the activations that the partitioner may keep."""
    of_region = _budget_of_region(node)
    if of_region is not None:
        return float(of_region)
    config = sys.modules.get("torch._functorch.config")
    if config is None:
        return 1.0
    try:
        return float(config.activation_memory_budget)
    except AttributeError as error:
        raise RuntimeError(_lacks("a dropout in compiled code", error)) from error


def let_compiled_checkpoints_count(allowed: bool) -> bool | None:
    """Allow or forbid compiled checkpointed regions to write to Python objects; returns the former setting.

    None if the compiler is not imported. If the setting is missing, Dynamo refuses such a region itself.
    """
    name = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    config = getattr(sys.modules.get("torch._dynamo"), "config", None)
    if not hasattr(config, name):
        return None
    before: bool = getattr(config, name)
    setattr(config, name, allowed)
    return before


_traced_by_fx: Callable[[], bool] = getattr(torch.fx._symbolic_trace, "is_fx_symbolic_tracing", lambda: False)


def traces_symbolically() -> bool:
    """Whether ``torch.fx.symbolic_trace`` or another tracer calls a module with proxies for tensors."""
    return _traced_by_fx() and not _modes()  # make_fx is in torch.fx too, and traces tensors by a mode


# Backward passes and recomputation.


def graph_task_is_running() -> bool:
    """Whether this thread is within a backward pass."""
    return _graph_task_id() != -1


def function_of(ctx: Any) -> Any:
    """The autograd Function of a context; None makes models/checkpoint.py compare random states instead."""
    return getattr(type(ctx), "_forward_cls", None)


def infers_shapes() -> bool:
    """Whether a pipeline stage calls its module only to learn what its results look like.

    A stage calls it for a microbatch in one of two methods. It does so once more before the first step.
    """
    stage = "torch.distributed.pipelining.stage"
    frame = inspect.currentframe() if stage in sys.modules else None
    while frame is not None:
        if frame.f_globals.get("__name__") == stage:
            return frame.f_code.co_name not in ("forward_maybe_with_nosync", "forward_one_chunk")
        frame = frame.f_back
    return False


class _Called(BaseException):
    pass


def checkpoint_generator() -> str:
    """The name under which ``torch.utils.checkpoint`` looks up its generator.

    Raises:
        RuntimeError: the name is none of those listed here; recomputations would get other masks.
    """
    # The first from 2.14 on, the second before.
    names = "_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator"
    for name in names:
        torchs = getattr(torch_checkpoint, name, None)
        if torchs is None:
            continue

        def generator(*_: Any, **__: Any) -> Any:
            raise _Called

        setattr(torch_checkpoint, name, generator)
        try:
            # Unwrapped, since the wrapper imports the compiler.
            inspect.unwrap(torch_checkpoint.checkpoint)(lambda: None, use_reentrant=False)
        except _Called:
            return name
        finally:
            setattr(torch_checkpoint, name, torchs)
    raise RuntimeError(
        f"torch.utils.checkpoint of PyTorch {torch.__version__} calls none of {', '.join(names)}, so "
        "what it recomputes would have other masks than the forward pass; thinned.address and "
        "thinned.intercept need another version of PyTorch, or of thinned"
    )


# The function modes of this thread, innermost last.
modes_of_thread: Callable[[], list[Any]]
modes_of_thread, pop_mode, push_mode = (
    _guarded("thinned.intercept", torch.overrides, name)
    for name in ("_get_current_function_mode_stack", "_pop_mode", "_push_mode")
)

# The parts of torch.nn.functional.multi_head_attention_forward.
mha_shape_check, in_projection, in_projection_packed, canonical_mask = (
    _guarded("thinned.intercept of nn.MultiheadAttention(dropout=)", nn.functional, name)
    for name in ("_mha_shape_check", "_in_projection", "_in_projection_packed", "_canonical_mask")
)
# A softmax that is 0 where all logits are -inf.
safe_softmax = _guarded(
    "thinned.intercept of scaled_dot_product_attention(dropout_p=)", torch.ops.aten, "_safe_softmax"
)


# Modules.

# Children that PyTorch's wrappers add; module paths leave them out.
COMPILED = "_orig_mod"  # torch.compile(module)
WRAPPERS = (COMPILED, "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
# The methods of nn.Module that only print.
REPRESENTATION = {"__repr__", "extra_repr", "_get_name"}


# Functions, since Dynamo traces no attrgetter.
def children_of(module: nn.Module) -> dict[str, nn.Module | None]:
    """The dictionary of children itself."""
    return module._modules


def parameters_of(module: nn.Module) -> dict[str, Parameter | None]:
    """The dictionary of parameters itself."""
    return module._parameters


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary of buffers itself."""
    return module._buffers


def pre_hooks_of(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """The hooks that run before ``module.forward``."""
    return module._forward_pre_hooks


def post_hooks_of(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """The hooks that run after ``module.forward``."""
    return module._forward_hooks


def has_backward_hooks(module: nn.Module) -> bool:
    """Whether a backward pass through ``module`` runs a hook of it."""
    return bool(module._backward_hooks or module._backward_pre_hooks)


def forward_hooks_of(module: nn.Module) -> list[Callable[..., Any]]:
    """The hooks that run before and after ``module.forward``."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def load_hooks_of(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """The hooks that run before ``module.load_state_dict``."""
    return module._load_state_dict_pre_hooks


def cached_parametrizations() -> dict[Any, Any]:
    """The weights that ``parametrize.cached()`` holds, by module and name; empty outside of it."""
    try:
        cache: dict[Any, Any] = parametrize._cache
    except AttributeError as error:
        raise RuntimeError(_lacks("WeightDrop of a parametrized weight", error)) from error
    return cache


def is_replica(module: nn.Module) -> bool:
    """Whether :class:`torch.nn.DataParallel` made ``module`` for one of its threads."""
    return getattr(module, "_is_replica", False)


# Data parallelism.


def fully_sharded_mesh(module: nn.Module) -> DeviceMesh | None:
    """The mesh of data-parallel dimensions that ``fully_shard`` was given; None for any other module.

    It is the same mesh for the data-parallel ``replicate``.

    Raises:
        RuntimeError: the mesh is not where it is in the supported versions.
    """
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
    if not isinstance(module, kind):
        return None
    try:
        state: Any = module._get_fsdp_state()
        # Older versions have the second only.
        several = getattr(state, "_fsdp_param_groups", None)
        groups = [state._fsdp_param_group] if several is None else several
        return next((group.mesh_info.mesh for group in groups if group is not None), None)
    except AttributeError as error:
        words = _lacks('data_parallel="auto" of a model of fully_shard', error)
        raise RuntimeError(f"{words}, or pass data_parallel= the mesh") from error


def localized_mesh(parameter: Tensor) -> DeviceMesh | None:
    """The mesh of a DTensor that DistributedDataParallel of a slice of a mesh made a plain parameter."""
    return getattr(getattr(parameter, "_st_info", None), "mesh", None)


# TorchScript.


class SeenByTracer(nn.Module):
    """A module whose calls under :func:`torch.jit.trace` go to ``_traced_forward()``, unless that is None."""

    def _traced_forward(self) -> Callable[..., Any] | None:
        """A function of the module and the inputs."""
        raise NotImplementedError

    def _slow_forward(self, *inputs: Any, **kwargs: Any) -> Any:
        forward = None if kwargs else self._traced_forward()
        if forward is not None:
            return forward(self, *inputs)
        return super()._slow_forward(*inputs, **kwargs)  # type: ignore[no-untyped-call]


class EagerForward:
    """Takes itself off its module, where it hides ``forward``, and calls that."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        vars(self.module).pop("forward", None)
        return self.module.forward(*args, **kwargs)


_Stub: Any = getattr(sys.modules.get("torch.jit._recursive"), "ScriptMethodStub", None)


class ScriptedForward(*([] if _Stub is None else [_Stub])):  # type: ignore[misc]
    """The ``forward`` that :func:`torch.jit.script` compiles for a module that has this attribute.

    Without TorchScript's private class a layer is refused.
    """

    original_method: MethodType
    module = property(lambda self: self.original_method.__self__)
    __call__ = EagerForward.__call__

    @classmethod
    def of(cls, module: nn.Module, forward: Callable[..., Any]) -> ScriptedForward:
        """From a function in TorchScript's language, whose first argument is the module."""
        if _Stub is None:
            raise RuntimeError(_lacks("torch.jit.script of a layer", "ScriptMethodStub"))
        definition = frontend.get_jit_def(forward, "forward", self_name="RecursiveScriptModule")
        names = {**vars(builtins), **forward.__globals__}
        # The module is within a field: torch.export copies a named tuple by its fields.
        return cls(names.get, definition, MethodType(forward, module))

    def __reduce__(self) -> tuple[type[EagerForward], tuple[nn.Module]]:
        return EagerForward, (self.module,)


def script_as(function: Callable[..., Any], operator: str) -> None:
    """Let :func:`torch.jit.script` compile calls of ``function`` as ``operator``, without its source."""
    register = getattr(sys.modules.get("torch.jit._builtins"), "_register_builtin", None)
    if register is not None:
        register(function, operator)


# Jagged tensors.


def _of_jagged(x: Tensor, name: str) -> Any:
    if not compiling() and not hasattr(x, name):
        raise RuntimeError(_lacks("a dropout of a jagged tensor", f"{type(x).__name__}.{name}"))
    return getattr(x, name)


def ragged_dim(x: Tensor) -> int:
    """The ragged dimension of a jagged tensor."""
    return _of_jagged(x, "_ragged_idx")  # type: ignore[no-any-return]


def seqlens(x: Tensor) -> tuple[int | None, int | None]:
    """The shortest and longest size along the ragged dimension, or None where torch has not computed them."""
    return _of_jagged(x, "_maybe_min_seqlen"), _of_jagged(x, "_maybe_max_seqlen")
