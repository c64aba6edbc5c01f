"""The output has the dtype, shape, memory format and device of the input."""

from __future__ import annotations

import re
import warnings
from functools import partial

import torch
from torch import Tensor

from thinned.compare.errors import one_line
from thinned.compare.implementation import Case, NotOfferedError, first
from thinned.compare.laws.chance import binomial_bounds, neighbouring, strongest
from thinned.compare.laws.law import (
    P_FOR_EQUALITY,
    Finding,
    Law,
    Level,
    has_mask,
    holds_if,
    nothing_wrong,
    takes_any_shape,
)
from thinned.compare.laws.values import P_ERROR, departure, scale_of, under_seed
from thinned.compare.settings import DTYPES, Settings
from thinned.torch_state import fake_tensors

__all__ = ["LAWS"]

MOST_SHOWN = 3
OTHER_DEVICE = re.compile("expected device|same device|to numpy")
SCALAR_CALLS = 64  # at p = 0.5 a scalar is both kept and dropped in them, but for one case in 2^63


def dtypes(layer: Case, settings: Settings) -> Finding:
    """The dtype of the output of a small call in each."""
    changed = []
    for name, dtype in DTYPES.items():
        module, inputs = layer.called(settings, dtype)
        if (y := first(module(*inputs))).dtype != dtype:
            changed.append(f"{name} → {y.dtype}".replace("torch.", ""))
    return holds_if(not changed, ", ".join(changed) or "kept")


def autocast(layer: Case, settings: Settings) -> Finding:
    """Under one seed, with and without autocast to bfloat16, values agree to 5 %."""
    module, inputs = layer.called(settings)
    plain = under_seed(settings, module, *inputs)
    with torch.autocast(torch.device(settings.device).type, torch.bfloat16):
        y = under_seed(settings, module, *inputs)
    close = torch.allclose(y.double(), plain.double(), rtol=0.05, atol=0.05)
    return holds_if(close, "same values" if close else "other values")


def complex_numbers(layer: Case, settings: Settings) -> Finding:
    """Normal real and imaginary parts, in complex64 and complex128, have one mask."""
    parts = settings.normal(*layer.sized(1000), 2, dtype=torch.float64)
    for dtype in (torch.complex64, torch.complex128):
        x = torch.view_as_complex(parts).to(dtype)
        y = layer.module(settings.p)(x)
        if y.dtype != dtype:
            return holds_if(False, f"{dtype} → {y.dtype}".replace("torch.", ""))
        kept = (y != 0)[..., None].expand(*y.shape, 2)
        if complaint := departure(torch.view_as_real(y), torch.view_as_real(x), kept):
            return holds_if(False, complaint)
    return holds_if(True, "both parts")


def channels_last(layer: Case, settings: Settings) -> Finding:
    """A channels_last input at p of the settings: strides of output and gradient, and the kept values."""
    shape = layer.sized(4, 8, 6, 5)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    return _same_strides(layer, settings, settings.normal(*shape).to(memory_format=memory_format))


def permuted(layer: Case, settings: Settings) -> Finding:
    """Last dimension moved to the front: strides of output and gradient, and the kept values."""
    last, *others = layer.sized(40, 20, 30)
    return _same_strides(layer, settings, settings.normal(*others, last).movedim(-1, 0))


def _same_strides(layer: Case, settings: Settings, x: Tensor) -> Finding:
    x.requires_grad_()
    y = layer.module(settings.p)(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    if complaint := departure(y.detach(), x.detach()):
        return holds_if(False, complaint)
    for name, result in {"output": y, "gradient": gradient}.items():
        if result.stride() != x.stride():
            return holds_if(False, f"{name}'s strides {result.stride()}, not {x.stride()}")
    return holds_if(True, "kept")


def zero_dimensional(layer: Case, settings: Settings) -> Finding:
    """64 calls on a scalar at p = 0.5: both 0 and a kept value come, unless it is refused."""
    module = layer.module(P_FOR_EQUALITY)
    x = torch.tensor(3.0, dtype=settings.dtype, device=settings.device)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "a 0-D input is deprecated", says torch before it refuses one
            results = [module(x) for _ in range(SCALAR_CALLS)]
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        if layer.takes_any_shape:
            raise
        return holds_if(True, f"refused: {type(error).__name__}")
    if any(y.shape != x.shape for y in results):
        return holds_if(False, f"shape () became {tuple(results[0].shape)}")
    values = sorted({float(y) for y in results})
    both = len(values) == 2 and values[0] == 0
    shown = [f"{value:g}" for value in values[:MOST_SHOWN]] + ["..."] * (len(values) > MOST_SHOWN)
    return holds_if(both, " or ".join(shown))


def empty(layer: Case, settings: Settings) -> Finding:
    """A batch of 0 samples goes forward and backward, and keeps its shape."""
    x = settings.ones(0, *layer.sized(0, 3)[1:]).requires_grad_()
    y = layer.module(settings.p)(x)
    y.sum().backward()
    return holds_if(y.shape == x.shape, f"shape {tuple(y.shape)}")


def expanded(layer: Case, settings: Settings) -> Finding:
    """One row in memory seen as many: each has a decision of its own, and the input is untouched."""
    shape = list(layer.sized(64, 1000))
    dim = next(dim for dim in range(len(shape)) if dim not in layer.mask.shared)
    row = settings.normal(*shape[:dim], 1, *shape[dim + 1 :])
    x, before = row.expand(shape), row.clone()
    y = layer.module(P_FOR_EQUALITY)(x)
    if not torch.equal(row, before):
        return holds_if(False, "changes its input")
    if (complaint := departure(y, x)) is None and (y == y.narrow(dim, 0, 1)).all():
        complaint = "one mask for all rows"
    return nothing_wrong(complaint, "a mask a row")


def sliced(layer: Case, settings: Settings) -> Finding:
    """Every second column of a tensor; of a layer of any shape also three other layouts.

    The columns between are neither read nor written. Values, gradient, rate and neighbours are no worse than
    those of a dense tensor.
    """
    rows, *others, columns = layer.sized(295, 400)
    base = settings.normal(1 + rows, *others, 2 * columns)
    before = base.clone()
    views = {"slice": base[1:, ..., ::2]}
    dense = views["slice"].contiguous()
    if layer.takes_any_shape:
        views["transposed"] = settings.normal(40, 50, 60).movedim(-1, 0)
        views["channels_last"] = settings.normal(16, 32, 16, 15).to(memory_format=torch.channels_last)
        views["1-d slice"] = settings.normal(200_000)[::2]
    finding = _no_worse(layer, settings.p, dense, views, "as dense")
    return finding if torch.equal(base, before) else holds_if(False, "changes its input")


def every_dtype(layer: Case, settings: Settings) -> Finding:
    """At p = 0.5 values, gradient, rate and neighbours are no worse than those of float32.

    A rate may be off by the dtype's epsilon, as random numbers of so few bits fall on p itself.
    """
    inputs = {name: settings.normal(512, 512, dtype=dtype) for name, dtype in DTYPES.items()}
    return _no_worse(layer, P_FOR_EQUALITY, inputs["float32"], inputs, "one law")


def _no_worse(layer: Case, p: float, plain: Tensor, inputs: dict[str, Tensor], measured: str) -> Finding:
    """Holds if no input has a kind of fault that ``plain`` lacks; faults of ``plain`` are for other laws."""
    known = _faults(layer, p, plain)
    for name, x in inputs.items():
        for kind, fault in _faults(layer, p, x).items():
            if kind not in known:
                return holds_if(False, f"{name}: {fault}")
    return holds_if(True, measured)


def _faults(layer: Case, p: float, x: Tensor) -> dict[str, str]:
    """What is wrong with a call, by its kind."""
    x = x.detach().requires_grad_()
    y = layer.module(p)(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    x, y = x.detach(), y.detach()
    faults = {
        "values": departure(y, x, scale=layer.mask.scale(p), p_error=P_ERROR),
        "gradient": departure(gradient, torch.ones_like(x), kept=y != 0, scale=scale_of(y, x)),
    }
    if layer.takes_any_shape:  # others may drop neighbours together
        n, count = y.numel(), int((y == 0).sum())
        low, high = binomial_bounds(n, p)
        slack = n * torch.finfo(x.dtype).eps
        if not low - slack <= count <= high + slack:
            faults["rate"] = f"{count / n:#.4g} dropped, not {p:#.4g}"
        near = strongest(neighbouring(y == 0))
        faults["neighbours"] = near.measured if near.verdict.is_breach else None
    return {kind: fault for kind, fault in faults.items() if fault}


def other_devices(layer: Case, settings: Settings) -> Finding:
    """On ``meta``, then as fake tensors: with a device and no values, so that no other device is needed.

    A layer that reads values, as by ``item()``, cannot run there and may be right on a GPU.
    """
    module, inputs = layer.called(settings)
    module, inputs = module.to("meta"), tuple(x.to("meta") for x in inputs)
    try:
        y = first(module(*inputs))
    except (RuntimeError, TypeError) as error:
        if OTHER_DEVICE.search(str(error)):
            return holds_if(False, one_line(error))
        raise NotOfferedError("needs the values") from error
    if not y.is_meta:
        return holds_if(False, f"output on {y.device}")
    try:  # meta accepts two devices in place and in matrix products; fake tensors refuse them
        with fake_tensors():
            module(*inputs)
    except Exception as error:
        if OTHER_DEVICE.search(str(error)):
            return holds_if(False, one_line(error))
    return holds_if(True, "stays there")


def has_images(case: Case) -> bool:
    return case.takes_any_shape or (case.masked is not None and len(case.masked.shape) in (4, 5))


FAMILY = "dtype and layout"
law = partial(Law, FAMILY)
unlike_torch = partial(Law, FAMILY, level=Level.UNLIKE_TORCH)
LAWS = [
    unlike_torch(
        "dtype",
        "float16, bfloat16, float32 and float64 stay what they are",
        dtypes,
        why="A model in half precision computes in float32 from here on, or fails at the next layer.",
    ),
    unlike_torch(
        "autocast",
        "autocast changes no mask",
        autocast,
        why="A run with mixed precision differs from one without by its masks.",
    ),
    unlike_torch(
        "complex",
        "both parts of a complex number are kept or dropped together",
        complex_numbers,
        has_mask,
        why="A complex feature loses its real or imaginary part alone.",
    ),
    unlike_torch(
        "channels_last",
        "output and gradient keep the input's memory format",
        channels_last,
        has_images,
        why="The convolution that follows copies its input or takes a slower path.",
    ),
    unlike_torch(
        "permuted input",
        "output and gradient keep the input's strides",
        permuted,
        has_mask,
        why="A view() that worked before the layer fails after it.",
    ),
    unlike_torch(
        "0-d input",
        "a scalar is dropped or kept, and stays a scalar, or is refused",
        zero_dimensional,
        has_mask,
        why="A loss or a single feature changes its shape.",
    ),
    unlike_torch(
        "empty input",
        "no elements in, none out, forward and backward",
        empty,
        has_mask,
        why="The last, empty batch of a worker or expert stops the run.",
    ),
    law(
        "every dtype",
        "float16, bfloat16, float32 and float64 have masks of the same law, forward and backward",
        every_dtype,
        takes_any_shape,
        why="A model in another precision trains with another kind of noise.",
    ),
    law(
        "other devices",
        "the mask is made where the input is: on meta nothing of another device is mixed in",
        other_devices,
        why="The layer that works on the CPU fails on a GPU.",
    ),
    law(
        "expanded input",
        "every decision of a broadcast view is made for itself",
        expanded,
        has_mask,
        why="Elements that share memory share a decision, or are scaled twice in place.",
    ),
    law(
        "sliced input",
        "strided views and channels_last obey the same law, and a view's base is untouched",
        sliced,
        has_mask,
        why="Elements that the caller did not pass are overwritten, or drop at another rate.",
    ),
]
