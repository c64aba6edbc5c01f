"""VariationalLSTM and VariationalGRU: torch.nn's without dropout, and with it the documented formula."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence, pad_sequence

import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers.recurrent import ENTRIES, VariationalGRUFormula, VariationalLSTMFormula
from thinned.functional import locked_dropout
from verdicts import verdict

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KEY = thinned.Key(7)
KEYS = KEY.fold(torch.arange(3))
C, H, R = 6, 5, 2  # features, units and their projection
KINDS = {"LSTM": thinned.VariationalLSTM, "GRU": thinned.VariationalGRU}
SHAPES = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "both directions": {"num_layers": 2, "bidirectional": True},
    "batch first": {"num_layers": 2, "batch_first": True},
    "no bias": {"bias": False},
    "projected": {"num_layers": 2, "bidirectional": True, "proj_size": R},
    "projected, no bias": {"proj_size": R, "bias": False},
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
FOR_SAMPLES = {**PROBABILITIES["all"], "weight_p": 0.0}
each_kind = pytest.mark.parametrize("kind", KINDS)
each_network = pytest.mark.parametrize(
    ("kind", "shape"),
    [(kind, shape) for kind in KINDS for shape in SHAPES if kind == "LSTM" or "proj" not in shape],
)

States = tuple[Tensor, ...]


def made(kind: str, shape: str, **probabilities: float) -> tuple[Any, Tensor, States]:
    """The network, an input and states."""
    torch.manual_seed(0)
    if kind == "GRU":
        probabilities.pop("cell_zoneout_p", None)
    net = KINDS[kind](C, H, **SHAPES[shape], **probabilities)
    rows = net.num_layers * (1 + net.bidirectional)
    x = torch.randn(3, 4, C) if net.batch_first else torch.randn(4, 3, C)
    sizes = (net.proj_size or H, H) if kind == "LSTM" else (H,)
    return net, x, tuple(torch.randn(rows, 3, size) for size in sizes)


def plain(net: nn.RNNBase) -> nn.RNNBase:
    options = {"bidirectional": net.bidirectional}
    if net.proj_size:
        options["proj_size"] = net.proj_size
    like = getattr(nn, net.mode)(C, H, net.num_layers, net.bias, net.batch_first, **options)
    like.load_state_dict(net.state_dict())
    return like


def run(net: nn.Module, x: Tensor | PackedSequence, states: States | None = None, **key: Any) -> list[Any]:
    """The output and the last states, in one list."""
    hx = states if states is None or len(states) > 1 else states[0]
    y, last = net(x, hx, **key)
    return [y, *last] if isinstance(last, tuple) else [y, last]


def by_hand(net: Any, x: Tensor, hx: States, key: thinned.Key) -> list[Tensor]:
    """The docstring's formula for each sample and step, with masks from keep_mask; time first."""

    def factor(name: str, shape: tuple[int, ...], p: float) -> Tensor:
        return thinned.keep_mask(key.fold(name), shape, p) / (1 - p)

    def linear(x: Tensor, which: str, factors: Tensor | float = 1.0) -> Tensor:
        y = x @ (net.get_parameter(f"weight_{which}") * factors).t()
        return y + net.get_parameter(f"bias_{which}") if net.bias else y

    time, samples, _ = x.shape
    states: list[list[Tensor]] = []
    for layer in range(net.num_layers):
        p = net.layer_p if layer else net.input_p
        x = x * factor(f"input_l{layer}", (1, samples, x.shape[2]), p)
        outputs = []
        for suffix in ("", "_reverse") if net.bidirectional else ("",):
            name = f"l{layer}{suffix}"
            weight = net.get_parameter(f"weight_hh_{name}")
            weights = factor(f"weight_hh_{name}", tuple(weight.shape), net.weight_p)
            state = [each[len(states)] for each in hx]
            m = factor(f"recurrent_{name}", tuple(state[0].shape), net.recurrent_p)
            taken = [
                thinned.keep_mask(
                    key.fold(f"{which}_zoneout_{name}"),
                    (samples, time, each.shape[1]),
                    getattr(net, f"{which}_zoneout_p"),
                )
                for which, each in zip(("hidden", "cell"), state, strict=False)
            ]
            output: list[Any] = [None] * time
            for t in range(time)[:: -1 if suffix else 1]:
                inputs, gates = linear(x[t], f"ih_{name}"), linear(m * state[0], f"hh_{name}", weights)
                if net.mode == "LSTM":
                    i, f, g, o = (inputs + gates).chunk(4, 1)
                    cell = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
                    h = torch.sigmoid(o) * torch.tanh(cell)
                    new = [h @ net.get_parameter(f"weight_hr_{name}").t() if net.proj_size else h, cell]
                else:
                    r, z = torch.sigmoid(inputs + gates).chunk(3, 1)[:2]
                    n = torch.tanh(inputs.chunk(3, 1)[2] + r * gates.chunk(3, 1)[2])
                    new = [(1 - z) * n + z * state[0]]
                state = [
                    torch.where(take[:, t], *both) for take, *both in zip(taken, new, state, strict=True)
                ]
                output[t] = state[0]
            outputs.append(torch.stack(output))
            states.append(state)
        x = torch.cat(outputs, 2)
    last = [torch.stack(each) for each in zip(*states, strict=True)]
    return [x * factor("output", (1, *x.shape[1:]), net.output_p), *last]


@each_network
@pytest.mark.parametrize("probabilities", PROBABILITIES)
def test_formula(kind: str, shape: str, probabilities: str) -> None:
    """Values, states and gradients, under a given key and under a drawn one."""
    net, x, hx = made(kind, shape, **PROBABILITIES[probabilities])
    x.requires_grad_()

    def call(key: thinned.Key) -> list[Tensor]:
        if not net.batch_first:
            return by_hand(net, x, hx, key)
        y, *last = by_hand(net, x.transpose(0, 1), hx, key)
        return [y.transpose(0, 1), *last]

    actual, expected = run(net, x, hx, key=KEY), call(KEY)
    torch.testing.assert_close(actual, expected)
    wrt = [x, *net.parameters()]
    grads = [
        torch.autograd.grad(sum(each.square().sum() for each in result), wrt) for result in (actual, expected)
    ]
    torch.testing.assert_close(*grads)
    torch.manual_seed(1)
    drawn = thinned.Key.from_bits(thinned.keys.draw(x.device))
    torch.manual_seed(1)
    torch.testing.assert_close(run(net, x, hx), call(drawn))


@each_network
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("layout", ["unbatched", "batched", "packed", "packed unsorted"])
def test_without_dropout_it_is_torchs(kind: str, shape: str, with_state: bool, layout: str) -> None:
    """Also where zoneout, here of p = 1e-30, makes it loop over the steps."""
    net, x, hx = made(kind, shape)
    given: Any = x
    if layout == "unbatched":
        given, hx = x[:, 0], tuple(state[:, 0] for state in hx)
    elif layout != "batched":
        lengths = (4, 3, 1) if layout == "packed" else (2, 4, 3)
        given = pack_sequence([torch.randn(n, C) for n in lengths], enforce_sorted=layout == "packed")
    arguments = (given, hx) if with_state else (given,)
    expected = run(plain(net), *arguments)
    looped = copy.deepcopy(net)
    looped.hidden_zoneout_p = 1e-30
    dropping = KINDS[kind](C, H, **SHAPES[shape], input_p=0.5, recurrent_p=0.5, weight_p=0.5)
    dropping.load_state_dict(net.state_dict())
    state = torch.get_rng_state()
    for each in (net, dropping.eval()):
        torch.testing.assert_close(run(each, *arguments), expected)
    assert torch.get_rng_state().equal(state)
    torch.testing.assert_close(run(looped, *arguments), expected)


@each_network
def test_parameters_are_torchs(kind: str, shape: str) -> None:
    torch.manual_seed(0)
    net = KINDS[kind](C, H, **SHAPES[shape], dtype=torch.float64, weight_p=0.5)
    torch.manual_seed(0)
    like = getattr(nn, kind)(C, H, **SHAPES[shape], dtype=torch.float64)
    torch.testing.assert_close(net.state_dict(), like.state_dict(), rtol=0, atol=0)
    x = torch.randn(4, 3, C, dtype=torch.float64)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        torch.testing.assert_close(run(twin, x, key=KEY), run(net, x, key=KEY), rtol=0, atol=0)


LENGTHS = {"sorted": [4, 4, 1], "unsorted": [2, 4, 3]}


@each_network
@pytest.mark.parametrize("order", LENGTHS)
@pytest.mark.parametrize("probabilities", PROBABILITIES)
def test_packed(kind: str, shape: str, order: str, probabilities: str) -> None:
    """Under one key, the masks of the padded sequences; under one each, as each sequence alone."""
    net, _, hx = made(kind, shape, **PROBABILITIES[probabilities])
    lengths = LENGTHS[order]
    alone = [torch.randn(n, C, requires_grad=True) for n in lengths]
    packed = pack_sequence(alone, enforce_sorted=order == "sorted")
    y, *last = run(net, packed, hx, key=KEY)
    for got, wanted in zip(y[1:], packed[1:], strict=True):
        assert got is wanted
    padded, _ = pad_packed_sequence(y)
    if not net.bidirectional:  # of the other direction's steps, those beyond a sample's end come first
        net.batch_first = False
        expected = run(net, pad_sequence(alone), hx, key=KEY)
        for n, length in enumerate(lengths):
            torch.testing.assert_close(padded[:length, n], expected[0][:length, n])
    if net.weight_p:
        return
    y, *last = run(net, packed, hx, key=KEYS)
    padded, _ = pad_packed_sequence(y)
    loss = y.data.square().sum() + sum(each.square().sum() for each in last)
    grads = torch.autograd.grad(loss, alone)
    for n, (one, length) in enumerate(zip(alone, lengths, strict=True)):
        own = tuple(state[:, n] for state in hx)
        expected = run(net, one, own, key=KEY.fold(n))
        torch.testing.assert_close([padded[:length, n], *(state[:, n] for state in last)], expected)
        (grad,) = torch.autograd.grad(sum(each.square().sum() for each in expected), one)
        torch.testing.assert_close(grads[n], grad)


@each_kind
def test_packed_in_an_address(kind: str) -> None:
    """A sample has its masks in any batch."""
    net, *_ = made(kind, "two layers", **FOR_SAMPLES)
    alone, ids = [torch.randn(n, C) for n in LENGTHS["unsorted"]], torch.tensor([11, 5, 8])
    with thinned.address(net, seed=3, step=0, samples=ids):
        whole = run(net, pack_sequence(alone, enforce_sorted=False))
    with thinned.address(net, seed=3, step=0, samples=ids[1:]):
        rest = run(net, pad_sequence(alone[1:]))
    for n in (1, 2):
        length = LENGTHS["unsorted"][n]
        torch.testing.assert_close(pad_packed_sequence(whole[0])[0][:length, n], rest[0][:length, n - 1])


@each_kind
@pytest.mark.parametrize("batch_first", [False, True])
def test_zoneout_in_evaluation_is_the_expectation(kind: str, batch_first: bool) -> None:
    p = 0.2, 0.6
    net, x, hx = made(
        kind, "batch first" if batch_first else "one layer", hidden_zoneout_p=p[0], cell_zoneout_p=p[1]
    )
    actual = run(net.eval(), x, hx)
    inputs = x.transpose(0, 1) if batch_first else x
    for layer in range(net.num_layers):
        cell = getattr(nn, f"{kind}Cell")(inputs.shape[2], H)
        cell.load_state_dict({k[:-3]: v for k, v in net.state_dict().items() if k.endswith(f"l{layer}")})
        state, outputs = [each[layer] for each in hx], []
        for x_t in inputs:
            new = cell(x_t, state) if kind == "LSTM" else [cell(x_t, state[0])]
            state = [r * old + (1 - r) * each for r, old, each in zip(p, state, new, strict=False)]
            outputs.append(state[0])
        inputs = torch.stack(outputs)
    expected = [inputs.transpose(0, 1) if batch_first else inputs, *(each[None] for each in state)]
    torch.testing.assert_close([actual[0], *(each[-1:] for each in actual[1:])], expected)


@each_kind
@pytest.mark.parametrize("shape", ["both directions", "batch first"])
def test_a_key_for_each_sample(kind: str, shape: str) -> None:
    """A sample's result depends on its key, and neither on its place nor on the other samples."""
    net, x, hx = made(kind, shape, **FOR_SAMPLES)
    batch = 0 if net.batch_first else 1
    y, *last = run(net, x, hx, key=KEYS)
    for n in range(3):
        actual = [y.narrow(batch, n, 1), *(state[:, n : n + 1] for state in last)]
        own = tuple(state[:, n : n + 1] for state in hx)
        expected = run(net, x.narrow(batch, n, 1), own, key=KEY.fold(torch.tensor([n])))
        torch.testing.assert_close(actual, expected)
        alone = run(net, x.select(batch, n), tuple(state[:, n] for state in hx), key=KEY.fold(n))
        torch.testing.assert_close(
            actual, [alone[0].unsqueeze(batch), *(each.unsqueeze(1) for each in alone[1:])]
        )


@each_kind
def test_awd_lstm_of_its_parts(kind: str) -> None:
    """Two layers of WeightDrop(LSTM), each with LockedDropout before and after."""
    net, x, _ = made(kind, "two layers", input_p=0.3, layer_p=0.4, output_p=0.2, weight_p=0.5)
    y = locked_dropout(x, 0.3, key=KEY.fold("input_l0"))
    for layer in range(2):
        part = getattr(nn, kind)(C if not layer else H, H)
        part.load_state_dict(
            {k[:-1] + "0": v for k, v in net.state_dict().items() if k.endswith(f"l{layer}")}
        )
        with torch.no_grad():
            U = part.weight_hh_l0
            U.mul_(thinned.keep_mask(KEY.fold(f"weight_hh_l{layer}"), U.shape, 0.5) * 2)
        y, _ = part(y if not layer else locked_dropout(y, 0.4, key=KEY.fold("input_l1")))
    torch.testing.assert_close(net(x, key=KEY)[0], locked_dropout(y, 0.2, key=KEY.fold("output")))


FORMULAS = {"LSTM": VariationalLSTMFormula, "GRU": VariationalGRUFormula}


def new_mask_each_step(kind: str, *args: int, **probabilities: float) -> nn.Module:
    class NewMaskEachStep(FORMULAS[kind]):  # type: ignore[misc]
        def forward(self, x: Tensor, hx: Any = None) -> Any:
            outputs = []
            for x_t in x:
                y, hx = super().forward(x_t[None], hx)
                outputs.append(y)
            return torch.cat(outputs), hx

    return NewMaskEachStep(*args, **probabilities)


def slightly(kind: str, *args: int, **probabilities: float) -> nn.Module:
    class Slightly(FORMULAS[kind]):  # type: ignore[misc]
        """A bias of 2 % in what is kept."""

        def _mask(self, like: Tensor, name: str) -> Tensor:
            return super()._mask(like, name) * 1.02

    return Slightly(*args, **probabilities)


def zones_too_often(kind: str, *args: int, **probabilities: float) -> nn.Module:
    class ZonesTooOften(FORMULAS[kind]):  # type: ignore[misc]
        def _zoneout(self, candidate: Tensor, previous: Tensor, name: str) -> Tensor:
            return super()._zoneout(super()._zoneout(candidate, previous, name), previous, name)

    return ZonesTooOften(*args, **probabilities)


def never_all(kind: str, **_: float) -> nn.Module:
    return FORMULAS[kind](30, 40, hidden_zoneout_p=0.9)


@each_kind
@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("evaluation", slightly),
        ("input mask", new_mask_each_step),
        ("recurrent mask", new_mask_each_step),
        ("recurrent mask", slightly),
        ("weight mask", new_mask_each_step),
        ("zoneout", zones_too_often),
        ("zoneout at p = 1", never_all),
    ],
)
def test_wrong_laws_are_seen(kind: str, law: str, wrong: Callable[..., nn.Module]) -> None:
    entry = ENTRIES[list(KINDS).index(kind)]
    assert verdict(entry, law, partial(wrong, kind)) is Verdict.BROKEN


@each_kind
@pytest.mark.usefixtures("fresh_compiler")
def test_compiled(kind: str) -> None:
    """The layer is in evaluation here; the law of the entry compiles training."""
    net, x, hx = made(kind, "one layer", recurrent_p=0.5)
    in_one = torch.compile(net.eval(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(in_one, x[:2], hx), run(net, x[:2], hx))


@each_kind
def test_parametrized_weights(kind: str) -> None:
    net, x, hx = made(kind, "one layer", **PROBABILITIES["all"])
    expected = run(net, x, hx, key=KEY)
    parametrize.register_parametrization(net, "weight_ih_l0", nn.Identity())
    torch.testing.assert_close(run(net, x, hx, key=KEY), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name in PROBABILITIES["all"] if (kind, name[:4]) != ("GRU", "cell")],
)
@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_outside_0_to_1(kind: str, name: str, p: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"between 0 and 1, but got {p}")):
        KINDS[kind](C, H, **{name: p})


@each_kind
def test_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"dropout has to be 0, but got 0\.5; layer_p"):
        KINDS[kind](C, H, dropout=0.5)
    net, x, hx = made(kind, "one layer", weight_p=0.5)
    with pytest.raises(
        ValueError, match=rf"{kind} needs an input with 2 or 3 dimensions, got shape \(1, 4, 3, 6\)"
    ):
        net(x[None])
    with pytest.raises(ValueError, match=r"packed data with 2 dimensions, got shape \(4, 3, 6\)"):
        net(pack_sequence([x]))
    with pytest.raises(RuntimeError, match=r"input_size = 6, got shape \(4, 5\)"):
        net(pack_sequence([x[:, 0, :5]]))
    with pytest.raises(RuntimeError, match=r"input_size = 6, got shape \(4, 3, 5\)"):
        net(x[..., :5])
    with pytest.raises(RuntimeError, match=r"at least one time step, got shape \(0, 3, 6\)"):
        net(x[:0])
    first, last = ("hidden[0]", "hidden[1]") if kind == "LSTM" else ("hidden", "hidden")
    with pytest.raises(RuntimeError, match=re.escape(f"Expected {first} size (1, 3, 5), got (1, 2, 5)")):
        run(net, x, (hx[0][:, :2], *hx[1:]))
    with pytest.raises(RuntimeError, match=re.escape(f"Expected {last} size (1, 5), got (1, 3, 5)")):
        run(net, x[:, 0], (*(each[:, 0] for each in hx[:-1]), hx[-1]))
    with pytest.raises(RuntimeError, match=re.escape(f"Expected {first} size (1, 2, 5), got (1, 3, 5)")):
        run(net, pack_sequence([x[:, 0], x[:, 1]]), hx)
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit a weight"):
        net(x, key=KEYS)
    net.weight_p = 0.0
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit a tensor of shape \(\)"):
        net(x[:, 0], key=KEYS)
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit a tensor of shape \(2,\)"):
        net(pack_sequence([x[:, 0], x[:, 1]]), key=KEYS)
