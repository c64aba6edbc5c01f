"""ConcreteDropout: dropout whose probability is learned, through a mask that is almost binary."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import has_torch_function, has_torch_function_variadic

from thinned.checks import check_real, got, integers
from thinned.geometry import dims_of
from thinned.keys import Key
from thinned.layers._arguments import check_parameter, check_tensor, drops, key_for, number
from thinned.layers._module import checked_dims
from thinned.layers._overrides import module_node, overridden
from thinned.layers._torchscript import Scriptable
from thinned.nested import elementwise, refuse
from thinned.op.learned import Noisy, apply_noisy
from thinned.op.noise import logistic
from thinned.torch_state import compiling

__all__ = ["ConcreteDropout", "concrete_dropout", "concrete_regularization"]

# Here 1 - p is 2e-35. At 89 its reciprocal overflows float32, and infinity times a mask of 0 is NaN.
_LARGEST_LOGIT = 80.0


def concrete_dropout(
    input: Tensor,
    p_logit: Tensor,
    *,
    temperature: float = 0.1,
    training: bool = True,
    key: Key | None = None,
    broadcast_dims: Sequence[int] = (),
) -> Tensor:
    r"""Multiply each element by a relaxed Bernoulli variable, through which ``p`` has a gradient.

    .. math:: y_i = x_i\,\frac{1 - z_i}{1 - p}, \qquad
        z_i = \operatorname{sigmoid}\Bigl(\frac1t\Bigl(\log\frac{p}{1-p} + \log\frac{u_i}{1-u_i}\Bigr)\Bigr),
        \qquad p = \operatorname{sigmoid}(\text{p\_logit})

    ``u`` is uniform; as the temperature ``t`` goes to 0, ``z`` becomes 1 with probability ``p``, else 0.
    Backward regenerates the noise, so only ``input`` and ``p_logit`` are saved; both gradients are exact.

    Args:
        input: a floating-point or complex tensor of any shape.
        p_logit: the logit of the probability of dropping, in a shape that broadcasts to ``input``'s.
        temperature: ``t``, above 0.
        training: False returns ``input`` itself.
        key: as for :func:`~thinned.functional.dropout`.
        broadcast_dims: dimensions along which all elements share one ``z``: ``(2, 3)`` is the authors'
            spatial concrete dropout, for which they take ``t = 2/3``.

    Returns:
        A tensor of ``input``'s shape and dtype.

    Raises:
        ValueError: ``temperature`` is not above 0 and finite.
        TypeError: ``input`` or ``p_logit`` is no tensor, or ``key`` no :class:`~thinned.Key`.
        RuntimeError: as :func:`~thinned.functional.dropout`; ``p_logit`` does not broadcast to ``input``.
        IndexError: ``input`` has no such dimension.

    Source: Gal, Hron and Kendall, "Concrete dropout", NeurIPS 2017, section 3, and the authors' code at
    https://github.com/yaringal/ConcreteDropout.

    >>> import torch, thinned
    >>> p_logit = torch.tensor(0.5).logit()
    >>> y = thinned.functional.concrete_dropout(torch.ones(2, 3), p_logit, key=thinned.Key(7))
    >>> y.round(decimals=3)
    tensor([[0., 0., 0.],
            [2., 2., 2.]])
    """
    if has_torch_function_variadic(input, p_logit) and not compiling():
        return overridden(concrete_dropout, locals())
    _check_temperature(temperature)
    if not drops("concrete_dropout", input, 1.0, training, key):
        return input
    p_logit = check_parameter("concrete_dropout", "p_logit", p_logit, input)
    dims = integers("broadcast_dims", broadcast_dims)
    shared_dims: set[int] = set()
    if not input.is_nested:
        shared_dims = dims_of(input.shape, dims)  # raises before a key is drawn
    elif p_logit.dim() or dims:
        unfit = f"p_logit of shape {tuple(p_logit.shape)} and broadcast_dims {dims}"
        refuse(f"concrete_dropout with {unfit}", input, "one p_logit and no broadcast_dims")
    key = key_for(input, key, shared_dims=shared_dims, elementwise=True)
    if input.is_nested:
        relaxed = partial(concrete_dropout, p_logit=p_logit, temperature=temperature)
        return elementwise("concrete_dropout", relaxed, input, key)
    noisy = Noisy(
        noise=lambda key, x, dtype: logistic(key, x, dtype=dtype, broadcast_dims=dims),
        factor=partial(_factor, temperature=temperature),
        both=partial(_factor_and_slope, temperature=temperature),
    )
    return apply_noisy(noisy, input, p_logit, key)


def _check_temperature(temperature: float) -> None:
    check_real("temperature", temperature)
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature has to be above 0 and finite, but got {temperature}")


def _odds(logit: Tensor) -> Tensor:
    """``p / (1 - p)``."""
    return logit.clamp(max=_LARGEST_LOGIT).exp()


def _factor(noise: Tensor, logit: Tensor, inplace: bool, temperature: float) -> Tensor:
    """``(1 - z) / (1 - p)``."""
    kept = _kept(noise, logit, inplace, temperature)
    return torch.mul(kept, 1 + _odds(logit), out=kept if inplace else None)


def _factor_and_slope(
    noise: Tensor, logit: Tensor, inplace: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    odds, kept = _odds(logit), _kept(noise, logit, inplace, temperature)
    steep = (1 + odds) / temperature
    slope = (odds - steep + steep * kept) * kept
    return torch.mul(kept, 1 + odds, out=kept if inplace else None), slope


def _kept(noise: Tensor, logit: Tensor, inplace: bool, temperature: float) -> Tensor:
    """``1 - z``, by exp: torch.sigmoid's vector tail rounds differently, so a result would show its place."""
    scaled = torch.add(noise, logit, out=noise if inplace else None).mul_(1 / temperature)
    if inplace:
        return scaled.exp_().add_(1).reciprocal_()
    return (1 + scaled.exp()).reciprocal()


class ConcreteDropout(Scriptable):
    """Dropout whose probability is learned, as the parameter ``p_logit``.

    Use this layer to estimate uncertainty, which needs a p that fits the data, without a search over the p of
    each layer. For a p that is known use :class:`Dropout`.

    :func:`thinned.functional.concrete_dropout` has the formula. Add :meth:`regularization` of the layer that
    follows to the loss::

        drop, linear = thinned.ConcreteDropout(), torch.nn.Linear(128, 10)
        loss = criterion(linear(drop(x)), y) + drop.regularization(linear.parameters(), 128)

    In evaluation the layer is the identity, as any dropout of PyTorch. The authors' code keeps sampling
    there, for Monte Carlo estimates: for that, call ``drop.train()`` after ``model.eval()``.

    Args:
        p: the probability of dropping that learning starts from, above 0 and below 1.
        temperature, broadcast_dims: as for the function.
        weight_regularizer, dropout_regularizer: as for :func:`thinned.functional.concrete_regularization`.
        device, dtype: of ``p_logit``.

    Attributes:
        p_logit: the parameter, of shape ``(1,)``.
        initial_p: the probability that :meth:`reset_parameters` restores.

    Raises:
        ValueError: ``p`` is not above 0 and below 1.

    Source: Gal, Hron and Kendall, "Concrete dropout", NeurIPS 2017, section 3, and the authors' code.

    >>> import thinned
    >>> drop = thinned.ConcreteDropout(0.5)
    >>> drop(torch.ones(6), key=thinned.Key(7)).detach().round(decimals=3)
    tensor([0., 0., 0., 2., 2., 2.])
    """

    def __init__(
        self,
        p: float = 0.1,
        *,
        temperature: float = 0.1,
        weight_regularizer: float = 1e-6,
        dropout_regularizer: float = 1e-5,
        broadcast_dims: Sequence[int] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        p = number(p)
        if not 0 < p < 1:
            raise ValueError(
                f"the initial dropout probability p has to be above 0 and below 1, but got {p}: "
                "its logit is learned"
            )
        _check_temperature(temperature)
        check_real("weight_regularizer", weight_regularizer)
        check_real("dropout_regularizer", dropout_regularizer)
        self.temperature = temperature
        self.weight_regularizer = weight_regularizer
        self.dropout_regularizer = dropout_regularizer
        self.broadcast_dims = checked_dims(broadcast_dims)
        self.initial_p = float(p)
        self.p_logit = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Let ``p`` be ``initial_p`` again."""
        nn.init.constant_(self.p_logit, math.log(self.initial_p) - math.log1p(-self.initial_p))

    @property
    def p(self) -> Tensor:
        """The probability of dropping."""
        return torch.sigmoid(self.p_logit)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return concrete_dropout(
            input,
            self.p_logit,
            temperature=self.temperature,
            training=self.training,
            key=key,
            broadcast_dims=self.broadcast_dims,
        )

    def regularization(self, weights: Tensor | Iterable[Tensor], num_features: int | None = None) -> Tensor:
        """:func:`thinned.functional.concrete_regularization` of this layer and the one that follows."""
        return concrete_regularization(
            self.p_logit, weights, num_features, self.weight_regularizer, self.dropout_regularizer
        )

    def extra_repr(self) -> str:
        shared = f", broadcast_dims={self.broadcast_dims}" if self.broadcast_dims else ""
        return (
            f"temperature={self.temperature}, weight_regularizer={self.weight_regularizer}, "
            f"dropout_regularizer={self.dropout_regularizer}{shared}"
        )


def concrete_regularization(
    p_logit: Tensor,
    weights: Tensor | Iterable[Tensor],
    num_features: int | None = None,
    weight_regularizer: float = 1e-6,
    dropout_regularizer: float = 1e-5,
) -> Tensor:
    r"""A term of the loss for each layer of :func:`concrete_dropout`, which keeps ``p`` from falling to 0.

    .. math:: \lambda_w \frac{\sum W^2}{1 - p} + \lambda_d\, K\,\bigl(p\log p + (1-p)\log(1-p)\bigr)

    ``W`` are the weights of the layer after the dropout; ``K`` is how many inputs that layer has. The first
    term pulls ``p`` to 0; it divides by ``1 - p`` because inverted dropout makes the paper's weights
    ``W / (1 - p)``. The second term, ``-K`` times the entropy of a mask, pulls ``p`` to 0.5.

    Args:
        p_logit: the logit of the probability of dropping, a tensor of one element.
        weights: the parameters of the layer after the dropout (the authors count its bias too).
        num_features: ``K``; default: the size of the first weight's dimension 1, the inputs of a linear layer
            or the channels of a convolution.
        weight_regularizer: ``l**2 / (tau * N)`` for the prior length scale ``l``, the model precision ``tau``
            and ``N`` examples, where the loss is the mean over examples.
        dropout_regularizer: ``2 / (tau * N)``.

    Returns:
        A tensor without dimensions.

    Raises:
        ValueError: there is no weight, or ``num_features`` is not given and the first has no dimension 1.

    Source: Gal, Hron and Kendall, "Concrete dropout", NeurIPS 2017, section 3, equations 3 and 4, and the
    authors' code.

    >>> import torch, thinned
    >>> p_logit = torch.tensor([0.1]).logit()
    >>> thinned.functional.concrete_regularization(p_logit, torch.ones(10, 100), dropout_regularizer=0.0)
    tensor(0.0011)
    """
    if isinstance(weights, Tensor | Proxy):
        weights = [weights]
    elif isinstance(weights, Iterable) and not isinstance(weights, nn.Module):
        weights = list(weights)
    else:
        raise TypeError(f"weights must be a tensor or several, such as layer.parameters(), {got(weights)}")
    if has_torch_function((p_logit, *weights)) and not compiling():
        return overridden(concrete_regularization, locals())
    if not weights:
        raise ValueError("weights are empty; accepted: a tensor or several, such as layer.parameters()")
    for weight in weights:
        check_tensor("concrete_regularization", "weights", weight)
    check_tensor("concrete_regularization", "p_logit", p_logit)
    if p_logit.numel() != 1:
        raise RuntimeError(f"p_logit has to have one element, {got(p_logit)}")
    check_real("weight_regularizer", weight_regularizer)
    check_real("dropout_regularizer", dropout_regularizer)
    if num_features is not None:
        check_real("num_features", num_features)
    else:
        if weights[0].dim() < 2:
            raise ValueError(
                "num_features has to be given where the first of weights has no dimension 1, but "
                f"its shape is {tuple(weights[0].shape)}"
            )
        num_features = weights[0].shape[1]
    logit = p_logit.reshape(())
    p = torch.sigmoid(logit)
    squares = torch.stack([weight.square().sum() for weight in weights]).sum()
    logsigmoid = torch.nn.functional.logsigmoid
    # p.log() would be -inf, and the product NaN, where p rounds to 0 or 1.
    negative_entropy = p * logsigmoid(logit) + (1 - p) * logsigmoid(-logit)
    cost = weight_regularizer * squares * (1 + _odds(logit))
    return cost + dropout_regularizer * num_features * negative_entropy
