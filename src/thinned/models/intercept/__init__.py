"""Calls of torch's dropout functions within a context run thinned's instead."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thinned import functional as F
from thinned.checks import got
from thinned.key_source import active
from thinned.keys import Key, as_key
from thinned.layers._arguments import threshold_and_scale
from thinned.layers._overrides import module_node
from thinned.models.checkpoint import Counting, close_failed
from thinned.models.intercept.attention import multi_head_attention_forward, scaled_dot_product_attention
from thinned.models.intercept.draws import DRAW_HANDLERS, running_in_training
from thinned.models.intercept.fast_path import FastPath, is_innermost, remove_mode
from thinned.models.intercept.recurrent import Packed, Padded, run
from thinned.named import Named
from thinned.torch_state import compiling, modes_of_thread, outside_graphs

__all__ = ["Intercept", "Intercepted", "intercept", "is_intercepted"]


def intercept(*, key: Key | None = None, sdpa_follows_training: bool = False) -> Intercept:
    """A context in which torch's dropout functions draw their masks from thinned.

    It reaches the dropouts that :func:`thinned.convert` cannot, because they are no modules: those of
    ``torch`` and ``torch.nn.functional``, ``scaled_dot_product_attention(dropout_p=)``,
    ``nn.MultiheadAttention(dropout=)`` and ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN(dropout=)``, also for packed
    sequences. :mod:`thinned.models.intercept.attention` and :mod:`thinned.models.intercept.recurrent` have
    the formulas. torch's dropout modules call such functions too. A call that drops nothing, as in
    evaluation, has torch's result, bit for bit.

    It also reaches :func:`torch.rand` and its like, where the function that draws is named after dropout, as
    ``dropout_edge``, or draws one number for layerdrop: see :mod:`thinned.models.draws`.

    The context holds for the thread that enters it. A region that a backward pass recomputes has the masks of
    its first run, also after the context has ended, if it is recomputed by
    :func:`torch.utils.checkpoint.checkpoint`, or by an autograd Function that calls it in
    ``forward(ctx, ...)``, as in Megatron and DeepSpeed. Other code that a backward pass calls, such as a
    gradient hook, has torch's dropouts. Under :func:`torch.compile` the context may be entered outside the
    compiled function or inside it. It does not reach TorchScript, or graphs that were compiled or exported
    without it. A symbolic trace of torch.fx within the context is the same as without, and draws no key: the
    GraphModule runs in a context like any module.

    Args:
        key: dropout number ``n`` of the context, from 0, has ``key.fold(n)``. By default keys come from
            :func:`thinned.address`, or from torch's default generator outside of one.
        sdpa_follows_training: let ``scaled_dot_product_attention`` drop nothing if the innermost running
            module is in evaluation. By default it always drops with ``dropout_p``, which models forget
            (pytorch#99293, #124464). Not for compiled code.

    Raises:
        TypeError: ``key`` is no :class:`~thinned.Key`.
        RuntimeError: at a dropout with an unknown number, in a backward pass or in another asyncio task; at
            the end, if a context that was entered later is still active.

    >>> import torch, thinned
    >>> from thinned.models.intercept import intercept
    >>> with intercept(key=thinned.Key(7)):
    ...     torch.nn.functional.dropout(torch.ones(2, 6), 0.5)
    tensor([[0., 2., 2., 0., 0., 0.],
            [0., 2., 0., 0., 2., 2.]])
    """
    return Intercept(key, sdpa_follows_training)


class Intercept(Counting, TorchFunctionMode):
    """The context that :func:`thinned.intercept` returns. One thread at a time may enter it, again and again.

    >>> import torch, thinned
    >>> from thinned.models.intercept import intercept
    >>> context = intercept()
    >>> with context:
    ...     torch.manual_seed(3).initial_seed(), torch.dropout(torch.ones(3), 1.0, True)
    (3, tensor([0., 0., 0.]))
    """

    _title = "thinned.intercept"

    def __init__(self, key: Key | None = None, sdpa_follows_training: bool = False) -> None:
        super().__init__()
        self.key = None if key is None else as_key(key)
        self.sdpa_follows_training = sdpa_follows_training
        self._first: Mapping[str, int] = {}
        self._reset()

    @property
    def count(self) -> int:
        """The number of dropouts that have had a key of this context since it was entered."""
        return self.calls.get("", 0)

    def __enter__(self) -> Intercept:
        self.calls = dict(self._first)
        if not compiling():  # Dynamo cannot trace these
            modes_of_thread()  # raises if PyTorch lacks its private functions, before anything changes
            close_failed()
            self._enter_counting(self._innermost.get())
            _fast_path.install()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not compiling():
            close_failed()
        # A backward pass that raised has restored the modes from before it, perhaps without this one.
        if compiling() or is_innermost(self):
            super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        else:
            remove_mode(self)
        if not compiling():
            _fast_path.remove()
            self._exit_counting()

    def resumed(self, calls: Mapping[str, int], stack: Sequence[str], region: Any = None) -> Intercept:  # noqa: ARG002
        twin = Intercept(self.key, self.sdpa_follows_training)
        twin._reset(region=region, recomputes=True)
        twin._first = calls
        return twin

    def next_key(self) -> Key | None:
        """The key of the next dropout, or None to draw one."""
        if self.key is None:
            self.note("", 0)
            return None
        if active.rows is not None:
            raise RuntimeError(
                "thinned.intercept(key=) does not know the masks of a dropout within a residual branch that "
                "is computed for the kept rows alone; use thinned.address, or compute it for all rows"
            )
        return self.key.fold(self.number(""))

    def _within(self, region: Callable[..., Any]) -> Callable[..., Any]:
        """Enter the mode in a checkpointed region: Dynamo applies it to the call of the checkpoint only."""

        def within(*args: Any, **kwargs: Any) -> Any:
            TorchFunctionMode.__enter__(self)
            try:
                return region(*args, **kwargs)
            finally:
                TorchFunctionMode.__exit__(self, None, None, None)

        return within

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.utils.checkpoint.checkpoint and compiling():
            args = (self._within(args[0]), *args[1:])
        # A call that torch.fx traces, or a class of its own, becomes what it becomes without the context.
        ours = all(issubclass(kind, Tensor) for kind in types)
        handler = _HANDLERS.get(func) if ours else None
        result = None if handler is None else handler(self, *args, **kwargs)
        return func(*args, **kwargs) if result is None else result


def is_intercepted() -> bool:
    """Whether this thread, or this asyncio task, is within :func:`thinned.intercept`."""
    return Intercept._innermost.get() is not None


_fast_path = FastPath(Intercept)


class Intercepted(Named):
    """A module that calls another within :func:`thinned.intercept`.

    Args:
        module: the module to call; its parameters are under ``module.`` in the ``state_dict``.
        key: as for :func:`thinned.intercept`; each call counts from 0.
        sdpa_follows_training: as for :func:`thinned.intercept`.

    >>> import torch, thinned
    >>> lstm = torch.nn.LSTM(3, 4, num_layers=2, dropout=0.5)
    >>> y, _ = Intercepted(lstm)(torch.randn(5, 2, 3))
    >>> y.shape
    torch.Size([5, 2, 4])
    """

    def __init__(
        self, module: nn.Module, *, key: Key | None = None, sdpa_follows_training: bool = False
    ) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module must be a torch.nn.Module, {got(module)}")
        self.module = module
        self.key = None if key is None else as_key(key)
        self.sdpa_follows_training = sdpa_follows_training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if (node := module_node(self, *args, **kwargs)) is not None:
            return node
        with Intercept(self.key, self.sdpa_follows_training):
            return self.module(*args, **kwargs)


# A handler takes the mode and the arguments of torch's function. It returns the result, or None to let
# torch's own function run, as where nothing is dropped.


def _drop(
    ours: Callable[..., Tensor],
    mode: Intercept,
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    rest: dict[str, Any],
) -> Tensor | None:
    """Call thinned's dropout, unless ``rest`` holds an argument that only torch knows.

    A later PyTorch may pass a ``generator``, which torch's own function then has to draw from.
    """
    if any(value is not None for value in rest.values()):
        return None
    if training and p != 0:
        return ours(input, p, True, inplace, key=mode.next_key())
    # torch would return the input too, but would leave a node in an exported graph. Only these two functions
    # check nothing but p.
    is_identity = ours in (F.dropout, F.alpha_dropout) and isinstance(input, Tensor) and 0 <= p <= 1
    return input if is_identity else None


def _functional(
    ours: Callable[..., Tensor], training_by_default: bool = True
) -> Callable[..., Tensor | None]:
    """The handler of a function of torch.nn.functional."""

    def handler(
        mode: Intercept,
        input: Tensor,
        p: float = 0.5,
        training: bool = training_by_default,
        inplace: bool = False,
        **rest: Any,
    ) -> Tensor | None:
        return _drop(ours, mode, input, p, training, inplace, rest)

    return handler


def _aten(ours: Callable[..., Tensor], inplace: bool = False) -> Callable[..., Tensor | None]:
    """The handler of a function of ``torch``."""

    def handler(mode: Intercept, input: Tensor, p: float, train: bool, **rest: Any) -> Tensor | None:
        return _drop(ours, mode, input, p, train, inplace, rest)

    return handler


def _feature_dropout(input: Tensor, p: float, training: bool, inplace: bool, *, key: Key | None) -> Tensor:
    if input.dim() < 2 and p != 1:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return F.dropout(input, p, training, inplace, key=key, broadcast_dims=range(2, input.dim()))


def _native_dropout(
    mode: Intercept, input: Tensor, p: float, train: bool | None
) -> tuple[Tensor, Tensor] | None:
    if train is False or p == 0:
        return None
    _, scale = threshold_and_scale(p)
    keep = F.dropout(torch.ones_like(input), p, key=mode.next_key()) != 0
    return torch.where(keep, input * scale, 0), keep


def _sdpa(
    mode: Intercept,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> Tensor | None:
    if dropout_p == 0:
        return None
    if mode.sdpa_follows_training and compiling():
        raise RuntimeError("intercept(sdpa_follows_training=True) is not for compiled code")
    if mode.sdpa_follows_training and not running_in_training():
        return torch_functional.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, **options
        )
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, **options, mask_key=mode.next_key()
    )


def _mha(
    mode: Intercept, *args: Any, training: bool = True, **kwargs: Any
) -> tuple[Tensor, Tensor | None] | None:
    # torch passes its function mode the arguments up to out_proj_bias by position; number 10 is dropout_p.
    if args[10] == 0 or not training:
        return None
    return multi_head_attention_forward(*args, **kwargs, mask_key=mode.next_key())


def _draws(draw: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    return lambda mode, *args, **kwargs: draw(mode.next_key, *args, **kwargs)


def _recurrent(kernel: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...] | None]:
    def handler(mode: Intercept, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | None:
        is_packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
        arguments = (Packed if is_packed else Padded)(*args, **kwargs)
        if not arguments.train or arguments.dropout == 0 or arguments.num_layers == 1:
            return None
        return _outside_graphs(kernel, arguments, mode.next_key)

    return handler


# As Dynamo does itself for recurrent networks, whose kernels it cannot train.
_outside_graphs = outside_graphs(run)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    torch_functional.dropout: _functional(F.dropout),
    torch_functional.dropout1d: _functional(F.dropout1d),
    torch_functional.dropout2d: _functional(F.dropout2d),
    torch_functional.dropout3d: _functional(F.dropout3d),
    torch_functional.alpha_dropout: _functional(F.alpha_dropout, False),
    torch_functional.feature_alpha_dropout: _functional(F.feature_alpha_dropout, False),
    torch_functional.scaled_dot_product_attention: _sdpa,
    torch_functional.multi_head_attention_forward: _mha,
    torch.native_dropout: _native_dropout,
}
for _name, _ours in {
    "dropout": F.dropout,
    "feature_dropout": _feature_dropout,
    "alpha_dropout": F.alpha_dropout,
    "feature_alpha_dropout": F.feature_alpha_dropout,
}.items():
    _HANDLERS[getattr(torch, _name)] = _aten(_ours)
    _HANDLERS[getattr(torch, f"{_name}_")] = _aten(_ours, inplace=True)
for _function, _draw in DRAW_HANDLERS.items():
    _HANDLERS[_function] = _draws(_draw)
for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _HANDLERS[getattr(torch, _name)] = _recurrent(getattr(torch, _name))
# Exported graphs call the same functions by other names.
for _name in ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "native_dropout"):
    _packet = getattr(torch.ops.aten, _name)
    _HANDLERS[_packet] = _HANDLERS[_packet.default] = _HANDLERS[getattr(torch, _name)]
_packet = torch.ops.aten.scaled_dot_product_attention
_HANDLERS[_packet] = _HANDLERS[_packet.default] = _sdpa
