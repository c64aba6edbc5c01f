"""LayerDrop: a stack of layers that skips some of them in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from thinned.checks import got
from thinned.devices import to_device
from thinned.key_source import active, ranks_draw
from thinned.keys import Key
from thinned.layers._arguments import check_p, key_for
from thinned.layers._overrides import module_node
from thinned.layers._torchscript import Scriptable, operation
from thinned.layers.dropout import keep_mask
from thinned.torch_state import (
    breaks_graph,
    compiling,
    constant_when_compiled,
    differs_by_example,
    is_traced,
    never_inlined,
    outside_graphs,
    traces_symbolically,
    tracing,
)

__all__ = ["LayerDrop"]


@operation
def surviving_layers(layers: int, p: float, *, key: Key | None = None) -> Tensor:
    """The decision of each layer."""
    if key is None:
        # On the CPU, so that Python can branch without a device synchronization.
        key = key_for(torch.empty((), device="cpu"), None, sample_dim=None)
    return keep_mask(key, (layers,), p)


class LayerDrop(Scriptable, nn.ModuleList):
    r"""A stack of layers: in training, a forward pass skips layer ``l`` with probability ``p``.

    .. math:: x_{l+1} = \begin{cases} f_l(x_l) & u(l) < T \\ x_l & \text{otherwise} \end{cases}

    Use this layer for a deep transformer that is to run with fewer layers later. The paper's p is 0.2, or 0.5
    if half of the layers or more are to be pruned. :class:`DropPath` decides for each sample and saves no
    time.

    One decision per layer holds for the entire batch: ``keep_mask(key, (len(layers),), p)``. Nothing is
    scaled. Evaluation runs all layers. A skipped layer does not run and its parameters get no gradient, so
    DistributedDataParallel needs ``find_unused_parameters=True``.

    Code of :func:`torch.compile` skips too, by a break of its graph: each layer that runs has a graph of its
    own, compiled when it first runs, and no step recompiles. ``torch.cond`` would need no break, but its
    backward pass runs the layer again with new random numbers, so gradients of a layer with a dropout are
    wrong (seen in PyTorch 2.13 and 2.15).

    With ``run_all=True`` all layers run, and :func:`torch.where` selects a layer's output or its input. The
    result under one key is the same. A skipped layer saves no time then, and advances the generator if it
    draws random numbers of its own. Its parameters get gradients of 0, where a layer that does not run leaves
    them None. An optimizer with momentum or weight decay acts on a gradient of 0; it is NaN if a number
    within the layer is infinite or NaN, because 0 times infinity is NaN. All layers run without the option

    - under :func:`torch.compile` where the graph cannot break: with ``fullgraph=True``, in
      :func:`torch.export` and in a compiled checkpoint; and within :func:`thinned.address`, which counts
      calls;
    - under :func:`torch.func.vmap` if the examples have decisions of their own, and under tracers;
    - in several processes of torch.distributed, for a call without a key outside :func:`thinned.address`:
      each process draws decisions of its own, and FSDP waits forever for a layer that one process skips.

    Processes skip the same layers if all get one ``key``, or enter :func:`thinned.address` with one seed and
    step. Use ``run_all=True`` for DistributedDataParallel without ``find_unused_parameters``, for engines
    that wait for the gradient of each parameter, and with ``mode="reduce-overhead"`` of
    :func:`torch.compile`: CUDA graphs are recorded anew for each order of layers.

    A graph of torch.fx that is traced in training calls the stack as one node; one that is traced in
    evaluation has a node for each layer.

    Indexing, iteration, ``len`` and ``state_dict`` are those of :class:`torch.nn.ModuleList` and see all
    layers. ``layers[::2]`` is the paper's "every other" pruning for inference. To write your own loop, as
    with fairseq's ``LayerDropModuleList``, iterate over :meth:`surviving`.

    Args:
        layers: modules that return a tensor of their input's shape.
        p: the probability of skipping a layer, in [0, 1].
        run_all: run skipped layers too, and do not use their outputs; ``synced_gpus`` in transformers.

    Shape:
        any that the layers accept; the output has the input's shape.

    Raises:
        ValueError: ``p`` outside [0, 1] or NaN.
        TypeError: all layers have to run, and ``input`` is no tensor.

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

    run_all = False  # on the class, so that layers pickled without it still run

    def __init__(
        self, layers: Iterable[nn.Module] | None = None, p: float = 0.5, *, run_all: bool = False
    ) -> None:
        check_p(p)
        if layers is not None:
            several = isinstance(layers, Iterable) and not isinstance(layers, Tensor)
            layers = list(layers) if several else layers
            if not several or not all(isinstance(layer, nn.Module) for layer in layers):
                raise TypeError(f"layers must be modules, {got(layers)}")
        super().__init__(layers)
        self.p = p
        self.run_all = run_all

    def __getitem__(self, idx: int | slice) -> Any:
        if isinstance(idx, slice):
            return type(self)(list(self)[idx], self.p, run_all=self.run_all)
        return super().__getitem__(idx)

    def surviving(self, *, key: Key | None = None) -> Iterator[nn.Module]:
        """The layers that one forward pass runs, in order; all layers in evaluation.

        Python reads the decisions here. :func:`torch.compile` breaks its graph, and compiles the caller's
        loop once for each choice of layers; a call of the LayerDrop itself compiles each layer once.

        Args:
            key: one key, or a batch of ``len(self)`` keys, one per layer. Without a key, one is drawn from
                torch's default CPU generator.

        Raises:
            RuntimeError: the examples of a vmap have different decisions; all layers have to run, by
                ``run_all`` or in several processes without a key.
        """
        keep = self._keep(key)
        if keep is None:
            return iter(self)
        if self._runs_all(key):
            why, instead = "each process draws which to skip", "give all processes the same key"
            if self.run_all:
                why, instead = "run_all=True", "set run_all=False"
            raise RuntimeError(f"all layers have to run ({why}): call the LayerDrop itself, or {instead}")
        if differs_by_example(keep):
            raise RuntimeError("each example has layers of its own under vmap; call the LayerDrop itself")
        return iter([layer for layer, kept in zip(self, keep.tolist(), strict=True) if kept])

    def _scriptable_forward(self, input: Tensor) -> Tensor:
        layers = 0
        for _ in self:
            layers += 1
        keep = torch.ones(layers, dtype=torch.bool)
        if self.training and self.p > 0:
            keep = torch.ops.thinned.surviving_layers(layers, float(self.p))
        for index, layer in enumerate(self):
            if self.run_all:
                input = torch.where(keep[index].to(input.device), layer(input), input)
            elif bool(keep[index]):
                input = layer(input)
        return input

    def _traced_forward(self) -> None:
        """Python cannot branch on a decision in a trace."""

    def forward(self, input: Any, *args: Any, key: Key | None = None, **kwargs: Any) -> Any:
        """Pass ``input`` through the surviving layers; every layer gets ``*args`` and ``**kwargs`` too."""
        if self.training and (node := module_node(self, input, *args, key=key, **kwargs)) is not None:
            return node
        if compiling() and self._skips_when_compiled(key):
            return _run_kept(self, key, input, args, kwargs)
        keep = self._keep(key)
        if keep is None:
            for layer in self:
                input = layer(input, *args, **kwargs)
            return input
        branches = not (is_traced(keep) or differs_by_example(keep) or self._runs_all(key))
        if not branches and not isinstance(input, Tensor):
            raise TypeError(
                f"all layers run and torch.where selects, so input must be a Tensor, {got(input)}"
            )
        for index, (layer, kept) in enumerate(
            zip(self, keep.tolist() if branches else keep.unbind(), strict=True)
        ):
            if branches and not kept:
                continue
            output = layer(input, *args, **kwargs)
            _check_shape(index, input, output)
            input = output if branches else torch.where(to_device(kept, input.device), output, input)
        return input

    def _runs_all(self, key: Key | None) -> bool:
        """Whether eager code has to run skipped layers too."""
        return self.run_all or (key is None and ranks_draw())

    def _skips_when_compiled(self, key: Key | None) -> bool:
        """Whether Dynamo breaks its graph here, so that Python runs the layers that are kept."""
        drops = self.training and self.p > 0 and not self._runs_all(key)
        # A key source counts the calls of layers. A graph of a layer would hold for one count alone.
        return drops and active.key_source is None and _breaks_graph()

    def _keep(self, key: Key | None) -> Tensor | None:
        """The decision of each layer, or None if all layers run."""
        if not self.training or self.p == 0:
            return None
        if traces_symbolically():
            raise RuntimeError(
                "torch.fx would skip the same layers at every call of its graph; accepted: a trace in "
                "evaluation, which has all layers, or a LayerDrop that a module calls as its child: one node"
            )
        if key is None and tracing():
            return torch.ops.thinned.surviving_layers(len(self), self.p)  # type: ignore[no-any-return]
        return surviving_layers(len(self), self.p, key=key)

    def extra_repr(self) -> str:
        return f"p={self.p}, run_all=True" if self.run_all else f"p={self.p}"

    def __repr__(self) -> str:
        # ModuleList's own does not call extra_repr.
        name, _, layers = super().__repr__().partition("(")
        return f"{name}({self.extra_repr()}{layers}"


@never_inlined
def _run_kept(
    layers: LayerDrop, key: Key | None, input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run the layers that are kept. Dynamo leaves this function to Python, and compiles what it calls."""
    for index, (layer, call) in enumerate(zip(layers, _decide(layers, key), strict=True)):
        if call is not None:
            output = call(layer, input, args, kwargs)
            _check_shape(index, input, output)
            input = output
    return input


@outside_graphs
def _decide(layers: LayerDrop, key: Key | None) -> list[Callable[..., Any] | None]:
    """What calls each layer; None for a layer that is skipped."""
    keep = surviving_layers(len(layers), layers.p, key=key).tolist()
    return [_caller(layer) if kept else None for layer, kept in zip(layers, keep, strict=True)]


@constant_when_compiled
def _breaks_graph() -> bool:
    return breaks_graph(_run_kept)


def _call(layer: nn.Module, input: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return layer(input, *args, **kwargs)


_callers: WeakKeyDictionary[nn.Module, Callable[..., Any]] = WeakKeyDictionary()
_numbers = count()


def _caller(layer: nn.Module) -> Callable[..., Any]:
    """:func:`_call` with code of its own: Dynamo stops to compile after 8 graphs for one code object."""
    if layer not in _callers:
        code = _call.__code__.replace(co_name=f"layer_{next(_numbers)}")
        _callers[layer] = FunctionType(code, globals())
    return _callers[layer]


def _check_shape(index: int, input: Any, output: Any) -> None:
    if isinstance(input, Tensor) and getattr(output, "shape", None) != input.shape:
        is_tensor = isinstance(output, Tensor)
        into = f"{tuple(output.shape)}" if is_tensor else f"a {type(output).__name__}"
        raise RuntimeError(
            "a skipped layer passes its input on, so every layer has to keep the shape of its input; "
            f"layer {index} turned {tuple(input.shape)} into {into}"
        )
