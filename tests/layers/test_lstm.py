"""VariationalLSTM: torch.nn.LSTM without dropout, and with it the documented formula, step by step."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import pack_sequence

import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers.lstm import ENTRIES, VariationalLSTMFormula
from thinned.functional import locked_dropout
from verdicts import verdict

KEY = thinned.Key(7)
C, H = 6, 5
SHAPES = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"num_layers": 2, "batch_first": True},
    "no bias": {"bias": False},
}
PROBABILITIES = {
    "kernel": {"input_p": 0.3},
    "kernel by layers": {"layer_p": 0.3, "output_p": 0.2},
    "weights": {"weight_p": 0.4},
    "recurrent": {"recurrent_p": 0.3},
    "hidden zoneout": {"hidden_zoneout_p": 0.3},
    "cell zoneout": {"cell_zoneout_p": 0.3},
    "all": {
        "input_p": 0.1,
        "layer_p": 0.2,
        "output_p": 0.3,
        "recurrent_p": 0.4,
        "weight_p": 0.5,
        "hidden_zoneout_p": 0.2,
        "cell_zoneout_p": 0.6,
    },
}
each_shape = pytest.mark.parametrize("shape", SHAPES)


def made(shape: str, **probabilities: float) -> tuple[thinned.VariationalLSTM, Tensor, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    lstm = thinned.VariationalLSTM(C, H, **SHAPES[shape], **probabilities)
    rows = lstm.num_layers * (1 + lstm.bidirectional)
    x = torch.randn(3, 4, C) if lstm.batch_first else torch.randn(4, 3, C)
    return lstm, x, (torch.randn(rows, 3, H), torch.randn(rows, 3, H))


def plain(lstm: thinned.VariationalLSTM) -> nn.LSTM:
    like = nn.LSTM(C, H, lstm.num_layers, lstm.bias, lstm.batch_first, bidirectional=lstm.bidirectional)
    like.load_state_dict(lstm.state_dict())
    return like


def flat(result: tuple[Tensor, tuple[Tensor, Tensor]]) -> list[Tensor]:
    y, (h, c) = result
    return [y, h, c]


def by_hand(
    lstm: thinned.VariationalLSTM, x: Tensor, hx: tuple[Tensor, Tensor], key: thinned.Key
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The docstring's formula for each sample and step, with masks from keep_mask; time first."""

    def factor(name: str, shape: tuple[int, ...], p: float) -> Tensor:
        return thinned.keep_mask(key.fold(name), shape, p) / (1 - p)

    time, samples, _ = x.shape
    states: list[Tensor] = []
    cells: list[Tensor] = []
    for layer in range(lstm.num_layers):
        p = lstm.layer_p if layer else lstm.input_p
        x = x * factor(f"input_l{layer}", (1, samples, x.shape[2]), p)
        outputs = []
        for suffix in ("", "_reverse") if lstm.bidirectional else ("",):
            name = f"l{layer}{suffix}"
            W, U = lstm.get_parameter(f"weight_ih_{name}"), lstm.get_parameter(f"weight_hh_{name}")
            U = U * factor(f"weight_hh_{name}", U.shape, lstm.weight_p)
            b = sum(lstm.get_parameter(f"bias_{i}h_{name}") for i in "ih") if lstm.bias else 0
            m = factor(f"recurrent_{name}", (samples, H), lstm.recurrent_p)
            taken = [
                thinned.keep_mask(key.fold(f"{which}_zoneout_{name}"), (samples, time, H), p)
                for which, p in (("hidden", lstm.hidden_zoneout_p), ("cell", lstm.cell_zoneout_p))
            ]
            h, c = hx[0][len(states)], hx[1][len(states)]
            output: list[Any] = [None] * time
            for t in range(time)[:: -1 if suffix else 1]:
                i, f, g, o = (x[t] @ W.t() + (m * h) @ U.t() + b).chunk(4, 1)
                candidate = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = torch.where(taken[0][:, t], torch.sigmoid(o) * torch.tanh(candidate), h)
                c = torch.where(taken[1][:, t], candidate, c)
                output[t] = h
            outputs.append(torch.stack(output))
            states.append(h)
            cells.append(c)
        x = torch.cat(outputs, 2)
    return x * factor("output", (1, *x.shape[1:]), lstm.output_p), (torch.stack(states), torch.stack(cells))


@each_shape
@pytest.mark.parametrize("probabilities", PROBABILITIES)
def test_formula(shape: str, probabilities: str) -> None:
    """Values, states and gradients, under a given key and under a drawn one."""
    lstm, x, hx = made(shape, **PROBABILITIES[probabilities])
    x.requires_grad_()

    def call(key: thinned.Key) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if not lstm.batch_first:
            return by_hand(lstm, x, hx, key)
        y, state = by_hand(lstm, x.transpose(0, 1), hx, key)
        return y.transpose(0, 1), state

    actual, expected = lstm(x, hx, key=KEY), call(KEY)
    torch.testing.assert_close(flat(actual), flat(expected))
    wrt = [x, *lstm.parameters()]
    grads = [
        torch.autograd.grad(sum(each.square().sum() for each in flat(result)), wrt)
        for result in (actual, expected)
    ]
    torch.testing.assert_close(*grads)
    torch.manual_seed(1)
    drawn = thinned.Key.from_bits(thinned.keys.draw(x.device))
    torch.manual_seed(1)
    torch.testing.assert_close(flat(lstm(x, hx)), flat(call(drawn)))


@each_shape
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("batched", [False, True])
def test_without_dropout_it_is_torch_nn_lstm(shape: str, with_state: bool, batched: bool) -> None:
    lstm, x, hx = made(shape)
    x, hx = (x, hx) if batched else (x[:, 0], tuple(state[:, 0] for state in hx))
    state = torch.get_rng_state()
    arguments = (x, hx) if with_state else (x,)
    expected = flat(plain(lstm)(*arguments))
    for actual in (flat(lstm(*arguments)), flat(by_loop(lstm)(*arguments))):
        assert [each.shape for each in actual] == [each.shape for each in expected]
        torch.testing.assert_close(actual, expected)
    dropping = thinned.VariationalLSTM(C, H, **SHAPES[shape], input_p=0.5, recurrent_p=0.5, weight_p=0.5)
    dropping.load_state_dict(lstm.state_dict())
    state = torch.get_rng_state()
    torch.testing.assert_close(flat(dropping.eval()(*arguments)), expected)
    assert torch.get_rng_state().equal(state)


def by_loop(lstm: thinned.VariationalLSTM) -> thinned.VariationalLSTM:
    """A copy with a zoneout of p = 1e-30, which makes it loop over the steps."""
    lstm = copy.deepcopy(lstm)
    lstm.hidden_zoneout_p = 1e-30
    return lstm


def test_parameters_are_those_of_torch_nn_lstm() -> None:
    torch.manual_seed(0)
    lstm = thinned.VariationalLSTM(C, H, 2, True, False, 0.0, True, dtype=torch.float64, weight_p=0.5)
    torch.manual_seed(0)
    like = nn.LSTM(C, H, 2, True, False, 0.0, True, dtype=torch.float64)
    torch.testing.assert_close(lstm.state_dict(), like.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("batch_first", [False, True])
def test_zoneout_in_evaluation_is_the_expectation(batch_first: bool) -> None:
    p, r = 0.2, 0.6
    lstm, x, (h, c) = made(
        "batch first" if batch_first else "one layer", hidden_zoneout_p=p, cell_zoneout_p=r
    )
    actual = flat(lstm.eval()(x, (h, c)))
    inputs = x.transpose(0, 1) if batch_first else x
    for layer in range(lstm.num_layers):
        cell = nn.LSTMCell(inputs.shape[2], H)
        cell.load_state_dict({k[:-3]: v for k, v in lstm.state_dict().items() if k.endswith(f"l{layer}")})
        state, outputs = (h[layer], c[layer]), []
        for x_t in inputs:
            new = cell(x_t, state)
            state = p * state[0] + (1 - p) * new[0], r * state[1] + (1 - r) * new[1]
            outputs.append(state[0])
        inputs = torch.stack(outputs)
    expected = [inputs.transpose(0, 1) if batch_first else inputs, *(each[None] for each in state)]
    torch.testing.assert_close([actual[0], actual[1][-1:], actual[2][-1:]], expected)


@pytest.mark.parametrize("shape", ["both directions", "batch first"])
def test_a_key_for_each_sample(shape: str) -> None:
    """A sample's result depends on its key, and neither on its place nor on the other samples."""
    probabilities = {**PROBABILITIES["all"], "weight_p": 0.0}
    lstm, x, (h, c) = made(shape, **probabilities)
    batch = 0 if lstm.batch_first else 1
    y, (h_n, c_n) = lstm(x, (h, c), key=KEY.fold(torch.arange(3)))
    for n in range(3):
        expected = lstm(
            x.narrow(batch, n, 1), (h[:, n : n + 1], c[:, n : n + 1]), key=KEY.fold(torch.tensor([n]))
        )
        actual = [y.narrow(batch, n, 1), h_n[:, n : n + 1], c_n[:, n : n + 1]]
        torch.testing.assert_close(actual, flat(expected))
        alone = lstm(x.select(batch, n), (h[:, n], c[:, n]), key=KEY.fold(n))
        torch.testing.assert_close(
            actual, [alone[0].unsqueeze(batch), *(each.unsqueeze(1) for each in alone[1])]
        )


def test_awd_lstm_of_its_parts() -> None:
    """Two layers of WeightDrop(LSTM), each with LockedDropout before and after."""
    lstm, x, _ = made("two layers", input_p=0.3, layer_p=0.4, output_p=0.2, weight_p=0.5)
    y = locked_dropout(x, 0.3, key=KEY.fold("input_l0"))
    for layer in range(2):
        part = nn.LSTM(C if not layer else H, H)
        part.load_state_dict(
            {k[:-1] + "0": v for k, v in lstm.state_dict().items() if k.endswith(f"l{layer}")}
        )
        with torch.no_grad():
            U = part.weight_hh_l0
            U.mul_(thinned.keep_mask(KEY.fold(f"weight_hh_l{layer}"), U.shape, 0.5) * 2)
        y, _ = part(y if not layer else locked_dropout(y, 0.4, key=KEY.fold("input_l1")))
    torch.testing.assert_close(lstm(x, key=KEY)[0], locked_dropout(y, 0.2, key=KEY.fold("output")))


class NewMaskEachStep(VariationalLSTMFormula):
    def forward(self, x: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> Any:  # type: ignore[override]
        outputs = []
        for x_t in x:
            y, hx = super().forward(x_t[None], hx)
            outputs.append(y)
        return torch.cat(outputs), hx


class Slightly(VariationalLSTMFormula):
    """A bias of 2 % in what is kept."""

    def _mask(self, like: Tensor, name: str) -> Tensor:
        return super()._mask(like, name) * 1.02


class ZonesTooOften(VariationalLSTMFormula):
    def _zoneout(self, candidate: Tensor, previous: Tensor, name: str) -> Tensor:
        return super()._zoneout(super()._zoneout(candidate, previous, name), previous, name)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("evaluation", Slightly),
        ("input mask", NewMaskEachStep),
        ("recurrent mask", NewMaskEachStep),
        ("recurrent mask", Slightly),
        ("weight mask", NewMaskEachStep),
        ("zoneout", ZonesTooOften),
        ("zoneout at p = 1", lambda **_: VariationalLSTMFormula(30, 40, hidden_zoneout_p=0.9)),
    ],
)
def test_wrong_laws_are_seen(law: str, wrong: Callable[..., nn.Module]) -> None:
    assert verdict(ENTRIES[0], law, wrong) is Verdict.BROKEN


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    """In evaluation; the law of the entry compiles training."""
    lstm, x, hx = made("one layer", recurrent_p=0.5)
    in_one = torch.compile(lstm.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(flat(in_one(x[:2], hx)), flat(lstm(x[:2], hx)))


def test_parametrized_weights() -> None:
    lstm, x, hx = made("one layer", **PROBABILITIES["all"])
    expected = flat(lstm(x, hx, key=KEY))
    parametrize.register_parametrization(lstm, "weight_ih_l0", nn.Identity())
    torch.testing.assert_close(flat(lstm(x, hx, key=KEY)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", PROBABILITIES["all"])
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_outside_0_to_1(name: str, p: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"between 0 and 1, but got {p}")):
        thinned.VariationalLSTM(C, H, **{name: p})


def test_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout has to be 0, but got 0\.5; layer_p"):
        thinned.VariationalLSTM(C, H, dropout=0.5)
    with pytest.raises(ValueError, match="proj_size has to be 0, but got 3"):
        thinned.VariationalLSTM(C, H, proj_size=3)
    lstm, x, (h, c) = made("one layer", weight_p=0.5)
    with pytest.raises(TypeError, match="must be Tensor, not PackedSequence"):
        lstm(pack_sequence([x[:, 0]]))
    with pytest.raises(ValueError, match=r"2 or 3 dimensions, got shape \(1, 4, 3, 6\)"):
        lstm(x[None])
    with pytest.raises(RuntimeError, match=r"input_size = 6, got shape \(4, 3, 5\)"):
        lstm(x[..., :5])
    with pytest.raises(RuntimeError, match=r"at least one time step, got shape \(0, 3, 6\)"):
        lstm(x[:0])
    with pytest.raises(RuntimeError, match=r"hidden\[0\] size \(1, 3, 5\), got \(1, 2, 5\)"):
        lstm(x, (h[:, :2], c))
    with pytest.raises(RuntimeError, match=r"hidden\[1\] size \(1, 5\), got \(1, 3, 5\)"):
        lstm(x[:, 0], (h[:, 0], c))
    keys = KEY.fold(torch.arange(3))
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit a weight"):
        lstm(x, key=keys)
    lstm.weight_p = 0.0
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit a tensor of shape \(\)"):
        lstm(x[:, 0], key=keys)
