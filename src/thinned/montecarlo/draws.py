"""Draws of a model: several at once by vmap, several in one batch, or one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thinned.keys import Key
from thinned.models.intercept import intercept
from thinned.montecarlo.thin import OneRow, Thinned

__all__ = ["Batch", "Draw", "Drawing", "Outputs", "Route", "arguments_of", "draw_of"]

Outputs: TypeAlias = tuple[Tensor, ...]
SampleDim: TypeAlias = int | Mapping[str, int] | None
Route: TypeAlias = Literal["thinned", "vmap", "batch", "one by one"]
LITTLE = 0.2  # of the results: what precedes the first dropout is then not worth vmap's slower operations


@dataclass(frozen=True)
class Batch:
    """The arguments of one call of the model, and an id for each of its examples.

    Attributes:
        args: positional arguments by their numbers, and others by their names.
        ids: the examples' ids.
        rows: which arguments have an example in each row. :meth:`of` takes the tensors as long as ``ids``.
    """

    args: Mapping[int | str, Any]
    ids: Tensor
    rows: frozenset[int | str]

    @classmethod
    def of(cls, args: Mapping[int | str, Any], ids: Tensor) -> Batch:
        """The batch of these arguments."""
        tensors = {name: value for name, value in args.items() if isinstance(value, Tensor) and value.dim()}
        return cls(args, ids, frozenset(name for name, value in tensors.items() if len(value) == len(ids)))

    def __len__(self) -> int:
        return len(self.ids)

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``function`` of the ids and of each tensor that has an example in each row."""
        args = {name: function(arg) if name in self.rows else arg for name, arg in self.args.items()}
        return Batch(args, function(self.ids), self.rows)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        args = {name: arg.to(device) if isinstance(arg, Tensor) else arg for name, arg in self.args.items()}
        return Batch(args, self.ids.to(device), self.rows)

    def call(self, model: nn.Module) -> Any:
        """The model's output for copies of the tensors, since a dropout may write to its input."""
        args = {name: arg.clone() if isinstance(arg, Tensor) else arg for name, arg in self.args.items()}
        positional = [args.pop(name) for name in self.args if isinstance(name, int)]
        return model(*positional, **{str(name): arg for name, arg in args.items()})


def arguments_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[int | str, Any]:
    """The arguments of a call: positional ones by their numbers, others by their names."""
    found: dict[int | str, Any] = dict(enumerate(args))
    return found | dict(kwargs)


class Draw(OneRow):
    r"""The address of a draw: a mask is a function of seed, draw, site, example and position alone.

    .. math:: \text{Key}(seed).\text{fold}(root).\text{fold}(site).\text{fold}(example)
        \;[.\text{stratified}(stratum, strata)]

    ``root`` is the number of an independent draw, or of a stratified set, in which the draw is number
    ``stratum``. Either may be a tensor with a number for each row.
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int | Key,
        root: int | Tensor,
        ids: Tensor,
        stratum: int | Tensor | None = None,
        strata: int = 1,
        sample_dim: SampleDim = None,
    ) -> None:
        rows = isinstance(root, Tensor) and root.dim() > 0
        super().__init__(model, seed, 0 if rows else root, ids, sample_dim)
        if rows:
            self._root = self._seed.fold(root)
            self._on_device = self._root, self._on_device[1]
        self._stratum, self._strata = stratum, strata
        self.has_dropped = False

    def finish(self, key: Key) -> Key:
        """See :meth:`thinned.models.address.Address.finish`."""
        self.has_dropped = True
        stratum = self._stratum
        if stratum is None:
            return key
        if isinstance(stratum, Tensor):
            stratum = stratum.to(key.bits.device)
            if stratum.dim():
                if not key.shape:
                    raise RuntimeError("the draws of a batch cannot share a mask that all its examples share")
                stratum = stratum.repeat_interleave(len(key.bits) // len(stratum))
        return key.stratified(stratum, self._strata)


def draw_of(
    model: nn.Module,
    seed: int | Key,
    number: int | Tensor,
    ids: Tensor,
    strata: int,
    sample_dim: SampleDim = None,
) -> Draw:
    """The address of a draw by its number, or with a tensor of numbers that of each row."""
    if strata == 1:
        return Draw(model, seed, number, ids, sample_dim=sample_dim)
    return Draw(model, seed, number // strata, ids, number % strata, strata, sample_dim)


class Drawing:
    """Computes draws by the first of these routes that gives the model's own results.

    - ``"thinned"``: as ``"vmap"``, but what a draw drops is left out of matrix products, see
      :class:`thinned.montecarlo.thin.Thinned`. For draws that all examples share.
    - ``"vmap"``: :func:`torch.vmap` over the draws. The model's results before its first dropout do not
      depend on the draw, so vmap computes them once.
    - ``"batch"``: each example as often as there are draws, in one batch. It comes before ``"vmap"`` where
      less than a fifth of the results, in bytes, precedes the first dropout.
    - ``"one by one"``: a call of the model for each draw.

    The first draw is computed alone, too. A route that raises there, or whose first draw differs from that
    one by more than rounding, gives way to the next; ``why`` then has the reasons.

    Args:
        model: the model, in :meth:`thinned.montecarlo.dropping.Dropouts.on`.
        read: takes a model's output and returns a tuple of floating-point tensors with examples as rows.
        seed: as of :func:`thinned.address`.
        strata: the number of draws of a stratified set; 1 for independent draws.
        consistent: whether all examples have the masks of example 0.
        sample_dim: as of :func:`thinned.address`.
        budget: bytes that the results of one chunk of draws may take.
    """

    def __init__(
        self,
        model: nn.Module,
        read: Callable[[Any], Outputs],
        seed: int | Key,
        strata: int,
        consistent: bool,
        sample_dim: SampleDim,
        budget: int,
    ) -> None:
        self.model, self.read, self.seed, self.strata = model, read, seed, strata
        self.routes: list[Route] = ["vmap", "batch", "one by one"]
        self.why: list[str] = []
        self._consistent, self._sample_dim, self._budget = consistent, sample_dim, budget
        self._alone: Outputs | None = None
        self._eps = 0.0
        self._row_bytes: dict[Route, float] = {}
        self._thinned: Thinned | None = None
        self._leaves_out = False

    @property
    def route(self) -> Route:
        """The route that is taken."""
        return self.routes[0]

    def at_once(self, batch: Batch, first: int) -> int:
        """How many draws of ``batch`` fit into the budget; before the first, ``first`` is its number."""
        if not self._row_bytes:
            draw = self._draw(batch, first)
            with _Largest(draw) as largest:
                self._alone = self._call(batch, draw)
            self._eps = largest.eps
            # An operation reads one such result and writes another; a third waits for a residual connection.
            row = 3 / len(batch)
            self._row_bytes = {"vmap": row * largest.after, "batch": row * largest.bytes}
            if largest.before < LITTLE * largest.total:
                self.routes = ["batch", "vmap", "one by one"]
            if self._consistent and (thinned := Thinned(self.model)):
                self._thinned = thinned
                self.routes = ["thinned", *self.routes]
        row_bytes = self._row_bytes["batch" if self.route == "batch" else "vmap"]
        return max(1, int(self._budget / max(1.0, row_bytes * len(batch))))

    def __call__(self, batch: Batch, first: int, count: int) -> Outputs:
        """Draws ``first`` to ``first + count - 1`` along a new dimension 0."""
        alone, self._alone = self._alone, None
        while alone is not None and len(self.routes) > 1:
            try:
                draws = ROUTES[self.route](self, batch, first, count)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            else:
                if _close([draw[0] for draw in draws], alone, self._eps):
                    if self.route == "thinned" and not self._leaves_out:
                        self.routes = ["vmap", *self.routes[1:]]
                    return draws
                reason = "its first draw differs from that draw alone"
            self.why.append(f"{self.route}: {reason}")
            self.routes = self.routes[1:]
        draws = ROUTES[self.route](self, batch, first, count)
        if alone is not None and not _close([draw[0] for draw in draws], alone, self._eps):
            warnings.warn(
                f"this {type(self.model).__name__} gives two results for one draw: it has random numbers "
                "or a state that no key gives, so its predictions depend on more than the seed",
                UserWarning,
                stacklevel=2,
            )
        return draws

    def _draw(self, batch: Batch, number: int | Tensor) -> Draw:
        ids = torch.zeros_like(batch.ids) if self._consistent else batch.ids
        return draw_of(self.model, self.seed, number, ids, self.strata, self._sample_dim)

    def _call(self, batch: Batch, draw: Draw) -> Outputs:
        with intercept(), draw:
            return self.read(batch.call(self.model))

    def _by_vmap(self, batch: Batch, first: int, count: int) -> Outputs:
        def call(number: Tensor) -> Outputs:
            draw = self._draw(batch, number)
            with self._thinned.on(draw) if self.route == "thinned" and self._thinned else nullcontext():
                result = self._call(batch, draw)
            self._leaves_out |= draw.gave_row
            return result

        draws = torch.arange(first, first + count, device=batch.ids.device)
        with _out_of_place(self.model):
            return torch.vmap(call, randomness="same")(draws)

    def _in_batch(self, batch: Batch, first: int, count: int) -> Outputs:
        rows = batch.map(lambda tensor: tensor.repeat(count, *(1,) * (tensor.dim() - 1)))
        # The first draw comes last: alone its rows are at other places, so a model that counts rows differs.
        draws = torch.arange(first + count - 1, first - 1, -1, device=batch.ids.device)
        outputs = self._call(rows, self._draw(rows, draws.repeat_interleave(len(batch))))
        return tuple(output.unflatten(0, (count, len(batch))).flip(0) for output in outputs)

    def _one_by_one(self, batch: Batch, first: int, count: int) -> Outputs:
        each = [self._call(batch, self._draw(batch, number)) for number in range(first, first + count)]
        return tuple(map(torch.stack, zip(*each, strict=True)))


ROUTES: dict[Route, Callable[[Drawing, Batch, int, int], Outputs]] = {
    "thinned": Drawing._by_vmap,
    "vmap": Drawing._by_vmap,
    "batch": Drawing._in_batch,
    "one by one": Drawing._one_by_one,
}


def _close(draws: Sequence[Tensor], alone: Sequence[Tensor], eps: float) -> bool:
    """Whether they are equal but for rounding, relative to the largest number.

    ``eps`` is that of the coarsest dtype that the model computes in.
    """
    for draw, one in zip(draws, alone, strict=True):
        if draw.shape != one.shape:
            return False
        largest = one.nan_to_num(0.0, 0.0, 0.0).abs().amax() if one.numel() else 0.0
        room = max(64 * torch.finfo(one.dtype).eps, 4 * eps) * float(largest)
        if not torch.allclose(draw, one, rtol=0, atol=room, equal_nan=True):
            return False
    return True


@contextmanager
def _out_of_place(model: nn.Module) -> Iterator[None]:
    """Let dropouts, which alone are in training, not write over inputs that all draws share."""
    modules: list[Any] = [
        module for module in model.modules() if module.training and getattr(module, "inplace", False)
    ]
    try:
        for module in modules:
            module.inplace = False
        yield
    finally:
        for module in modules:
            module.inplace = True


class _Largest(TorchFunctionMode):
    """Notes the sizes of the results of torch functions, in bytes.

    Attributes:
        bytes: the largest.
        after: the largest of those after the first dropout.
        before: the sum of those before it.
        total: the sum of all.
        eps: that of the coarsest dtype.
    """

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw
        self.bytes = self.after = self.before = self.total = 0
        self.eps = 0.0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, Tensor):
                size = each.numel() * each.element_size()
                self.bytes = max(self.bytes, size)
                self.total += size
                if each.is_floating_point():
                    self.eps = max(self.eps, torch.finfo(each.dtype).eps)
                if self.draw.has_dropped:
                    self.after = max(self.after, size)
                else:
                    self.before += size
        return result
