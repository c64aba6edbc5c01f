"""A residual branch that is computed for the rows that a DropPath keeps, and for no others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import handle_torch_function, has_torch_function_unary

from thinned.checks import got
from thinned.distributed.ranks import has_peers
from thinned.key_source import Rows, Seeing, active
from thinned.keys import Key
from thinned.layers._arguments import apply, check_tensor, kept, key_for, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node
from thinned.layers.path import check_mode, drops_rows, stochastic_depth
from thinned.torch_state import SingleLevelFunction, assume, compiling, is_eager, version_of

BATCH_NORMS = nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm

__all__ = [
    "BATCH_NORMS",
    "Branch",
    "Residual",
    "computes_rows",
    "contents_of",
    "refuse_batch_norm",
    "residual",
    "residual_drops",
]


def residual(
    input: Tensor,
    branch: Callable[[Tensor], Tensor],
    p: float = 0.0,
    *,
    mode: Literal["row", "batch"] = "row",
    scale_by_keep: bool = True,
    allow_batch_norm: bool = False,
    training: bool = True,
    key: Key | None = None,
) -> Tensor:
    r"""Add a branch to ``input`` that is dropped with probability ``p`` row by row, and not computed then.

    .. math:: y_n = \begin{cases} x_n + f(x)_n / q & u(n) < T \\ x_n & \text{otherwise} \end{cases}

    This is ``input + drop_path(branch(input), p)`` with the same mask, to the order of floating-point sums,
    in ``1 - p`` of the branch's time and memory. ``branch`` gets the kept rows of ``input`` alone, and is not
    called if none is kept, so each row of its result must depend on the same row of ``input`` only.

    Without ``key`` the call draws one before the branch draws its own. Within :func:`thinned.address` a
    dropout of the branch has the masks that its rows have in the whole batch, or raises. Its input has the
    rows in dimension 0, or several consecutive rows for each, such as windows; ``sample_dim`` of the address
    names another dimension. Outside of an address, and with a key that the branch gives it, a dropout has the
    mask of the tensor that it gets, as everywhere.

    :func:`torch.compile` makes one graph for all numbers of rows if
    ``torch._dynamo.config.capture_dynamic_output_shape_ops`` is True. Otherwise it breaks the graph at the
    branch, and compiles no more after the first steps. Compiled code computes at least two rows.

    The branch is computed for all rows, and its result masked, where Python cannot know the rows: under
    :func:`torch.vmap` and other transforms, in traces, and for nested tensors and DTensors.

    A branch that is not called leaves the gradients of its parameters None. In several processes of
    torch.distributed, and within :func:`thinned.address`, a branch of which no row is kept is called with one
    or two rows that are not used, and these gradients are zero. DistributedDataParallel then needs no
    ``find_unused_parameters``, and no process of FSDP waits for another.

    Args:
        input: a floating-point or complex tensor of shape ``(N, *)``.
        branch: a function of a tensor of shape ``(K, *)``; its result has ``K`` rows and broadcasts with it.
        p: the probability of dropping the branch, in [0, 1].
        mode: ``"row"``, a decision for each row, or ``"batch"``, one for all.
        scale_by_keep: divide what is kept by the keep probability ``q``.
        allow_batch_norm: let a batch normalization take its statistics over the kept rows alone.
        training: False returns ``input + branch(input)``, and so does ``p = 0``.
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
    by_row = mode == "row"
    if isinstance(input, Proxy):
        y = stochastic_depth(branch(input), p, mode, training, key=key)
        return input + (y if scale_by_keep or not T or not training else y * (1 / scale))
    check_tensor("residual", "input", input)
    if not drops_rows("residual", input, p, training, key):
        return input + branch(input)
    if has_torch_function_unary(input) and not compiling():
        handle_torch_function(residual_drops, (input,), input, p)
    if not allow_batch_norm:
        refuse_batch_norm(branch)
    scale = scale if scale_by_keep else 1.0
    key = key_for(input, key, sample_dim=0 if by_row else None)
    if not computes_rows(input):
        y = branch(input)
        return input + apply(y, key, range(by_row, y.dim()), False, T, scale)
    part = Branch.decide(input.shape[0], T, scale, mode, key)
    if part.is_dropped and not (has_peers() or active.key_source is not None):
        return input.clone()
    rows, input = part.take(input)
    y = part.compute(
        branch,
        rows,
        what="a residual branch has overwritten",
        instead="use no in-place operation on the input, such as ReLU(inplace=True)",
    )
    return part.plus(input, y)


def residual_drops(input: Tensor, p: float) -> None:
    """A call of :func:`residual` that drops, as a mode of torch functions sees it, such as inspect's.

    To hand :func:`residual` itself to a mode would hide its branch from that mode.
    """


def computes_rows(x: Tensor) -> bool:
    """Whether Python, or Dynamo, can know which rows of ``x`` are kept."""
    return not x.is_nested and (is_eager(x) or (compiling() and type(x) is Tensor))


class Branch(Seeing):
    """The decisions about one call of a residual branch, and the context in which the branch runs.

    Attributes:
        index: the places of the rows that the branch computes; None for all rows.
        used: True for those of them that are kept; None if all are.
        is_dropped: whether none is kept; compiled code does not know.
        size: the number of rows of the batch.
        scale: the factor of what is added.
    """

    def __init__(
        self, index: Tensor | None, used: Tensor | None, size: int, scale: float, is_dropped: bool = False
    ) -> None:
        super().__init__(active.rows if index is None else Rows(index, size, active.rows))
        self.index, self.used, self.size, self.scale = index, used, size, scale
        self.is_dropped = is_dropped

    @classmethod
    def decide(cls, size: int, T: int, scale: float, mode: str, key: Key) -> Branch:
        """The decisions of :func:`~thinned.functional.stochastic_depth` about ``size`` rows.

        The key is that of :func:`~thinned.layers._arguments.key_for`.
        """
        keep = kept(key, (size,), () if mode == "row" else (0,), T).expand(size)
        # One row would look like one that all rows share to a key source. Compiled code would have a graph of
        # its own for one row, and for none.
        least = 2 if compiling() or active.key_source is not None else 1
        if not compiling():
            index = keep.nonzero().squeeze(1)
            count = index.shape[0]
            if count == size:
                return cls(None, None, size, scale)
            if count >= least:
                return cls(index, None, size, scale)
        computed = keep | ((~keep).cumsum(0) <= least - keep.sum())
        index = computed.nonzero().squeeze(1)
        if compiling():
            assume(index.shape[0] >= min(least, size))
            assume(index.shape[0] <= size)
        return cls(index, keep.index_select(0, index), size, scale, not compiling() and not count)

    def take(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of ``x`` that the branch computes, and ``x`` for :meth:`plus`."""
        if self.index is None:
            return x, x
        if _records(x):
            return _Take.apply(x, self.index)  # type: ignore[attr-defined, no-any-return]
        return _rows(x, self.index), x

    def rows_of(self, x: Tensor) -> Tensor:
        """The rows of another tensor of the batch."""
        return x if self.index is None else _rows(x, self.index)

    def compute(
        self, branch: Callable[..., Tensor], rows: Tensor, *others: Any, what: str, instead: str
    ) -> Tensor:
        """``branch(rows, *others)`` in this context; RuntimeError in these words if it writes to ``rows``."""
        version = None if compiling() or rows.is_inference() else version_of(rows)
        with self:
            y = branch(rows, *others)
        if version is not None and version_of(rows) != version:
            raise RuntimeError(
                f"{what} its input, which is a copy for some numbers of kept rows and for others not; "
                f"{instead}"
            )
        return y

    def plus(self, x: Tensor, y: Tensor) -> Tensor:
        """``x`` and what the branch computed, ``y``."""
        index, y = self._kept(y)
        if index is None:
            return torch.add(x, y, alpha=self.scale)
        if x.shape[1:] != y.shape[1:] or x.shape[0] != self.size:
            return x + self._put(index, y)
        if x.dtype != y.dtype:
            dtype = torch.promote_types(x.dtype, y.dtype)
            x, y = x.to(dtype), y.to(dtype)
        if _records(x) or _records(y):
            return _Plus.apply(x, y, index, self.scale)  # type: ignore[attr-defined, no-any-return]
        return _with_rows(x, index, y, self.scale)

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
        if self.used is not None:
            y = torch.where(self.used.view(-1, *(1,) * (y.dim() - 1)), y, 0)
        return self.index, y

    def _put(self, index: Tensor, y: Tensor) -> Tensor:
        zeros = y.new_zeros(()).expand(self.size, *y.shape[1:])
        if _records(y):
            return _Plus.apply(zeros, y, index, self.scale)  # type: ignore[attr-defined, no-any-return]
        return _with_rows(zeros, index, y, self.scale)


def _records(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled() and not compiling()


def _rows(x: Tensor, index: Tensor) -> Tensor:
    order = _memory_order(x)
    if order is None:
        return x.index_select(0, index)
    return x.permute(order).index_select(0, index).permute(_inverse(order))


def _with_rows(x: Tensor, index: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    """A copy of ``x``, in its memory format, with ``y * scale`` added to some of its rows."""
    if x.is_contiguous():
        return x.index_add(0, index, y, alpha=scale)
    if (order := _memory_order(x)) is None:
        return x.clone().index_add_(0, index, y, alpha=scale)
    return x.permute(order).index_add(0, index, y.permute(order), alpha=scale).permute(_inverse(order))


def _memory_order(x: Tensor) -> tuple[int, ...] | None:
    """The dimensions of a channels_last tensor in the order of memory; None for another tensor.

    Along a channels_last tensor as it stands ``index_select`` and ``index_add`` take 10 times as long.
    """
    if x.dim() < 3 or x.is_contiguous():
        return None
    order = (0, *range(2, x.dim()), 1)
    return order if x.permute(order).is_contiguous() else None


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(dim) for dim in range(len(order)))


class _Take(SingleLevelFunction):
    """Rows of ``x``, and ``x``: one pass of backward adds the gradients of both."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(index)
        return _rows(x, index), x

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_x: Tensor) -> tuple[Tensor, None]:
        return _with_rows(grad_x, ctx.saved_tensors[0], grad), None


class _Plus(SingleLevelFunction):
    """:func:`_with_rows`; that of ``index_add`` would save ``y`` for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, index: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(index)
        ctx.scale = scale
        return _with_rows(x, index, y, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows = _rows(grad, ctx.saved_tensors[0]) * ctx.scale if ctx.needs_input_grad[1] else None
        return grad, rows, None, None


def refuse_batch_norm(branch: Any) -> None:
    """Raise ValueError, with its name, for a batch normalization in training that ``branch`` holds."""
    for path, module in _modules_of(branch, set()):
        if _takes_statistics(module):
            raise ValueError(
                f"the branch has a {type(module).__name__} in training"
                f"{path and f' at {path!r}'}, whose statistics would be those of the kept rows alone; "
                "allow_batch_norm=True allows that"
            )


def _takes_statistics(module: nn.Module) -> bool:
    """Whether a call computes, or updates, statistics of the batch."""
    if module.training:
        return isinstance(module, BATCH_NORMS) or getattr(module, "running_var", None) is not None
    return isinstance(module, BATCH_NORMS) and module.running_mean is None


def _modules_of(value: Any, seen: set[int]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that a function holds: itself, its owner, and all in its closure, defaults and globals."""
    if id(value) in seen:
        return
    seen.add(id(value))
    held: Iterable[Any] = ()
    if isinstance(value, nn.Module):
        yield from value.named_modules()
    elif isinstance(value, partial):
        held = (value.func, *value.args, *value.keywords.values())
    elif isinstance(value, MethodType):
        held = (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        names = (value.__globals__.get(name) for name in value.__code__.co_names)
        held = (
            *(contents_of(cell) for cell in value.__closure__ or ()),
            *(value.__defaults__ or ()),
            *(value.__kwdefaults__ or {}).values(),
            *(each for each in names if isinstance(each, nn.Module)),
        )
    elif isinstance(value, list | tuple):
        held = value
    elif isinstance(value, dict):
        held = value.values()
    elif callable(value) and not isinstance(value, type):
        held = getattr(value, "__dict__", {}).values()
    for each in held:
        yield from _modules_of(each, seen)


def contents_of(cell: CellType) -> Any:
    """What a cell of a closure holds; None for a variable that is not assigned yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


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

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        # The mask is drawn before the branch draws, and in a dtype that rounds no scale.
        keep = torch.ones([input.size(0)] + [1] * (input.dim() - 1), dtype=torch.float64, device=input.device)
        keep = torch.ops.thinned.stochastic_depth(keep, float(self.p), self.mode, self.training)
        if not self.scale_by_keep:
            keep = (keep != 0).to(keep.dtype)
        y = self.branch(input)
        return input + torch.where(keep != 0, (y * keep).to(y.dtype), torch.zeros_like(y))

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
