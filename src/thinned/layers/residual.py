"""A residual branch that is computed for the rows that a DropPath keeps, and for no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.modules.batchnorm import _BatchNorm

from thinned.checks import got
from thinned.distributed.ranks import has_peers
from thinned.key_source import Rows, Seeing, active
from thinned.keys import Key
from thinned.layers._arguments import apply, check_tensor, kept, key_for, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node
from thinned.layers.path import check_mode, drops_rows
from thinned.torch_state import compiling, is_eager

__all__ = ["Branch", "Residual", "computes_rows", "refuse_batch_norm", "residual"]


def residual(
    x: Tensor,
    branch: Callable[[Tensor], Tensor],
    p: float = 0.0,
    *,
    mode: Literal["row", "batch"] = "row",
    scale_by_keep: bool = True,
    allow_batch_norm: bool = False,
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Add a branch to ``x`` that is dropped with probability ``p`` for each row, and computed only if kept.

    .. math:: y_n = \begin{cases} x_n + f(x)_n / q & u(n) < T \\ x_n & \text{otherwise} \end{cases}

    This is ``x + drop_path(branch(x), p)`` with the same mask, to the order of floating-point sums, in
    ``1 - p`` of the branch's time and memory. ``branch`` gets the kept rows of ``x`` alone, and is not called
    if none is kept, so each row of its result must depend on the same row of ``x`` only.

    Without ``key`` the call draws one before the branch draws its own. Within :func:`thinned.address` a
    dropout of the branch has the masks of the rows that it sees. A key that the branch gives to a dropout is
    for the tensor that the dropout gets, as everywhere.

    The branch is computed for all rows, and its result masked, where Python cannot know the rows: under
    :func:`torch.vmap` and other transforms, in traces, and for nested tensors and DTensors.

    A branch that is not called leaves the gradients of its parameters None. In several processes of
    torch.distributed, and within :func:`thinned.address`, a branch of which no row is kept is called with one
    or two rows that are not used, and these gradients are zero. DistributedDataParallel then needs no
    ``find_unused_parameters``, and no process of FSDP waits for another.

    Args:
        x: a floating-point or complex tensor of shape ``(N, *)``.
        branch: a function of a tensor of shape ``(K, *)``; its result has ``K`` rows and broadcasts with it.
        p: the probability of dropping the branch, in [0, 1].
        mode: ``"row"``, a decision for each row, or ``"batch"``, one for all.
        scale_by_keep: divide what is kept by the keep probability ``q``.
        allow_batch_norm: let a batch normalization take its statistics over the kept rows alone.
        training: False returns ``x + branch(x)``, and so does ``p = 0``.
        key: as for :func:`~thinned.functional.drop_path`.

    Returns:
        A new tensor.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN; another ``mode``; or a batch normalization in training within
            the branch, which the message names, unless ``allow_batch_norm``.
        TypeError: ``branch`` is no function.
        TypeError, RuntimeError: as :func:`~thinned.functional.drop_path`; the branch's result has other rows.

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016, section 3, which skips a block for
    the batch; for single rows, Oquab et al., "DINOv2", TMLR 2024, section 5, which keeps a fixed number.

    >>> import torch, thinned
    >>> def branch(rows):
    ...     print("computes", len(rows), "rows")
    ...     return 3 * rows
    >>> thinned.functional.residual(torch.ones(4, 2), branch, 0.5, key=thinned.Key(3))
    computes 2 rows
    tensor([[1., 1.],
            [1., 1.],
            [7., 7.],
            [7., 7.]])
    """
    if not callable(branch):
        raise TypeError(f"branch must be a function of a tensor, {got(branch)}")
    T, scale = threshold_and_scale(p)
    check_mode(mode)
    check_tensor("residual", "x", x)
    if not drops_rows("residual", x, p, training, key):
        return x + branch(x)
    if not allow_batch_norm:
        refuse_batch_norm(branch)
    scale = scale if scale_by_keep else 1.0
    if not computes_rows(x):
        return x + _masked(branch(x), T, scale, mode, key)
    part = Branch.decide(x, T, scale, mode, key)
    if part.is_dropped and not (has_peers() or active.key_source is not None):
        return x.clone()
    with part:
        y = branch(part.take(x))
    return part.plus(x, y)


def computes_rows(x: Tensor) -> bool:
    """Whether Python, or Dynamo, can know which rows of ``x`` are kept."""
    return is_eager(x) or (compiling() and type(x) is Tensor)


class Branch(Seeing):
    """The decisions about one call of a residual branch, and the context in which the branch runs.

    Attributes:
        index: the places of the rows that the branch computes; None for all rows.
        used: which of these are kept; None for all of them.
        size: the number of rows of the batch.
        scale: the factor of what is added.
    """

    def __init__(self, index: Tensor | None, used: Tensor | None, size: int, scale: float) -> None:
        rows = active.rows
        if index is not None:
            rows = Rows(index, size)
            if active.rows is not None:
                outer = active.rows.of(size)
                rows = Rows(outer.index[index], outer.size)
        super().__init__(rows)
        self.index, self.used, self.size, self.scale = index, used, size, scale

    @classmethod
    def decide(cls, x: Tensor, T: int, scale: float, mode: str, key: Key | None) -> Branch:
        """Draw the decisions for ``x``: those of :func:`~thinned.functional.stochastic_depth` for the key."""
        size, by_row = x.shape[0], mode == "row"
        key = key_for(x, key, sample_dim=0 if by_row else None)
        keep = kept(key, x, range(by_row, x.dim()), T).flatten().expand(size)
        index = keep.nonzero().squeeze(1)
        if compiling():
            return cls(index, None, size, scale)
        count = index.shape[0]
        if count == size:
            return cls(None, None, size, scale)
        # One row would look like one that all rows share to a key source.
        least = 1 if active.key_source is None else 2
        if count >= least:
            return cls(index, None, size, scale)
        computed = keep.clone()
        computed[(~keep).nonzero()[: least - count]] = True
        index = computed.nonzero().squeeze(1)
        return cls(index, keep[index].nonzero().squeeze(1), size, scale)

    @property
    def is_dropped(self) -> bool:
        """Whether no row is kept."""
        return self.used is not None and not self.used.shape[0]

    def take(self, x: Tensor) -> Tensor:
        """The rows of ``x`` that the branch computes."""
        index = self.index
        if index is None:
            return x
        order = _memory_order(x)
        if order is None:
            return x.index_select(0, index)
        return x.permute(order).index_select(0, index).permute(_inverse(order))

    def plus(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` and what the branch computed, ``y``."""
        index, y = self._kept(y)
        if index is None:
            return torch.add(x, y, alpha=self.scale)
        if x.shape[1:] != y.shape[1:] or x.shape[0] != self.size:
            return x + self._put(index, y)
        dtype = torch.result_type(x, y)
        x, y = x.to(dtype), y.to(dtype)
        order = _memory_order(x)
        if order is None:
            return _add(x, index, y, self.scale)
        return _add(x.permute(order), index, y.permute(order), self.scale).permute(_inverse(order))

    def put(self, y: Tensor) -> Tensor:
        """What the branch computed, in its rows of the batch, with zeros in the others."""
        index, y = self._kept(y)
        return y * self.scale if index is None else self._put(index, y)

    def _kept(self, y: Tensor) -> tuple[Tensor | None, Tensor]:
        wanted = self.size if self.index is None else self.index.shape[0]
        if not isinstance(y, Tensor) or not y.dim() or y.shape[0] != wanted:
            raise RuntimeError(
                f"a residual branch has to return a tensor of {wanted} rows, as its input has, {got(y)}"
            )
        if self.used is None or self.index is None:
            return self.index, y
        return self.index[self.used], y.index_select(0, self.used)

    def _put(self, index: Tensor, y: Tensor) -> Tensor:
        full = y.new_zeros(()).expand(self.size, *y.shape[1:])
        return _add(full, index, y, self.scale)


def _add(x: Tensor, index: Tensor, y: Tensor, scale: float) -> Tensor:
    """``x.index_add(0, index, y, alpha=scale)``, which would save ``y`` for backward, for its shape alone."""
    if compiling():  # which saves the shape alone
        return x.index_add(0, index, y, alpha=scale)
    return _Add.apply(x, index, y, scale)  # type: ignore[no-any-return, no-untyped-call]


class _Add(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, y: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(index)
        return x.index_add(0, index, y, alpha=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor | None, None]:
        (index,) = ctx.saved_tensors
        return grad, None, grad.index_select(0, index) * ctx.scale if ctx.needs_input_grad[2] else None, None


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions in the order of memory, for a tensor in one piece that is not contiguous; else None.

    Along a channels_last tensor as it stands ``index_select`` and ``index_add`` take 10 times as long.
    """
    if x.dim() < 3 or x.is_contiguous():
        return None
    order = (0, *range(2, x.dim()), 1)
    return order if x.permute(order).is_contiguous() else None


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(dim) for dim in range(len(order)))


def _masked(y: Tensor, T: int, scale: float, mode: str, key: Key | None) -> Tensor:
    by_row = mode == "row"
    return apply(y, key, range(by_row, y.dim()), False, T, scale, sample_dim=0 if by_row else None)


def refuse_batch_norm(branch: Any) -> None:
    """Raise ValueError, with its name, for a batch normalization in training that ``branch`` holds."""
    for path, module in _modules_of(branch):
        if isinstance(module, _BatchNorm) and module.training:
            raise ValueError(
                f"the branch has a {type(module).__name__} in training"
                f"{path and f' at {path!r}'}, whose statistics would be those of the kept rows alone; "
                "allow_batch_norm=True allows that"
            )


def _modules_of(branch: Any) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a function holds: itself, its owner, and what its closure and its defaults name."""
    if isinstance(branch, nn.Module):
        yield from branch.named_modules()
    elif isinstance(branch, partial):
        for value in (branch.func, *branch.args, *branch.keywords.values()):
            yield from _modules_of(value)
    elif isinstance(branch, MethodType):
        yield from _modules_of(branch.__self__)
    elif isinstance(branch, FunctionType):
        for cell in branch.__closure__ or ():
            yield from _modules_of(cell.cell_contents)


class Residual(Layer):
    """A residual block whose branch is computed for the kept rows alone: ``x + DropPath(branch(x))``.

    Use this layer in place of a block that ends in :class:`DropPath`: at p = 0.4 a training step of a
    vision transformer takes 60 % of the time. :func:`thinned.convert` with ``skip=True`` does so in models of
    timm and torchvision.

    :func:`thinned.functional.residual` has the formula.

    Args:
        branch: a module of which each row of the output depends on the same row of the input only.

    Source: Huang et al. 2016, as the function.

    >>> import torch, thinned
    >>> layer = thinned.Residual(torch.nn.Identity(), p=0.5)
    >>> layer(torch.ones(4, 1), key=thinned.Key(3)).flatten()
    tensor([1., 1., 3., 3.])
    """

    def __init__(
        self,
        branch: nn.Module,
        p: float = 0.0,
        *,
        mode: Literal["row", "batch"] = "row",
        scale_by_keep: bool = True,
        allow_batch_norm: bool = False,
    ) -> None:
        super().__init__(p)
        check_mode(mode)
        if not isinstance(branch, nn.Module):
            raise TypeError(f"branch must be a module, {got(branch)}")
        self.branch = branch
        self.mode = mode
        self.scale_by_keep = scale_by_keep
        self.allow_batch_norm = allow_batch_norm

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return residual(
            input,
            self.branch,
            self.p,
            mode=self.mode,
            scale_by_keep=self.scale_by_keep,
            allow_batch_norm=self.allow_batch_norm,
            training=self.training,
            key=key,
        )
