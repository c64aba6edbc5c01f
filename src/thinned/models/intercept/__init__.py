"""The dropouts that are calls and not modules: within a context, thinned's take the place of torch's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thinned import functional as F
from thinned.keys import Key
from thinned.layers._arguments import threshold_and_scale
from thinned.models.checkpoint import Counting, close_failed
from thinned.models.intercept.attention import multi_head_attention_forward, scaled_dot_product_attention
from thinned.models.intercept.fast_path import FastPath, is_innermost, remove_mode
from thinned.models.intercept.recurrent import run_packed, run_padded
from thinned.torch_state import MODULE_CALL, compiler_is_imported, compiling, modes_of_thread, never_inlined

__all__ = ["Intercept", "Intercepted", "intercept"]


def intercept(*, key: Key | None = None, sdpa_follows_training: bool = False) -> Intercept:
    """A context in which torch's dropout functions draw their masks from thinned.

    They are those that exchanging modules does not reach: the dropouts of ``torch`` and
    ``torch.nn.functional``, ``scaled_dot_product_attention(dropout_p=)``, ``nn.MultiheadAttention(dropout=)``
    and ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN(dropout=)``, also of packed sequences. The formulas are in
    :mod:`thinned.models.intercept.attention` and :mod:`thinned.models.intercept.recurrent`. torch's dropout
    modules call such a function too. A call that drops nothing, as in evaluation, has torch's result, bit for
    bit.

    It holds for the thread that enters it, and for regions of it that a backward pass computes again, also
    after its end: by :func:`torch.utils.checkpoint.checkpoint`, or by an autograd Function that calls them in
    its ``forward(ctx, ...)``, as those of Megatron and DeepSpeed do. Other code that a backward pass calls,
    such as a gradient hook, has torch's dropouts. Under :func:`torch.compile` it may be entered outside of
    the compiled function or in it. It does not reach into TorchScript, nor into graphs that were compiled or
    exported without it.

    Args:
        key: what the masks are functions of: the dropout with number ``n`` in the context, from 0, has
            ``key.fold(n)``. Without one, keys are drawn from torch's default generator, or given by
            :func:`thinned.address`.
        sdpa_follows_training: let ``scaled_dot_product_attention`` drop nothing if the innermost module that
            is running is in evaluation. By itself it drops whatever ``dropout_p`` says, and models forget
            that (pytorch#99293, #124464). Not for compiled code.

    Raises:
        TypeError: ``key`` is no :class:`~thinned.Key`.
        RuntimeError: at a dropout whose number is unknown, in a backward pass or in another asyncio task; at
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
    """What :func:`thinned.intercept` returns; it may be entered any number of times, by one thread at a time.

    >>> import torch, thinned
    >>> from thinned.models.intercept import intercept
    >>> context = intercept()
    >>> with context:
    ...     torch.manual_seed(3).initial_seed(), torch.dropout(torch.ones(3), 1.0, True)
    (3, tensor([0., 0., 0.]))
    """

    def __init__(self, key: Key | None = None, sdpa_follows_training: bool = False) -> None:
        super().__init__()
        if key is not None and not isinstance(key, Key):
            raise TypeError(f"key must be a thinned.Key, got {key!r} of type {type(key).__name__}")
        self.key = key
        self.sdpa_follows_training = sdpa_follows_training
        self._first: dict[str, int] = {}
        self._reset({})

    @property
    def count(self) -> int:
        """How many dropouts have had a key in the context so far."""
        return self.calls.get("", 0)

    def __enter__(self) -> Intercept:
        self.calls = dict(self._first)
        if not compiling():  # which does not trace this, and needs neither
            modes_of_thread()  # which refuses before anything has changed
            close_failed()
            self._enter_counting(None)
            _fast_path.install()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not compiling():
            close_failed()
        # A backward pass that raised has put back the modes that there were before it.
        if compiling() or is_innermost(self):
            super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        else:
            remove_mode(self)
        if not compiling():
            _fast_path.remove()
            self._exit_counting()

    def resumed(self, calls: dict[str, int], stack: list[str], region: Any = None) -> Intercept:  # noqa: ARG002
        twin = Intercept(self.key, self.sdpa_follows_training)
        twin._reset({}, region=region, recomputes=True)
        twin._first = calls
        return twin

    def next_key(self) -> Key | None:
        """The key of the next dropout, or None to have one drawn."""
        if self.key is None:
            self.note("", 0)
            return None
        return self.key.fold(self.number(""))

    def _within(self, region: Callable[..., Any]) -> Callable[..., Any]:
        """The region, in which a compiler does not apply the mode that it applies to the checkpoint."""

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
        site = _SITES.get(func)
        if site is not None:
            result = site(self, *args, **kwargs)
            if result is not None:
                return result
        return func(*args, **kwargs)


_fast_path = FastPath(Intercept)


class Intercepted(nn.Module):
    """A module that calls another within :func:`thinned.intercept`.

    Args:
        module: what is called; its parameters are under ``module.`` in the ``state_dict``.
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
        Intercept(key)
        self.module = module
        self.key = key
        self.sdpa_follows_training = sdpa_follows_training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with Intercept(self.key, self.sdpa_follows_training):
            return self.module(*args, **kwargs)


# A site has the mode and the arguments of torch's function; None, if nothing is dropped, leaves it to torch.


def _like_torchs(
    ours: Callable[..., Tensor], training_by_default: bool = True
) -> Callable[..., Tensor | None]:
    """A function of torch.nn.functional; thinned's has the same arguments."""

    def site(
        mode: Intercept,
        input: Tensor,
        p: float = 0.5,
        training: bool = training_by_default,
        inplace: bool = False,
        **rest: Any,
    ) -> Tensor | None:
        if _is_torchs(rest):
            return None
        if not training or p == 0:
            return _unchanged(ours, input, p)
        return ours(input, p, True, inplace, key=mode.next_key())

    return site


def _is_torchs(rest: dict[str, Any]) -> bool:
    """Whether a call has an argument that only torch knows, such as a generator in versions to come."""
    return any(value is not None for value in rest.values())


def _unchanged(ours: Callable[..., Tensor], input: Tensor, p: float) -> Tensor | None:
    """What torch gives, without a node in an exported graph; where torch might object, it is torch's call."""
    checks_nothing = ours in (F.dropout, F.alpha_dropout)
    return input if checks_nothing and isinstance(input, Tensor) and 0 <= p <= 1 else None


def _of_aten(ours: Callable[..., Tensor], inplace: bool = False) -> Callable[..., Tensor | None]:
    """A function of ``torch``, with three arguments."""

    def site(mode: Intercept, input: Tensor, p: float, train: bool, **rest: Any) -> Tensor | None:
        if _is_torchs(rest):
            return None
        if not train or p == 0:
            return _unchanged(ours, input, p)
        return ours(input, p, True, inplace, key=mode.next_key())

    return site


def _feature_dropout(
    input: Tensor,
    p: float,
    training: bool,
    inplace: bool,
    *,
    key: Key | None,
) -> Tensor:
    if input.dim() < 2 and p != 1:
        raise RuntimeError("Feature dropout requires at least 2 dimensions in the input")
    return F.dropout(input, p, training, inplace, key=key, broadcast_dims=range(2, input.dim()))


def _native_dropout(
    mode: Intercept,
    input: Tensor,
    p: float,
    train: bool | None,
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
    if mode.sdpa_follows_training and not _running_in_training():
        return torch_functional.scaled_dot_product_attention(
            query, key, value, attn_mask, 0.0, is_causal, **options
        )
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, **options, mask_key=mode.next_key()
    )


def _running_in_training() -> bool:
    """Whether the innermost module that is running is in training; True if none is."""
    if compiling():
        raise RuntimeError("intercept(sdpa_follows_training=True) is not for compiled code")
    frame = sys._getframe()
    while frame.f_code is not MODULE_CALL:
        if frame.f_back is None:
            return True
        frame = frame.f_back
    return bool(frame.f_locals["self"].training)


def _mha(
    mode: Intercept, *args: Any, training: bool = True, **kwargs: Any
) -> tuple[Tensor, Tensor | None] | None:
    # torch gives its function mode these by position: dropout_p, what is before it and two more.
    dropout_p = args[10]
    if dropout_p == 0 or not training:
        return None
    return multi_head_attention_forward(*args, **kwargs, mask_key=mode.next_key())


def _recurrent(kernel: Callable[..., Any]) -> Callable[..., tuple[Tensor, ...] | None]:
    def padded(
        mode: Intercept,
        input: Tensor,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...] | None:
        if not train or dropout == 0 or num_layers == 1:
            return None
        rest = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        return _outside_graphs(False, kernel, input, hx, params, *rest, next_key=mode.next_key)

    def packed(
        mode: Intercept,
        data: Tensor,
        batch_sizes: Tensor,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
    ) -> tuple[Tensor, ...] | None:
        if not train or dropout == 0 or num_layers == 1:
            return None
        rest = (has_biases, num_layers, dropout, train, bidirectional)
        return _outside_graphs(True, kernel, data, batch_sizes, hx, params, *rest, next_key=mode.next_key)

    def site(mode: Intercept, *args: Any, **kwargs: Any) -> tuple[Tensor, ...] | None:
        is_packed = "batch_sizes" in kwargs or (len(args) > 3 and not isinstance(args[3], bool))
        return (packed if is_packed else padded)(mode, *args, **kwargs)

    return site


@never_inlined
def _outside_graphs(is_packed: bool, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
    """Dynamo breaks its graph for recurrent networks, whose kernels it cannot train; so do we."""
    run: Callable[..., tuple[Tensor, ...]] = run_packed if is_packed else run_padded
    if compiler_is_imported():
        run = torch.compiler.disable(run)
    return run(*args, **kwargs)


_SITES: dict[Any, Callable[..., Any]] = {
    torch_functional.dropout: _like_torchs(F.dropout),
    torch_functional.dropout1d: _like_torchs(F.dropout1d),
    torch_functional.dropout2d: _like_torchs(F.dropout2d),
    torch_functional.dropout3d: _like_torchs(F.dropout3d),
    torch_functional.alpha_dropout: _like_torchs(F.alpha_dropout, False),
    torch_functional.feature_alpha_dropout: _like_torchs(F.feature_alpha_dropout, False),
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
    _SITES[getattr(torch, _name)] = _of_aten(_ours)
    _SITES[getattr(torch, f"{_name}_")] = _of_aten(_ours, inplace=True)
for _name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _SITES[getattr(torch, _name)] = _recurrent(getattr(torch, _name))
# Graphs call the same functions by other names.
for _name in ("dropout", "dropout_", "feature_dropout", "alpha_dropout", "native_dropout"):
    _packet = getattr(torch.ops.aten, _name)
    _SITES[_packet] = _SITES[_packet.default] = _SITES[getattr(torch, _name)]
_packet = torch.ops.aten.scaled_dot_product_attention
_SITES[_packet] = _SITES[_packet.default] = _sdpa
