"""Matrix products of thinned networks: what a draw drops is left out of them, not multiplied by zero."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from thinned.keys import Key
from thinned.layers import Dropout, GELUDropout, ReLUDropout, SiLUDropout
from thinned.layers._arguments import threshold_and_scale
from thinned.layers.fused import activation_of
from thinned.models.address import Address
from thinned.models.address.hooks import has_other_hooks
from thinned.models.walk import is_sequential

__all__ = ["POINTWISE", "OneRow", "Thinned"]

POINTWISE = (
    nn.Identity, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish,
    nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
    nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign,
)  # fmt: skip
FUSED = (ReLUDropout, GELUDropout, SiLUDropout)
DROPOUTS = (nn.Dropout, Dropout, *FUSED)
GATHER = 8  # an element that is gathered takes as long as 8 multiply-adds of a product (AVX-512, 1 thread)


class OneRow(Address):
    """An address that can give the mask of one row, where all samples have the same id.

    Attributes:
        gave_row: whether it has given one.
    """

    one_row = gave_row = False

    def parts(self, device: torch.device) -> tuple[Key, Tensor | None]:
        """See :meth:`thinned.models.address.Address.parts`."""
        root, samples = super().parts(device)
        return root, samples[:1] if self.one_row and samples is not None else samples

    def keep(self, dropout: nn.Module, features: int, device: torch.device) -> Tensor:
        """The mask of a dropout for a row of features; it counts as the dropout's call."""
        self.one_row = self.gave_row = True
        try:
            dropped: Tensor = dropout(torch.ones(1, features, device=device, dtype=torch.float32))
        finally:
            self.one_row = False
        return dropped[0] != 0


@dataclass(frozen=True)
class Stage:
    """A linear layer, which the first stage may lack, and the elementwise modules behind it."""

    linear: nn.Linear | None
    elementwise: tuple[nn.Module, ...]

    @property
    def dropouts(self) -> list[Any]:
        return [module for module in self.elementwise if type(module) in DROPOUTS]

    def __call__(self, h: Tensor, kept: Tensor | None, keep: Tensor | None) -> Tensor:
        """The features ``keep`` of the stage's result, scaled, from the features ``kept`` of its input."""
        if self.linear is None:
            h = h.clone() if keep is None else _columns(h, keep)
        else:
            weight: Tensor = self.linear.weight
            bias: Tensor | None = self.linear.bias
            if keep is not None:
                weight, bias = weight.index_select(0, keep), None if bias is None else bias[keep]
            h = nn.functional.linear(h, _columns(weight, kept), bias)
        for module in self.elementwise:
            if type(module) not in DROPOUTS:
                h = module(h)
            elif type(module) in FUSED:
                h = activation_of(module)(h)
            if type(module) in DROPOUTS and module.training:
                h = h * _scale(module)
        return h


@dataclass(frozen=True)
class Chain:
    """Stages of which all but the last may drop, and the modules that they are made of."""

    stages: tuple[Stage, ...]

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> Chain | None:
        """A chain from some successive modules, if they begin and end with what it can leave out."""
        stages: list[Stage] = []
        for module in modules:
            if isinstance(module, nn.Linear):
                stages.append(Stage(module, ()))
            else:
                last = stages.pop() if stages else Stage(None, ())
                stages.append(Stage(last.linear, (*last.elementwise, module)))
        return cls(tuple(stages)) if any(stage.dropouts for stage in stages[:-1]) else None

    def __call__(self, x: Any, address: OneRow) -> Any:
        rows = 0 if address.samples is None else len(address.samples)
        if not isinstance(x, Tensor) or x.dim() != 2 or len(x) != rows or not self._pays(rows, x):
            for stage in self.stages:
                for module in (stage.linear, *stage.elementwise):
                    x = x if module is None else module(x)
            return x
        keeps: list[Tensor | None] = []
        for stage in self.stages:
            features = x.shape[1] if stage.linear is None else stage.linear.out_features
            keep = None
            for dropout in stage.dropouts:
                one = address.keep(dropout, features, x.device)
                keep = one if keep is None else keep & one
            keeps.append(keep)
        return _Product.apply(self, x, *keeps)  # type: ignore[no-untyped-call]

    def _pays(self, rows: int, x: Tensor) -> bool:
        """Whether the multiply-adds that are saved are worth the weights that are gathered."""
        saved = gathered = 0.0
        part = 1.0  # of the features
        for stage in self.stages:
            of_rows = 1.0
            for dropout in stage.dropouts:
                of_rows *= 1 - dropout.p if dropout.training else 1.0
            if stage.linear is not None and part < 1:
                weights = stage.linear.weight.numel()
                saved += rows * weights * (1 - part * of_rows)
                gathered += weights * of_rows * (1 + part)
            part = of_rows
        return x.is_cpu and saved > GATHER * gathered

    def draws(self, x: Tensor, batched: bool, keeps: Sequence[Tensor | None]) -> Tensor:
        """The results of several draws along dimension 0, as ``x`` is if ``batched``, and ``keeps``."""
        indices = [None if keep is None else _indices(keep) for keep in keeps]
        first = 0
        shared: Tensor | None = None
        if not batched:
            shared = x
            while indices[first] is None:
                shared = self.stages[first](shared, None, None)
                first += 1
            shared = self.stages[first](shared, None, None)
        results = []
        for draw in range(len(next(keep for keep in keeps if keep is not None))):
            kept = [None if each is None else each[draw] for each in indices]
            if shared is not None:
                h = _columns(shared, kept[first])
            else:
                h = self.stages[0](x[draw], None, kept[0])
            for n in range(first + 1, len(self.stages)):
                h = self.stages[n](h, kept[n - 1], kept[n])
            results.append(h)
        return torch.stack(results)


def _indices(keep: Tensor) -> Sequence[Tensor]:
    """The positions in each row where ``keep`` is True."""
    return torch.split(keep.nonzero()[:, 1], keep.sum(1).tolist())


def _scale(dropout: Any) -> float:
    return threshold_and_scale(dropout.p)[1]


def _columns(x: Tensor, kept: Tensor | None) -> Tensor:
    return x if kept is None else x.index_select(1, kept)


class _Product(torch.autograd.Function):
    """A chain under one draw, and under vmap several, whose number of features differs."""

    @staticmethod
    def forward(chain: Chain, x: Tensor, *keeps: Tensor | None) -> Tensor:
        return chain.draws(x, False, [None if keep is None else keep[None] for keep in keeps])[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Nothing is saved: it has no gradient."""

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], chain: Chain, x: Tensor, *keeps: Tensor | None
    ) -> tuple[Tensor, int]:
        def batched(keep: Tensor | None, dim: int | None) -> Tensor | None:
            if keep is None:
                return None
            return keep.expand(info.batch_size, -1) if dim is None else keep.movedim(dim, 0)

        x = x if in_dims[1] is None else x.movedim(in_dims[1], 0)
        each = [batched(keep, dim) for keep, dim in zip(keeps, in_dims[2:], strict=True)]
        return chain.draws(x, in_dims[1] is not None, each), 0


class _Forward:
    """The forward of an nn.Sequential with its chains."""

    def __init__(self, parts: Sequence[nn.Module | Chain], address: OneRow) -> None:
        self.parts, self.address = parts, address

    def __call__(self, x: Any) -> Any:
        for part in self.parts:
            x = part(x, self.address) if isinstance(part, Chain) else part(x)
        return x


class Thinned:
    """The nn.Sequentials of a model in which linear layers follow a dropout.

    They may be anywhere in the model, and contain others. Between two linear layers there may be modules of
    :data:`POINTWISE` and element dropouts. Those behind a dropout must map 0 to 0. Modules with hooks other
    than those of :func:`thinned.address` are left as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parts: dict[nn.Module, Sequence[nn.Module | Chain]] = {}
        within: set[nn.Module] = set()
        for module in model.modules():
            if module not in within and is_sequential(module):
                parts = _parts(_flat(module, within))
                if any(isinstance(part, Chain) for part in parts):
                    self._parts[module] = parts

    def __bool__(self) -> bool:
        return bool(self._parts)

    @contextmanager
    def on(self, address: OneRow) -> Iterator[None]:
        """Let the model leave out what it drops in draws that all examples share."""
        try:
            for module, parts in self._parts.items():
                module.forward = _Forward(parts, address)
            yield
        finally:
            for module in self._parts:
                vars(module).pop("forward", None)


def _flat(sequential: nn.Sequential, within: set[nn.Module]) -> Iterator[nn.Module]:
    """The modules that it calls, also through others, which are added to ``within``."""
    for module in sequential:
        if is_sequential(module) and not has_other_hooks(module):
            within.add(module)
            yield from _flat(module, within)
        else:
            yield module


def _parts(modules: Iterable[nn.Module]) -> list[nn.Module | Chain]:
    """The modules in their order, those that make a chain in one."""
    parts: list[nn.Module | Chain] = []
    run: list[nn.Module] = []

    def end_run() -> None:
        length = max((n + 1 for n, module in enumerate(run) if isinstance(module, nn.Linear)), default=0)
        chain = Chain.of(run[:length])
        parts.extend(run if chain is None else (chain, *run[length:]))
        run.clear()

    zeros = False  # whether some features are zeros
    for module in modules:
        kind = None if has_other_hooks(module) else type(module)
        if kind is nn.Linear and type(module.weight) is nn.Parameter:
            zeros = False
        elif kind in DROPOUTS and not getattr(module, "broadcast_dims", ()):
            zeros = True
        elif not (run and kind in POINTWISE and (not zeros or module(torch.zeros(1)) == 0)):
            end_run()
            parts.append(module)
            zeros = False
            continue
        run.append(module)
    end_run()
    return parts
