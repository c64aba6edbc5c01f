"""Alpha dropout, of elements and of whole channels."""

from __future__ import annotations

import torch
from torch import Tensor

from thinned.functional.alpha import alpha_dropout, feature_alpha_dropout
from thinned.functional.arguments import threshold_and_scale
from thinned.keys import Key

__all__ = ["AlphaDropout", "FeatureAlphaDropout"]


class AlphaDropout(torch.nn.AlphaDropout):
    r""":func:`thinned.functional.alpha_dropout` as a module: :class:`torch.nn.AlphaDropout` with a key.

    .. math:: y_i = a \cdot (x_i \text{ with probability } q = 1 - p \text{, else } -\alpha') + a \alpha' p
        \qquad a = \frac{1}{\sqrt{q\,(1 + \alpha'^2 p)}}, \quad \alpha' = 1.7580993408473766

    Args:
        p: the probability of dropping an element, in [0, 1].
        inplace: write the result over the input; PyTorch's module takes this argument and ignores it.

    Shape:
        any; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, section 3.

    >>> import torch, thinned
    >>> thinned.AlphaDropout(0.5)(torch.zeros(6), key=thinned.Key(7))
    tensor([-0.7792, -0.7792, -0.7792,  0.7792,  0.7792,  0.7792])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return alpha_dropout(input, self.p, self.training, self.inplace, key=key)


class FeatureAlphaDropout(torch.nn.FeatureAlphaDropout):
    r""":func:`thinned.functional.feature_alpha_dropout` as a module: torch.nn's with a key.

    .. math:: y_{nc*} = a \cdot (x_{nc*} \text{ with probability } q = 1 - p \text{, else } -\alpha')
        + a \alpha' p

    with the constants of :class:`AlphaDropout`, and one decision for each ``(n, c)``.

    Args:
        p: the probability of dropping a channel, in [0, 1].
        inplace: write the result over the input; PyTorch's module takes this argument and ignores it.

    Shape:
        ``(N, C, *)``; the output has the input's shape, dtype and memory format.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Klambauer et al., "Self-normalizing neural networks", NeurIPS 2017, section 3; Tompson et al.,
    "Efficient object localization using convolutional networks", CVPR 2015, section 3.2.

    >>> import torch, thinned
    >>> thinned.FeatureAlphaDropout(0.5)(torch.zeros(1, 4, 2), key=thinned.Key(3))
    tensor([[[-0.7792, -0.7792],
             [-0.7792, -0.7792],
             [ 0.7792,  0.7792],
             [ 0.7792,  0.7792]]])
    """

    def __init__(self, p: float = 0.5, inplace: bool = False) -> None:
        threshold_and_scale(p)
        super().__init__(p, inplace)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:  # noqa: A002
        return feature_alpha_dropout(input, self.p, self.training, self.inplace, key=key)
