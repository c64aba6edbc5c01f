"""Several dropout samples of the same features."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.functional.arguments import apply, check_input, key_for, threshold_and_scale
from thinned.keys import Key

__all__ = ["check_samples", "multi_sample_dropout"]


def multi_sample_dropout(
    input: Tensor,  # noqa: A002
    p: float = 0.5,
    samples: int = 8,
    training: bool = True,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""``samples`` independent dropouts of the same features, along a new first dimension.

    .. math:: y_{m,i} = \begin{cases} x_i / q & u_m(i) < T \\ +0 & \text{otherwise} \end{cases}

    Sample ``m`` is ``dropout(input, p, key=key.fold(m))``, however many there are. The features are not
    copied before, and nothing but the keys is saved for the backward pass.

    Args:
        input: a floating-point or complex tensor of any shape.
        p: the probability of dropping an element, in [0, 1].
        samples: how many; at least 1.
        training: False returns ``samples`` times ``input`` in a view without memory of its own, and so does
            ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of shape ``(samples, *input.shape)`` and ``input``'s dtype.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``samples`` below 1.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`.

    Source: Inoue, "Multi-sample dropout for accelerated training and better generalization", 2019, section 3.

    >>> import torch, thinned
    >>> thinned.functional.multi_sample_dropout(torch.ones(6), samples=3, key=thinned.Key(3))
    tensor([[0., 0., 0., 2., 2., 2.],
            [2., 2., 0., 2., 0., 0.],
            [0., 2., 0., 0., 2., 2.]])
    """
    T, scale = threshold_and_scale(p)
    check_samples(samples)
    check_input("multi_sample_dropout", input, key, dense=True)
    stacked = input.expand(samples, *input.shape)
    if not training or p == 0:
        return stacked
    key = key_for(input, key)
    samples_of = torch.arange(samples, device=key.bits.device)
    keys = key.fold(samples_of.view(-1, *(1,) * key.bits.dim()))
    return apply(stacked, keys, (), False, T, scale)


def check_samples(samples: int) -> None:
    """ValueError for fewer than one."""
    if samples < 1:
        raise ValueError(f"samples has to be at least 1, but got {samples}")
