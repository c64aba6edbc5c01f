"""Draws of a model: several at once by vmap, several in one batch, or one at a time."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thinned.keys import Key
from thinned.models.address import Address
from thinned.models.intercept import intercept

__all__ = ["Batch", "Draw", "Drawing", "Outputs", "Route"]

Outputs: TypeAlias = tuple[Tensor, ...]
Route: TypeAlias = Literal["vmap", "batch", "one by one"]
SLOWER: dict[Route, Route] = {"vmap": "batch", "batch": "one by one"}


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
        """The model's output for copies of the rows, since a dropout may write to its input."""
        args = {name: arg.clone() if name in self.rows else arg for name, arg in self.args.items()}
        positional = [args.pop(name) for name in self.args if isinstance(name, int)]
        return model(*positional, **{str(name): arg for name, arg in args.items()})


class Draw(Address):
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
        sample_dim: int | Mapping[str, int] | None = None,
    ) -> None:
        rows = isinstance(root, Tensor) and root.dim() > 0
        super().__init__(model, seed, 0 if rows else root, ids, sample_dim)
        if rows:
            self._root = (seed if isinstance(seed, Key) else Key(seed)).fold(root)
            self._on_device = self._root, self._on_device[1]
        self._stratum, self._strata = stratum, strata

    def finish(self, key: Key) -> Key:
        """See :meth:`thinned.models.address.Address.finish`."""
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


class Drawing:
    """Computes draws by the first of three routes that gives the model's own results.

    - ``"vmap"``: :func:`torch.vmap` over the draws. The model's results before its first dropout do not
      depend on the draw, so vmap computes them once.
    - ``"batch"``: each example as often as there are draws, in one batch.
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
        sample_dim: int | Mapping[str, int] | None,
        budget: int,
    ) -> None:
        self.model, self.read, self.seed, self.strata = model, read, seed, strata
        self.route: Route = "vmap"
        self.why: list[str] = []
        self._consistent, self._sample_dim, self._budget = consistent, sample_dim, budget
        self._alone: Outputs | None = None
        self._row_bytes = 0.0

    def at_once(self, batch: Batch, first: int) -> int:
        """How many draws of ``batch`` fit into the budget; before the first, ``first`` is its number."""
        if not self._row_bytes:
            of_set, draw = self._split(first)
            with _Largest() as largest:
                self._alone = self._call(batch, draw, of_set)
            # An operation reads one such result and writes another; a third waits for a residual connection.
            self._row_bytes = 3 * max(1, largest.bytes) / len(batch)
        return max(1, int(self._budget / (self._row_bytes * len(batch))))

    def __call__(self, batch: Batch, first: int, count: int) -> Outputs:
        """Draws ``first`` to ``first + count - 1``, which are of one set, along a new dimension 0."""
        alone, self._alone = self._alone, None
        while alone is not None and self.route != "one by one":
            try:
                draws = ROUTES[self.route](self, batch, first, count)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            else:
                if _close([draw[0] for draw in draws], alone):
                    return draws
                reason = "its first draw differs from that draw alone"
            self.why.append(f"{self.route}: {reason}")
            self.route = SLOWER[self.route]
        draws = ROUTES[self.route](self, batch, first, count)
        if alone is not None and not _close([draw[0] for draw in draws], alone):
            warnings.warn(
                f"this {type(self.model).__name__} gives two results for one draw: it has random numbers "
                "or a state that no key gives, so its predictions depend on more than the seed",
                UserWarning,
                stacklevel=2,
            )
        return draws

    def _call(self, batch: Batch, draw: int | Tensor, of_set: int = 0) -> Outputs:
        stratum = None if self.strata == 1 else draw
        root = draw if self.strata == 1 else of_set
        ids = torch.zeros_like(batch.ids) if self._consistent else batch.ids
        place = Draw(self.model, self.seed, root, ids, stratum, self.strata, self._sample_dim)
        with intercept(), place:
            return self.read(batch.call(self.model))

    def _split(self, first: int) -> tuple[int, int]:
        """The set of a draw, and its number within the set."""
        return (0, first) if self.strata == 1 else divmod(first, self.strata)

    def _by_vmap(self, batch: Batch, first: int, count: int) -> Outputs:
        of_set, first = self._split(first)
        draws = torch.arange(first, first + count, device=batch.ids.device)
        call = torch.vmap(lambda draw: self._call(batch, draw, of_set), randomness="same")
        return call(draws)

    def _in_batch(self, batch: Batch, first: int, count: int) -> Outputs:
        of_set, first = self._split(first)
        rows = batch.map(lambda tensor: tensor.repeat(count, *(1,) * (tensor.dim() - 1)))
        draws = torch.arange(first, first + count, device=batch.ids.device).repeat_interleave(len(batch))
        outputs = self._call(rows, draws, of_set)
        return tuple(output.unflatten(0, (count, len(batch))) for output in outputs)

    def _one_by_one(self, batch: Batch, first: int, count: int) -> Outputs:
        of_set, first = self._split(first)
        each = [self._call(batch, draw, of_set) for draw in range(first, first + count)]
        return tuple(map(torch.stack, zip(*each, strict=True)))


ROUTES: dict[Route, Callable[[Drawing, Batch, int, int], Outputs]] = {
    "vmap": Drawing._by_vmap,
    "batch": Drawing._in_batch,
    "one by one": Drawing._one_by_one,
}


def _close(draws: Sequence[Tensor], alone: Sequence[Tensor]) -> bool:
    """Whether they are equal but for rounding, relative to the largest number."""
    for draw, one in zip(draws, alone, strict=True):
        if draw.shape != one.shape:
            return False
        largest = one.nan_to_num(0.0, 0.0, 0.0).abs().amax() if one.numel() else 0.0
        room = 64 * torch.finfo(one.dtype).eps * float(largest)
        if not torch.allclose(draw, one, rtol=0, atol=room, equal_nan=True):
            return False
    return True


class _Largest(TorchFunctionMode):
    """Notes the size of the largest result of a torch function."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, Tensor):
                self.bytes = max(self.bytes, each.numel() * each.element_size())
        return result
