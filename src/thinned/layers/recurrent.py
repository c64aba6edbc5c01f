"""LSTM and GRU with dropout wherever it has been proposed for one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from thinned import op
from thinned.checks import check_integer, got
from thinned.devices import to_device
from thinned.distributed.shards import is_dtensor
from thinned.key_source import refuse_rows
from thinned.keys import Key
from thinned.layers._arguments import check_key, check_p, drops, key_for
from thinned.layers._overrides import module_node
from thinned.layers._torchscript import Scriptable
from thinned.layers.dropout import dropout, keep_mask
from thinned.layers.locked import locked_dropout, pack_as, pad
from thinned.layers.weights import check_one_key, cudnn_copies, drop_connect
from thinned.layers.zoneout import zoneout
from thinned.torch_state import compiling, transforming

__all__ = ["VariationalGRU", "VariationalLSTM"]

States = tuple[Tensor, ...]  # h, and c of an LSTM
Result = tuple[Any, States]  # output, a tensor or a packed sequence, and the last states


class _VariationalRNN(Scriptable, nn.RNNBase):
    """The part that an LSTM and a GRU share: the masks, and the loops over layers and time steps."""

    _instead_of_script = "load its state_dict into the layer of torch.nn for evaluation, or use torch.export"
    _states: ClassVar[tuple[str, ...]]  # the names of the states, as in hidden_zoneout_p
    _torch: ClassVar[Callable[..., States]]  # torch.lstm or torch.gru

    def __init__(
        self, mode: str, sizes: tuple[int, int, int], dropout: float, *options: Any, **probabilities: float
    ) -> None:
        if not isinstance(dropout, float | int) or dropout:
            raise ValueError(f"dropout has to be 0, but got {dropout}; layer_p drops between layers")
        bias, batch_first, bidirectional, proj_size, device, dtype = options
        for name, size in zip(("input_size", "hidden_size", "num_layers"), sizes, strict=True):
            check_integer(name, size)
        check_integer("proj_size", proj_size)
        for name, p in probabilities.items():
            check_p(p, name)
        super().__init__(mode, *sizes, bias, batch_first, 0.0, bidirectional, proj_size, device, dtype)
        self._p_names = tuple(probabilities)
        for name, p in probabilities.items():
            setattr(self, name, p)

    input_p: float
    layer_p: float
    output_p: float
    recurrent_p: float
    weight_p: float

    def _state_sizes(self) -> tuple[int, ...]:
        raise NotImplementedError

    def _cell(self, x: Tensor, weights: list[Tensor]) -> Callable[..., States]:
        """A function that takes the step, the hidden state that enters the gates, and all states."""
        raise NotImplementedError

    def _call(self, input: Any, hx: States | None, key: Key | None) -> Result:
        is_packed = isinstance(input, PackedSequence)
        # As in a call that drops: evaluation refuses nested and integer inputs too.
        drops(type(self).__name__, input.data if is_packed else input, 1.0, True, None, dense=True)
        batched = is_packed or input.dim() == 3
        x, states = self._time_first(input, hx, is_packed, batched)
        if key is not None:
            check_key(key, (states[0].shape[1],) if batched else ())
            if self.weight_p:
                check_one_key(key)
        if self.training and any(getattr(self, name) for name in self._p_names):
            if self.weight_p and key is None:
                refuse_rows(f"a {type(self).__name__} with weight_p")  # one key for weights and rows
            sample_dim = 1 if batched and not self.weight_p else None
            key = key_for(states[0] if is_packed else x, key, sample_dim=sample_dim)
        else:
            key = None
        x, states = self._run(x, states, key)
        if not batched:
            return x.squeeze(1), tuple(state.squeeze(1) for state in states)
        return x.transpose(0, 1) if self.batch_first and not is_packed else x, states

    def extra_repr(self) -> str:
        given = (f", {name}={p}" for name in self._p_names if (p := getattr(self, name)))
        return super().extra_repr() + "".join(given)

    def _time_first(self, x: Any, hx: States | None, is_packed: bool, batched: bool) -> Result:
        """The checked arguments: ``(time, N, C)`` or a packed sequence, and states ``(layers, N, H)``."""
        data = x.data if is_packed else x
        shape, dims = tuple(data.shape), (2,) if is_packed else (2, 3)
        if len(shape) not in dims:
            raise ValueError(
                f"{type(self).__name__} needs {'packed data' if is_packed else 'an input'} with "
                f"{' or '.join(map(str, dims))} dimensions, got shape {shape}"
            )
        if shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) has to be input_size = {self.input_size}, got shape {shape}")
        if not is_packed:
            x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
            if not len(x):
                raise RuntimeError(f"{type(self).__name__} needs at least one time step, got shape {shape}")
        samples = (int(x.batch_sizes[0]) if is_packed else x.shape[1],) if batched else ()
        rows = self.num_layers * (1 + self.bidirectional)
        expected = [(rows, *samples, size) for size in self._state_sizes()]
        states = tuple(data.new_zeros(size) for size in expected) if hx is None else hx
        if not isinstance(states, tuple | list) or not all(isinstance(state, Tensor) for state in states):
            what = f"{len(expected)} tensors" if len(expected) > 1 else "a tensor"
            raise TypeError(f"hx must be {what}, {got(states[0] if len(expected) == 1 else hx)}")
        if len(states) != len(expected):
            raise RuntimeError(f"hx must be {len(expected)} tensors, got {len(states)}")
        for i, (state, size) in enumerate(zip(states, expected, strict=True)):
            if tuple(state.shape) != size:
                which = f"hidden[{i}]" if len(expected) > 1 else "hidden"
                raise RuntimeError(f"Expected {which} size {size}, got {tuple(state.shape)}")
        return x, states if batched else tuple(state.unsqueeze(1) for state in states)

    def _run(self, x: Any, states: States, key: Key | None) -> Result:
        """All layers; ``key`` is None where there is no mask, as in evaluation."""
        zoned = any(getattr(self, f"{which}_zoneout_p") for which in self._states)
        in_python = compiling() or transforming() or is_dtensor(x)
        looped = zoned or (key is not None and self.recurrent_p) or in_python
        # One kernel call for all layers takes the parameters where cuDNN wants them, without a copy.
        by_layer = looped or (key is not None and (self.layer_p or self.weight_p))
        calls = [[layer] for layer in range(self.num_layers)] if by_layer else [range(self.num_layers)]
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        last = []
        for layers in calls:
            first = layers[0]
            x = _dropped(locked_dropout, x, self.layer_p if first else self.input_p, key, f"input_l{first}")
            names = [f"l{layer}{suffix}" for layer in layers for suffix in suffixes]
            rows = slice(first * len(suffixes), first * len(suffixes) + len(names))
            weights = [
                [w_ih, _dropped(drop_connect, w_hh, self.weight_p, key, f"weight_hh_{name}"), *others]
                for (w_ih, w_hh, *others), name in zip(self.all_weights[rows], names, strict=True)
            ]
            own = tuple(state[rows] for state in states) if by_layer else states
            if looped:
                x, own = self._loop(x, own, weights, names, key)
            else:
                x, own = self._kernel(x, own, weights, len(layers))
            last.append(own)
        x = _dropped(locked_dropout, x, self.output_p, key, "output")
        return x, tuple(torch.cat(each) for each in zip(*last, strict=True)) if by_layer else own

    def _kernel(self, x: Any, states: States, weights: list[list[Tensor]], layers: int) -> Result:
        flat = [weight for direction in weights for weight in direction]
        packed = isinstance(x, PackedSequence)
        if packed:
            states = tuple(_permuted(state, x.sorted_indices) for state in states)
        data, layout = ((x.data, x.batch_sizes), ()) if packed else ((x,), (False,))
        with cudnn_copies() if data[0].is_cuda else nullcontext():
            y, *last = self._torch(
                *data,
                states if len(states) > 1 else states[0],
                *(flat, self.bias, layers, 0.0, self.training, self.bidirectional, *layout),
            )
        if not packed:
            return y, tuple(last)
        last = [_permuted(state, x.unsorted_indices) for state in last]
        return PackedSequence(y, *x[1:]), tuple(last)

    def _loop(
        self, x: Any, states: States, weights: list[list[Tensor]], names: list[str], key: Key | None
    ) -> Result:
        """One layer, step by step in each direction."""
        is_packed = isinstance(x, PackedSequence)
        padded = pad(x).transpose(0, 1) if is_packed else x
        steps = len(padded)
        valid = _valid_steps(x) if is_packed else None
        outputs, last = [], []
        for own_weights, name, *own in zip(weights, names, *states, strict=True):
            cell = self._cell(padded, own_weights)
            m = key.fold(f"recurrent_{name}") if key is not None and self.recurrent_p else None
            zoneouts = [
                _zoneout(getattr(self, f"{which}_zoneout_p"), key, f"{which}_zoneout_{name}", steps, state)
                for which, state in zip(self._states, own, strict=True)
            ]
            output: list[Tensor] = [own[0]] * steps
            for t in range(steps)[:: -1 if name.endswith("_reverse") else 1]:
                kept = own[0] if m is None else dropout(own[0], self.recurrent_p, key=m)
                new = [
                    zoned(t, candidate, state)
                    for zoned, candidate, state in zip(zoneouts, cell(t, kept, *own), own, strict=True)
                ]
                if valid is not None:  # a sample that has ended, or not begun, keeps its state
                    new = [torch.where(valid[t], *both) for both in zip(new, own, strict=True)]
                own = new
                output[t] = own[0]
            outputs.append(torch.stack(output))
            last.append(own)
        y = torch.cat(outputs, 2)
        return (
            pack_as(x, y.transpose(0, 1)) if is_packed else y,
            tuple(torch.stack(each) for each in zip(*last, strict=True)),
        )


class VariationalLSTM(_VariationalRNN):
    r"""A :class:`torch.nn.LSTM` with locked masks, dropped recurrent weights and zoneout.

    Use this layer for an LSTM that overfits: ``dropout=`` of :class:`torch.nn.LSTM` drops between its layers
    alone, with a new mask at each step. AWD-LSTM has ``input_p=0.4, layer_p=0.3, output_p=0.4,
    weight_p=0.5``. To keep a :class:`torch.nn.LSTM` use :class:`WeightDrop` and :class:`LockedDropout`.

    With the weights :math:`W, U` of a layer and direction of :class:`torch.nn.LSTM`, and :math:`b` the sum of
    its biases,

    .. math::
        (i, f, g, o)_t &= W (m^x \odot x_t) + (m^U \odot U) (m^h \odot h_{t-1}) + b \\
        \tilde c_t &= \sigma(f_t) \odot c_{t-1} + \sigma(i_t) \odot \tanh(g_t) \\
        \tilde h_t &= W_{hr} \bigl(\sigma(o_t) \odot \tanh(\tilde c_t)\bigr) \\
        c_t &= \operatorname{zoneout}(\tilde c_t, c_{t-1}) \\
        h_t &= \operatorname{zoneout}(\tilde h_t, h_{t-1})

    :math:`W_{hr}` is the identity unless ``proj_size`` is given. The masks :math:`m^x` and :math:`m^h` are
    those of :func:`~thinned.functional.locked_dropout`, the same at all steps. :math:`m^U` is that of
    :func:`~thinned.functional.drop_connect`. Zoneout has a new mask at each step. All probabilities are 0
    unless given:

    - Gal & Ghahramani: ``input_p``, ``layer_p`` and ``recurrent_p``, with one mask for the four gates;
    - AWD-LSTM: ``input_p`` ("dropouti"), ``layer_p`` ("dropouth"), ``output_p`` ("dropout"), ``weight_p``
      ("wdrop");
    - zoneout: ``hidden_zoneout_p`` and ``cell_zoneout_p``.

    Parameters, ``state_dict``, inputs and results are those of :class:`torch.nn.LSTM`. Its kernel computes
    the layers, except with ``recurrent_p`` or zoneout, in compiled code and under :mod:`torch.func`: these
    run a Python loop over the steps. (The class is no subclass of :class:`torch.nn.LSTM`, which
    ``torch.compile`` refuses.)

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, proj_size, device, dtype: as
            for :class:`torch.nn.LSTM`.
        dropout: refused unless 0; ``layer_p`` is the probability between layers.
        input_p: the probability of dropping a feature of the first layer's input.
        layer_p: the probability of dropping a feature of another layer's input.
        output_p: the probability of dropping a feature of the output; the final states keep all features.
        recurrent_p: the probability of dropping a unit of the hidden state that enters the next step.
        weight_p: the probability of dropping a connection of a recurrent weight.
        hidden_zoneout_p: the probability that a unit of the hidden state keeps its previous value.
        cell_zoneout_p: the probability that a cell keeps its previous value.

    Shape:
        as :class:`torch.nn.LSTM`'s: ``(time, N, C)``, ``(N, time, C)`` with ``batch_first``, ``(time, C)`` or
        a :class:`~torch.nn.utils.rnn.PackedSequence`, and optionally ``hx = (h_0, c_0)`` give
        ``(output, (h_n, c_n))``. The ``key`` of a call is one key, or without ``weight_p`` a key for each
        sample. A mask is that of ``key.fold(name)``, with the names ``"input_l0"``, ``"recurrent_l0"``,
        ``"weight_hh_l0"``, ``"hidden_zoneout_l0"`` and ``"cell_zoneout_l0"`` for layer 0, and ``"output"``.
        In the second direction, names of the recurrent, weight and zoneout masks end in ``"_reverse"``. The
        zoneout masks have shape ``(N, time, H)``. A packed sequence has the masks of the padded one.

    Raises:
        ValueError: a probability outside [0, 1] or NaN; ``dropout`` other than 0; what
            :class:`torch.nn.LSTM` refuses.
        RuntimeError: a shape or dtype that does not fit, or a batch of keys with ``weight_p``.

    Source: Gal & Ghahramani, NeurIPS 2016, section 4; Merity et al., ICLR 2018, sections 3 and 4; Krueger et
    al., ICLR 2017, section 3. The functions above have the titles.

    >>> import torch, thinned
    >>> lstm = thinned.VariationalLSTM(3, 5, num_layers=2, input_p=0.5, recurrent_p=0.25)
    >>> output, (h, c) = lstm(torch.randn(7, 2, 3), key=thinned.Key(7))
    >>> output.shape, h.shape
    (torch.Size([7, 2, 5]), torch.Size([2, 2, 5]))
    >>> lstm
    thinned.VariationalLSTM(3, 5, num_layers=2, input_p=0.5, recurrent_p=0.25)
    """

    _states = ("hidden", "cell")
    _torch = staticmethod(torch.lstm)
    hidden_zoneout_p: float
    cell_zoneout_p: float

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_p: float = 0.0,
        layer_p: float = 0.0,
        output_p: float = 0.0,
        recurrent_p: float = 0.0,
        weight_p: float = 0.0,
        hidden_zoneout_p: float = 0.0,
        cell_zoneout_p: float = 0.0,
    ) -> None:
        super().__init__(
            "LSTM",
            (input_size, hidden_size, num_layers),
            dropout,
            *(bias, batch_first, bidirectional, proj_size, device, dtype),
            input_p=input_p,
            layer_p=layer_p,
            output_p=output_p,
            recurrent_p=recurrent_p,
            weight_p=weight_p,
            hidden_zoneout_p=hidden_zoneout_p,
            cell_zoneout_p=cell_zoneout_p,
        )

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: tuple[Tensor, Tensor] | None = None,
        *,
        key: Key | None = None,
    ) -> tuple[Any, tuple[Tensor, Tensor]]:
        if (node := module_node(self, input, hx, key=key)) is not None:
            return node  # type: ignore[return-value]
        output, (h, c) = self._call(input, hx, key)
        return output, (h, c)

    def _state_sizes(self) -> tuple[int, ...]:
        return self.proj_size or self.hidden_size, self.hidden_size

    def _cell(self, x: Tensor, weights: list[Tensor]) -> Callable[..., States]:
        w_ih, w_hh, *others = weights
        w_hr = others.pop() if self.proj_size else None
        # Backward of `unbind` is one stack; backward of an index would be a scatter for each step.
        gates = F.linear(x, w_ih, others[0] + others[1] if others else None).unbind()
        w_hh = w_hh.t()

        def step(t: int, kept: Tensor, _: Tensor, c: Tensor) -> States:
            i, f, g, o = torch.addmm(gates[t], kept, w_hh).chunk(4, 1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            return h if w_hr is None else F.linear(h, w_hr), c

        return step


class VariationalGRU(_VariationalRNN):
    r"""A :class:`torch.nn.GRU` with locked masks, dropped recurrent weights and zoneout.

    Use this layer for a GRU that overfits: ``dropout=`` of :class:`torch.nn.GRU` drops between its layers
    alone, with a new mask at each step. For a cell of your own use :class:`Zoneout` and
    :class:`LockedDropout`.

    With the weights :math:`W, U` and biases :math:`b, d` of a layer and direction of :class:`torch.nn.GRU`,

    .. math::
        r_t &= \sigma\bigl(W_r (m^x \odot x_t) + b_r + (m^U \odot U)_r (m^h \odot h_{t-1}) + d_r\bigr) \\
        z_t &= \sigma\bigl(W_z (m^x \odot x_t) + b_z + (m^U \odot U)_z (m^h \odot h_{t-1}) + d_z\bigr) \\
        n_t &= \tanh\Bigl(W_n (m^x \odot x_t) + b_n
            + r_t \odot \bigl((m^U \odot U)_n (m^h \odot h_{t-1}) + d_n\bigr)\Bigr) \\
        \tilde h_t &= (1 - z_t) \odot n_t + z_t \odot h_{t-1} \\
        h_t &= \operatorname{zoneout}(\tilde h_t, h_{t-1})

    The masks, their probabilities and their names are those of :class:`VariationalLSTM`, except that there is
    no cell. Parameters, ``state_dict``, inputs and results are those of :class:`torch.nn.GRU`, whose kernel
    computes the layers where :class:`VariationalLSTM` uses that of an LSTM.

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, device, dtype: as for
            :class:`torch.nn.GRU`.
        dropout: refused unless 0; ``layer_p`` is the probability between layers.
        input_p, layer_p, output_p, recurrent_p, weight_p, hidden_zoneout_p: as for :class:`VariationalLSTM`.

    Shape:
        as :class:`VariationalLSTM`'s, with ``hx = h_0`` and ``(output, h_n)``.

    Raises:
        ValueError: a probability outside [0, 1] or NaN; ``dropout`` other than 0; what
            :class:`torch.nn.GRU` refuses.
        RuntimeError: a shape or dtype that does not fit, or a batch of keys with ``weight_p``.

    Source: Gal & Ghahramani, NeurIPS 2016, section 4; Merity et al., ICLR 2018, sections 3 and 4; Krueger et
    al., ICLR 2017, section 3.

    >>> import torch, thinned
    >>> gru = thinned.VariationalGRU(3, 5, bidirectional=True, recurrent_p=0.25, hidden_zoneout_p=0.1)
    >>> output, h = gru(torch.randn(7, 2, 3), key=thinned.Key(7))
    >>> output.shape, h.shape
    (torch.Size([7, 2, 10]), torch.Size([2, 2, 5]))
    """

    _states = ("hidden",)
    _torch = staticmethod(torch.gru)
    hidden_zoneout_p: float

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        input_p: float = 0.0,
        layer_p: float = 0.0,
        output_p: float = 0.0,
        recurrent_p: float = 0.0,
        weight_p: float = 0.0,
        hidden_zoneout_p: float = 0.0,
    ) -> None:
        super().__init__(
            "GRU",
            (input_size, hidden_size, num_layers),
            dropout,
            *(bias, batch_first, bidirectional, 0, device, dtype),
            input_p=input_p,
            layer_p=layer_p,
            output_p=output_p,
            recurrent_p=recurrent_p,
            weight_p=weight_p,
            hidden_zoneout_p=hidden_zoneout_p,
        )

    def forward(
        self, input: Tensor | PackedSequence, hx: Tensor | None = None, *, key: Key | None = None
    ) -> tuple[Any, Tensor]:
        if (node := module_node(self, input, hx, key=key)) is not None:
            return node  # type: ignore[return-value]
        output, (h,) = self._call(input, None if hx is None else (hx,), key)
        return output, h

    def _state_sizes(self) -> tuple[int, ...]:
        return (self.hidden_size,)

    def _cell(self, x: Tensor, weights: list[Tensor]) -> Callable[..., States]:
        w_ih, w_hh, *biases = weights
        b_ih, b_hh = biases or (None, None)
        gates = F.linear(x, w_ih, b_ih).unbind()

        def step(t: int, kept: Tensor, h: Tensor) -> States:
            (r, z, n), (r_h, z_h, n_h) = gates[t].chunk(3, 1), F.linear(kept, w_hh, b_hh).chunk(3, 1)
            n = (n + (r + r_h).sigmoid() * n_h).tanh()
            return (n + (z + z_h).sigmoid() * (h - n),)

        return step


def _dropped(drop: Callable[..., Any], x: Any, p: float, key: Key | None, name: str) -> Any:
    return x if key is None or not p else drop(x, p, key=key.fold(name))


def _permuted(state: Tensor, order: Tensor | None) -> Tensor:
    return state if order is None else state.index_select(1, order)


def _valid_steps(packed: PackedSequence) -> States:
    """The samples that have each step: masks of shape ``(N, 1)``, in the order before they were sorted."""
    samples = torch.arange(int(packed.batch_sizes[0]))
    valid = to_device(packed.batch_sizes[:, None] > samples, packed.data.device)
    return _permuted(valid, packed.unsorted_indices).unsqueeze(2).unbind()


def _zoneout(
    p: float, key: Key | None, name: str, steps: int, like: Tensor
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A function of the step, the candidate and the previous state."""
    if not p:
        return lambda _, candidate, __: candidate
    if key is None:
        return lambda _, candidate, previous: zoneout(candidate, previous, p, training=False)
    samples, units = like.shape
    keep = keep_mask(key.fold(name), (samples, steps, units), p).unbind(1)
    return lambda t, candidate, previous: torch.where(op.shard_like(keep[t], candidate), candidate, previous)
