"""What every layer is held to, whatever its formula: modes, gradients, dtypes, transforms, copies."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from thinned.compare.laws import Finding
from thinned.compare.laws.law import holds_if
from thinned.compare.layers.entry import Example, Implementation, LayerLaw, first
from thinned.compare.memory import saved_by_call
from thinned.compare.settings import DTYPES, Settings

__all__ = ["general_laws"]

OUTSIDE = (-0.1, 1.5, float("nan"))


def evaluation(layer: Implementation, settings: Settings, example: Example) -> Finding:
    inputs = _inputs(example, settings)
    y = first(layer.make(**example.arguments).eval()(*inputs))
    if y is inputs[0]:
        return holds_if(True, "the input")
    return holds_if(False, "a copy" if torch.equal(y, inputs[0]) else "other values")


def p_zero(layer: Implementation, settings: Settings, example: Example) -> Finding:
    inputs = _inputs(example, settings)
    y = first(layer.make(**{**example.arguments, example.p_name: 0.0})(*inputs))
    return holds_if(torch.equal(y, inputs[0]), "the input" if y is inputs[0] else "equal")


def refuses_p(layer: Implementation, settings: Settings, example: Example) -> Finding:
    answers = {}
    for p in OUTSIDE:
        try:
            layer.make(**{**example.arguments, example.p_name: p})(*_inputs(example, settings))
            answers[p] = "accepted"
        except ValueError as error:
            answers[p] = "" if str(p) in str(error) else f"says nothing of {p}"
        except Exception as error:
            answers[p] = type(error).__name__
    wrong = [f"{p}: {answer}" for p, answer in answers.items() if answer]
    return holds_if(not wrong, ", ".join(wrong) or "ValueError")


def gradient(layer: Implementation, settings: Settings, example: Example) -> Finding:
    """Against finite differences in float64, each under one mask."""
    module = layer.make(**example.arguments).double()
    x, *rest = _inputs(example, settings, torch.float64)
    calls = _under_seed(lambda x: first(module(x, *rest)), settings)
    x.requires_grad_()
    try:
        torch.autograd.gradcheck(calls, x, fast_mode=True, check_undefined_grad=False)
    except GradcheckError as error:
        return holds_if(False, str(error).splitlines()[0])
    return holds_if(True, "finite differences")


def dtypes(layer: Implementation, settings: Settings, example: Example) -> Finding:
    changed = []
    for name, dtype in DTYPES.items():
        module = layer.make(**example.arguments).to(dtype)
        y = first(module(*_inputs(example, settings, dtype)))
        if y.dtype != dtype:
            changed.append(f"{name} → {y.dtype}".replace("torch.", ""))
    return holds_if(not changed, ", ".join(changed) or "kept")


def autocast(layer: Implementation, settings: Settings, example: Example) -> Finding:
    module, inputs = layer.make(**example.arguments), _inputs(example, settings)
    call = _under_seed(lambda *inputs: first(module(*inputs)), settings)
    plain = call(*inputs)
    with torch.autocast(torch.device(settings.device).type, torch.bfloat16):
        y = call(*inputs)
    close = torch.allclose(y.double(), plain.double(), rtol=0.05, atol=0.05)
    return holds_if(close, "same values" if close else "other values")


def same_seed(layer: Implementation, settings: Settings, example: Example) -> Finding:
    module, inputs = layer.make(**example.arguments), _inputs(example, settings)

    def call(seed: int) -> Tensor:
        return _under_seed(lambda: first(module(*inputs)), settings, seed)()

    if not _same(call(0), call(0)):
        return holds_if(False, "another mask")
    if all(_same(call(0), call(seed)) for seed in range(1, 21)):
        return holds_if(False, "one mask for all seeds")
    return holds_if(True, "same mask")


def compiled(layer: Implementation, settings: Settings, example: Example) -> Finding:
    """One graph, and what the layer gives without it, to the rounding of other kernels.

    The gradients are those of the first input and of every parameter. The default compiler takes seconds a
    layer; --quick stops at the graphs that it would be given.
    """
    torch.compiler.reset()
    module, inputs = layer.make(**example.arguments), _inputs(example, settings)
    in_one = torch.compile(module, fullgraph=True, backend="aot_eager" if settings.quick else "inductor")
    results = []
    for each in (module, in_one):
        x = inputs[0].clone()
        leaves = [x.requires_grad_()] if x.is_floating_point() else []
        leaves += module.parameters()
        y = _under_seed(lambda x, each=each: first(each(x, *inputs[1:])), settings)(x)
        grads = tuple(torch.zeros_like(leaf) for leaf in leaves)
        if leaves and y.requires_grad:
            grads = torch.autograd.grad(y.square().sum(), leaves, materialize_grads=True)
        results.append((y.detach(), grads))
    torch.compiler.reset()
    (y, grads), (other, other_grads) = results
    if y.shape != other.shape:
        return holds_if(False, "another shape")
    if not torch.allclose(y, other, rtol=1e-5, atol=1e-6):
        return holds_if(False, "another mask than eager")
    alike = all(map(partial(torch.allclose, rtol=1e-4, atol=1e-5), grads, other_grads))
    return holds_if(alike, "one graph" if alike else "another gradient than eager")


def vmapped(layer: Implementation, settings: Settings, example: Example) -> Finding:
    """The same inputs for 8 examples: under "same" they stay the same, under "different" they do not."""
    module = layer.make(**example.arguments)
    inputs = tuple(x.expand(8, *x.shape) for x in _inputs(example, settings))

    def run(randomness: str) -> Tensor:
        return first(torch.func.vmap(lambda *each: first(module(*each)), randomness=randomness)(*inputs))

    shared, own = run("same"), run("different")
    if not all(_same(each, shared[0]) for each in shared):
        return holds_if(False, 'masks differ under "same"')
    if all(_same(each, own[0]) for each in own):
        return holds_if(False, 'one mask under "different"')
    return holds_if(True, "same, different")


def copied(layer: Implementation, settings: Settings, example: Example) -> Finding:
    module, inputs = layer.make(**example.arguments), _inputs(example, settings)
    for how, twin in {
        "deepcopy": copy.deepcopy(module),
        "pickle": pickle.loads(pickle.dumps(module)),
    }.items():
        call = [_under_seed(lambda each=each: first(each(*inputs)), settings)() for each in (module, twin)]
        if not _same(*call):
            return holds_if(False, f"{how}: another mask")
        twin.eval()
        if not module.training:
            return holds_if(False, f"{how}: shares the original's mode")
    return holds_if(True, "alike")


def saved(layer: Implementation, settings: Settings, example: Example) -> Finding:
    """Bytes an element of the input that autograd keeps, beside input, output and parameters."""
    x, *rest = _inputs(example, settings)
    if not x.is_floating_point():
        return holds_if(True, "no gradient")
    module = layer.make(**example.arguments)
    kept = saved_by_call(lambda x: first(module(x, *rest)), x.requires_grad_(), module.parameters())
    return holds_if(kept < example.saved_bytes + 1, f"{kept:.3g} bytes", bytes=kept)


def _inputs(example: Example, settings: Settings, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2**32 - 1 - settings.seed % 2**32)
        return tuple(x.to(settings.device) for x in example.inputs(dtype or torch.float32))


def _under_seed(call: Callable[..., Tensor], settings: Settings, offset: int = 0) -> Callable[..., Tensor]:
    def seeded(*inputs: Tensor) -> Tensor:
        torch.manual_seed(settings.seed + offset)
        return call(*inputs)

    return seeded


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


FAMILY = "layer"


def general_laws(example: Example) -> tuple[LayerLaw, ...]:
    """The laws that apply to a layer with such an example."""
    checks: dict[str, tuple[str, Callable[..., Finding]]] = {}
    if example.identity_in_evaluation:
        checks["evaluation"] = "in evaluation the input itself comes back", evaluation
        if example.p_name:
            checks["p = 0"] = "at p = 0 the input comes back", p_zero
    if example.p_name:
        checks["p outside [0, 1]"] = "ValueError, with the value in its message", refuses_p
    checks |= {
        "gradient": ("the gradient is that of finite differences under one mask", gradient),
        "dtype": ("float16, bfloat16, float32 and float64 stay what they are", dtypes),
        "autocast": ("autocast changes no mask", autocast),
        "same seed": ("one seed gives one mask, another seed another", same_seed),
        "torch.compile": ("compiles without a graph break, to what eager code gives", compiled),
        "vmap": ("one mask for all examples or one for each, as asked", vmapped),
        "copies": ("a deepcopy and a pickled copy have the original's masks and a mode of their own", copied),
        "saved": (
            f"keeps {example.saved_bytes:g} bytes an element for backward, and what is small",
            saved,
        ),
    }
    return tuple(
        LayerLaw(FAMILY, name, statement, partial(check, example=example))
        for name, (statement, check) in checks.items()
    )
