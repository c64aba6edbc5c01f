"""Layers as functions: validate, turn ``p`` into a threshold, call the operation."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from thinned import op
from thinned.geometry import Geometry, shared, shared_cached
from thinned.keys import Key
from thinned.state import compiling

__all__ = ["dropout", "keep_mask"]

DTYPES = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128}
)


def dropout(
    x: Tensor,
    p: float = 0.5,
    training: bool = True,
    inplace: bool = False,
    *,
    key: Key | None = None,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Inverted dropout: zero each element with probability ``p``, scale the others so that the mean stays.

    .. math:: y_i = \begin{cases} x_i / q & u(i) < T \\ +0 & \text{otherwise} \end{cases}
        \qquad T = \operatorname{round}((1-p)\,2^{32}), \quad q = T / 2^{32}

    ``u(i)`` is a 32-bit number that depends on the key and on the position ``i`` alone, so nothing is saved
    for the backward pass and every device, process and recomputation draws the same mask.

    Args:
        x: a float16, bfloat16, float32, float64, complex64 or complex128 tensor of any shape and strides.
        p: the probability of dropping an element, in [0, 1].
        training: False returns ``x`` itself, and so does ``p = 0``.
        inplace: write the result over ``x``.
        key: what the mask is a function of: one :class:`~thinned.Key`, or a batch of ``len(x)`` keys, one
            for each row, whose masks then do not depend on the row's place. Without one, a key is drawn from
            torch's default generator of ``x``'s device.
        broadcast_dims: dimensions along which all elements share one decision.

    Returns:
        A tensor of ``x``'s shape, dtype and memory format; ``x`` itself if ``inplace``. A dropped element is
        ``+0``, NaN and infinity included, and so is its gradient.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError: ``x`` is no tensor, or ``key`` no :class:`~thinned.Key`.
        RuntimeError: ``x`` is of another dtype, the keys' shape or device does not fit, or ``x`` cannot be
            written in place.
        IndexError: ``x`` has no such dimension.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15
    (2014), section 4 and, for the scaling during training, section 10.

    >>> import thinned
    >>> thinned.functional.dropout(torch.ones(2, 6), p=0.5, key=thinned.Key(7))
    tensor([[0., 0., 0., 2., 2., 2.],
            [0., 0., 0., 2., 0., 0.]])
    """
    T, scale = _threshold_and_scale(p)
    if getattr(x, "dtype", None) not in DTYPES:
        raise _refusal(x)
    if key is not None:
        _check_key(key, x.shape)
    if not training or p == 0:
        return x
    bits = None if key is None else _bits_for(key, x)
    geometry = None
    if broadcast_dims or (bits is not None and bits.dim()):
        geometry = _geometry(x.shape, tuple(broadcast_dims), 0 if bits is None else bits.dim())
    if inplace:
        return op.masked_affine_(x, bits, geometry, T, scale)
    return op.masked_affine(x, bits, geometry, T, scale)


def keep_mask(
    key: Key,
    shape: Sequence[int],
    p: float,
    *,
    device: torch.device | str | None = None,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    """The mask that :func:`dropout` applies to a tensor of ``shape`` under ``key``: True where it keeps.

    Args:
        key: one key, or a batch of ``shape[0]`` keys.
        shape: the mask's.
        p: the probability of dropping, in [0, 1].
        device: where the mask is made; default: where the key is.
        broadcast_dims: dimensions along which all elements share one decision.

    Returns:
        A bool tensor of ``shape``.

    Raises:
        ValueError, TypeError, RuntimeError, IndexError: as :func:`dropout`.

    >>> import thinned
    >>> thinned.keep_mask(thinned.Key(7), (2, 6), p=0.5).int()
    tensor([[0, 0, 0, 1, 1, 1],
            [0, 0, 0, 1, 0, 0]], dtype=torch.int32)
    """
    T, _ = _threshold_and_scale(p)
    shape = tuple(shape)
    _check_key(key, shape)
    bits = key.bits if device is None else key.bits.to(device)
    return op.keep_mask(bits, shape, shared(shape, broadcast_dims, bits.dim()), T)


def _compute(p: float) -> tuple[int, float]:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    T = round((1 - p) * 2**32)
    return T, 2**32 / T if T else 0.0


_compute_cached = lru_cache(maxsize=1024)(_compute)


def _threshold_and_scale(p: float) -> tuple[int, float]:
    """``T`` and ``1/q`` of the mask's specification."""
    if type(p) is not float:
        p = float(p)
    # Dynamo traces through a cache and says so in a warning.
    return _compute(p) if compiling() else _compute_cached(p)


def _geometry(shape: Sequence[int], broadcast_dims: tuple[int, ...], key_dims: int) -> Geometry:
    if compiling():
        return shared(shape, broadcast_dims, key_dims)
    return shared_cached(shape, broadcast_dims, key_dims)


def _refusal(x: Tensor) -> Exception:
    if not isinstance(x, Tensor):
        return TypeError(f"dropout(): argument 'x' must be Tensor, not {type(x).__name__}")
    return RuntimeError(
        f"dropout needs a floating-point or complex tensor, got {x.dtype} of shape {tuple(x.shape)}; "
        f"accepted: {', '.join(sorted(str(dtype) for dtype in DTYPES))}"
    )


def _check_key(key: Key, shape: Sequence[int]) -> None:
    if not isinstance(key, Key):
        hint = f"; write thinned.Key({key})" if isinstance(key, int) else ""
        raise TypeError(f"key must be a thinned.Key, got {key!r} of type {type(key).__name__}{hint}")
    if key.bits.dim() > 1 or (key.bits.dim() and key.shape[:1] != tuple(shape[:1])):
        rows = f", or a batch of shape ({shape[0]},), one for each row" if shape else ""
        raise RuntimeError(
            f"keys of shape {tuple(key.shape)} do not fit a tensor of shape {tuple(shape)}; "
            f"accepted: one key of shape (){rows}"
        )


def _bits_for(key: Key, x: Tensor) -> Tensor:
    bits = key.bits
    if bits.device != x.device:
        if bits.dim():
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but the keys are on {bits.device} and the "
                f"tensor is on {x.device}; move them with key.to({str(x.device)!r})"
            )
        bits = bits.to(x.device)
    return bits
