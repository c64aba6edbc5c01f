"""Masksembles: an ensemble in one network, whose members are fixed masks over the channels."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from operator import index

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.overrides import has_torch_function

from thinned import op
from thinned.checks import check_integer, check_real, got
from thinned.geometry import shared
from thinned.key_source import active
from thinned.keys import Key
from thinned.layers._arguments import check_device, check_tensor, drops
from thinned.layers._overrides import module_node, overridden
from thinned.layers._torchscript import Scriptable, operation
from thinned.torch_state import compiling

__all__ = ["Masksembles", "masksembles", "masksembles_masks"]


@operation
def masksembles(
    input: Tensor, masks: Tensor, *, member: int | Tensor | None = None, factor: float = 1.0
) -> Tensor:
    r"""Multiply each row's channels by the mask of one member of an ensemble.

    .. math:: y_{ic\ldots} = \begin{cases} x_{ic\ldots} \cdot \mathrm{factor} & \mathrm{masks}_{m(i),c} \\
        +0 & \text{otherwise} \end{cases} \qquad m(i) = \lfloor i n / N \rfloor

    Without ``member``, the ``N`` rows are split into ``n`` successive groups. Where ``n`` divides ``N`` the
    groups are the authors'. Their code fails for any other ``N``; here the groups' sizes differ by at most 1,
    and fewer than ``n`` rows leave some members out.

    Args:
        input: a floating-point or complex tensor of shape ``(N, C, *)``.
        masks: a bool tensor of shape ``(n, C)``, such as :func:`masksembles_masks` returns.
        member: the number of one member for all rows, or an int64 tensor of shape ``()`` or ``(N,)``, with
            one for each row.
        factor: what a kept element is multiplied by.

    Returns:
        A tensor of ``input``'s shape and dtype. The authors' masks are float64, so their 1d layer returns
        float64 for float32, and their 2d layer float32 for any dtype.

    Raises:
        RuntimeError: ``input`` or ``masks`` is of another shape or dtype, or ``member`` of another shape.
        NotImplementedError: ``input`` is nested or sparse.
        TypeError: an argument is no tensor, or ``member`` neither an integer nor an int64 tensor.
        IndexError: a member is not in ``0 .. n-1``. A GPU reports that for a tensor as a failed assertion.

    Source: Durasov et al., "Masksembles for uncertainty estimation", CVPR 2021, section 3.

    >>> import torch, thinned
    >>> masks = torch.tensor([[True, True, False], [False, True, True]])
    >>> thinned.functional.masksembles(torch.ones(4, 3), masks)
    tensor([[1., 1., 0.],
            [1., 1., 0.],
            [0., 1., 1.],
            [0., 1., 1.]])
    >>> thinned.functional.masksembles(torch.ones(2, 3), masks, member=torch.tensor([1, 0]), factor=1.5)
    tensor([[0.0000, 1.5000, 1.5000],
            [1.5000, 1.5000, 0.0000]])
    """
    if has_torch_function((input, masks, member)) and not compiling():
        return overridden(masksembles, locals())
    drops("masksembles", input, 1.0, True, None, dense=True)  # raises for a tensor that has no mask
    op.refuse_layout(input)
    check_tensor("masksembles", "masks", masks)
    if masks.dtype != torch.bool or masks.dim() != 2:
        raise RuntimeError(f"masks has to be a bool tensor of shape (n, C), {got(masks)}")
    check_device("masks", masks, input)
    members, channels = masks.shape
    if input.dim() < 2 or input.shape[1] != channels:
        raise RuntimeError(
            f"{members} masks of {channels} channels need an input of shape (N, {channels}, *), got a tensor "
            f"of shape {tuple(input.shape)}"
        )
    masks, rows = op.whole(masks), input.shape[0]
    if member is None:
        place, size = torch.arange(rows, device=input.device), rows
        if active.rows is not None:
            seen = active.rows.of(rows)
            place, size = seen.index, seen.size
        member = place * members // size
    if isinstance(member, Tensor):
        _check_members(member, input)
        keep = masks.index_select(0, op.whole(member).reshape(-1))
    else:
        check_integer("member", member)
        if not 0 <= member < members:
            raise IndexError(f"member has to be in 0 .. {members - 1}, but got {member}")
        keep = masks.narrow(0, member, 1)
    keep = keep.view(*keep.shape, *(1,) * (input.dim() - 2))
    check_real("factor", factor)
    return torch.where(op.shard_like(keep, input), input * factor, 0)


def _check_members(member: Tensor, input: Tensor) -> None:
    if member.dtype != torch.int64:
        raise TypeError(f"member must be an integer or an int64 tensor, {got(member)}")
    if member.dim() and member.shape != input.shape[:1]:
        raise RuntimeError(
            f"member of shape {tuple(member.shape)} does not fit an input of shape {tuple(input.shape)}; "
            f"accepted: one member of shape (), or one for each row, of shape ({input.shape[0]},)"
        )
    check_device("member", member, input)


def masksembles_masks(channels: int, n: int = 4, scale: float = 2.0, *, seed: int = 0) -> Tensor:
    r"""``n`` random masks with equally many ones, which leave no channel unused.

    .. math:: M = \left\lfloor \frac{C}{S\,(1 - (1 - 1/S)^n)} \right\rfloor \qquad
        \operatorname{E}\left[\frac{|m_a \cap m_b|}{|m_a \cup m_b|}\right] \approx \frac{1}{2S - 1}

    Each mask has ``M`` ones. A larger scale ``S`` gives fewer ones and masks that overlap less; at ``S = 1``
    all are ones. ``M`` is raised to ``ceil(C/n)`` where fewer ones could not reach all channels.

    All sets of such masks are equally likely. They are drawn as the authors draw them: a mask is ``M`` of
    ``P`` places, the places that no mask has are removed, and a draw is repeated until ``C`` places are
    left. The result's law does not depend on ``P``, so ``P`` is the one that leaves ``C`` places on average.
    The authors search for ``P`` by trial with NumPy's global generator, may fail to find it, and refuse fewer
    than 10 channels. Here the masks are a function of the arguments alone.

    Args:
        channels: the number of channels ``C``, at least 1.
        n: the number of masks, at least 1.
        scale: ``S``, in [1, 6] as in the authors' code.
        seed: of the masks, an integer as for :class:`~thinned.Key`.

    Returns:
        A bool tensor of shape ``(n, channels)`` on the CPU.

    Raises:
        ValueError: ``channels`` or ``n`` is below 1, or ``scale`` outside [1, 6].
        TypeError: an argument is no number.

    Source: Durasov et al. 2021, section 3 and supplementary material; their package `masksembles`.

    >>> import thinned
    >>> thinned.functional.masksembles_masks(10, n=4).int()
    tensor([[1, 0, 1, 1, 0, 0, 1, 0, 1, 0],
            [1, 1, 0, 1, 0, 1, 0, 1, 0, 0],
            [0, 1, 1, 1, 1, 0, 0, 0, 0, 1],
            [0, 1, 1, 0, 1, 1, 0, 1, 0, 0]], dtype=torch.int32)
    """
    check_integer("channels", channels, least=1)
    check_integer("n", n, least=1)
    channels, n = index(channels), index(n)  # a tensor's text is no part of a key
    ones = _ones(channels, n, scale)
    key = Key(seed).fold(f"masksembles of {channels} channels, {n} masks, {ones} ones")

    def enough(places: int) -> bool:
        """Whether at least ``channels - 1/2`` of the places are used on average."""
        unused = (places - ones) ** n  # in units of places ** (1 - n)
        return bool(2 * (places**n - unused) >= (2 * channels - 1) * places ** (n - 1))

    shape = (n, channels + bisect_left(range(channels, channels + (n * ones) ** 2), True, key=enough))
    geometry = shared(shape, (), 0)
    attempt = 0
    while True:
        numbers = op.uniform(key.fold(attempt).bits, shape, geometry)
        masks = numbers <= numbers.kthvalue(ones, dim=1, keepdim=True).values
        used = masks.any(0)
        # Two equal numbers could make one mask larger.
        if used.sum() == channels and masks.sum() == n * ones:
            return masks[:, used]
        attempt += 1


def _ones(channels: int, n: int, scale: float) -> int:
    """The number of ones in each mask; in rational numbers, since C's pow differs between platforms."""
    check_real("scale", scale)
    if not 1 <= scale <= 6:
        raise ValueError(f"scale has to be between 1 and 6, but got {scale}")
    s = Fraction(float(scale))
    return max(int(channels / (s * (1 - (1 - 1 / s) ** n))), -(-channels // n))


class Masksembles(Scriptable):
    """An ensemble of ``n`` thinned networks with shared weights: each row passes one of ``n`` fixed masks.

    Use this layer for a model that has to say how uncertain it is after ``n`` predictions and not some 50: it
    selects a member in training and in evaluation alike. For draws of any number use :class:`Dropout`, left
    on in prediction.

    :func:`thinned.functional.masksembles` has the formula, and says which row has which member;
    :func:`thinned.functional.masksembles_masks` makes the masks. With ``x`` repeated, one call gives the
    outputs of all members::

        outputs = model(x.repeat(n, 1)).unflatten(0, (n, len(x)))   # (n, N, classes)

    A row's member depends on its place in the batch, so pass ``member`` where the batch is split over
    processes or has fewer than ``n`` rows.

    The masks are a buffer: the weights of a trained model fit no others, and so a checkpoint of the authors'
    layers brings its own. Layers with one seed and equal arguments have equal masks; give each its own seed.

    Args:
        channels, n, scale, seed: as for the function.
        scale_by_keep: multiply what is kept by ``channels / M``, so that the mean over the channels stays.
            The authors do not, hence False for their checkpoints.
        device: of the masks.

    Shape:
        ``(N, C, *)`` to the same. For ``(N, L, C)`` transpose: ``layer(x.mT).mT``.

    Raises:
        ValueError, TypeError, RuntimeError, IndexError: as the functions.

    Source: Durasov et al., CVPR 2021, section 3; the arguments are those of their ``Masksembles1D`` and
    ``Masksembles2D``.

    >>> import torch, thinned
    >>> layer = thinned.Masksembles(5, n=2)
    >>> layer(torch.ones(2, 5))
    tensor([[1.6667, 1.6667, 0.0000, 1.6667, 0.0000],
            [0.0000, 0.0000, 1.6667, 1.6667, 1.6667]])
    >>> layer(torch.ones(1, 5), member=1)
    tensor([[0.0000, 0.0000, 1.6667, 1.6667, 1.6667]])
    """

    def __init__(
        self,
        channels: int,
        n: int = 4,
        scale: float = 2.0,
        *,
        scale_by_keep: bool = True,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        check_integer("channels", channels, least=1)
        check_integer("n", n, least=1)
        self.channels, self.n, self.scale, self.seed = channels, n, scale, seed
        self.scale_by_keep = scale_by_keep
        self.factor = channels / _ones(channels, n, scale) if scale_by_keep else 1.0
        self.masks = nn.Buffer(torch.empty(n, channels, dtype=torch.bool, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the masks to those of the arguments, which a tensor on meta does not hold."""
        self.masks.copy_(masksembles_masks(self.channels, self.n, self.scale, seed=self.seed))

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        return torch.ops.thinned.masksembles(input, self.masks, factor=self.factor)  # type: ignore[no-any-return]

    def forward(self, input: Tensor, *, member: int | Tensor | None = None) -> Tensor:
        if isinstance(input, Proxy) and (node := module_node(self, input, member=member)) is not None:
            return node
        return masksembles(input, self.masks, member=member, factor=self.factor)

    def extra_repr(self) -> str:
        return (
            f"channels={self.channels}, n={self.n}, scale={self.scale}, "
            f"scale_by_keep={self.scale_by_keep}, seed={self.seed}"
        )
