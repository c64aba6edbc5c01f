"""An implementation, and the description of the layer as which it is examined: inputs, arguments, mask."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from thinned.compare.settings import Settings

__all__ = ["Case", "Example", "Implementation", "Masked", "NotOfferedError", "P", "first", "normal", "ones"]

P = 0.3  # of the masks of layers that have a shape of their own


class NotOfferedError(Exception):
    """The implementation has no such feature, which is no breach of a law."""


@dataclass(frozen=True)
class Implementation:
    """One column of a table: ``make`` takes the arguments of thinned's layer by name.

    ``origin`` says where the implementation comes from, also where that library is not installed.
    """

    name: str
    make: Callable[..., nn.Module]
    origin: str = "formula in plain torch"


@dataclass(frozen=True)
class Example:
    """A small call of a layer, for the laws of every layer.

    Attributes:
        inputs: the arguments of a call in a dtype; gradients are those of the first, and ``vmap`` maps over
            the first dimension of all.
        arguments: constructor arguments under which most inputs change.
        p_name: the constructor's name for the probability of dropping; empty where there is none.
        identity_in_evaluation: whether evaluation returns the first input itself.
        is_random: whether two calls differ.
        saved_bytes: what the formula has to keep for backward, in bytes for each element of the first input.
    """

    inputs: Callable[[torch.dtype], tuple[Tensor, ...]]
    arguments: Mapping[str, Any] = field(default_factory=lambda: {"p": 0.5})
    p_name: str = "p"
    identity_in_evaluation: bool = True
    is_random: bool = True
    saved_bytes: float = 0.0


@dataclass(frozen=True)
class Masked:
    """The mask of a layer that multiplies by zeros and a scale.

    Attributes:
        shape: of an input with many decisions; empty for a layer that takes any shape, and that is examined
            with the shape, dtype and p of the settings.
        shared: the dimensions along which elements share one decision.
        arguments: the constructor's, apart from the probability.
        scale: the factor of a kept element, as a function of ``p``.
        through: for a ``p``, a function of layer and ``x`` that returns a tensor in which dropped elements of
            ``x`` are 0; for layers that do not.
    """

    shape: tuple[int, ...] = ()
    shared: tuple[int, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)
    scale: Callable[[float], float] = field(default=lambda p: 1 / (1 - p))
    through: Callable[[float], Callable[[Any, Tensor], Tensor]] | None = None


@dataclass(frozen=True)
class Case:
    """The argument of a law's check: an implementation, and the layer in whose place it is examined."""

    implementation: Implementation
    example: Example
    masked: Masked | None = None

    @property
    def mask(self) -> Masked:
        assert self.masked is not None  # a law of masks applies to no other layer
        return self.masked

    @property
    def takes_any_shape(self) -> bool:
        return self.masked is not None and not self.masked.shape

    def offers(self, argument: str) -> bool:
        return argument in inspect.signature(self.implementation.make).parameters

    def make(self, **arguments: Any) -> Any:
        """The layer, in training."""
        if "inplace" in arguments and not self.offers("inplace"):
            raise NotOfferedError("no inplace argument")
        return self.implementation.make(**arguments)

    def called(
        self, settings: Settings, dtype: torch.dtype = torch.float32, **arguments: Any
    ) -> tuple[Any, tuple[Tensor, ...]]:
        """The layer of the example, with some arguments replaced, and inputs."""
        layer = self.make(**{**self.example.arguments, **arguments}).to(settings.device, dtype)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2**32 - 1 - settings.seed % 2**32)
            return layer, tuple(x.to(settings.device) for x in self.example.inputs(dtype))

    def differentiable(
        self, settings: Settings, dtype: torch.dtype = torch.float32
    ) -> tuple[Callable[[Tensor], Tensor], Tensor, list[Tensor]]:
        """A call of the layer as a function of one tensor, the tensor, and what else has a gradient."""
        layer, (x, *rest) = self.called(settings, dtype)
        if x.is_floating_point():
            others = [each.requires_grad_() for each in rest if each.is_floating_point()]
            return lambda x: first(layer(x, *rest)), x.requires_grad_(), [*others, *layer.parameters()]
        layer = self.module(0.5).to(dtype)
        x = settings.normal(*self.mask.shape, dtype=dtype)
        return layer, x.requires_grad_(), list(layer.parameters())

    def settled(self, settings: Settings) -> Settings:
        """The settings, with p, shape and dtype of a layer that does not take any."""
        if self.masked is None or self.takes_any_shape:
            return settings
        return replace(settings, p=P, shape=self.masked.shape, dtype=torch.float32)

    def sized(self, *shape: int) -> tuple[int, ...]:
        """``shape``, unless the mask has one of its own."""
        return self.mask.shape or shape

    def module(self, p: float, **arguments: Any) -> Any:
        """The layer as a module of one tensor, with 0 for dropped elements."""
        layer = self.make(**{self.example.p_name: p, **self.mask.arguments, **arguments})
        return layer if self.mask.through is None else _Through(layer, self.mask.through(p))

    def once(self, y: Tensor) -> Tensor:
        """One element for each decision."""
        for dim in sorted(self.mask.shared, reverse=True):
            y = y.select(dim, 0)
        return y


class _Through(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def first(result: Any) -> Tensor:
    """A layer's output, or the first of several."""
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def normal(*shape: int, count: int = 1) -> Callable[[torch.dtype], tuple[Tensor, ...]]:
    """Inputs of an :class:`Example`: so many tensors of normal numbers."""
    return lambda dtype: tuple(torch.randn(shape, dtype=dtype) for _ in range(count))


def ones(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    """Inputs of a workload."""
    return lambda: (torch.ones(shape),)
