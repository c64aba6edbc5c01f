"""Dropout of single weights."""

from __future__ import annotations

from torch import Tensor

from thinned.functional.arguments import apply, check_input, check_key, threshold_and_scale
from thinned.keys import Key

__all__ = ["check_one_key", "drop_connect"]


def drop_connect(
    input: Tensor,  # noqa: A002
    p: float = 0.5,
    training: bool = True,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Drop each connection of a weight with probability ``p``.

    .. math:: \tilde W_{ij} = \begin{cases} W_{ij} / q & u(i, j) < T \\ +0 & \text{otherwise} \end{cases}

    so that the mean of :math:`\tilde W x` over masks is :math:`W x`, which is what evaluation computes. (Wan
    et al. divide by nothing in training, and in evaluation sample from the normal law that has the output's
    mean and variance. What some libraries call drop connect is :func:`~thinned.functional.drop_path`.)

    Args:
        input: a weight, or a bias: a floating-point or complex tensor of any shape.
        p: the probability of dropping a connection, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format, whose mask a batch of inputs shares. For the
        paper's mask for each example, map over the batch, as below.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`.

    Source: Wan et al., "Regularization of neural networks using DropConnect", ICML 2013, section 3.

    >>> import torch, thinned
    >>> from thinned.functional import drop_connect
    >>> weight = torch.ones(2, 6)
    >>> drop_connect(weight, p=0.5, key=thinned.Key(7))
    tensor([[0., 0., 0., 2., 2., 2.],
            [0., 0., 0., 2., 0., 0.]])
    >>> def example(x):
    ...     return torch.nn.functional.linear(x, drop_connect(weight, p=0.5))
    >>> torch.vmap(example, randomness="different")(torch.ones(3, 6)).shape
    torch.Size([3, 2])
    """
    T, scale = threshold_and_scale(p)
    check_input("drop_connect", input, key)
    if not training or p == 0:
        return input
    return apply(input, key, (), False, T, scale, rows=None)


def check_one_key(key: Key) -> None:
    """Raise if ``key`` is no key, or a batch of keys, for weights that all samples share."""
    if isinstance(key, Key) and key.shape:
        raise RuntimeError(
            f"keys of shape {tuple(key.shape)} do not fit a weight that all samples share; "
            "accepted: one key of shape ()"
        )
    check_key(key, ())
