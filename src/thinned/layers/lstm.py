"""An LSTM with dropout wherever it has been proposed for one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thinned.keys import Key
from thinned.layers._arguments import check_input, check_key, check_p, key_for
from thinned.layers._torchscript import Scriptable
from thinned.layers.dropout import dropout, keep_mask
from thinned.layers.locked import locked_dropout
from thinned.layers.weights import check_one_key, cudnn_copies, drop_connect
from thinned.layers.zoneout import zoneout
from thinned.torch_state import compiling, transforming

__all__ = ["VariationalLSTM"]

P_NAMES = ("input_p", "layer_p", "output_p", "recurrent_p", "weight_p", "hidden_zoneout_p", "cell_zoneout_p")

State = tuple[Tensor, Tensor]
Result = tuple[Tensor, Tensor, Tensor]  # output, h_n and c_n


class VariationalLSTM(Scriptable, nn.RNNBase):
    r"""A :class:`torch.nn.LSTM` with locked masks, dropped recurrent weights and zoneout.

    With the weights :math:`W, U` of a layer and direction of :class:`torch.nn.LSTM`, and :math:`b` the sum of
    its biases,

    .. math::
        (i, f, g, o)_t &= W (m^x \odot x_t) + (m^U \odot U) (m^h \odot h_{t-1}) + b \\
        \tilde c_t &= \sigma(f_t) \odot c_{t-1} + \sigma(i_t) \odot \tanh(g_t) \\
        \tilde h_t &= \sigma(o_t) \odot \tanh(\tilde c_t) \\
        c_t &= \operatorname{zoneout}(\tilde c_t, c_{t-1}) \\
        h_t &= \operatorname{zoneout}(\tilde h_t, h_{t-1})

    The masks :math:`m^x` and :math:`m^h` are those of :func:`~thinned.functional.locked_dropout`, the same at
    all steps. :math:`m^U` is that of :func:`~thinned.functional.drop_connect`. Zoneout has a new mask at each
    step. All probabilities are 0 unless given:

    - Gal & Ghahramani: ``input_p``, ``layer_p`` and ``recurrent_p``, with one mask for the four gates;
    - AWD-LSTM: ``input_p`` ("dropouti"), ``layer_p`` ("dropouth"), ``output_p`` ("dropout"), ``weight_p``
      ("wdrop");
    - zoneout: ``hidden_zoneout_p`` and ``cell_zoneout_p``.

    Parameters, ``state_dict``, inputs and results are those of :class:`torch.nn.LSTM`. Its kernel computes
    the layers, except with ``recurrent_p`` or zoneout, in compiled code and under :mod:`torch.func`: these
    run a Python loop over the steps. (The class is no subclass of :class:`torch.nn.LSTM`, which
    ``torch.compile`` refuses.)

    Args:
        input_size, hidden_size, num_layers, bias, batch_first, bidirectional, device, dtype: as for
            :class:`torch.nn.LSTM`.
        dropout: refused unless 0; ``layer_p`` is the probability between layers.
        proj_size: refused unless 0.
        input_p: the probability of dropping a feature of the first layer's input.
        layer_p: the probability of dropping a feature of another layer's input.
        output_p: the probability of dropping a feature of the output; the final states keep all features.
        recurrent_p: the probability of dropping a unit of the hidden state that enters the next step.
        weight_p: the probability of dropping a connection of a recurrent weight.
        hidden_zoneout_p: the probability that a unit of the hidden state keeps its previous value.
        cell_zoneout_p: the probability that a cell keeps its previous value.

    Shape:
        as :class:`torch.nn.LSTM`'s: ``(time, N, C)``, or ``(N, time, C)`` with ``batch_first``, or
        ``(time, C)``, and optionally ``hx = (h_0, c_0)`` give ``(output, (h_n, c_n))``. The ``key`` of a call
        is one key, or without ``weight_p`` a key for each sample. A mask is that of ``key.fold(name)``, with
        the names ``"input_l0"``, ``"recurrent_l0"``, ``"weight_hh_l0"``, ``"hidden_zoneout_l0"`` and
        ``"cell_zoneout_l0"`` for layer 0, and ``"output"``. In the second direction, names of the recurrent,
        weight and zoneout masks end in ``"_reverse"``. The zoneout masks have shape ``(N, time, H)``.

    Raises:
        ValueError: a probability outside [0, 1] or NaN; ``dropout`` or ``proj_size`` other than 0; what
            :class:`torch.nn.LSTM` refuses.
        TypeError: the input is a :class:`~torch.nn.utils.rnn.PackedSequence`.
        RuntimeError: a shape or dtype that does not fit, or a batch of keys with ``weight_p``.

    Source: Gal & Ghahramani, NeurIPS 2016, section 4; Merity et al., ICLR 2018, sections 3 and 4; Krueger et
    al., ICLR 2017, section 3. The functions above have the titles.

    >>> import torch, thinned
    >>> lstm = thinned.VariationalLSTM(3, 5, num_layers=2, input_p=0.5, recurrent_p=0.25)
    >>> output, (h, c) = lstm(torch.randn(7, 2, 3), key=thinned.Key(7))
    >>> output.shape, h.shape
    (torch.Size([7, 2, 5]), torch.Size([2, 2, 5]))
    >>> lstm
    VariationalLSTM(3, 5, num_layers=2, input_p=0.5, recurrent_p=0.25)
    """

    _instead_of_script = "load its state_dict into a torch.nn.LSTM for evaluation, or use torch.export"

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
        if dropout:
            raise ValueError(f"dropout has to be 0, but got {dropout}; layer_p drops between layers")
        if proj_size:
            raise ValueError(f"proj_size has to be 0, but got {proj_size}")
        sizes = (input_size, hidden_size, num_layers)
        super().__init__("LSTM", *sizes, bias, batch_first, 0.0, bidirectional, 0, device, dtype)
        self.input_p = input_p
        self.layer_p = layer_p
        self.output_p = output_p
        self.recurrent_p = recurrent_p
        self.weight_p = weight_p
        self.hidden_zoneout_p = hidden_zoneout_p
        self.cell_zoneout_p = cell_zoneout_p
        for name in P_NAMES:
            check_p(getattr(self, name))

    def forward(
        self, input: Tensor, hx: State | None = None, *, key: Key | None = None
    ) -> tuple[Tensor, State]:
        check_input("VariationalLSTM", input, None, dense=True)
        batched = input.dim() == 3
        x, h, c = self._time_first(input, hx, batched)
        if key is not None:
            check_key(key, (x.shape[1],) if batched else ())
            if self.weight_p:
                check_one_key(key)
        drops = self.training and any(getattr(self, name) for name in P_NAMES)
        key = key_for(x, key, sample_dim=1 if batched and not self.weight_p else None) if drops else None
        x, h, c = self._run(x, h, c, key)
        if not batched:
            return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h, c)

    def extra_repr(self) -> str:
        given = (f", {name}={p}" for name in P_NAMES if (p := getattr(self, name)))
        return super().extra_repr() + "".join(given)

    def _time_first(self, x: Tensor, hx: State | None, batched: bool) -> Result:
        """The checked arguments in the shapes ``(time, N, C)`` and ``(layers, N, H)``."""
        shape = tuple(x.shape)
        if x.dim() not in (2, 3):
            raise ValueError(f"VariationalLSTM needs an input with 2 or 3 dimensions, got shape {shape}")
        if shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) has to be input_size = {self.input_size}, got shape {shape}")
        x = x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
        if not len(x):
            raise RuntimeError(f"VariationalLSTM needs at least one time step, got shape {shape}")
        samples = (x.shape[1],) if batched else ()
        expected = (self.num_layers * (1 + self.bidirectional), *samples, self.hidden_size)
        h, c = (x.new_zeros(expected), x.new_zeros(expected)) if hx is None else hx
        for i, state in enumerate((h, c)):
            if tuple(state.shape) != expected:
                raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {tuple(state.shape)}")
        return (x, h, c) if batched else (x, h.unsqueeze(1), c.unsqueeze(1))

    def _run(self, x: Tensor, h: Tensor, c: Tensor, key: Key | None) -> Result:
        """All layers; ``key`` is None where there is no mask, as in evaluation."""
        zoned = self.hidden_zoneout_p or self.cell_zoneout_p
        looped = zoned or (key is not None and self.recurrent_p) or compiling() or transforming()
        # One kernel call for all layers takes the parameters where cuDNN wants them, without a copy.
        by_layer = looped or (key is not None and (self.layer_p or self.weight_p))
        calls = [[layer] for layer in range(self.num_layers)] if by_layer else [range(self.num_layers)]
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        hidden, cells = [], []
        for layers in calls:
            first = layers[0]
            x = _dropped(locked_dropout, x, self.layer_p if first else self.input_p, key, f"input_l{first}")
            names = [f"l{layer}{suffix}" for layer in layers for suffix in suffixes]
            states = slice(first * len(suffixes), first * len(suffixes) + len(names))
            weights = [
                [w_ih, _dropped(drop_connect, w_hh, self.weight_p, key, f"weight_hh_{name}"), *biases]
                for (w_ih, w_hh, *biases), name in zip(self.all_weights[states], names, strict=True)
            ]
            h_0, c_0 = (h[states], c[states]) if by_layer else (h, c)
            if looped:
                x, h_n, c_n = self._loop(x, h_0, c_0, weights, names, key)
            else:
                x, h_n, c_n = self._kernel(x, h_0, c_0, weights, len(layers))
            hidden.append(h_n)
            cells.append(c_n)
        x = _dropped(locked_dropout, x, self.output_p, key, "output")
        return (x, torch.cat(hidden), torch.cat(cells)) if by_layer else (x, h_n, c_n)

    def _kernel(self, x: Tensor, h: Tensor, c: Tensor, weights: list[list[Tensor]], layers: int) -> Result:
        flat = [weight for direction in weights for weight in direction]
        with cudnn_copies() if x.is_cuda else nullcontext():
            return torch.lstm(
                x, (h, c), flat, self.bias, layers, 0.0, self.training, self.bidirectional, False
            )

    def _loop(
        self,
        x: Tensor,
        h_0: Tensor,
        c_0: Tensor,
        weights: list[list[Tensor]],
        names: list[str],
        key: Key | None,
    ) -> Result:
        """One layer, step by step in each direction."""
        outputs, hidden, cells = [], [], []
        for h, c, (w_ih, w_hh, *biases), name in zip(h_0, c_0, weights, names, strict=True):
            # Backward of `unbind` is one stack; backward of an index would be a scatter for each step.
            gates = F.linear(x, w_ih, biases[0] + biases[1] if biases else None).unbind()
            w_hh = w_hh.t()
            m = key.fold(f"recurrent_{name}") if key is not None and self.recurrent_p else None
            zoneout_h = _zoneout(self.hidden_zoneout_p, key, f"hidden_zoneout_{name}", len(x), h)
            zoneout_c = _zoneout(self.cell_zoneout_p, key, f"cell_zoneout_{name}", len(x), c)
            output: list[Tensor] = [h] * len(x)
            for t in range(len(x))[:: -1 if name.endswith("_reverse") else 1]:
                kept = h if m is None else dropout(h, self.recurrent_p, key=m)
                i, f, g, o = torch.addmm(gates[t], kept, w_hh).chunk(4, 1)
                candidate = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = zoneout_h(t, o.sigmoid() * candidate.tanh(), h)
                c = zoneout_c(t, candidate, c)
                output[t] = h
            outputs.append(torch.stack(output))
            hidden.append(h)
            cells.append(c)
        return torch.cat(outputs, 2), torch.stack(hidden), torch.stack(cells)


def _dropped(drop: Callable[..., Tensor], x: Tensor, p: float, key: Key | None, name: str) -> Tensor:
    return x if key is None or not p else drop(x, p, key=key.fold(name))


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
    return lambda t, candidate, previous: torch.where(keep[t], candidate, previous)
