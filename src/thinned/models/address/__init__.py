"""Masks by address: what a mask is depends on the step and on the site, and on nothing that ran before."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from thinned.functional import keep_mask
from thinned.key_source import current
from thinned.keys import Key
from thinned.models.address.hooks import Sites, module_at, sites_of
from thinned.models.checkpoint import Counting, close_failed
from thinned.models.convert.rules import is_ours
from thinned.nested import shape_of
from thinned.op.vmap_keys import key_per_call
from thinned.torch_state import compiling

__all__ = ["Address", "address"]


def address(
    model: nn.Module,
    *,
    seed: int | Key,
    step: int | Tensor,
    samples: Tensor | Sequence[int] | None = None,
    sample_dim: int | Mapping[str, int] | None = None,
) -> Address:
    r"""A context in which each mask is a function of seed, step, site, sample and position alone.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(step).\text{fold}(site)
        \;[.\text{fold}(sample) \text{ for each row}]

    A site is the path of a module in ``model``, the first if it has several, and from its second call within
    the context on the path, ``"#"`` and the number of calls before it. (A ``"#"`` in a path counts as two.)
    So no order of execution, no number that something else draws, and no random state has a part in it: a
    run that is resumed at a step, a checkpointed region that is computed again, and a frozen or reordered
    layer have the masks of the uninterrupted run.

    It gives keys to the calls of thinned's layers and functions in ``model`` that are given none. A key that
    a call is given stays; torch's own dropouts are not affected (see :func:`thinned.convert` and
    :func:`thinned.intercept`). A region that a backward pass computes again has the masks of its first
    computation, also after the context: by :func:`torch.utils.checkpoint.checkpoint`, which needs no
    ``preserve_rng_state``, or by an autograd Function that calls it in its ``forward(ctx, ...)``, as those of
    Megatron and DeepSpeed do. Such a Function has to restore the random state only if it calls one site more
    than once. Any other call of a site while a backward pass runs is refused.

    It holds for the thread that enters it, where no other asyncio task may run within it, and for the
    replicas of ``model`` that :class:`torch.nn.DataParallel` runs in others, each of which counts its rows
    from 0. A mask is no random
    number to :func:`torch.vmap`: all mapped calls have the same one, and rows are those of the mapped call.
    Only with ``randomness="different"`` has call ``i`` a mask of its own, with ``key.fold(i)``.

    Under :func:`torch.compile` enter it around the compiled code, where neither another step nor other
    samples compile anew. It may be entered in compiled code too if ``model`` has its hooks by then, from an
    address that was made before; there a ``step`` that is an integer compiles anew once.

    Args:
        model: whose sites it is about. On first use its modules get forward hooks, which do nothing outside
            the context; a module that is added later counts as a part of the one around it.
        seed: of the run: an integer, or a :class:`~thinned.Key`.
        step: of the run: an integer, or an int64 tensor of one element.
        samples: an id for each sample that the sites are given. A sample's mask then does not
            depend on its place in the batch, on the batch's size, or on what is accumulated. Where a sample
            has ``k`` rows, their keys are ``key.fold(sample).fold(0 .. k-1)``; a tensor of one row has one
            mask for all samples.
        sample_dim: the dimension of the samples in what element-wise sites are given, such as 1 for sequences
            of shape ``(L, N, *)``; or one for each pattern of paths (:mod:`fnmatch`), of which the first that
            matches counts. By default it is what the nearest module around the site says by its
            ``batch_first``, for inputs of three dimensions or more, and 0 where none says so.

    Raises:
        TypeError, ValueError: ``seed``, ``step`` or ``samples`` are no integers, or too large.
        IndexError: at a site whose input has no dimension ``sample_dim``.
        RuntimeError: at a site whose dimension of samples is no multiple of their number, or where dimension
            0 is a multiple of it and dimension 1 the number itself and nothing tells which of them it is; at
            one whose call is unknown, in a backward pass or in another asyncio task; at the end, if another
            address that was entered later is still active.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), thinned.Dropout(0.5))
    >>> x = torch.ones(2, 8)
    >>> with thinned.address(model, seed=7, step=100):
    ...     y = model(x)
    >>> thinned.address(model, seed=7, step=100).mask_of("1", (2, 8), p=0.5).equal(y != 0)
    True
    """
    return Address(model, seed, step, samples, sample_dim)


class Address:
    """What :func:`thinned.address` returns: the context, and the keys and masks of its sites.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(thinned.Dropout(0.5))
    >>> thinned.address(model, seed=7, step=3).key_of("0") == thinned.Key(7).fold(3).fold("0")
    True
    """

    def __init__(
        self,
        model: nn.Module,
        seed: int | Key,
        step: int | Tensor,
        samples: Tensor | Sequence[int] | None,
        sample_dim: int | Mapping[str, int] | None = None,
    ) -> None:
        self.sites = sites_of(model)
        self._model = model
        self._root = _seed(seed).fold(_step(step))
        self.samples = None if samples is None else _ids(samples)
        self.sample_dim, self.sample_dims = _dims(sample_dim, self.sites)
        device = next((parameter.device for parameter in model.parameters()), None)
        self._device = device
        self._there = self._root, self.samples
        if device is not None and device.type != "cpu":
            there = None if self.samples is None else self.samples.to(device)
            self._there = self._root.to(device), there

    def __enter__(self) -> Address:
        _Running(self).begin()
        if not compiling():
            self.sites.context = self
            self.sites.addressed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.leave()
        if not compiling():
            outer: Any = current.source
            within = isinstance(outer, _Running) and outer.sites == self.sites.name
            self.sites.context = outer.address if within else None

    def join(self) -> _Running:
        """Enter with a replica, whose thread has no other source."""
        return _Running(self, joined=True).begin()

    def leave(self) -> None:
        """End what this thread entered last of it."""
        if not compiling():
            close_failed()
        running: Any = current.source
        while not compiling() and running.address is not self:
            running = running._outer
        running.end()

    def parts(self, device: torch.device | None) -> tuple[Key, Tensor | None]:
        """What keys are made of: the step's key and the samples, on the ``device`` if it is the model's.

        Eager code folds a name into a key faster on the CPU, and compiled code is a CUDA graph only if all of
        it is on one device.
        """
        return self._there if device is not None and device == self._device else (self._root, self.samples)

    def key_of(self, path: str, call: int = 0) -> Key:
        """The key of a site's call, or one for each of the samples.

        Args:
            path: of the module in the model, as in ``model.named_modules()``; of one with several, any.
            call: how many calls of the site come before it within the context.

        Raises:
            ValueError: the model has no module at ``path``, or ``call`` is negative.
        """
        path, _ = module_at(self._model, path)
        if call < 0:
            raise ValueError(f"call has to be at least 0, but got {call}")
        key = self._root.fold(_site(path, call))
        return key if self.samples is None else key.fold(self.samples)

    def mask_of(
        self,
        path: str,
        shape: Sequence[int],
        p: float | None = None,
        *,
        call: int = 0,
        broadcast_dims: Sequence[int] = (),
    ) -> Tensor:
        """The mask of a site's call on a tensor of ``shape``: True where it keeps.

        Args:
            path: as for :meth:`key_of`.
            call: as for :meth:`key_of`.
            shape: of what the site was given.
            p: its probability of dropping. Without it, the site is a layer of thinned, and the mask is what
                that drops, with the probability that it has now, in training.
            broadcast_dims: with ``p``, the dimensions along which a decision is shared.

        Raises:
            ValueError: the model has no module at ``path``; or, without ``p``, no layer of thinned is there
                that gives a tensor.
        """
        if p is not None:
            return keep_mask(self.key_of(path, call), shape, p, broadcast_dims=broadcast_dims)
        path, module = module_at(self._model, path)
        layer = copy(module)
        layer.training = True
        x = torch.ones(tuple(shape), requires_grad=True)
        with torch.enable_grad():
            y = None
            if is_ours(layer):
                with _within(_Running(self, {path: call}, [path], recomputes=True)):
                    y = layer.forward(x.clone())  # without its hooks
            if not isinstance(y, Tensor):
                raise ValueError(
                    f"p has to be given for the mask of {path!r}, which is a {type(layer).__name__}"
                )
            return torch.autograd.grad(y.sum(), x)[0] != 0  # what is dropped has no gradient


class _Running(Counting):
    """An address in one thread: the source of its keys, which counts the calls of each site."""

    def __init__(
        self,
        address: Address,
        calls: dict[str, int] | None = None,
        stack: list[str] | None = None,
        joined: bool = False,
        **recomputation: Any,
    ) -> None:
        self.address, self.sites, self.joined = address, address.sites.name, joined
        self._reset({} if calls is None else calls, stack, **recomputation)
        self._outer: Any = None

    def _words(self) -> str:
        return "thinned.address"

    def begin(self) -> _Running:
        if not compiling():
            close_failed()
            outer: Any = current.source
            self._enter_counting(outer)
        self._outer = current.source
        current.source = self
        return self

    def end(self) -> None:
        if current.source is self:
            current.source = self._outer
        else:  # out of order
            inner: Any = current.source
            while inner is not None and inner._outer is not self:
                inner = inner._outer
            if inner is not None:
                inner._outer = self._outer
        if not compiling():
            self._exit_counting()

    def resumed(
        self, calls: dict[str, int], stack: list[str], region: Any = None
    ) -> AbstractContextManager[Any]:
        return _within(_Running(self.address, calls, stack, region=region, recomputes=True))

    def sample_dim(self, input: Tensor) -> int:
        """The dimension of the samples in an element-wise call; see :class:`thinned.key_source.Source`."""
        address = self.address
        if address.samples is None or input.is_nested:
            return 0
        shape, path = input.shape, self.stack[-1] if self.stack else ""
        ndim = len(shape)
        if ndim < 2:
            return 0
        dim = address.sample_dims.get(path, address.sample_dim)
        if dim is not None:
            if not -ndim <= dim < ndim:
                raise IndexError(
                    f"the site {path!r} has sample_dim={dim} and was given a tensor of shape {tuple(shape)}; "
                    f"accepted: {-ndim} .. {ndim - 1}"
                )
            return dim % ndim
        if ndim > 2 and path in address.sites.sample_dims:
            return address.sites.sample_dims[path]
        count, size = address.samples.shape[0], shape[0]
        if size != count and size != 1 and shape[1] == count:
            raise RuntimeError(
                f"the site {path!r} was given a tensor of shape {tuple(shape)}, which may have its {count} "
                "samples along dimension 0 or 1; say which by thinned.address(sample_dim=)"
            )
        return 0

    def key_for(self, input: Tensor, rows: int | None) -> Key | None:
        """The key of the call that is running, which is counted; see :class:`thinned.key_source.Source`."""
        if not compiling():
            close_failed()
            if (source := current.source) is not self:  # this was one of those that failed
                return None if source is None else source.key_for(input, rows)
        stack, device = self.stack, input.device
        path = stack[-1] if stack else ""
        site = _site(path, self.number(path))
        compiled = compiling()
        root, samples = self.address.parts(device if compiled else None)
        if samples is None or rows is None or not input.dim() or input.size(rows) == 1 != samples.shape[0]:
            key = root.fold(site)
        else:
            key = _rows(root.fold(site).fold(samples), samples, input, rows, path)
        if key.bits.device != device:
            key = key.to(device)
        return key_per_call(key)


def _site(path: str, call: int) -> str:
    path = path.replace("#", "##")
    return f"{path}#{call}" if call else path


def _seed(seed: int | Key) -> Key:
    key = seed if isinstance(seed, Key) else Key(seed)
    if key.shape:
        raise ValueError(
            f"seed must be one key, got keys of shape {tuple(key.shape)}; a key for each row is what "
            "samples= makes of it"
        )
    return key


def _step(step: int | Tensor) -> int | Tensor:
    if isinstance(step, str):
        raise TypeError(f"step must be an integer or an int64 tensor of one element, got {step!r}")
    if not isinstance(step, Tensor):
        return step
    if step.dtype != torch.int64 or step.numel() != 1:
        raise (TypeError if step.dtype != torch.int64 else ValueError)(
            f"step must be an integer or an int64 tensor of one element, got {step.dtype} of shape "
            f"{tuple(step.shape)}"
        )
    return step.reshape(())


def _dims(sample_dim: int | Mapping[str, int] | None, sites: Sites) -> tuple[int | None, dict[str, int]]:
    """The dimension of the samples for all sites, or for the paths that patterns name."""
    if sample_dim is None or isinstance(sample_dim, int):
        return sample_dim, {}
    given = sample_dim.values() if isinstance(sample_dim, Mapping) else (sample_dim,)
    if not all(isinstance(dim, int) for dim in given):
        raise TypeError(
            "sample_dim must be an integer, or integers by patterns of paths such as {'encoder.*': 1}, "
            f"got {sample_dim!r}"
        )
    unused = [
        pattern for pattern in sample_dim if not any(fnmatchcase(path, pattern) for path in sites.paths)
    ]
    if unused:
        raise ValueError(f"no module of the model is at a path like {unused[0]!r}, which sample_dim names")
    named = {
        path: next((dim for pattern, dim in sample_dim.items() if fnmatchcase(path, pattern)), None)
        for path in sites.paths
    }
    return None, {path: dim for path, dim in named.items() if dim is not None}


@contextmanager
def _within(running: _Running) -> Iterator[None]:
    running.begin()
    try:
        yield
    finally:
        running.end()


def _rows(keys: Key, samples: Tensor, input: Tensor, rows: int, path: str) -> Key:
    count = samples.shape[0]  # which may be symbolic, as len() may not
    each = input.size(rows) // count
    if each * count != input.size(rows):
        raise RuntimeError(
            f"the site {path!r} was given a tensor of shape {shape_of(input)}, whose dimension {rows} "
            f"is no multiple of the {count} samples"
        )
    if each == 1:
        return keys
    return Key.from_bits(
        Key.from_bits(keys.bits.repeat_interleave(each))
        .fold(torch.arange(each, device=keys.bits.device).repeat(count))
        .bits
    )


def _ids(samples: Tensor | Iterable[int]) -> Tensor:
    ids = samples if isinstance(samples, Tensor) else torch.tensor(list(samples), dtype=torch.int64)
    if ids.dtype != torch.int64 or ids.dim() != 1:
        raise TypeError(
            f"samples must be int64 ids in one dimension, got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    return ids
