"""What comes out has the dtype, shape and memory format of what went in."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.compare.laws.law import HALF, Finding, Law, holds_if, nothing_wrong
from thinned.compare.laws.values import departure
from thinned.compare.settings import DTYPES, Settings
from thinned.compare.subjects import Subject

__all__ = ["LAWS"]

SCALAR_CALLS = 64  # at p = 0.5 a scalar is both kept and dropped in them, but for one case in 2^63


def dtypes(subject: Subject, settings: Settings) -> Finding:
    changed = {
        name: str(y.dtype).removeprefix("torch.")
        for name, dtype in DTYPES.items()
        if (y := subject.make(settings.p)(settings.ones(64, dtype=dtype))).dtype != dtype
    }
    return holds_if(not changed, ", ".join(f"{old} → {new}" for old, new in changed.items()) or "kept")


def complex_numbers(subject: Subject, settings: Settings) -> Finding:
    """Both parts of a complex number are kept or dropped together."""
    parts = settings.normal(1000, 2, dtype=torch.float64)
    for dtype in (torch.complex64, torch.complex128):
        x = torch.view_as_complex(parts).to(dtype)
        y = subject.make(settings.p)(x)
        if y.dtype != dtype:
            return holds_if(False, f"{dtype} → {y.dtype}".replace("torch.", ""))
        kept = (y != 0)[:, None].expand(-1, 2)
        if complaint := departure(torch.view_as_real(y), torch.view_as_real(x), kept):
            return holds_if(False, complaint)
    return holds_if(True, "both parts")


def channels_last(subject: Subject, settings: Settings) -> Finding:
    x = settings.normal(4, 8, 6, 5).to(memory_format=torch.channels_last)
    return _same_strides(subject, settings, x)


def permuted(subject: Subject, settings: Settings) -> Finding:
    return _same_strides(subject, settings, settings.normal(20, 30, 40).permute(2, 0, 1))


def _same_strides(subject: Subject, settings: Settings, x: Tensor) -> Finding:
    x.requires_grad_()
    y = subject.make(settings.p)(x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    if complaint := departure(y.detach(), x.detach()):
        return holds_if(False, complaint)
    for name, result in {"output": y, "gradient": gradient}.items():
        if result.stride() != x.stride():
            return holds_if(False, f"{name}'s strides {result.stride()}, not {x.stride()}")
    return holds_if(True, "kept")


def zero_dimensional(subject: Subject, settings: Settings) -> Finding:
    layer, x = subject.make(HALF), torch.tensor(3.0, dtype=settings.dtype, device=settings.device)
    results = [layer(x) for _ in range(SCALAR_CALLS)]
    if any(y.shape != x.shape for y in results):
        return holds_if(False, f"shape () became {tuple(results[0].shape)}")
    values = sorted({float(y) for y in results})
    both = len(values) == 2 and values[0] == 0
    return holds_if(both, " or ".join(f"{value:g}" for value in values))


def empty(subject: Subject, settings: Settings) -> Finding:
    x = settings.ones(0, 3).requires_grad_()
    y = subject.make(settings.p)(x)
    y.sum().backward()
    return holds_if(y.shape == x.shape, f"shape {tuple(y.shape)}")


def expanded(subject: Subject, settings: Settings) -> Finding:
    """One row in memory seen as 64: each of the 64 gets a mask of its own, and the input is untouched."""
    row = settings.normal(1, 1000)
    x, before = row.expand(64, -1), row.clone()
    y = subject.make(HALF)(x)
    if not torch.equal(row, before):
        return holds_if(False, "changes its input")
    if (complaint := departure(y, x)) is None and (y == y[:1]).all():
        complaint = "one mask for all rows"
    return nothing_wrong(complaint, "a mask a row")


def sliced(subject: Subject, settings: Settings) -> Finding:
    """Every second column of a tensor: the columns between them are neither read nor written."""
    whole = settings.normal(60, 80)
    before = whole.clone()
    x = whole[1:, ::2]
    complaint = departure(subject.make(settings.p)(x), x)
    if complaint is None and not torch.equal(whole, before):
        complaint = "changes its input"
    return nothing_wrong(complaint, "base untouched")


FAMILY = "dtype and layout"
LAWS = [
    Law(FAMILY, "dtype", "float16, bfloat16, float32 and float64 stay what they are", dtypes),
    Law(FAMILY, "complex", "both parts of a complex number are kept or dropped together", complex_numbers),
    Law(FAMILY, "channels_last", "output and gradient keep the input's memory format", channels_last),
    Law(FAMILY, "permuted input", "output and gradient keep the input's strides", permuted),
    Law(FAMILY, "0-d input", "a scalar is dropped or kept, and stays a scalar", zero_dimensional),
    Law(FAMILY, "empty input", "no elements in, none out, forward and backward", empty),
    Law(FAMILY, "expanded input", "every element of a broadcast view is decided for itself", expanded),
    Law(FAMILY, "sliced input", "a strided view gives the same law, and its base is untouched", sliced),
]
