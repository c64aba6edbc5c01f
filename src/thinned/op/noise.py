"""Random numbers as functions of a key and a position: uniform, normal, logistic."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from thinned import op
from thinned.distributed.shards import is_dtensor
from thinned.geometry import dims_of, shared
from thinned.keys import Key, StratifiedKey
from thinned.torch_state import is_eager

__all__ = ["logistic", "multiply", "normal", "numbers", "opmath", "uniform"]


def numbers(key: Key, like: Tensor | Sequence[int], broadcast_dims: Sequence[int] = ()) -> Tensor:
    """``u(i) - 2**31`` as int32, or ``u'(i, s) - 2**31`` of a stratified key's draw.

    The arguments are those of :func:`uniform`.
    """
    shape = like.shape if isinstance(like, Tensor) else like
    key_dims = key.bits.dim()
    single = dims_of(shape, broadcast_dims).difference(range(key_dims))
    drawn = tuple(1 if dim in single else size for dim, size in enumerate(shape))
    geometry = shared(shape, broadcast_dims, key_dims)
    bits, draw, strata = (
        (key.of, key.draw, key.strata) if isinstance(key, StratifiedKey) else (key.bits, None, 1)
    )
    if isinstance(like, Tensor) and is_dtensor(like):
        return op.uniform_for(like, bits, drawn, geometry, draw, strata)
    return op.uniform(bits, drawn, geometry, draw, strata)


def uniform(
    key: Key,
    like: Tensor | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Uniform numbers, none of which is 0 or 1.

    .. math:: (u(i) + 1/2) / 2^{32}

    In float32 the numbers are pulled towards 1/2 by ``2**-24`` of their distance, so that they end at
    ``2**-24`` and ``1 - 2**-24`` and cannot be 0 or 1.

    Args:
        key: one key, or a batch of ``shape[0]`` keys.
        like: a tensor that the numbers broadcast to, or its shape. For a DTensor they are one, sharded alike.
        dtype: float32 or float64.
        broadcast_dims: dimensions along which all elements share one number; they have size 1 in the result.

    >>> import thinned
    >>> uniform(thinned.Key(7), (2, 3))
    tensor([[0.7921, 0.7905, 0.9462],
            [0.2465, 0.0501, 0.1966]])
    """
    return _centred(key, like, dtype, broadcast_dims, 0.5, 2**-23).add_(0.5)


def normal(
    key: Key,
    like: Tensor | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Standard normal numbers, by the inverse of their distribution function.

    .. math:: z(i) = \sqrt 2\,\operatorname{erfinv}(v(i)), \qquad v(i) = (u(i) + 1/2) / 2^{31} - 1

    In float32 ``v`` is ``2**-23`` off at most, and ``z``, at most 3 ulp from the quantile of that ``v``, ends
    at 5.42, beyond which lie 6e-8 of the law. In float64 ``v`` is exact, and ``z`` ends at 6.34.

    The arguments are those of :func:`uniform`.

    >>> import thinned
    >>> normal(thinned.Key(7), (2, 3))
    tensor([[ 0.8138,  0.8080,  1.6088],
            [-0.6857, -1.6442, -0.8538]])
    """
    return _centred(key, like, dtype, broadcast_dims).erfinv_().mul_(math.sqrt(2))


def logistic(
    key: Key,
    like: Tensor | Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Standard logistic numbers, the logits of uniform ones.

    .. math:: l(i) = \log\frac{1 + v(i)}{1 - v(i)}, \qquad v(i) = (u(i) + 1/2) / 2^{31} - 1

    In float32 ``v`` is ``2**-23`` off at most, and ``l`` ends at 17.3, beyond which lie 6e-8 of the law; in
    float64 it ends at 22.9.

    The arguments are those of :func:`uniform`.

    >>> import thinned
    >>> logistic(thinned.Key(7), (2, 3))
    tensor([[ 1.3377,  1.3277,  2.8666],
            [-1.1176, -2.9431, -1.4077]])
    """
    centred = _centred(key, like, dtype, broadcast_dims)
    above = 1 + centred
    # Not torch.logit or atanh: their vector tail rounds differently, so a row would depend on its place.
    return above.div_(centred.neg_().add_(1)).log_()


def multiply(x: Tensor, factor: Tensor) -> Tensor:
    """``x * factor`` in the factor's dtype. May overwrite ``factor``."""
    same = factor.dtype == x.dtype and factor.shape == x.shape
    if same and not torch.is_grad_enabled() and is_eager(x) and x.is_contiguous():
        return factor.mul_(x)  # not for a subclass of Tensor, whose result has to be one too
    if x.is_complex() and not factor.is_complex():
        # torch would multiply by factor + 0j, and infinity times 0 is NaN.
        return torch.view_as_complex(torch.view_as_real(x.resolve_conj()) * factor.unsqueeze(-1))
    return x * factor


def opmath(dtype: torch.dtype) -> torch.dtype:
    """The dtype that numbers of ``dtype`` are computed in."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _centred(
    key: Key,
    like: Tensor | Sequence[int],
    dtype: torch.dtype,
    broadcast_dims: Sequence[int],
    half_width: float = 1.0,
    shrink: float = 2**-24,
) -> Tensor:
    """``((u + 1/2) / 2**31 - 1) * half_width``, in float32 pulled towards 0 by ``shrink`` of it.

    Otherwise the outermost numbers would be rounded to the ends, where a quantile is infinite.
    """
    u = numbers(key, like, broadcast_dims).to(dtype)
    inside = 1 - shrink if dtype == torch.float32 else 1.0
    return u.add_(0.5).mul_(2**-31 * half_width * inside)
