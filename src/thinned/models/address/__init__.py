"""Masks by address: a mask depends on step and site, not on the random numbers drawn before."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from fnmatch import fnmatchcase
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thinned.checks import check_integer, got, integers
from thinned.devices import to_device
from thinned.distributed.agreement import check_agreement
from thinned.distributed.ranks import DataParallel, Replica, replica_of
from thinned.distributed.shards import is_dtensor
from thinned.functional import keep_mask
from thinned.key_source import KeySource, active
from thinned.keys import Key, key_of_rows, key_of_seed
from thinned.layers import Residual, StochasticDepth
from thinned.models.address.hooks import ModuleHooks, hook_wrapper, hooks_of, module_at
from thinned.models.checkpoint import Counting, close_failed
from thinned.models.walk import check_model, is_ours
from thinned.nested import shape_of
from thinned.op.vmap_keys import key_per_call
from thinned.philox import signed64
from thinned.torch_state import (
    compiling,
    graph_task_is_running,
    infers_shapes,
    local_of,
    outside_graphs,
    unwrapped,
)

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["Address", "address", "ids_of"]


def address(
    model: nn.Module,
    *,
    seed: int | Key,
    step: int | Tensor,
    samples: Tensor | Sequence[int] | None = None,
    sample_dim: int | Mapping[str, int] | None = None,
    data_parallel: DataParallel = "auto",
    microbatches: int | None = None,
) -> Address:
    r"""A context in which each mask is a function of seed, step, site, sample and position alone.

    .. math:: \text{key} = \text{Key}(seed).\text{fold}(step)\;[.\text{fold}(\text{"\#data parallel"})
        .\text{fold}(replica)].\text{fold}(site)\;[.\text{fold}(sample) \text{ for each row}]

    The replica is in the key only without ``samples``, and only on several processes; see ``data_parallel``.

    A site is the path of a module in ``model``, the first path if several lead to it. The path's second call
    within the context is the site ``path#1``, its third ``path#2``. (A ``"#"`` in a path is doubled.) A run
    that resumes at a step has the masks of the uninterrupted run, and so has a model with a frozen or
    reordered layer.

    The context gives keys to calls of thinned's layers and functions in ``model`` that are not given one. It
    does not affect torch's own dropouts; see :func:`thinned.convert` and :func:`thinned.intercept`.

    A region that a backward pass recomputes has the masks of its first run, also after the context has ended.
    It may be recomputed by :func:`torch.utils.checkpoint.checkpoint`, which needs no ``preserve_rng_state``,
    or by an autograd Function that calls it in ``forward(ctx, ...)``, as in Megatron and DeepSpeed. Such a
    Function must restore the random state only if it calls one site more than once. Any other call of a site
    during a backward pass raises.

    The context holds for the thread that enters it, in which no other asyncio task may run meanwhile. The
    replicas of ``model`` that :class:`torch.nn.DataParallel` runs in other threads join it, and each counts
    its rows from 0. Under :func:`torch.vmap` all mapped calls share a mask, since nothing is drawn. Only with
    ``randomness="different"`` does call ``i`` have a mask of its own, that of ``key.fold(i)``.

    On several processes, ids decide where there are ``samples``: an example has the same masks in any process
    and on any number of them; :func:`thinned.distributed.shard_ids` makes ids for the shards of a batch.
    Without ``samples``, processes with one seed have other masks in each data-parallel replica, and the same
    within one, as its tensor-parallel processes need. A DTensor that all replicas compute together has one
    mask. Decisions that all samples share are the same in all processes: the layers of
    :class:`~thinned.LayerDrop`, the weights of :class:`~thinned.WeightDrop` and its kin, and the edges of a
    graph. The context communicates nothing, and processes that disagree on seed, step or samples go unnoticed
    unless all of them call :meth:`Address.check_agreement`.

    Under :func:`torch.compile`, enter it outside the compiled code: other steps and samples then cause no
    recompilation. Compiled code may enter it too if an earlier address gave ``model`` its hooks; an integer
    ``step`` then recompiles once.

    Args:
        model: the model. On first use its modules get forward hooks, which do nothing outside the context. A
            module that is added later counts as a part of its parent.
        seed: of the run: an integer, or a :class:`~thinned.Key`.
        step: of the run: an integer, or an int64 tensor of one element.
        samples: an id for each sample of the batch, which for DTensors is that of all processes. A sample's
            mask then does not depend on its place in the batch, on the batch's size or on gradient
            accumulation. Where a sample has ``k`` rows, their keys are ``key.fold(sample).fold(0 .. k-1)``. A
            tensor of one row has one mask for all samples. So has a layer whose samples share a decision,
            such as ``StochasticDepth(p, "batch")``.
        sample_dim: the dimension of the samples in the inputs of element-wise layers: an integer, such as 1
            for sequences of shape ``(L, N, *)``, or integers by patterns of paths (:mod:`fnmatch`), of which
            the first match holds. By default, inputs of three dimensions or more follow ``batch_first`` of
            the module or of one that contains it; otherwise the dimension is 0.
        data_parallel: says which data-parallel replica this process computes. ``"auto"`` finds it by the
            model's ``DistributedDataParallel``, ``fully_shard`` or DTensors, else takes this process's rank
            among all; :func:`thinned.distributed.ranks.replica_of` has the table. Tensor and pipeline
            parallelism on plain tensors, as in Megatron, cannot be seen: pass the mesh of the data-parallel
            dimensions, in which processes count row by row, their process group, or the replica's number.
            ``None`` gives all processes the same masks. With ``samples`` it only matters to
            :meth:`Address.check_agreement`.
        microbatches: the number of calls of ``model`` within the context, each with a part of the batch. A
            schedule of :mod:`torch.distributed.pipelining` and a loop that accumulates gradients make such
            calls. Call ``m`` has the ids ``samples.tensor_split(microbatches)[m]``, and its sites count from
            0, so its masks are those of one call with the whole batch. The addresses of several models, such
            as the stages of one rank, may be entered together. A call by which a pipeline stage infers shapes
            does not count. With ``torch.compile(model)``, give that to the address too, or Dynamo breaks its
            graph at the call.

    Raises:
        TypeError, ValueError: ``seed``, ``step`` or ``samples`` are no integers, or too large;
            ``data_parallel`` is none of the above, or a group without this process; ``microbatches`` is given
            without ``samples``, or exceeds their number.
        IndexError: at a site whose input has no dimension ``sample_dim``.
        RuntimeError: at a site if the samples' dimension is no multiple of their number, or, in a DTensor
            that is sharded along it, is not their number; or if only dimension 1 has that size, or
            that of the kept rows of a residual branch, and nothing says that it is meant; at a site that a
            backward pass or another asyncio task calls; at the end, if a later address is still active, or if
            ``model`` was called more or less often than ``microbatches`` says; and where ``"auto"`` cannot
            tell the replica.

    >>> import torch, thinned
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), thinned.Dropout(0.5))
    >>> x = torch.ones(2, 8)
    >>> with thinned.address(model, seed=7, step=100):
    ...     y = model(x)
    >>> thinned.address(model, seed=7, step=100).mask_of("1", (2, 8), p=0.5).equal(y != 0)
    True
    """
    return Address(model, seed, step, samples, sample_dim, data_parallel, microbatches)


class Address:
    """The context that :func:`thinned.address` returns, with the keys and masks of its sites.

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
        data_parallel: DataParallel = None,
        microbatches: int | None = None,
    ) -> None:
        check_model("address", model)
        self.hooks = hooks_of(model)
        self._model = model
        self._seed = _seed(seed)
        self._root = self._seed.fold(_step(step))
        self.samples = None if samples is None else ids_of(samples)
        self.sample_dim, self.sample_dims = _dims(sample_dim, self.hooks)
        self._device = next((parameter.device for parameter in model.parameters()), None)
        self._on_device = self._root, self.samples
        if self._device is not None and self._device.type != "cpu":
            there = None if self.samples is None else to_device(self.samples, self._device)
            self._on_device = self._root.to(self._device), there
        self._step, self._data_parallel = step, data_parallel
        self.replica: Replica | None = None
        if samples is None and data_parallel is not None:
            self.replica = self.hooks.replica_of(model, data_parallel)
        if self.replica is not None:
            self._of_replica = {self.replica.number: self._fold_replica(self.replica.number)}
        self.microbatches: tuple[Address, ...] = ()
        if microbatches is not None:
            self.microbatches = self._split(microbatches)
            if not compiling():
                hook_wrapper(model)

    def _fold_replica(self, number: int) -> tuple[Key, Key]:
        root, there = (key.fold("#data parallel").fold(number) for key in (self._root, self._on_device[0]))
        return root, there

    def _split(self, microbatches: int) -> tuple[Address, ...]:
        """The address of each microbatch."""
        root, there = self._on_device
        if self.samples is None or there is None:
            raise ValueError(
                f"microbatches={microbatches} needs samples: without ids a mask belongs to a row of the "
                "whole batch, and a call with a part of it has other rows"
            )
        check_integer("microbatches", microbatches, least=1)
        if microbatches > self.samples.shape[0]:
            raise ValueError(f"microbatches={microbatches} is more than the {self.samples.shape[0]} samples")
        parts = tuple(copy(self) for _ in range(microbatches))
        ids: Any = zip(*(each.tensor_split(microbatches) for each in (self.samples, there)), strict=True)
        for part, (samples, there) in zip(parts, ids, strict=True):
            part.samples, part._on_device = samples, (root, there)
        return parts

    def __enter__(self) -> Address:
        if not compiling():
            close_failed()
        if active.rows is not None:
            raise RuntimeError(
                "thinned.address is entered within a residual branch that is computed for the kept rows "
                "alone; enter it around the whole model"
            )
        _Running(self).begin()
        if not compiling():
            self.hooks.context = self
            self.hooks.addressed = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = self.leave()
        if not compiling():
            outer: Any = active.key_source
            within = isinstance(outer, _Running) and outer.hooks_id == self.hooks.id
            self.hooks.context = outer.address if within else None
        count, calls = len(self.microbatches), ended.calls.get(_MODEL, 0)
        if calls < count and kind is None:
            raise RuntimeError(
                f"a model was called {calls} times within a thinned.address with microbatches={count}"
            )

    def join(self) -> _Running:
        """Activate this address in the thread of a replica."""
        return _Running(self, joined=True).begin()

    def leave(self) -> _Running:
        """End what this thread began last of this address, and return it."""
        if not compiling():
            close_failed()
        running: Any = active.key_source
        while not compiling() and running.address is not self:
            running = running._outer
        running.end()
        return running  # type: ignore[no-any-return]

    def finish(self, key: Key) -> Key:
        """The key that a call gets in place of ``key``, for subclasses."""
        return key

    def recomputing(self) -> AbstractContextManager[Any]:
        """A context for recomputations of what this address was active in, for subclasses."""
        return nullcontext()

    def parts(self, device: torch.device) -> tuple[Key, Tensor | None]:
        """The step's key and the samples, for an input on ``device``.

        In eager code one key stays on the CPU, where it is a number and a fold launches no kernel. Compiled
        code can be a CUDA graph only if it is on one device.
        """
        if device != self._device:
            return self._root, self.samples
        root, samples = self._on_device
        return root if compiling() else self._root, samples

    def _root_for(self, input: Tensor, root: Key) -> Key:
        """``root`` of :meth:`parts`, with the data-parallel replica folded in that computes ``input``."""
        if self.replica is None:
            return root
        number = self.replica.number_for(unwrapped(input))
        if number is None:
            return root
        if number not in self._of_replica:
            self._of_replica[number] = self._fold_replica(number)
        return self._of_replica[number][int(root is not self._root)]

    def check_agreement(self, group: ProcessGroup | None = None) -> None:
        """Raise in every process of a group if this address differs between them.

        The processes must have the same seed and step, and the same samples within a data-parallel replica.
        No two replicas may have the same sample. (A ``DistributedSampler`` repeats samples at the end of an
        epoch unless ``drop_last=True``.) The check is one :func:`torch.distributed.all_gather_object`, which
        every process of the group has to call. The context itself communicates nothing.

        Args:
            group: the process group; by default all processes.

        Raises:
            RuntimeError: the processes disagree; the message names two ranks and what each has.
        """
        replica = replica_of(self._model, self._data_parallel)
        number = None if replica is None else replica.number
        samples = None if self.samples is None else self.samples.tolist()
        check_agreement({"seed": self._seed, "step": int(self._step)}, samples, number, group)

    def key_of(self, path: str, call: int = 0) -> Key:
        """The key of a site, or one for each of the samples.

        At sites that all samples share, such as those of :class:`thinned.WeightDrop`, the key is instead that
        of the address without ``samples`` and with ``data_parallel=None``.

        Args:
            path: any path that leads to the module, as in ``model.named_modules()``.
            call: the number of earlier calls of the module within the context.

        Raises:
            ValueError: the model has no module at ``path``, or ``call`` is negative.
        """
        path, _ = module_at(self._model, path)
        check_integer("call", call, least=0)
        root = self._root if self.replica is None else self._of_replica[self.replica.number][0]
        key = root.fold(_site(path, call))
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
        """The mask of a site for an input of ``shape``: True where it keeps.

        Args:
            path: as for :meth:`key_of`.
            call: as for :meth:`key_of`.
            shape: the input's shape.
            p: the probability of dropping. By default the mask is what the layer of thinned at ``path`` drops
                in training, with its present probability.
            broadcast_dims: with ``p``, the dimensions along which all elements share one decision.

        Raises:
            ValueError: the model has no module at ``path``; or, without ``p``, that module is no layer of
                thinned, or one that returns no tensor.
        """
        if p is not None:
            return keep_mask(self.key_of(path, call), shape, p, broadcast_dims=broadcast_dims)
        path, module = module_at(self._model, path)
        check_integer("call", call, least=0)
        shape = integers("shape", shape)
        for size in shape:
            check_integer("a size of shape", size)
        layer = copy(module)
        layer.training = True
        if isinstance(layer, Residual):
            layer = StochasticDepth(layer.p, layer.mode)  # the same mask, without the branch
        with torch.inference_mode(False), torch.enable_grad():
            x = torch.ones(tuple(shape), device="cpu", requires_grad=True)
            y = None
            if is_ours(layer):
                with _within(_Running(self, calls={path: call}, stack=[path], recomputes=True)):
                    y = layer.forward(x.clone())  # forward runs no hooks
            if not isinstance(y, Tensor):
                raise ValueError(
                    f"p has to be given for the mask of {path!r}, which is a {type(layer).__name__}"
                )
            return torch.autograd.grad(y.sum(), x)[0] != 0  # dropped elements have gradient 0


class _Running(Counting):
    """An address that is active in one thread: its key source, and the counter of its sites' calls."""

    _title = "thinned.address"

    def __init__(self, address: Address, joined: bool = False, **counting: Any) -> None:
        self.address, self.hooks_id, self.joined = address, address.hooks.id, joined
        self._reset(**counting)

    def begin(self) -> _Running:
        if compiling():
            self._outer = active.key_source
        else:
            close_failed()
            self._enter_counting(active.key_source)
        active.key_source = self
        return self

    def end(self) -> None:
        active.key_source = self._unlink(active.key_source)
        if not compiling():
            self._exit_counting()

    def resumed(
        self, calls: Mapping[str, int], stack: Sequence[str], region: Any = None
    ) -> AbstractContextManager[Any]:
        running = _Running(self.address, calls=calls, stack=stack, region=region, recomputes=True)
        return _within(running, self.address.recomputing())

    def called(self, hooks_id: str) -> KeySource:
        """See :class:`thinned.key_source.KeySource`."""
        running: Any = self
        while running is not None and running.hooks_id != hooks_id:
            running = running._outer
        if running is None or running.stack or running.joined:
            return self
        if not compiling():
            return running.begin_call() or self
        return (_begin_call(running) or self) if running.address.microbatches else self

    def begin_call(self) -> _Running | None:
        """The key source of a call of the model, if it is not this one."""
        if graph_task_is_running() and not self._recomputes:
            return None  # number() refuses it if it calls a dropout
        address, infers = self.address, infers_shapes()
        if count := len(address.microbatches):
            number = 0 if infers else self._count(_MODEL)
            if number == count:
                raise RuntimeError(
                    f"a model is called {count + 1} times within a thinned.address with microbatches={count}"
                )
            address = address.microbatches[number]
        elif not infers:
            return None
        return _Running(address, joined=True, recomputes=self._recomputes).begin()

    def sample_dim(self, input: Tensor) -> int:
        """See :class:`thinned.key_source.KeySource`."""
        address, rows = self.address, active.rows
        if (address.samples is None and rows is None) or input.is_nested:
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
        if ndim > 2 and path in address.hooks.sample_dims:
            return address.hooks.sample_dims[path]
        if rows is not None:
            # A dropout with the rows elsewhere cannot be compiled: its size is no known multiple of them.
            count, what = shape[0] if compiling() else rows.index.shape[0], "kept rows"
        elif address.samples is not None:
            count, what = address.samples.shape[0], "samples"
        if shape[0] != count and shape[0] != 1 and shape[1] == count:
            raise RuntimeError(
                f"the site {path!r} was given a tensor of shape {tuple(shape)}, which may have its {count} "
                f"{what} along dimension 0 or 1; say which by thinned.address(sample_dim=)"
            )
        return 0

    def key_for(self, input: Tensor, sample_dim: int | None) -> Key | None:
        """Number the running call and return its key."""
        if not compiling():
            close_failed()
            if (source := active.key_source) is not self:  # this was a recomputation that raised
                return None if source is None else source.key_for(input, sample_dim)
        path = self.stack[-1] if self.stack else ""
        address = self.address
        root, samples = address.parts(input.device)
        rows = active.rows if input.dim() else None
        if rows is not None and sample_dim is not None:
            seen = input.size(sample_dim)
            # A tensor of one row that all samples share has the mask that it has outside of the branch.
            rows = None if seen == 1 != rows.index.shape[0] else rows.of(seen)
        if address.replica is not None and sample_dim is not None:
            root = address._root_for(input, root)
        key = root.fold(_site(path, self.number(path)))
        if samples is not None and sample_dim is not None and input.dim():
            key = _of_samples(key, samples, input, sample_dim, path, None if rows is None else rows.size)
        if key.shape and key.bits.device != input.device:
            key = key.to(input.device)
        key = address.finish(key_per_call(key))
        if rows is None or sample_dim is None:
            return key
        return key_of_rows(key, rows.index, rows.size, sample_dim)


_MODEL = "."  # under which the model's calls are counted; no module has this path
# Dynamo compiles a hook alone if its module is compiled in place, and would lose the new key source.
_begin_call = outside_graphs(_Running.begin_call)


def _site(path: str, call: int) -> str:
    path = path.replace("#", "##")
    return f"{path}#{call}" if call else path


def _seed(seed: int | Key) -> Key:
    key = key_of_seed(seed)
    if key.shape:
        raise ValueError(
            f"seed must be one key, got keys of shape {tuple(key.shape)}; a key for each row is what "
            "samples= makes of it"
        )
    return key


def _step(step: int | Tensor) -> int | Tensor:
    if not isinstance(step, Tensor):
        # Not check_integer: Dynamo may have a symbolic step.
        if not isinstance(step, int | torch.SymInt) and not hasattr(step, "__index__"):
            raise TypeError(f"step must be an integer or an int64 tensor of one element, {got(step)}")
        return step
    if step.dtype != torch.int64 or step.numel() != 1:
        raise (TypeError if step.dtype != torch.int64 else ValueError)(
            f"step must be an integer or an int64 tensor of one element, got {step.dtype} of shape "
            f"{tuple(step.shape)}"
        )
    return step.reshape(())


def _dims(
    sample_dim: int | Mapping[str, int] | None, hooks: ModuleHooks
) -> tuple[int | None, dict[str, int]]:
    """The dimension of the samples for all paths, and for the paths that a pattern matches."""
    if sample_dim is None or isinstance(sample_dim, int):
        return sample_dim, {}
    given = sample_dim.values() if isinstance(sample_dim, Mapping) else (sample_dim,)
    if not all(isinstance(dim, int) for dim in given):
        raise TypeError(
            "sample_dim must be an integer, or integers by patterns of paths such as {'encoder.*': 1}, "
            f"got {sample_dim!r}"
        )
    dims: dict[str, int] = {}
    for pattern, dim in sample_dim.items():
        matches = [path for path in hooks.paths if fnmatchcase(path, pattern)]
        if not matches:
            raise ValueError(f"no module of the model is at a path like {pattern!r}, which sample_dim names")
        for path in matches:
            dims.setdefault(path, dim)  # the first pattern that matches holds
    return None, dims


@contextmanager
def _within(running: _Running, around: AbstractContextManager[Any] | None = None) -> Iterator[None]:
    with around or nullcontext():
        running.begin()
        try:
            yield
        finally:
            running.end()


def _of_samples(
    key: Key, samples: Tensor, input: Tensor, sample_dim: int, path: str, size: int | None = None
) -> Key:
    """A key for each row of ``input`` along ``sample_dim``, or ``key`` for one row that all samples share.

    ``size`` is the number of rows, where ``input`` has only some of the batch.
    """
    count = samples.shape[0]  # since a symbolic size has no len()
    size = input.size(sample_dim) if size is None else size
    if size == 1 != count:
        return key
    rows_each = size // max(count, 1)  # an empty batch has no samples
    if rows_each * count != size or rows_each > 1:
        _check_all_rows(count, input, sample_dim, path)
    if rows_each * count != size:
        raise RuntimeError(
            f"the site {path!r} was given a tensor of shape {shape_of(input)}, whose dimension {sample_dim} "
            f"(sample_dim) is no multiple of the {count} samples"
        )
    keys = key.fold(samples)
    if rows_each == 1:
        return keys
    rows = torch.arange(rows_each, device=keys.bits.device).repeat(count)
    return Key.from_bits(keys.bits.repeat_interleave(rows_each)).fold(rows)


def _check_all_rows(count: int, input: Tensor, sample_dim: int, path: str) -> None:
    """Raise if ``input`` is a DTensor that is sharded along ``sample_dim``, where each row needs an id."""
    input = unwrapped(input)
    if is_dtensor(input) and (local := local_of(input).size(sample_dim)) != input.size(sample_dim):
        raise RuntimeError(
            f"the site {path!r} was given a DTensor of shape {tuple(input.shape)}, sharded along dimension "
            f"{sample_dim} (sample_dim), with {input.size(sample_dim)} rows in all processes and {local} in "
            f"this one, but there are {count} samples; samples= has to be an id for each row of all processes"
        )


def ids_of(samples: Tensor | Iterable[int]) -> Tensor:
    """The ids in an int64 tensor of one dimension; TypeError and ValueError for others."""
    if isinstance(samples, Tensor):
        if samples.dtype != torch.int64 or samples.dim() != 1:
            got = f"{samples.dtype} of shape {tuple(samples.shape)}"
            raise TypeError(f"samples must be int64 ids in one dimension, got {got}")
        if is_dtensor(samples):
            placements: Any = samples.placements  # type: ignore[attr-defined]
            if not all(placement.is_replicate() for placement in placements):
                raise TypeError(
                    f"samples must be the ids of the whole batch in each process, got a DTensor of "
                    f"{samples.size(0)} ids with placements {placements}; pass samples.full_tensor(), which "
                    "gathers them"
                )
            return local_of(samples)
        return samples
    try:
        ids = [operator.index(sample) for sample in samples]
    except TypeError:
        raise TypeError(f"samples must be int64 ids in one dimension, got {samples!r}") from None
    for sample in ids:
        if not -(2**63) <= sample < 2**64:
            raise ValueError(f"samples must be in -2**63 .. 2**64-1, got {sample}")
    return torch.tensor([signed64(sample) for sample in ids], dtype=torch.int64, device="cpu")
