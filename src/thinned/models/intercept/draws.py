"""``torch.rand`` and its like, where their numbers are known to decide what is dropped."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from thinned import op
from thinned.geometry import shared
from thinned.key_source import active, refuse_rows
from thinned.keys import Key
from thinned.layers._arguments import key_for
from thinned.models.draws import SINGLE, purpose_of
from thinned.torch_state import MODULE_CALL, compiling, constant_when_compiled, never_inlined, traced_lines

__all__ = ["DRAW_HANDLERS", "running_in_training", "uniform"]

_HERE = str(Path(__file__).parent)
_BITS = {torch.float32: 24, torch.float64: 32, torch.float16: 11, torch.bfloat16: 8}  # as torch.rand has

NextKey = Callable[[], Key | None]


def uniform(like: Tensor, key: Key | None, samples: bool = False) -> Tensor:
    r"""The numbers of ``torch.rand_like(like)`` under a key.

    .. math:: r_i = 1 - \frac{u(i) + 1}{2^{32}}, \text{ rounded down to as many bits as torch.rand has}

    Therefore ``uniform(like, key) >= p`` is ``thinned.keep_mask(key, like.shape, p)``, up to that rounding.

    Args:
        like: gives shape, floating-point dtype and device.
        key: one key; by default that of the active key source, or one drawn from torch's generator.
        samples: whether the key source may have a key for each sample of ``like``.

    >>> import torch, thinned
    >>> key = thinned.Key(7)
    >>> keep = uniform(torch.empty(100), key) >= 0.25
    >>> keep.equal(thinned.keep_mask(key, (100,), 0.25))
    True
    """
    dim = 0
    if samples and key is None and active.key_source is not None:
        dim = active.key_source.sample_dim(like)
    elif key is None:
        refuse_rows(f"random numbers of shape {tuple(like.shape)}")
    moved = like.movedim(dim, 0) if dim else like
    bits = key_for(moved, key, sample_dim=0 if samples else None).bits
    u = op.uniform(bits, moved.shape, shared(moved.shape, (), bits.dim()))
    kept = _BITS[like.dtype]
    r = (~u >> (32 - kept)).to(like.dtype) * 2.0**-kept + 0.5
    return r.movedim(0, dim) if dim else r


# A handler takes the context's ``next_key`` and the arguments of torch's function. It returns None to let
# torch's own function run, as where the numbers are not known to be for a dropout.


def _rand(next_key: NextKey, *size: Any, **options: Any) -> Tensor | None:
    shape = options.pop("size", size)
    if shape and not isinstance(shape[0], int | torch.SymInt):
        (shape,) = shape
    return _new(next_key, tuple(shape), options)


def _rand_like(next_key: NextKey, input: Tensor, **options: Any) -> Tensor | None:
    if input.is_nested:
        return None
    of_input = {"dtype": input.dtype, "device": input.device}
    given = {name: value for name, value in options.items() if value is not None}
    return _new(next_key, input.shape, {**of_input, **given}, samples=input.dim() > 1)


def _new(
    next_key: NextKey, shape: Sequence[int], options: dict[str, Any], samples: bool = False
) -> Tensor | None:
    dtype, device, requires_grad = (options.pop(name, None) for name in ("dtype", "device", "requires_grad"))
    dtype = dtype or torch.get_default_dtype()
    # Other options, such as a generator, are for torch's own function.
    if any(options.values()) or dtype not in _BITS or not _is_for_dropout(shape):
        return None
    like = torch.empty((), dtype=dtype, device=device).expand(shape)
    r = uniform(like, next_key(), samples or _is_of_samples(like))
    return r.requires_grad_() if requires_grad else r


def _bernoulli(next_key: NextKey, input: Tensor, p: Any = None, **options: Any) -> Tensor | None:
    p = input if p is None else p
    return None if _refuses(input, p, options) else _below(p, input, next_key())


def _bernoulli_(next_key: NextKey, input: Tensor, p: Any = 0.5, **options: Any) -> Tensor | None:
    return None if _refuses(input, p, options) else input.copy_(_below(p, input, next_key()))


def _uniform_(next_key: NextKey, input: Tensor, *bounds: float, **options: Any) -> Tensor | None:
    given = dict(zip(("from", "to"), bounds, strict=False))
    low, high = (
        given.get(name, options.pop(name, default)) for name, default in (("from", 0.0), ("to", 1.0))
    )
    if low > high or _refuses(input, 0.5, options):
        return None
    return input.copy_(low + (high - low) * uniform(input, next_key(), _is_of_samples(input)))


def _refuses(input: Tensor, p: Any, options: dict[str, Any]) -> bool:
    in_range = isinstance(p, Tensor) or 0 <= p <= 1  # else torch has the error
    plain = not any(options.values()) and input.dtype in _BITS and not input.is_nested
    return not (in_range and plain and _is_for_dropout(input.shape))


def _below(p: Any, input: Tensor, key: Key | None) -> Tensor:
    """1 where ``u(i) < p * 2**32``: the mask of ``thinned.keep_mask`` with ``1 - p``."""
    like = torch.empty((), dtype=torch.float64, device=input.device).expand(input.shape)
    r = uniform(like, key, _is_of_samples(input))
    return (r >= 1 - (p.double() if isinstance(p, Tensor) else p)).to(input.dtype)


def _is_of_samples(like: Tensor) -> bool:
    """Whether a shape such as (N, 1, 1) says that there is a number for each sample."""
    return like.dim() > 1 and like.numel() == like.shape[0]


DRAW_HANDLERS: dict[Any, Callable[..., Tensor | None]] = {
    torch.rand: _rand,
    torch.rand_like: _rand_like,
    torch.bernoulli: _bernoulli,
    Tensor.bernoulli: _bernoulli,
    Tensor.bernoulli_: _bernoulli_,
    Tensor.uniform_: _uniform_,
}


def _is_for_dropout(shape: Sequence[int]) -> bool:
    single = tuple(shape) in SINGLE
    known = _from_traced_lines(single) if compiling() else None
    return _from_frames(single) if known is None else known


@constant_when_compiled
def _from_traced_lines(single: bool) -> bool | None:
    """None if Dynamo traces this context alone, having left the frame that draws to the interpreter."""
    lines = (place for place in traced_lines() if not place[0].startswith(_HERE))
    return next((bool(purpose_of(*place, single)) for place in lines), None)


@never_inlined
def _from_frames(single: bool) -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_HERE):
        frame = frame.f_back
    purpose = purpose_of(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name, single)
    # Some models draw the number of a layer in evaluation too, and do not use it.
    return running_in_training() if purpose == "layerdrop" else bool(purpose)


def running_in_training() -> bool:
    """Whether the innermost running module is in training; True if none is running."""
    frame = sys._getframe()
    while frame.f_code is not MODULE_CALL:
        if frame.f_back is None:
            return True
        frame = frame.f_back
    return bool(frame.f_locals["self"].training)
