"""Recurrent networks equal their one-layer parts with thinned's dropout between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import oracle
import thinned
from thinned.models.intercept import intercept

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
KEY = thinned.Key(7)
P = 0.3
Q = round((1 - P) * 2**32) / 2**32
NETWORKS: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm": (nn.LSTM, {}),
    "lstm proj": (nn.LSTM, {"proj_size": 3}),
    "lstm bidirectional proj": (nn.LSTM, {"proj_size": 3, "bidirectional": True}),
    "gru": (nn.GRU, {}),
    "gru bidirectional": (nn.GRU, {"bidirectional": True}),
    "tanh": (nn.RNN, {"nonlinearity": "tanh"}),
    "relu no bias": (nn.RNN, {"nonlinearity": "relu", "bias": False}),
}
every_network = pytest.mark.parametrize("name", NETWORKS)


def network(name: str, **more: Any) -> nn.RNNBase:
    torch.manual_seed(0)
    kind, options = NETWORKS[name]
    return kind(4, 5, num_layers=3, dropout=P, **options, **more)


def layer(whole: nn.RNNBase, i: int) -> nn.RNNBase:
    """Layer ``i`` as a network of its own, with the whole's weights."""
    size = whole.input_size if not i else (whole.proj_size or whole.hidden_size) * (1 + whole.bidirectional)
    options = {"bidirectional": whole.bidirectional, "bias": whole.bias, "batch_first": whole.batch_first}
    if isinstance(whole, nn.LSTM):
        options["proj_size"] = whole.proj_size
    elif isinstance(whole, nn.RNN):
        options["nonlinearity"] = whole.nonlinearity
    part = type(whole)(size, whole.hidden_size, **options)
    for parameter, _ in part.named_parameters():
        setattr(part, parameter, getattr(whole, parameter.replace("l0", f"l{i}")))
    return part


def initial(whole: nn.RNNBase, batch: int) -> Any:
    rows = 3 * (1 + whole.bidirectional)
    hidden = torch.randn(rows, batch, whole.proj_size or 5)
    return (hidden, torch.randn(rows, batch, 5)) if isinstance(whole, nn.LSTM) else hidden


def state_of(hx: Any, i: int, rows: int) -> Any:
    if hx is None:
        return None
    return (
        hx[i * rows : (i + 1) * rows] if isinstance(hx, Tensor) else tuple(h[i * rows :][:rows] for h in hx)
    )


def formula(whole: nn.RNNBase, x: Any, hx: Any = None) -> tuple[Any, list[Tensor]]:
    last: list[Any] = []
    for i in range(whole.num_layers):
        if i:
            x = dropped(x, i - 1, whole.batch_first)
        x, state = layer(whole, i)(x, state_of(hx, i, 1 + whole.bidirectional))
        last.append(state if isinstance(state, tuple) else (state,))
    return x, [torch.cat(states) for states in zip(*last, strict=True)]


def dropped(x: Any, number: int, batch_first: bool) -> Any:
    key = KEY.fold(number)
    if isinstance(x, PackedSequence):
        return x._replace(data=torch.where(thinned.keep_mask(key, x.data.shape, P), x.data * (1 / Q), 0))
    if x.dim() == 2:
        return dropped(x.unsqueeze(1), number, False).squeeze(1)
    x = x if batch_first else x.transpose(0, 1)
    x = torch.where(thinned.keep_mask(key, x.shape, P), x * (1 / Q), 0)
    return x if batch_first else x.transpose(0, 1)


def assert_formula(whole: nn.RNNBase, x: Any, hx: Any = None) -> None:
    expected, last = formula(whole, x, hx)
    with intercept(key=KEY) as context:
        y, state = whole(x, hx)
    assert context.count == whole.num_layers - 1
    for got, want in zip((state,) if isinstance(state, Tensor) else state, last, strict=True):
        oracle.assert_same(got, want)
    if isinstance(y, PackedSequence):
        assert y.batch_sizes.equal(x.batch_sizes)
        y, expected = y.data, expected.data
    oracle.assert_same(y, expected)


@every_network
@pytest.mark.parametrize("batch_first", [True, False])
def test_is_the_formula_bit_for_bit(name: str, batch_first: bool) -> None:
    assert_formula(network(name, batch_first=batch_first), torch.randn(6, 2, 4))


@every_network
def test_given_states_and_no_batch(name: str) -> None:
    whole = network(name)
    assert_formula(whole, torch.randn(6, 2, 4), initial(whole, 2))
    assert_formula(whole, torch.randn(6, 4))


@every_network
@pytest.mark.parametrize("ordered", [True, False])
def test_packed_sequences(name: str, ordered: bool) -> None:
    lengths = (6, 4, 1) if ordered else (4, 6, 1)
    packed = pack_sequence([torch.randn(length, 4) for length in lengths], enforce_sorted=ordered)
    whole = network(name)
    assert_formula(whole, packed)
    hx = sorted_hx = initial(whole, 3)
    if not ordered:
        order = packed.sorted_indices
        sorted_hx = hx[:, order] if isinstance(hx, Tensor) else tuple(h[:, order] for h in hx)
    plain = PackedSequence(packed.data, packed.batch_sizes)
    expected, _ = formula(whole, plain, sorted_hx)
    with intercept(key=KEY):
        y, _ = whole(packed, hx)
    oracle.assert_same(y.data, expected.data)


def test_layouts_have_one_mask() -> None:
    x = torch.randn(6, 2, 4)
    with intercept(key=KEY):
        first, _ = network("lstm")(x)
    with intercept(key=KEY):
        second, _ = network("lstm", batch_first=True)(x.transpose(0, 1))
    torch.testing.assert_close(second.transpose(0, 1), first)


def test_the_same_seed_gives_the_same_masks() -> None:
    whole, x = network("gru"), torch.randn(6, 2, 4)
    results = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        with intercept():
            results.append(whole(x)[0])
    assert results[0].equal(results[1])
    assert not results[0].equal(results[2])


@pytest.mark.parametrize("name", ["lstm proj", "gru bidirectional", "tanh"])
def test_gradcheck(name: str) -> None:
    whole = network(name).double()

    def run(x: Tensor, *_: Tensor) -> Tensor:
        with intercept(key=KEY):
            return whole(x)[0]

    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *whole.parameters()), fast_mode=True)


def test_autocast() -> None:
    whole, x = network("lstm"), torch.randn(6, 2, 4)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            whole(x)
    except RuntimeError as error:  # oneDNN has this LSTM on some processors only
        pytest.skip(f"torch alone has no LSTM in bfloat16 here: {error}")
    with torch.autocast("cpu", torch.bfloat16), intercept(key=KEY):
        y, _ = whole(x)
        expected, _ = formula(whole, x)
    oracle.assert_same(y, expected)


def test_p_is_checked() -> None:
    whole = network("lstm")
    whole.dropout = 1.5
    with intercept(), pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
        whole(torch.randn(6, 2, 4))


def test_by_keyword() -> None:
    whole, x = network("gru"), torch.randn(6, 2, 4)
    h = torch.zeros(3, 2, 5)
    with intercept(key=KEY):
        expected = torch.gru(x, h, whole._flat_weights, True, 3, P, True, False, False)
    names = ("input", "hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
    values = (x, h, whole._flat_weights, True, 3, P, True, False)
    with intercept(key=KEY):
        y, _ = torch.gru(**dict(zip(names, values, strict=True)), batch_first=False)
    assert y.equal(expected[0])
    packed = pack_sequence([x[:, 0], x[:3, 1]])
    with intercept(key=KEY):
        y, _ = torch.gru(
            data=packed.data, batch_sizes=packed.batch_sizes, **dict(zip(names[1:], values[1:], strict=True))
        )
    with intercept(key=KEY):
        assert whole(packed)[0].data.equal(y)
