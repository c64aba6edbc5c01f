"""Dropout of single weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize
from torch.overrides import has_torch_function_unary

from thinned.checks import got
from thinned.keys import Key, as_key
from thinned.layers._arguments import apply, drops, key_for, refuse_activations, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.torch_state import (
    buffers_of,
    cached_parametrizations,
    compiling,
    parameters_of,
    pre_hooks_of,
)

__all__ = ["DropConnect", "WeightDrop", "check_one_key", "cudnn_copies", "drop_connect"]


def drop_connect(input: Tensor, p: float = 0.5, *, training: bool = True, key: Key | None = None) -> Tensor:
    r"""Drop each connection of a weight with probability ``p``.

    .. math:: \tilde W_{ij} = \begin{cases} W_{ij} / q & u(i, j) < T \\ +0 & \text{otherwise} \end{cases}

    The mean of :math:`\tilde W x` over masks is :math:`W x`, and evaluation computes :math:`W x`. Wan et al.
    do not divide in training, and in evaluation they sample the normal distribution with the output's mean
    and variance. Some libraries call :func:`~thinned.functional.drop_path` "drop connect".

    Args:
        input: a weight, or a bias: a floating-point or complex tensor of any shape.
        p: the probability of dropping a connection, in [0, 1].
        training: False returns ``input`` itself, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format. All examples of a batch share its mask; for
        the paper's mask for each example use vmap, as below.

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
    if has_torch_function_unary(input) and not compiling():
        return overridden(drop_connect, locals())
    T, scale = threshold_and_scale(p)
    if not drops("drop_connect", input, p, training, key):
        return input
    refuse_activations("drop_connect", input, key)
    return apply(input, key, (), False, T, scale, sample_dim=None)


class DropConnect(Layer):
    """A parametrization that drops connections of a module's weight.

    Use this layer on the weight of a fully connected layer, with the paper's p of 0.5. A :class:`Dropout` of
    the inputs costs less where the weight has more elements than the input.

    :func:`thinned.functional.drop_connect` has the formula.
    :func:`torch.nn.utils.parametrize.register_parametrization` gives a module a weight with a new mask at
    each lookup, or with one mask within :func:`torch.nn.utils.parametrize.cached`. A recurrent module looks
    its weights up several times in a call, and PyTorch does not pickle parametrized modules;
    :class:`WeightDrop` has neither limit and takes a key.

    Shape:
        any; the output has the weight's shape.

    Source: Wan et al., "Regularization of neural networks using DropConnect", ICML 2013, section 3.

    >>> import torch, thinned
    >>> from torch.nn.utils import parametrize
    >>> linear = torch.nn.Linear(100, 100)
    >>> linear = parametrize.register_parametrization(linear, "weight", thinned.DropConnect(0.5))
    >>> bool((linear.weight == 0).any()), bool((linear.eval().weight == 0).any())
    (True, False)
    """

    def __init__(self, p: float = 0.5) -> None:
        super().__init__(p)

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return drop_connect(input, self.p, training=self.training, key=key)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """An assigned weight is stored as it is."""
        return weight


class WeightDrop(Layer):
    """A module that drops connections of another module's weights, with a new mask for each call.

    Use this layer on the recurrent weights of a :class:`torch.nn.LSTM`, such as ``weight_hh_l0``; AWD-LSTM's
    p is 0.5. For the weight of a linear layer :class:`DropConnect` will do.

    During a call each named weight is :func:`thinned.functional.drop_connect` of the parameter under
    ``key.fold(name)``, so a recurrent module has one mask for all its time steps. The parameters stay where
    they are in the module, and their names in the ``state_dict`` get the prefix ``module.``. A weight may be
    computed from other parameters, by :mod:`torch.nn.utils.parametrize` or by a hook, such as that of
    :func:`torch.nn.utils.spectral_norm` or of pruning: the computed weight is dropped from.
    ``torch.compile`` refuses to trace :class:`torch.nn.LSTM` and its like into one graph;
    :class:`VariationalLSTM` drops its weights too, and compiles.

    Args:
        module: any module, such as a :class:`torch.nn.LSTM` or a :class:`torch.nn.Linear`.
        weights: the names of the weights to drop from, such as ``["weight_hh_l0"]`` or ``"0.weight"``.

    Shape:
        the module's. The ``key`` of a call is one key: the examples of a batch share the weights.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN, or a name that is no weight's.
        RuntimeError: ``key`` is a batch of keys, or the module has lost a weight since.

    Source: Wan et al., ICML 2013, section 3; Merity et al., "Regularizing and optimizing LSTM language
    models", ICLR 2018, section 3, whose code has this order of arguments.

    >>> import torch, thinned
    >>> lstm = thinned.WeightDrop(torch.nn.LSTM(3, 5), ["weight_hh_l0"], p=0.5)
    >>> output, (h, c) = lstm(torch.randn(7, 2, 3), key=thinned.Key(7))
    """

    _instead_of_script = "script its .module for evaluation, or use torch.export"

    def __init__(self, module: nn.Module, weights: str | Sequence[str], p: float = 0.5) -> None:
        super().__init__(p)
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, {got(module)}")
        names = (weights,) if isinstance(weights, str) else weights
        if isinstance(names, Tensor | nn.Module) or not isinstance(names, Iterable):
            raise TypeError(f"weights must be the names of weights, {got(weights)}")
        self.module = module
        self.weights = tuple(names)
        accepted = _weights_of(module)
        for name in self.weights:
            if name not in accepted:
                raise ValueError(
                    f"weights must be those of the module, but {type(module).__name__} has no parameter "
                    f"{name!r}; accepted: {', '.join(accepted)}"
                )

    def forward(self, *args: Any, key: Key | None = None, **kwargs: Any) -> Any:
        if (node := module_node(self, *args, key=key, **kwargs)) is not None:
            return node
        if key is not None:
            check_one_key(key)
        if not self.training or self.p == 0 or not self.weights:
            return self.module(*args, **kwargs)
        owners = {name: _owner_of(self.module, name) for name in self.weights}
        plain = {name: getattr(*owner) for name, owner in owners.items()}
        key = key_for(plain[self.weights[0]], key, sample_dim=None)
        drops = {name: partial(drop_connect, p=self.p, key=key.fold(name)) for name in self.weights}
        recurrent = [module for module in self.module.modules() if isinstance(module, nn.RNNBase)]
        with (
            _not_flattened(recurrent) if recurrent else nullcontext(),
            _computed_weights(owners, plain, drops) as swapped,
        ):
            return torch.func.functional_call(self.module, swapped, args, kwargs, tie_weights=False)

    def extra_repr(self) -> str:
        return f"weights={list(self.weights)}, p={self.p}"


def _weights_of(module: nn.Module) -> list[str]:
    """The names of parameters, of parametrized weights, and of weights that a hook computes from others."""
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    for path, owner in module.named_modules(remove_duplicate=False):
        own = [name for name, value in vars(owner).items() if isinstance(value, Tensor)]
        if parametrize.is_parametrized(owner):
            own += owner.get_submodule("parametrizations").keys()
        names += (f"{path}.{name}" if path else name for name in own)
    return names


def _owner_of(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has the weight, and the weight's name in there."""
    path, _, own = name.rpartition(".")
    owner = module.get_submodule(path)
    is_stored = own in parameters_of(owner) or own in buffers_of(owner) or own in vars(owner)
    if not is_stored and not parametrize.is_parametrized(owner, own):
        raise RuntimeError(
            f"{type(module).__name__} no longer has the weight {name!r}; accepted: "
            f"{', '.join(_weights_of(module))}"
        )
    return owner, own


@contextmanager
def _computed_weights(
    owners: dict[str, tuple[nn.Module, str]],
    plain: dict[str, Tensor],
    drops: Mapping[str, Callable[[Tensor], Tensor]],
) -> Iterator[dict[str, Tensor]]:
    """Drop from weights that their modules compute in each call; yields all others, dropped."""
    swapped: dict[str, Tensor] = {}
    undo: list[Callable[[], None]] = []
    try:
        for name, (owner, own) in owners.items():
            dropped = drops[name](plain[name])
            if parametrize.is_parametrized(owner, own):
                computes, cache = owner.get_submodule("parametrizations"), cached_parametrizations()
                undo.append(partial(computes.add_module, own, computes.get_submodule(own)))
                computes.add_module(own, _Value(dropped))
                for entry in [entry for entry, weight in cache.items() if weight is plain[name]]:
                    undo.append(partial(cache.update, {entry: plain[name]}))
                    cache[entry] = dropped
                continue
            swapped[name] = dropped
            if own in vars(owner) and pre_hooks_of(owner):
                hook = owner.register_forward_pre_hook(_DropAgain(own, dropped, drops[name]))
                undo.append(hook.remove)
        yield swapped
    finally:
        for each in undo:
            each()


class _Value(nn.Module):
    """Stands for the parametrizations of a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight

    def forward(self) -> Tensor:
        return self.weight


class _DropAgain:
    """A hook that drops from a weight which an earlier hook has computed anew, as that of a weight norm."""

    def __init__(self, name: str, dropped: Tensor, drop: Callable[[Tensor], Tensor]) -> None:
        self.name, self.dropped, self.drop = name, dropped, drop

    def __call__(self, module: nn.Module, _: Any) -> None:
        weight = getattr(module, self.name)
        if weight is not self.dropped:
            self.dropped = self.drop(weight)
            setattr(module, self.name, self.dropped)


def check_one_key(key: Key) -> None:
    """Raise if ``key`` is no key, or a batch of keys, for weights that all samples share."""
    if (key := as_key(key)).shape:
        raise RuntimeError(
            f"keys of shape {tuple(key.shape)} do not fit a weight that all samples share; "
            "accepted: one key of shape ()"
        )


@contextmanager
def _not_flattened(modules: Sequence[nn.RNNBase]) -> Iterator[None]:
    """Keep recurrent modules from moving the parameters in memory.

    A recurrent module that finds new weights moves all of them into one buffer for cuDNN, including those
    that an autograd graph has saved for backward.
    """
    for module in modules:
        module.flatten_parameters = lambda: None  # type: ignore[method-assign]
    try:
        with cudnn_copies():
            yield
    finally:
        for module in modules:
            del module.flatten_parameters


@contextmanager
def cudnn_copies() -> Iterator[None]:
    """Ignore cuDNN's warning that it copies weights: dropped ones are new tensors in each call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
        yield
