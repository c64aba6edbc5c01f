"""Dropout by Gaussian noise, of a given variance or of one that is learned."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from thinned.functional.arguments import check_input, key_for, threshold_and_scale
from thinned.functional.learned import Noisy, apply_noisy, check_parameter
from thinned.functional.noise import multiply, normal, opmath
from thinned.keys import Key
from thinned.linear import apply_linear
from thinned.nested import elementwise, refuse

__all__ = ["check_gaussian_p", "gaussian_dropout", "variational_dropout", "variational_kl"]


def gaussian_dropout(
    input: Tensor,  # noqa: A002
    p: float = 0.5,
    training: bool = True,
    *,
    key: Key | None = None,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Multiply each element by normal noise with the mean and the variance of a dropout mask.

    .. math:: y_i = x_i\,(1 + \sigma z(i)), \qquad \sigma^2 = \frac{p}{1-p}, \qquad z(i) \sim N(0, 1)

    ``z`` is the normal quantile of a 32-bit number that depends on the key and on the position alone
    (:func:`thinned.functional.noise.normal`), so nothing is saved for the backward pass. Its float32 tails
    end at 5.42 standard deviations. The product is computed in float32 (in float64 for float64 tensors) and
    rounded once. The numbers are the same bits on every device; their quantiles come from the device's own
    ``erfinv``, which rounds in its own way.

    Args:
        input: a floating-point or complex tensor of any shape; both parts of a complex number share a factor.
        p: the probability of dropping in the dropout that this stands for, in [0, 1): what Keras calls
            ``rate``. At 1 the variance is infinite.
        training: False returns ``input`` itself, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.
        broadcast_dims: dimensions along which all elements share one factor.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        ValueError: ``p`` outside [0, 1) or NaN.
        TypeError, RuntimeError, IndexError: as :func:`~thinned.functional.dropout`.

    Source: Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR 15
    (2014), section 10; the layer is Keras's ``GaussianDropout``.

    >>> import torch, thinned
    >>> thinned.functional.gaussian_dropout(torch.ones(2, 3), p=0.2, key=thinned.Key(7))
    tensor([[1.4069, 1.4040, 1.8044],
            [0.6572, 0.1779, 0.5731]])
    """
    p = check_gaussian_p(p)
    check_input("gaussian_dropout", input, key)
    if not training or p == 0:
        return input
    if input.is_nested:
        if broadcast_dims:
            refuse(
                f"gaussian_dropout with broadcast_dims {tuple(broadcast_dims)}", input, "no broadcast_dims"
            )
        return elementwise(
            "gaussian_dropout", partial(gaussian_dropout, p=p), input, key_for(input, key, elementwise=True)
        )
    noisy = partial(_times_normal, sigma=math.sqrt(p / (1 - p)), broadcast_dims=tuple(broadcast_dims))
    return apply_linear(noisy, input, key_for(input, key, elementwise=True))


def check_gaussian_p(p: float) -> float:
    """``p`` as a float; ValueError outside [0, 1)."""
    p = float(p)
    threshold_and_scale(p)
    if p == 1:
        raise ValueError(
            f"Gaussian dropout's probability has to be below 1, but got {p}: the variance p / (1 - p) of its "
            "noise is infinite there"
        )
    return p


def _times_normal(x: Tensor, key: Key, sigma: float, broadcast_dims: tuple[int, ...]) -> Tensor:
    noise = normal(key, x.shape, dtype=opmath(x.dtype), broadcast_dims=broadcast_dims)
    return multiply(x, noise.mul_(sigma).add_(1)).to(x.dtype)


def variational_dropout(
    input: Tensor,  # noqa: A002
    log_alpha: Tensor,
    training: bool = True,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Multiply each element by normal noise whose variance is learned.

    .. math:: y_i = x_i\,(1 + \sqrt\alpha\, z(i)), \qquad z(i) \sim N(0, 1)

    The noise is made again for the backward pass, which is exact in ``input`` and in ``log_alpha``; what is
    saved is these two. :func:`gaussian_dropout` has the same noise at ``alpha = p / (1 - p)``.

    Args:
        input: a floating-point or complex tensor of any shape.
        log_alpha: the logarithm of the noise's variance, in a shape that broadcasts to ``input``'s.
        training: False returns ``input`` itself.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        TypeError: ``input`` or ``log_alpha`` is no tensor, or ``key`` no :class:`~thinned.Key`.
        RuntimeError: as :func:`~thinned.functional.dropout`; ``log_alpha`` does not broadcast to ``input``.

    Source: Kingma, Salimans and Welling, "Variational dropout and the local reparameterization trick",
    NeurIPS 2015, sections 3.1 to 3.3.

    >>> import torch, thinned
    >>> thinned.functional.variational_dropout(torch.ones(2, 3), torch.tensor(0.25).log(), key=thinned.Key(7))
    tensor([[1.4069, 1.4040, 1.8044],
            [0.6572, 0.1779, 0.5731]])
    """
    check_input("variational_dropout", input, key)
    log_alpha = check_parameter("variational_dropout", "log_alpha", log_alpha, input)
    if not training:
        return input
    if input.is_nested:
        if log_alpha.dim():
            refuse(
                f"variational_dropout with log_alpha of shape {tuple(log_alpha.shape)}",
                input,
                "one log_alpha",
            )
        noisy = partial(variational_dropout, log_alpha=log_alpha)
        return elementwise("variational_dropout", noisy, input, key_for(input, key, elementwise=True))
    return apply_noisy(_VARIATIONAL, input, log_alpha, key_for(input, key, elementwise=True))


def _normal(key: Key, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return normal(key, shape, dtype=dtype)


def _factor(noise: Tensor, log_alpha: Tensor, out: Tensor | None) -> Tensor:
    return torch.mul(noise, (0.5 * log_alpha).exp(), out=out).add_(1)


def _factor_and_slope(noise: Tensor, log_alpha: Tensor, out: Tensor | None) -> tuple[Tensor, Tensor]:
    deviation = torch.mul(noise, (0.5 * log_alpha).exp(), out=out)
    return 1 + deviation, deviation.mul_(0.5)


_VARIATIONAL = Noisy(_normal, _factor, _factor_and_slope)

# -KL = log(alpha) / 2 - E log|e| + constant, for e ~ N(1, alpha). With this one it vanishes as alpha grows.
_CONSTANT = -(0.5772156649015329 + math.log(2)) / 2


def variational_kl(
    log_alpha: Tensor, approximation: Literal["polynomial", "sigmoid"] = "polynomial"
) -> Tensor:
    r"""How far the noise of one variable is from the log-uniform prior, in nats.

    .. math:: -\mathrm{KL} \approx \tfrac12\log\alpha + c_1\alpha + c_2\alpha^2 + c_3\alpha^3 + C
        \qquad\text{("polynomial")}

    .. math:: -\mathrm{KL} \approx k_1\,\operatorname{sigmoid}(k_2 + k_3\log\alpha)
        - \tfrac12\log(1 + 1/\alpha) - k_1 \qquad\text{("sigmoid")}

    The divergence from an improper prior is known up to a constant; here it is the one at which the
    divergence vanishes as ``alpha`` grows, :math:`C = -(\gamma + \log 2)/2`, so that both forms agree.

    Args:
        log_alpha: the logarithm of the noise's variance, of any shape.
        approximation: ``"polynomial"``, Kingma et al.'s, is for ``alpha <= 1``, where it is at most 0.04 off,
            and useless above; ``"sigmoid"``, Molchanov et al.'s, is at most 0.01 off for every ``alpha``.

    Returns:
        The divergence of one variable for each ``alpha``, in a tensor of ``log_alpha``'s shape and dtype.

    Raises:
        ValueError: another ``approximation``.

    Source: Kingma et al., NeurIPS 2015, section 3.3 and appendix C; Molchanov, Ashukha and Vetrov,
    "Variational dropout sparsifies deep neural networks", ICML 2017, section 4.2.

    >>> import torch, thinned
    >>> log_alpha = torch.tensor([0.01, 0.1, 1.0]).log()
    >>> thinned.functional.variational_kl(log_alpha)
    tensor([2.9263, 1.6848, 0.3895])
    >>> thinned.functional.variational_kl(log_alpha, "sigmoid")
    tensor([2.9390, 1.7235, 0.4312])
    """
    if approximation == "polynomial":
        alpha = log_alpha.exp()
        rest = alpha * (1.16145124 + alpha * (-1.50204118 + alpha * 0.58629921))
        return -(0.5 * log_alpha + rest + _CONSTANT)
    if approximation == "sigmoid":
        k1, k2, k3 = 0.63576, 1.87320, 1.48695
        softplus = torch.nn.functional.softplus(-log_alpha)
        return k1 * torch.sigmoid(-k2 - k3 * log_alpha) + 0.5 * softplus
    raise ValueError(f"approximation has to be either 'polynomial' or 'sigmoid', but got {approximation!r}")
