"""Dropout of whole tokens: removed from the sequence, or zeroed in their place."""

from __future__ import annotations

from torch import Tensor, nn

from thinned.functional.arguments import threshold_and_scale
from thinned.functional.tokens import check_prefix, patch_dropout, token_dropout
from thinned.keys import Key

__all__ = ["PatchDropout", "TokenDropout"]


class PatchDropout(nn.Module):
    """:func:`thinned.functional.patch_dropout` as a module, with timm's arguments.

    Args:
        p: the share of tokens to remove, in [0, 1].
        num_prefix_tokens: how many tokens in front always stay, such as a class token.
        ordered: keep the tokens' order; otherwise they come in random order.
        return_indices: return a pair: the tokens, and the indices of the kept ones among those after the
            prefix, or None where nothing was removed. timm's ``PatchDropoutWithIndices`` does so.
        prob: timm's name for ``p``, for calls that were written for it.

    Shape:
        ``(N, L, *)`` becomes ``(N, num_prefix_tokens + k, *)`` in training, with
        ``k = max(1, int((L - num_prefix_tokens) * (1 - p)))``; in evaluation the input comes back.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``num_prefix_tokens`` below 0.
        TypeError: both ``p`` and ``prob``.

    Source: Liu et al., "PatchDropout: economizing vision transformers using patch dropout", WACV 2023,
    section 3; Li et al., "Scaling language-image pre-training via masking", CVPR 2023, section 3.

    >>> import torch, thinned
    >>> x = torch.arange(7.0).view(1, 7, 1)
    >>> thinned.PatchDropout(0.5, ordered=True)(x, key=thinned.Key(3)).flatten()
    tensor([0., 3., 4., 5.])
    """

    def __init__(
        self,
        p: float = 0.5,
        num_prefix_tokens: int = 1,
        ordered: bool = False,
        return_indices: bool = False,
        *,
        prob: float | None = None,
    ) -> None:
        super().__init__()
        if prob is not None:
            if p != 0.5:
                raise TypeError(f"PatchDropout() got p={p} and prob={prob}, two names for one argument")
            p = prob
        threshold_and_scale(p)
        check_prefix(num_prefix_tokens)
        self.p = p
        self.num_prefix_tokens = num_prefix_tokens
        self.ordered = ordered
        self.return_indices = return_indices

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor | tuple[Tensor, Tensor | None]:  # noqa: A002
        return patch_dropout(
            input,
            self.p,
            self.training,
            num_prefix_tokens=self.num_prefix_tokens,
            ordered=self.ordered,
            return_indices=self.return_indices,
            key=key,
        )

    def extra_repr(self) -> str:
        return (
            f"p={self.p}, num_prefix_tokens={self.num_prefix_tokens}, ordered={self.ordered}, "
            f"return_indices={self.return_indices}"
        )


class TokenDropout(nn.Module):
    """:func:`thinned.functional.token_dropout` as a module.

    Args:
        p: the probability of dropping a token, in [0, 1].
        num_prefix_tokens: how many tokens in front are left alone, such as a class token.
        scale: divide what is kept by the keep probability.

    Shape:
        ``(N, L, *)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or ``num_prefix_tokens`` below 0.

    Source: Gal and Ghahramani, "A theoretically grounded application of dropout in recurrent neural
    networks", NIPS 2016, section 4.2, for words; here each place has its own decision.

    >>> import torch, thinned
    >>> thinned.TokenDropout(0.5, num_prefix_tokens=1)(torch.ones(1, 5, 2), key=thinned.Key(3))[..., 0]
    tensor([[1., 0., 2., 2., 2.]])
    """

    def __init__(self, p: float = 0.5, num_prefix_tokens: int = 0, scale: bool = True) -> None:
        super().__init__()
        threshold_and_scale(p)
        check_prefix(num_prefix_tokens)
        self.p = p
        self.num_prefix_tokens = num_prefix_tokens
        self.scale = scale

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return token_dropout(
            input, self.p, self.training, num_prefix_tokens=self.num_prefix_tokens, scale=self.scale, key=key
        )

    def extra_repr(self) -> str:
        return f"p={self.p}, num_prefix_tokens={self.num_prefix_tokens}, scale={self.scale}"
