"""Masks by address: what a mask is depends on the step and on the site, and on nothing that ran before."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thinned.functional import keep_mask
from thinned.keys import Key
from thinned.models.recompute import Remembering
from thinned.models.sites import Sites, sites_of
from thinned.sites import current

__all__ = ["Address", "address"]


def address(
    model: nn.Module,
    *,
    seed: int | Key,
    step: int,
    samples: Tensor | Sequence[int] | None = None,
) -> Address:
    r"""A context in which each mask is a function of seed, step, site, sample and position alone.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(step).\text{fold}(site)
        \;[.\text{fold}(sample) \text{ for each row}]

    A site is the path of a module in ``model``, and from its second call within the context on the path,
    ``"#"`` and the number of calls before it. So no order of execution, no number that something else draws,
    and no random state has a part in it: a run that is resumed at a step, a checkpointed region that is
    computed again, and a frozen or reordered layer have the masks of the uninterrupted run.

    It gives keys to the calls of thinned's layers and functions in ``model`` that are given none. A key that
    a call is given stays; torch's own dropouts are not affected (see :func:`thinned.convert` and
    :func:`thinned.intercept`). Within :func:`torch.utils.checkpoint.checkpoint` the recomputation has the
    masks of the first computation, also after the context, and needs no ``preserve_rng_state``.

    Args:
        model: whose sites it is about. On first use its modules get forward hooks, which do nothing outside
            the context; a module that is added later counts as a part of the one around it.
        seed: of the run: an integer, or a :class:`~thinned.Key`.
        step: of the run. Under :func:`torch.compile` neither another step nor other samples compile anew.
        samples: an id for each row of dimension 0 of what the sites are given. A sample's mask then does not
            depend on its place in the batch, on the batch's size, or on what is accumulated. Where a sample
            has ``k`` rows, their keys are ``key.fold(sample).fold(0 .. k-1)``; a tensor of one row has one
            mask for all samples.

    Raises:
        TypeError, ValueError: ``seed``, ``step`` or ``samples`` are no integers, or too large.
        RuntimeError: at a site whose dimension 0 has a size that is no multiple of the number of samples.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), thinned.Dropout(0.5))
    >>> x = torch.ones(2, 8)
    >>> with thinned.address(model, seed=7, step=100):
    ...     y = model(x)
    >>> thinned.address(model, seed=7, step=100).mask_of("1", (2, 8), p=0.5).equal(y != 0)
    True
    """
    return Address(sites_of(model), seed, step, samples)


class Address:
    """What :func:`thinned.address` returns: the context, and the keys and masks of its sites.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(thinned.Dropout(0.5))
    >>> thinned.address(model, seed=7, step=3).key_of("0") == thinned.Key(7).fold(3).fold("0")
    True
    """

    def __init__(
        self, sites: Sites, seed: int | Key, step: int, samples: Tensor | Sequence[int] | None
    ) -> None:
        self.sites = sites
        self._root = (seed if isinstance(seed, Key) else Key(seed)).fold(step)
        self._samples = None if samples is None else _ids(samples)
        self._calls: dict[str, int] = {}
        self._remembering = Remembering(self)
        self._outer: list[Any] = []

    def __enter__(self) -> Address:
        self._calls.clear()
        self.activate()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.deactivate()

    def activate(self) -> None:
        """Become the source of keys, with the sites' calls counted so far."""
        self._outer.append((current.source, list(self.sites.stack)))
        self.sites.stack.clear()
        self._remembering.install()
        current.source = self

    def deactivate(self) -> None:
        """Leave it to the source that was there before."""
        self._remembering.remove()
        current.source, self.sites.stack[:] = self._outer.pop()

    def state(self) -> tuple[dict[str, int], list[str]]:
        """How often each site has been called, and the modules that are running."""
        return dict(self._calls), list(self.sites.stack)

    def restore(self, state: tuple[dict[str, int], list[str]]) -> None:
        """Count on from an earlier :meth:`state`."""
        calls, stack = state
        self._calls.clear()
        self._calls.update(calls)
        self.sites.stack[:] = stack

    def key_of(self, path: str, call: int = 0) -> Key:
        """The key of a site's call, or one for each of the samples.

        Args:
            path: of the module in the model, as in ``model.named_modules()``.
            call: how many calls of the site come before it within the context.
        """
        key = self._root.fold(f"{path}#{call}" if call else path)
        return key if self._samples is None else key.fold(self._samples)

    def mask_of(
        self,
        path: str,
        shape: Sequence[int],
        p: float,
        *,
        call: int = 0,
        broadcast_dims: Sequence[int] = (),
    ) -> Tensor:
        """The mask of a site's call on a tensor of ``shape``: True where it keeps.

        Args:
            path: as for :meth:`key_of`.
            call: as for :meth:`key_of`.
            shape: of what the site was given.
            p: its probability of dropping.
            broadcast_dims: the dimensions along which it shares a decision, such as (2, 3) for a Dropout2d.
        """
        return keep_mask(self.key_of(path, call), shape, p, broadcast_dims=broadcast_dims)

    def key_for(self, input: Tensor, rows: int | None) -> Key:  # noqa: A002
        """The key of the call that is running, which is counted; see :class:`thinned.sites.Source`."""
        path = self.sites.stack[-1] if self.sites.stack else ""
        call = self._calls.get(path, 0)
        self._calls[path] = call + 1
        samples = self._samples
        if samples is None or rows is None or not input.dim() or input.shape[rows] == 1 != len(samples):
            key = self._root.fold(f"{path}#{call}" if call else path)
        else:
            key = self._rows(self.key_of(path, call), samples, input, rows, path)
        return key if key.bits.device == input.device else key.to(input.device)

    def _rows(self, keys: Key, samples: Tensor, input: Tensor, rows: int, path: str) -> Key:  # noqa: A002
        each = input.shape[rows] // len(samples)
        if each * len(samples) != input.shape[rows]:
            raise RuntimeError(
                f"the site {path!r} was given a tensor of shape {tuple(input.shape)}, whose dimension {rows} "
                f"is no multiple of the {len(samples)} samples"
            )
        if each == 1:
            return keys
        return Key.from_bits(
            Key.from_bits(keys.bits.repeat_interleave(each))
            .fold(torch.arange(each, device=keys.bits.device).repeat(len(samples)))
            .bits
        )


def _ids(samples: Tensor | Iterable[int]) -> Tensor:
    ids = samples if isinstance(samples, Tensor) else torch.tensor(list(samples), dtype=torch.int64)
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise TypeError(
            f"samples must be int64 ids in one dimension, got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    return ids
