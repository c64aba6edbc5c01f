"""Gaussian noise as dropout: GaussianDropout of a given variance, VariationalDropout of a learned one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary, has_torch_function_variadic

from thinned.checks import check_integer, check_real, got, integers
from thinned.geometry import dims_of
from thinned.keys import Key
from thinned.layers._arguments import check_p, check_parameter, check_tensor, drops, key_for, number
from thinned.layers._module import Layer, checked_dims
from thinned.layers._overrides import module_node, overridden
from thinned.layers._torchscript import Scriptable, operation
from thinned.nested import elementwise, refuse
from thinned.op.from_key import apply_linear, modes_of
from thinned.op.learned import Noisy, apply_noisy
from thinned.op.noise import multiply, normal, opmath
from thinned.torch_state import compiling

__all__ = [
    "GaussianDropout",
    "VariationalDropout",
    "gaussian_dropout",
    "variational_dropout",
    "variational_kl",
]


def gaussian_dropout(
    input: Tensor,
    p: float = 0.5,
    *,
    training: bool = True,
    key: Key | None = None,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Multiply each element by normal noise with the mean and the variance of a dropout mask.

    .. math:: y_i = x_i\,(1 + \sigma z(i)), \qquad \sigma^2 = \frac{p}{1-p}, \qquad z(i) \sim N(0, 1)

    ``z`` is the normal quantile of a 32-bit number that depends on the key and on the position alone
    (:func:`thinned.op.noise.normal`), so nothing is saved for the backward pass. The 32-bit numbers are the
    same on every device, but the device's own ``erfinv`` rounds the quantiles, which end at 5.42 standard
    deviations in float32. The product is computed in float32 (float64 for float64 tensors) and rounded once.

    Args:
        input: a floating-point or complex tensor of any shape; both parts of a complex number share a factor.
        p: the probability of dropping in the dropout that the noise stands for, in [0, 1); Keras's ``rate``.
            At 1 the variance is infinite.
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
    if has_torch_function_unary(input) and not compiling():
        return overridden(gaussian_dropout, locals())
    p = _check_gaussian_p(p)
    if not drops("gaussian_dropout", input, p, training, key):
        return input
    dims = integers("broadcast_dims", broadcast_dims)
    shared_dims: set[int] = set()
    if not input.is_nested:
        shared_dims = dims_of(input.shape, dims)  # raises before a key is drawn
    elif dims:
        refuse(f"gaussian_dropout with broadcast_dims {dims}", input, "no broadcast_dims")
    key = key_for(input, key, shared_dims=shared_dims, elementwise=True)
    if input.is_nested:
        return elementwise("gaussian_dropout", partial(gaussian_dropout, p=p), input, key)
    sigma = math.sqrt(p / (1 - p))

    def times_noise(x: Tensor, key: Key) -> Tensor:
        noise = normal(key, x, dtype=opmath(x.dtype), broadcast_dims=dims)
        return multiply(x, noise.mul_(sigma).add_(1)).to(x.dtype)

    return apply_linear(times_noise, input, key)


def _check_gaussian_p(p: float) -> float:
    check_p(p)
    p = float(p)
    if p == 1:
        raise ValueError(
            f"Gaussian dropout's probability has to be below 1, but got {p}: the variance p / (1 - p) of its "
            "noise is infinite there"
        )
    return p


class GaussianDropout(Layer):
    """Multiply by normal noise with the mean and the variance of :class:`Dropout`'s mask.

    Use this layer as a replacement of :class:`Dropout` with the same p: the paper finds it as good or better,
    and no element becomes 0. For a variance that is learned use :class:`VariationalDropout`.

    :func:`thinned.functional.gaussian_dropout` has the formula.

    Source: Srivastava et al., JMLR 15 (2014), section 10.

    >>> import thinned
    >>> thinned.GaussianDropout(0.2)(torch.ones(3), key=thinned.Key(7))
    tensor([1.4069, 1.4040, 1.8044])
    """

    broadcast_dims: Sequence[int] = ()  # on the class, so that layers pickled without it still run

    def __init__(self, p: float = 0.5, *, broadcast_dims: Sequence[int] = ()) -> None:
        super().__init__(p)
        _check_gaussian_p(p)
        if dims := checked_dims(broadcast_dims):
            self.broadcast_dims = dims

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return gaussian_dropout(
            input, self.p, training=self.training, key=key, broadcast_dims=self.broadcast_dims
        )


def variational_dropout(
    input: Tensor, log_alpha: Tensor, *, training: bool = True, key: Key | None = None
) -> Tensor:
    r"""Multiply each element by normal noise whose variance is learned.

    .. math:: y_i = x_i\,(1 + \sqrt\alpha\, z(i)), \qquad z(i) \sim N(0, 1)

    Backward regenerates the noise, so only ``input`` and ``log_alpha`` are saved; both gradients are exact.
    :func:`gaussian_dropout` has the same noise at ``alpha = p / (1 - p)``.

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
    if has_torch_function_variadic(input, log_alpha) and not compiling():
        return overridden(variational_dropout, locals())
    if not drops("variational_dropout", input, 1.0, training, key):
        return input
    log_alpha = check_parameter("variational_dropout", "log_alpha", log_alpha, input)
    if input.is_nested and log_alpha.dim():
        unfit = f"log_alpha of shape {tuple(log_alpha.shape)}"
        refuse(f"variational_dropout with {unfit}", input, "one log_alpha")
    key = key_for(input, key, elementwise=True)
    if input.is_nested:
        noisy = partial(variational_dropout, log_alpha=log_alpha)
        return elementwise("variational_dropout", noisy, input, key)
    return apply_noisy(_VARIATIONAL, input, log_alpha, key)


def _deviation(noise: Tensor, log_alpha: Tensor, inplace: bool) -> Tensor:
    return torch.mul(noise, (0.5 * log_alpha).exp(), out=noise if inplace else None)


def _factor(noise: Tensor, log_alpha: Tensor, inplace: bool) -> Tensor:
    return _deviation(noise, log_alpha, inplace).add_(1)


def _factor_and_slope(noise: Tensor, log_alpha: Tensor, inplace: bool) -> tuple[Tensor, Tensor]:
    deviation = _deviation(noise, log_alpha, inplace)
    return 1 + deviation, deviation.mul_(0.5)


_VARIATIONAL = Noisy(lambda key, x, dtype: normal(key, x, dtype=dtype), _factor, _factor_and_slope)


class VariationalDropout(Scriptable):
    """Gaussian dropout whose variance is learned, as the parameter ``log_alpha``.

    Use this layer to learn how much noise the network, each channel or each feature bears, instead of a
    search over p. For a fixed variance use :class:`GaussianDropout`, for masks that are almost binary
    :class:`ConcreteDropout`.

    :func:`thinned.functional.variational_dropout` has the formula.

    Add :meth:`kl` to the loss: the divergence, in nats, of one noise variable from its prior. A layer of
    ``K`` inputs and one ``alpha`` has ``K`` such variables, one for each row of the weights that follow. A
    loss that is the mean over ``N`` training examples takes their sum over ``N``::

        loss = criterion(model(x), y) + K * drop.kl().sum() / N    # one alpha
        loss = criterion(model(x), y) + drop.kl().sum() / N        # one for each of K features

    Args:
        p: what ``alpha`` starts from, as ``p / (1 - p)``.
        num_features: the shape of ``log_alpha``, which has to broadcast to the input's: ``None`` for one
            ``alpha``, a number for one for each place in the last dimension, or several sizes, such as
            ``(C, 1, 1)`` for one for each channel.
        max_alpha: the bound of ``alpha``: above 1, which is p = 0.5, the authors found the gradients too
            noisy. At the bound ``log_alpha`` has a gradient only where a step leads back below. ``inf`` for
            no bound, with ``kl("sigmoid")``.
        device, dtype: of ``log_alpha``.

    Attributes:
        log_alpha: the parameter, of shape ``(1,)`` or of ``num_features``.
        initial_p: the probability that :meth:`reset_parameters` restores.

    Raises:
        ValueError: ``p`` is not above 0 and below 1, or its ``alpha`` is above ``max_alpha``.

    Source: Kingma, Salimans and Welling, NeurIPS 2015, sections 3.1 to 3.3.

    >>> import thinned
    >>> drop = thinned.VariationalDropout(0.2)
    >>> drop(torch.ones(3), key=thinned.Key(7)).detach(), drop.kl().detach()
    (tensor([1.4069, 1.4040, 1.8044]), tensor([1.1227]))
    """

    def __init__(
        self,
        p: float = 0.5,
        *,
        num_features: int | Sequence[int] | None = None,
        max_alpha: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        p = number(p)
        if not 0 < p < 1:
            raise ValueError(
                f"the initial dropout probability p has to be above 0 and below 1, but got {p}: the "
                "logarithm of alpha = p / (1 - p) is learned"
            )
        check_real("max_alpha", max_alpha)
        alpha = p / (1 - p)
        if not alpha <= max_alpha:
            raise ValueError(
                f"alpha = p / (1 - p) has to be at most max_alpha={max_alpha}, but p={p} gives {alpha}"
            )
        self.initial_p = float(p)
        self.max_alpha = max_alpha
        if isinstance(num_features, Sequence):
            shape = num_features
        else:
            shape = (1 if num_features is None else num_features,)
        for size in shape:
            check_integer("num_features", size, least=0)
        self.log_alpha = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let ``p`` be ``initial_p`` again."""
        nn.init.constant_(self.log_alpha, math.log(self.initial_p / (1 - self.initial_p)))

    __jit_unused_properties__ = ("alpha", "p")

    @property
    def alpha(self) -> Tensor:
        """The variance of the noise."""
        return self._bounded().exp()

    @property
    def p(self) -> Tensor:
        """The probability of dropping in a dropout of this variance."""
        return torch.sigmoid(self._bounded())

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return input
        log_alpha = torch.ops.thinned.at_most(self.log_alpha, math.log(self.max_alpha))
        return torch.ops.thinned.variational_dropout(input, log_alpha)  # type: ignore[no-any-return]

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        log_alpha = self._bounded() if self.training else self.log_alpha
        return variational_dropout(input, log_alpha, training=self.training, key=key)

    def kl(self, approximation: Literal["polynomial", "sigmoid"] = "polynomial") -> Tensor:
        """:func:`thinned.functional.variational_kl` of one variable for each ``alpha``.

        Raises:
            ValueError: another ``approximation``, or ``"polynomial"`` with a ``max_alpha`` above 1.
        """
        if approximation == "polynomial" and self.max_alpha > 1:
            raise ValueError(
                f"the polynomial approximation is for alpha up to 1, but max_alpha is {self.max_alpha}; "
                'take kl("sigmoid")'
            )
        return variational_kl(self._bounded(), approximation)

    def _bounded(self) -> Tensor:
        if self.max_alpha == math.inf:
            return self.log_alpha
        return at_most(self.log_alpha, math.log(self.max_alpha))

    def extra_repr(self) -> str:
        shape = tuple(self.log_alpha.shape)
        features = "" if shape == (1,) else f"num_features={shape if len(shape) > 1 else shape[0]}, "
        return f"{features}max_alpha={self.max_alpha}"


class _AtMost:
    """``min(x, bound)`` whose gradient is zero only where a step would go further beyond the bound.

    The gradient of ``torch.clamp`` is zero everywhere beyond: a parameter that got there would stay.
    """

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp(max=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:  # noqa: ARG004
        x, ctx.bound = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where((x >= ctx.bound) & (grad < 0), 0, grad), None

    @staticmethod
    def tangent(_: Any, x_tangent: Tensor, __: None) -> Tensor:
        return x_tangent  # as a positive gradient passes


_ReverseMode, _BothModes = modes_of(_AtMost)


@operation
def at_most(x: Tensor, bound: float) -> Tensor:
    """``min(x, bound)``, with the gradient of :class:`_AtMost`."""
    if has_torch_function_unary(x) and not compiling():
        return overridden(at_most, locals())
    function = _ReverseMode if compiling() else _BothModes
    return function.apply(x, bound)  # type: ignore[no-any-return]


# -KL = log(alpha) / 2 - E log|e| + this constant, for e ~ N(1, alpha). It makes KL vanish as alpha grows.
_CONSTANT = -(0.5772156649015329 + math.log(2)) / 2


def variational_kl(
    log_alpha: Tensor, approximation: Literal["polynomial", "sigmoid"] = "polynomial"
) -> Tensor:
    r"""How far the noise of one variable is from the log-uniform prior, in nats.

    .. math:: -\mathrm{KL} \approx \tfrac12\log\alpha + c_1\alpha + c_2\alpha^2 + c_3\alpha^3 + C
        \qquad\text{("polynomial")}

    .. math:: -\mathrm{KL} \approx k_1\,\operatorname{sigmoid}(k_2 + k_3\log\alpha)
        - \tfrac12\log(1 + 1/\alpha) - k_1 \qquad\text{("sigmoid")}

    The divergence from an improper prior is defined up to a constant. With :math:`C = -(\gamma + \log 2)/2`
    it vanishes as ``alpha`` grows, so that both forms agree.

    Args:
        log_alpha: the logarithm of the noise's variance, of any shape.
        approximation: ``"polynomial"``, Kingma et al.'s, is at most 0.04 off for ``alpha <= 1`` and useless
            above; ``"sigmoid"``, Molchanov et al.'s, is at most 0.01 off for every ``alpha``.

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
    if has_torch_function_unary(log_alpha) and not compiling():
        return overridden(variational_kl, locals())
    check_tensor("variational_kl", "log_alpha", log_alpha)
    if not (log_alpha.is_floating_point() or log_alpha.is_complex()):
        raise RuntimeError(f"log_alpha has to be a floating-point tensor, {got(log_alpha)}")
    if approximation == "polynomial":
        alpha = log_alpha.exp()
        rest = alpha * (1.16145124 + alpha * (-1.50204118 + alpha * 0.58629921))
        return -(0.5 * log_alpha + rest + _CONSTANT)
    if approximation == "sigmoid":
        k1, k2, k3 = 0.63576, 1.87320, 1.48695
        softplus = torch.nn.functional.softplus(-log_alpha)
        return k1 * torch.sigmoid(-k2 - k3 * log_alpha) + 0.5 * softplus
    raise ValueError(f"approximation has to be either 'polynomial' or 'sigmoid', but got {approximation!r}")
