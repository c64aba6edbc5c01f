"""Dropout of whole layers of a stack."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from thinned.keys import Key
from thinned.layers._arguments import key_for, threshold_and_scale
from thinned.layers.dropout import keep_mask
from thinned.torch_state import compiling, is_batched, is_eager

__all__ = ["LayerDrop"]


class LayerDrop(nn.ModuleList):
    r"""A stack of layers, of which each pass of training leaves out some: layer ``l`` with probability ``p``.

    .. math:: x_{l+1} = \begin{cases} f_l(x_l) & u(l) < T \\ x_l & \text{otherwise} \end{cases}

    There is one decision a layer for the whole batch, ``keep_mask(key, (len(layers),), p)``, and nothing is
    scaled. Evaluation runs all layers. A layer that is left out is not run, and its parameters get no
    gradient (DistributedDataParallel has to be told, with ``find_unused_parameters=True``).

    Where Python cannot branch on a decision, under :func:`torch.compile`, :func:`torch.func.vmap` and
    tracers, all layers run and the decision selects. The result is the same for the same key, but layers that
    draw random numbers of their own draw them where they are left out too.

    It is a :class:`torch.nn.ModuleList`, also in its ``state_dict``: indexing, iteration and ``len`` see all
    layers. ``layers[::2]`` is the paper's "every other" pruning for inference. A loop of one's own, as over
    fairseq's ``LayerDropModuleList``, goes over :meth:`surviving`.

    Args:
        layers: modules, each of which returns a tensor of the shape that it is given.
        p: the probability of leaving a layer out, in [0, 1].

    Shape:
        what the layers take; the output has the input's shape.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.

    Source: Fan, Grave and Joulin, "Reducing transformer depth on demand with structured dropout", ICLR 2020,
    section 3.

    >>> import torch, thinned
    >>> layers = thinned.LayerDrop([torch.nn.Linear(4, 4) for _ in range(6)], p=0.5)
    >>> [i for i, layer in enumerate(layers) if layer in list(layers.surviving(key=thinned.Key(3)))]
    [2, 3, 4, 5]
    >>> y = layers(torch.ones(2, 4), key=thinned.Key(3))  # runs these
    >>> len(layers), len(list(layers.eval().surviving()))
    (6, 6)
    """

    def __init__(self, layers: Iterable[nn.Module] | None = None, p: float = 0.5) -> None:
        threshold_and_scale(p)
        super().__init__(layers)
        self.p = p

    def __getitem__(self, idx: int | slice) -> Any:
        if isinstance(idx, slice):
            return type(self)(list(self)[idx], self.p)
        return super().__getitem__(idx)

    def surviving(self, *, key: Key | None = None) -> Iterator[nn.Module]:
        """The layers of one pass, in order: all of them in evaluation.

        Python has to know the decisions for it: :func:`torch.compile` breaks its graph, and
        :func:`torch.func.vmap` refuses. The stack itself can be called in both.

        Args:
            key: what the decisions are a function of, or a batch of ``len(self)`` keys, one for each layer.
                Without one, a key is drawn from torch's default generator of the CPU.

        Raises:
            RuntimeError: each example of a vmap has decisions of its own.
        """
        if not self._drops():
            return iter(self)
        keep = self._keep(key)
        if not compiling() and is_batched(keep):
            raise RuntimeError("each example has layers of its own under vmap; call the LayerDrop itself")
        return iter([layer for layer, kept in zip(self, keep.tolist(), strict=True) if kept])

    def forward(self, input: Any, *args: Any, key: Key | None = None, **kwargs: Any) -> Any:
        """``input`` through the layers of one pass, each called with the other arguments too.

        Args:
            input: what the first layer takes.
            *args: what each layer takes beside it.
            key: as for :meth:`surviving`.
            **kwargs: what each layer takes by name.
        """
        if not self._drops():
            for layer in self:
                input = layer(input, *args, **kwargs)
            return input
        keep = self._keep(key)
        branches = is_eager(keep)
        for index, (layer, kept) in enumerate(zip(self, keep.tolist() if branches else keep, strict=True)):
            if branches and not kept:
                continue
            output = layer(input, *args, **kwargs)
            if isinstance(input, Tensor) and getattr(output, "shape", None) != input.shape:
                raise RuntimeError(
                    f"a layer that is left out hands on its input, so that each has to keep its shape; layer "
                    f"{index} turned {tuple(input.shape)} into {_described(output)}"
                )
            input = output if branches else torch.where(kept.to(input.device), output, input)
        return input

    def _drops(self) -> bool:
        return self.training and self.p != 0

    def _keep(self, key: Key | None) -> Tensor:
        if key is None:
            # Decided where Python can look at it without waiting for a device.
            key = key_for(torch.empty((), device="cpu"), None, sample_dim=None)
        return keep_mask(key, (len(self),), self.p)

    def extra_repr(self) -> str:
        return f"p={self.p}"

    def __repr__(self) -> str:
        name, _, layers = super().__repr__().partition("(")
        return f"{name}({self.extra_repr()}{layers}"


def _described(output: Any) -> str:
    return f"{tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
