"""An LSTM with dropout wherever it has been proposed for one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional
from torch import Tensor, nn

from thinned import op
from thinned.geometry import shared
from thinned.keys import Key
from thinned.layers._arguments import apply, check_input, check_key, key_for, threshold_and_scale
from thinned.layers.locked import locked_dropout
from thinned.layers.weights import check_one_key, drop_connect
from thinned.layers.zoneout import zoneout
from thinned.torch_state import compiling, transforming

__all__ = ["VariationalLSTM"]

State = tuple[Tensor, Tensor]


class VariationalLSTM(nn.RNNBase):
    r"""A :class:`torch.nn.LSTM` with locked masks, dropped recurrent weights and zoneout.

    For each layer and direction, with :math:`W, U, b` the weights and the sum of the biases that
    :class:`torch.nn.LSTM` has,

    .. math::
        (i, f, g, o)_t &= W (m^x \odot x_t) + (m^U \odot U) (m^h \odot h_{t-1}) + b \\
        \tilde c_t &= \sigma(f_t) \odot c_{t-1} + \sigma(i_t) \odot \tanh(g_t) \\
        \tilde h_t &= \sigma(o_t) \odot \tanh(\tilde c_t) \\
        c_t &= \operatorname{zoneout}(\tilde c_t, c_{t-1}) \\
        h_t &= \operatorname{zoneout}(\tilde h_t, h_{t-1})

    The masks :math:`m^x` and :math:`m^h` are those of :func:`~thinned.functional.locked_dropout`, the same at
    all steps, :math:`m^U` is that of :func:`~thinned.functional.drop_connect`, and zoneout draws anew at each
    step. All probabilities are 0 unless given:

    - Gal & Ghahramani: ``input_p``, ``layer_p`` and ``recurrent_p``, with one mask for the four gates;
    - AWD-LSTM: ``input_p`` ("dropouti"), ``layer_p`` ("dropouth"), ``output_p`` ("dropout"), ``weight_p``
      ("wdrop");
    - zoneout: ``hidden_zoneout_p`` and ``cell_zoneout_p``.

    Parameters, ``state_dict``, inputs and results are those of :class:`torch.nn.LSTM`, whose kernel computes
    whatever needs no mask within the recurrence: all but ``recurrent_p`` and zoneout, which take a loop over
    the steps. Compiled code, and code under :mod:`torch.func`, always takes the loop. (The class is not a
    subclass of :class:`torch.nn.LSTM`, which ``torch.compile`` refuses.)

    Args:
        input_size: the number of features of the input.
        hidden_size: the number of features of the state.
        num_layers: how many layers are stacked.
        bias: add biases.
        batch_first: the input is ``(N, time, C)`` and not ``(time, N, C)``.
        dropout: refused unless 0; ``layer_p`` is the probability between layers.
        bidirectional: a second LSTM in each layer reads from the end.
        proj_size: refused unless 0.
        device: of the parameters.
        dtype: of the parameters.
        input_p: the probability of dropping a feature of the first layer's input.
        layer_p: of dropping a feature of the input of each other layer.
        output_p: of dropping a feature of the output; the final states are not dropped from.
        recurrent_p: of dropping a unit of the hidden state on its way to the next step.
        weight_p: of dropping a connection of each recurrent weight.
        hidden_zoneout_p: of keeping the previous value of a unit of the hidden state.
        cell_zoneout_p: of keeping the previous value of a cell.

    Shape:
        as :class:`torch.nn.LSTM`'s: ``(time, N, C)``, or ``(N, time, C)`` with ``batch_first``, or
        ``(time, C)``, and optionally ``hx = (h_0, c_0)`` give ``(output, (h_n, c_n))``. The ``key`` of a call
        is one key, or one for each sample, which does not go with ``weight_p``. Masks are those of
        ``key.fold(name)`` for the names ``"input_l0"`` and so on for each layer, ``"output"``, and, for each
        layer, with ``"_reverse"`` after it for the second direction, ``"recurrent_l0"``, ``"weight_hh_l0"``,
        ``"hidden_zoneout_l0"`` and ``"cell_zoneout_l0"``; the zoneout masks have shape ``(N, time, H)``.

    Raises:
        ValueError: a probability outside [0, 1] or NaN; ``dropout`` or ``proj_size`` other than 0; what
            :class:`torch.nn.LSTM` refuses.
        TypeError: the input is a :class:`~torch.nn.utils.rnn.PackedSequence`.
        RuntimeError: a shape or dtype that does not fit, or a batch of keys with ``weight_p``.

    Source: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural networks",
    NeurIPS 2016, section 4; Merity et al., "Regularizing and optimizing LSTM language models", ICLR 2018,
    sections 3 and 4; Krueger et al., "Zoneout: regularizing RNNs by randomly preserving hidden activations",
    ICLR 2017, section 3.

    >>> import torch, thinned
    >>> lstm = thinned.VariationalLSTM(3, 5, num_layers=2, input_p=0.5, recurrent_p=0.25)
    >>> output, (h, c) = lstm(torch.randn(7, 2, 3), key=thinned.Key(7))
    >>> output.shape, h.shape
    (torch.Size([7, 2, 5]), torch.Size([2, 2, 5]))
    >>> lstm
    VariationalLSTM(3, 5, num_layers=2, input_p=0.5, recurrent_p=0.25)
    """

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
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            bidirectional=bidirectional,
            device=device,
            dtype=dtype,
        )
        self.input_p = input_p
        self.layer_p = layer_p
        self.output_p = output_p
        self.recurrent_p = recurrent_p
        self.weight_p = weight_p
        self.hidden_zoneout_p = hidden_zoneout_p
        self.cell_zoneout_p = cell_zoneout_p
        for p in self._probabilities().values():
            threshold_and_scale(p)

    def forward(
        self,
        input: Tensor,
        hx: State | None = None,
        *,
        key: Key | None = None,
    ) -> tuple[Tensor, State]:
        check_input("VariationalLSTM", input, None, dense=True)
        x = self._time_first(input)
        h, c = self._state(x, hx, batched=input.dim() == 3)
        if key is not None:
            check_key(key, (x.shape[1],) if input.dim() == 3 else ())
            if self.weight_p:
                check_one_key(key)

        if self.training and any(self._probabilities().values()):
            shared_by_all = input.dim() == 2 or self.weight_p
            key = key_for(x, key, sample_dim=None if shared_by_all else 1)
        else:
            key = None
        x, h, c = self._run(x, h, c, key)
        if input.dim() == 2:
            return x.squeeze(1), (h.squeeze(1), c.squeeze(1))
        return x.transpose(0, 1) if self.batch_first else x, (h, c)

    def extra_repr(self) -> str:
        given = (f", {name}={p}" for name, p in self._probabilities().items() if p)
        return super().extra_repr() + "".join(given)

    def _probabilities(self) -> dict[str, float]:
        return {
            "input_p": self.input_p,
            "layer_p": self.layer_p,
            "output_p": self.output_p,
            "recurrent_p": self.recurrent_p,
            "weight_p": self.weight_p,
            "hidden_zoneout_p": self.hidden_zoneout_p,
            "cell_zoneout_p": self.cell_zoneout_p,
        }

    def _time_first(self, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        if x.dim() not in (2, 3):
            raise ValueError(f"VariationalLSTM needs an input with 2 or 3 dimensions, got shape {shape}")
        if shape[-1] != self.input_size:
            raise RuntimeError(f"input.size(-1) has to be input_size = {self.input_size}, got shape {shape}")
        x = x.unsqueeze(1) if x.dim() == 2 else x.transpose(0, 1) if self.batch_first else x
        if not len(x):
            raise RuntimeError(f"VariationalLSTM needs at least one time step, got shape {shape}")
        return x

    def _state(self, x: Tensor, hx: State | None, batched: bool) -> State:
        rows = self.num_layers * (1 + self.bidirectional)
        shape = (rows, x.shape[1], self.hidden_size)
        if hx is None:
            return x.new_zeros(shape), x.new_zeros(shape)
        expected = shape if batched else (rows, self.hidden_size)
        for i, state in enumerate(hx):
            if tuple(state.shape) != expected:
                raise RuntimeError(f"Expected hidden[{i}] size {expected}, got {tuple(state.shape)}")
        h, c = hx
        return (h, c) if batched else (h.unsqueeze(1), c.unsqueeze(1))

    def _run(self, x: Tensor, h: Tensor, c: Tensor, key: Key | None) -> tuple[Tensor, Tensor, Tensor]:
        """All layers; without a key, as in evaluation."""
        looped = self.hidden_zoneout_p or self.cell_zoneout_p or (key is not None and self.recurrent_p)
        looped = looped or compiling() or transforming()
        x = _locked(x, self.input_p, key, "input_l0")
        suffixes = ("", "_reverse") if self.bidirectional else ("",)
        if not looped and (key is None or not (self.layer_p or self.weight_p)):
            # All in one call, and the parameters where cuDNN wants them.
            names = [f"l{layer}{suffix}" for layer in range(self.num_layers) for suffix in suffixes]
            flat = [weight for name in names for weight in self._weights(name, None)]
            x, h, c = self._kernel(x, h, c, flat, self.num_layers)
            return _locked(x, self.output_p, key, "output"), h, c

        hidden: list[Tensor] = []
        cells: list[Tensor] = []
        for layer in range(self.num_layers):
            if layer:
                x = _locked(x, self.layer_p, key, f"input_l{layer}")
            names = [f"l{layer}{suffix}" for suffix in suffixes]
            weights = [self._weights(name, key) for name in names]
            start = layer * len(names)
            if looped:
                each = [
                    self._steps(x, h[start + i], c[start + i], weights[i], name, key)
                    for i, name in enumerate(names)
                ]
                x = torch.cat([output for output, _, _ in each], 2)
                hidden += [h_n for _, h_n, _ in each]
                cells += [c_n for _, _, c_n in each]
            else:
                rows = slice(start, start + len(names))
                flat = [weight for direction in weights for weight in direction]
                x, h_n, c_n = self._kernel(x, h[rows], c[rows], flat, 1)
                hidden += h_n
                cells += c_n
        return _locked(x, self.output_p, key, "output"), torch.stack(hidden), torch.stack(cells)

    def _weights(self, name: str, key: Key | None) -> list[Tensor]:
        """Those of a layer's direction: ``weight_ih``, ``weight_hh`` and, if any, the two biases."""
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        weights: list[Tensor] = [getattr(self, f"{kind}_{name}") for kind in kinds]
        if key is not None and self.weight_p:
            weights[1] = drop_connect(weights[1], self.weight_p, key=key.fold(f"weight_hh_{name}"))
        return weights

    def _kernel(
        self, x: Tensor, h: Tensor, c: Tensor, weights: list[Tensor], layers: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        def call() -> tuple[Tensor, Tensor, Tensor]:
            return torch.lstm(
                x, (h, c), weights, self.bias, layers, 0.0, self.training, self.bidirectional, False
            )

        if not x.is_cuda:
            return call()
        with warnings.catch_warnings():
            # Dropped weights are new ones in each call, so that cuDNN has to copy them.
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
            return call()

    def _steps(
        self, x: Tensor, h: Tensor, c: Tensor, weights: Sequence[Tensor], name: str, key: Key | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer in one direction, step by step."""
        w_ih, w_hh, *biases = weights
        # By unbind, whose derivative is one stack, and not by an index for each step.
        gates = torch.nn.functional.linear(x, w_ih, biases[0] + biases[1] if biases else None).unbind()
        w_hh = w_hh.t()
        recurrent = _same_each_step(self.recurrent_p, key, f"recurrent_{name}")
        zoneout_h = _zoneout(self.hidden_zoneout_p, key, f"hidden_zoneout_{name}", len(x), h)
        zoneout_c = _zoneout(self.cell_zoneout_p, key, f"cell_zoneout_{name}", len(x), c)
        outputs: list[Tensor] = [h] * len(x)
        steps = range(len(x))
        for t in reversed(steps) if name.endswith("_reverse") else steps:
            i, f, g, o = torch.addmm(gates[t], recurrent(h), w_hh).chunk(4, 1)
            candidate = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = zoneout_h(t, o.sigmoid() * candidate.tanh(), h)
            c = zoneout_c(t, candidate, c)
            outputs[t] = h
        return torch.stack(outputs), h, c


def _locked(x: Tensor, p: float, key: Key | None, name: str) -> Tensor:
    return x if key is None or not p else locked_dropout(x, p, key=key.fold(name))


def _same_each_step(p: float, key: Key | None, name: str) -> Callable[[Tensor], Tensor]:
    if key is None or not p:
        return lambda h: h
    T, scale = threshold_and_scale(p)
    child = key.fold(name)
    return lambda h: apply(h, child, (), False, T, scale)


def _zoneout(
    p: float, key: Key | None, name: str, steps: int, like: Tensor
) -> Callable[[int, Tensor, Tensor], Tensor]:
    """A function of the step, the candidate and the previous state."""
    if not p:
        return lambda _, candidate, __: candidate
    if key is None:
        return lambda _, candidate, previous: zoneout(candidate, previous, p, training=False)
    T, _ = threshold_and_scale(p)
    bits = key.fold(name).bits
    samples, units = like.shape
    shape = (samples, steps, units)
    keep = op.keep_mask(bits, shape, shared(shape, (), bits.dim()), T).unbind(1)
    return lambda t, candidate, previous: torch.where(keep[t], candidate, previous)
