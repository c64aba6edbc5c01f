"""Dropout inside attention: of whole heads, and of keys before the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from thinned.functional.arguments import threshold_and_scale
from thinned.functional.attention import check_normalize, drop_head, drop_key
from thinned.keys import Key

__all__ = ["DropHead", "DropKey"]


class DropHead(nn.Module):
    """:func:`thinned.functional.drop_head` as a module.

    Args:
        p: the probability of dropping a head, in [0, 1].
        dim: the heads' dimension.
        normalize: ``"kept"``, by the share of heads that a sample has kept, as the paper does, or
            ``"expected"``, by the probability of keeping.

    Shape:
        ``(N, H, L, D)``, or any other whose dimension 0 is the sample's and ``dim`` the heads'; the output
        has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or another ``normalize``.

    Source: Zhou et al., "Scheduled DropHead: a regularization method for transformer models", Findings of
    EMNLP 2020, section 3.

    >>> import torch, thinned
    >>> thinned.DropHead(0.5)(torch.ones(2, 3, 1, 2), key=thinned.Key(3)).flatten(1)
    tensor([[0., 0., 0., 0., 3., 3.],
            [1., 1., 1., 1., 1., 1.]])
    """

    def __init__(self, p: float = 0.5, dim: int = 1, normalize: Literal["kept", "expected"] = "kept") -> None:
        super().__init__()
        threshold_and_scale(p)
        check_normalize(normalize)
        self.p = p
        self.dim = dim
        self.normalize = normalize

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return drop_head(input, self.p, self.training, dim=self.dim, normalize=self.normalize, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}, dim={self.dim}, normalize={self.normalize!r}"


class DropKey(nn.Module):
    """:func:`thinned.functional.drop_key` as a module: it stands right before the softmax.

    Args:
        p: the probability of dropping, in [0, 1].
        broadcast_dims: dimensions along which all share one decision; none, as in the paper, gives each
            query of each head keys of its own.

    Shape:
        logits such as ``(N, H, L_q, L_k)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Li et al., "DropKey for vision transformer", CVPR 2023, section 3 and algorithm 1.

    >>> import torch, thinned
    >>> thinned.DropKey(0.5)(torch.zeros(2, 4), key=thinned.Key(3)).softmax(-1)
    tensor([[0.0000, 0.0000, 0.5000, 0.5000],
            [0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def __init__(self, p: float = 0.5, broadcast_dims: Sequence[int] = ()) -> None:
        super().__init__()
        threshold_and_scale(p)
        self.p = p
        self.broadcast_dims = tuple(broadcast_dims)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return drop_key(input, self.p, self.training, broadcast_dims=self.broadcast_dims, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}, broadcast_dims={self.broadcast_dims}"
