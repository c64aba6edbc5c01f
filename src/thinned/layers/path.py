"""Dropout of a sample's residual branch: DropPath and StochasticDepth."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.fx import Proxy
from torch.overrides import has_torch_function_unary

from thinned.checks import check_integer
from thinned.keys import Key
from thinned.layers._arguments import apply, check_p, drops, threshold_and_scale
from thinned.layers._module import Layer
from thinned.layers._overrides import module_node, overridden
from thinned.layers._torchscript import Scriptable
from thinned.torch_state import compiling

__all__ = [
    "DropPath",
    "StochasticDepth",
    "check_mode",
    "drop_path",
    "drop_path_rates",
    "drops_rows",
    "stochastic_depth",
]


def drop_path(
    input: Tensor,
    drop_prob: float = 0.0,
    training: bool = False,
    scale_by_keep: bool = True,
    *,
    key: Key | None = None,
) -> Tensor:
    r"""Zero a sample's whole branch with probability ``drop_prob``: one decision for each row of dimension 0.

    .. math:: y_n = \begin{cases} x_n / q & u(n) < T \\ 0 & \text{otherwise} \end{cases}

    Args:
        input: a floating-point or complex tensor of shape ``(N, *)``.
        drop_prob: the probability of dropping a row, in [0, 1].
        training: False returns ``input`` itself, and so does ``drop_prob = 0``.
        scale_by_keep: divide what is kept by the keep probability ``q``.
        key: as for :func:`~thinned.functional.dropout`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Raises:
        ValueError: ``drop_prob`` outside [0, 1] or NaN.
        TypeError, RuntimeError: as :func:`~thinned.functional.dropout`; ``input`` has no dimension.

    Source: Huang et al., "Deep networks with stochastic depth", ECCV 2016, section 3; the signature is
    timm's.

    >>> import torch, thinned
    >>> thinned.functional.drop_path(torch.ones(4, 9), 0.5, training=True, key=thinned.Key(3)).mean(1)
    tensor([0., 0., 2., 2.])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(drop_path, locals())
    T, scale = threshold_and_scale(drop_prob, "drop_prob")
    if not drops_rows("drop_path", input, drop_prob, training, key):
        return input
    return apply(input, key, range(1, input.dim()), False, T, scale if scale_by_keep else 1.0)


class DropPath(Scriptable):
    """Drop a sample's residual branch, with timm's arguments.

    Use this layer at the end of a residual branch, right before the addition. After the addition it would
    zero the sample itself. :func:`thinned.functional.drop_path_rates` lets p rise with the depth, to 0.1 in
    DeiT and 0.5 in Swin-B. To skip layers and their time use :class:`LayerDrop`.

    :func:`thinned.functional.drop_path` has the formula.

    Source: Huang et al. 2016, as the function.

    >>> import torch, thinned
    >>> thinned.DropPath(0.5)(torch.ones(4, 1), key=thinned.Key(3)).flatten()
    tensor([0., 0., 2., 2.])
    """

    def __init__(self, drop_prob: float = 0.0, scale_by_keep: bool = True) -> None:
        super().__init__()
        check_p(drop_prob, "drop_prob")
        self.drop_prob = drop_prob
        self.scale_by_keep = scale_by_keep

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return drop_path(input, self.drop_prob, self.training, self.scale_by_keep, key=key)

    def extra_repr(self) -> str:
        return f"drop_prob={self.drop_prob}, scale_by_keep={self.scale_by_keep}"


def stochastic_depth(
    input: Tensor, p: float, mode: Literal["batch", "row"], training: bool = True, *, key: Key | None = None
) -> Tensor:
    r"""Zero a branch with probability ``p``: for each row of dimension 0, or for the whole batch at once.

    .. math:: y_n = \begin{cases} x_n / q & u(n) < T \\ 0 & \text{otherwise} \end{cases}
        \qquad\text{("row"; "batch" has } u(0) \text{ for all } n)

    ``mode`` is ``"row"``, a decision for each row, or ``"batch"``, one for all; ValueError for another. In
    :func:`thinned.address` the one decision holds for all samples and all data-parallel ranks. A batch of
    keys decides row by row in both modes. The other arguments, the result and the errors are those of
    :func:`drop_path`.

    Source: Huang et al. 2016, as :func:`drop_path`; the signature is torchvision's.

    >>> import torch, thinned
    >>> thinned.functional.stochastic_depth(torch.ones(4, 9), 0.5, "batch", key=thinned.Key(3)).mean(1)
    tensor([0., 0., 0., 0.])
    """
    if has_torch_function_unary(input) and not compiling():
        return overridden(stochastic_depth, locals())
    T, scale = threshold_and_scale(p)
    check_mode(mode)
    if not drops_rows("stochastic_depth", input, p, training, key):
        return input
    dims = range(mode == "row", input.dim())
    return apply(input, key, dims, False, T, scale, sample_dim=0 if mode == "row" else None)


class StochasticDepth(Layer):
    """Drop a residual branch, with torchvision's arguments.

    Use this layer at the end of a residual branch of a model in torchvision's style. ``"row"`` decides for
    each sample, as :class:`DropPath` does, and ``"batch"`` for the batch, as the paper does. The branch is
    computed before this layer drops it; ``Residual(branch, p, mode="batch")`` does not compute it, nor does a
    model after ``thinned.convert(model, skip=True)``.

    :func:`thinned.functional.stochastic_depth` has the formula.

    Source: Huang et al. 2016, as the function.

    >>> import torch, thinned
    >>> thinned.StochasticDepth(0.5, "row")(torch.ones(4, 1), key=thinned.Key(3)).flatten()
    tensor([0., 0., 2., 2.])
    """

    def __init__(self, p: float, mode: Literal["batch", "row"]) -> None:
        super().__init__(p)
        check_mode(mode)
        self.mode = mode

    def forward(self, input: Tensor, *, key: Key | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, key=key)) is not None:
            return node
        return stochastic_depth(input, self.p, self.mode, self.training, key=key)


def drop_path_rates(depth: int, max_rate: float) -> list[float]:
    """A ``drop_prob`` for each of ``depth`` blocks, rising linearly from 0 to ``max_rate``.

    Raises:
        ValueError: ``depth`` below 1, or ``max_rate`` outside [0, 1].

    Source: Huang et al. 2016, section 3, "the linear decay rule"; from 0 at the first block as in timm.

    >>> drop_path_rates(5, 0.5)
    [0.0, 0.125, 0.25, 0.375, 0.5]
    """
    check_p(max_rate, "max_rate")
    check_integer("depth", depth, least=1)
    return [max_rate * block / max(1, depth - 1) for block in range(depth)]


def check_mode(mode: str) -> None:
    """Raise ValueError for another mode than "batch" and "row"."""
    if mode not in ("batch", "row"):
        raise ValueError(f"mode has to be either 'batch' or 'row', but got {mode!r}")


def drops_rows(name: str, input: Tensor, p: float, training: bool, key: Key | None) -> bool:
    """Whether the call drops; RuntimeError if it does and ``input`` has no dimension."""
    active = drops(name, input, p, training, key)
    if active and not input.dim():
        raise RuntimeError(f"{name} needs a batch dimension, got an input of shape ()")
    return active
