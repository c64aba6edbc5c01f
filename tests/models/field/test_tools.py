"""Field issues about PyTorch's tools: torch.fx, TorchScript, quantization, export, and recurrent modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import thinned
from models.field.halves import in_torch
from thinned import Key

X = torch.ones(4, 8)


@pytest.fixture(autouse=True)
def _deprecated() -> Iterator[None]:
    """TorchScript and torch.ao.quantization are deprecated, and say so."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Functional(nn.Module):
    def __init__(self, dropout: Callable[..., Tensor]) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x, training=self.training)


def model(dropout: type[nn.Module] = nn.Dropout) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), dropout(0.5), nn.Linear(8, 8))


def drops(function: Callable[[Tensor], Tensor], x: Tensor = X) -> bool:
    """Whether two calls differ."""
    return not function(x).equal(function(x))


@in_torch("reproduces")
def test_pytorch_68190_torch() -> None:
    """A function's ``training`` is a constant of the graph, so eval() changes nothing."""
    assert drops(torch.fx.symbolic_trace(Functional(F.dropout)).eval())


def test_pytorch_68190_thinned() -> None:
    """So it is for a function; a layer is a node that has its own training flag."""
    assert drops(torch.fx.symbolic_trace(Functional(thinned.functional.dropout)).eval())
    for layer in (thinned.Dropout(0.5), thinned.DropPath(0.5), thinned.GaussianDropout(0.5)):
        traced = torch.fx.symbolic_trace(nn.Sequential(layer))
        assert drops(traced)
        assert traced.eval()(X).equal(X)


def quantized(dropout: type[nn.Module]) -> Tensor:
    tools = pytest.importorskip("torch.ao.quantization.quantize_fx")
    quantization = pytest.importorskip("torch.ao.quantization")
    mapping = quantization.get_default_qat_qconfig_mapping(torch.backends.quantized.engine)
    prepared = tools.prepare_qat_fx(model(dropout).train(), mapping, (X,))
    prepared(X).sum().backward()
    return tools.convert_fx(prepared)(X)  # type: ignore[no-any-return]


@in_torch("no longer reproduces")
def test_pytorch_68250_torch() -> None:
    """A model that was converted in training called dropout on a quantized tensor."""
    assert quantized(nn.Dropout).isfinite().all()


def test_pytorch_68250_thinned() -> None:
    """Converted in training or not; in evaluation a layer passes a quantized tensor on."""
    assert quantized(thinned.Dropout).isfinite().all()
    x = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    assert thinned.Dropout(0.5).eval()(x) is x


def keys_of_quantized(dropout: type[nn.Module]) -> list[str]:
    """The checkpoint of a model that eager quantization prepared and converted."""
    quantization = pytest.importorskip("torch.ao.quantization")
    eager = model(dropout).train()
    eager.qconfig = quantization.get_default_qat_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare_qat(eager)
    names = list(prepared.state_dict())
    prepared(X)
    return names + list(quantization.convert(prepared.eval()).state_dict())


@in_torch("no longer reproduces")
def test_vision_5198_torch() -> None:
    """A dropout was observed, so checkpoints from before lacked keys."""
    assert not [name for name in keys_of_quantized(nn.Dropout) if name.startswith("1.")]


def test_vision_5198_thinned() -> None:
    assert keys_of_quantized(thinned.Dropout) == keys_of_quantized(nn.Dropout)


@in_torch("no longer reproduces")
def test_pytorch_13991_torch() -> None:
    """A scripted module with a dropout could not be set to evaluation."""
    scripted = torch.jit.script(model())
    assert drops(scripted)
    assert not drops(scripted.eval())


def test_pytorch_13991_thinned() -> None:
    scripted = torch.jit.script(model(thinned.Dropout))
    assert drops(scripted)
    assert not drops(scripted.eval())


@in_torch("reproduces")
def test_pytorch_71929_torch() -> None:
    """A trace of training drops in evaluation, too."""
    assert drops(torch.jit.trace(model(), X, check_trace=False).eval())


def test_pytorch_71929_thinned() -> None:
    """The same, as a trace has no flag; a trace of evaluation has no node, and torch.fx keeps the flag."""
    assert drops(torch.jit.trace(model(thinned.Dropout), X, check_trace=False).eval())
    traced = torch.jit.trace(model(thinned.Dropout).eval(), X)
    assert "thinned::" not in str(traced.inlined_graph)
    assert not drops(traced.train())
    assert not drops(torch.fx.symbolic_trace(model(thinned.Dropout)).eval())


def operations(function: Callable[[Tensor], Tensor], device: str) -> list[str]:
    graph = make_fx(function)(torch.ones(4, 8, device=device)).graph
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@in_torch("reproduces")
def test_pytorch_97894_torch() -> None:
    """On a CPU a traced dropout is taken apart, so a pass that looks for dropouts finds none."""
    found = operations(lambda x: F.dropout(x, 0.1), "cpu")
    assert "aten.native_dropout.default" not in found
    assert any("bernoulli" in name for name in found)


def test_pytorch_97894_thinned() -> None:
    """The same two nodes on every device: the draw, and the dropout with T and 1/q as constants."""
    wanted = ["thinned.draw_key.default", "thinned.masked_affine.default"]
    for device in ("cpu", "meta"):
        found = operations(lambda x: thinned.functional.dropout(x, 0.1), device)
        assert [name for name in found if name.startswith("thinned.")] == wanted


def widely_copied(lstm: nn.LSTM) -> Callable[[Tensor], Tensor]:
    """AWD-LSTM's WeightDrop, which exchanges a parameter for its dropped value."""
    raw = nn.Parameter(lstm.weight_hh_l0.data)
    del lstm._parameters["weight_hh_l0"]
    lstm.register_parameter("weight_hh_l0_raw", raw)

    def forward(x: Tensor) -> Tensor:
        lstm.weight_hh_l0 = F.dropout(lstm.get_parameter("weight_hh_l0_raw"), 0.5)
        return lstm(x)[0]  # type: ignore[no-any-return]

    return forward


@in_torch("no longer reproduces")
def test_pytorch_32346_torch() -> None:
    """To move such a module, or to run it again, failed for lack of the parameter."""
    lstm = nn.LSTM(8, 8)
    forward = widely_copied(lstm)
    lstm.double()
    assert drops(forward, X.double())


def test_pytorch_32346_thinned() -> None:
    """WeightDrop leaves the parameters of the module where they are, and trains them."""
    layer = thinned.WeightDrop(nn.LSTM(8, 8), "weight_hh_l0", 0.5).double()
    assert drops(lambda x: layer(x)[0], X.double())
    y = layer(X.double(), key=Key(7))[0]
    y.sum().backward()
    weight = layer.module.weight_hh_l0
    kept = thinned.keep_mask(Key(7).fold("weight_hh_l0"), weight.shape, 0.5)
    assert not weight.grad[~kept].any()
    assert weight.grad[kept].any()


def normed(device: str) -> nn.Module:
    return parametrizations.weight_norm(nn.LSTM(8, 8), "weight_hh_l0").to(device)


@in_torch("needs a GPU")
def test_pytorch_86457_torch() -> None:
    """An LSTM with weight norm makes cuDNN warn, after flatten_parameters() too."""
    lstm: Any = normed("cuda")
    lstm.flatten_parameters()
    with pytest.warns(UserWarning, match="not part of single contiguous chunk"):
        lstm(X.cuda())


@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_pytorch_86457_thinned(device: str) -> None:
    """WeightDrop drops from the normed weight, and ignores cuDNN's warning."""
    lstm: Any = normed(device)
    layer = thinned.WeightDrop(lstm, "weight_hh_l0", 0.5)
    x = X.to(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = layer(x, key=Key(7))[0]
    plain = nn.LSTM(8, 8, device=device)
    plain.load_state_dict({name: getattr(lstm, name).detach() for name in plain.state_dict()})
    expected = thinned.WeightDrop(plain, "weight_hh_l0", 0.5)
    torch.testing.assert_close(y, expected(x, key=Key(7))[0])
    y.sum().backward()
    assert lstm.parametrizations.weight_hh_l0.original1.grad is not None


class DropsLayers(nn.Module):
    """The report's loop, in which Python reads a random number."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if not (self.training and torch.rand(1).item() <= 0.5):
                x = layer(x)
        return x


@in_torch("reproduces")
def test_audio_4116_torch() -> None:
    """A model that drops layers is not exported in training, in which a new model is."""
    with pytest.raises(Exception, match="data-dependent"):
        torch.export.export(DropsLayers(), (X,), strict=False)


def test_audio_4116_thinned() -> None:
    layers = thinned.LayerDrop([nn.Linear(8, 8) for _ in range(3)], p=0.5)
    program = torch.export.export(layers, (X,), strict=False).module()
    results = []
    for run in (program, layers):
        torch.manual_seed(3)
        results.append([run(X).detach() for _ in range(5)])
    for exported, eager in zip(*results, strict=True):
        torch.testing.assert_close(exported, eager)
    assert len({tuple(y.flatten().tolist()) for y in results[0]}) > 1


SEQUENCES = [torch.ones(5, 3), torch.ones(2, 3)]


@in_torch("reproduces")
def test_opacus_103_torch() -> None:
    """nn.LSTM takes a PackedSequence, but no dropout does, so an LSTM in Python has to take it apart."""
    packed = pack_sequence(SEQUENCES)
    assert isinstance(nn.LSTM(3, 4)(packed)[0], PackedSequence)
    with pytest.raises(TypeError, match="must be Tensor, not PackedSequence"):
        nn.Dropout(0.5)(packed)


def test_opacus_103_thinned() -> None:
    """It is nn.LSTM without dropout; with a key for each sequence, each has the masks that it has alone."""
    packed = pack_sequence(SEQUENCES)
    lstm = thinned.VariationalLSTM(3, 4, 2, input_p=0.5, layer_p=0.3, recurrent_p=0.2)
    plain = nn.LSTM(3, 4, 2)
    plain.load_state_dict(lstm.state_dict())
    y, (h, _) = lstm.eval()(packed)
    expected, (expected_h, _) = plain(packed)
    torch.testing.assert_close(y.data, expected.data)
    torch.testing.assert_close(h, expected_h)
    keys = Key(7).fold(torch.arange(2))
    y, _ = lstm.train()(packed, key=keys)
    for row, (sequence, mine) in enumerate(zip(SEQUENCES, nn.utils.rnn.unpack_sequence(y), strict=True)):
        alone, _ = lstm(sequence.unsqueeze(1), key=Key.from_bits(keys.bits[row : row + 1]))
        torch.testing.assert_close(mine, alone.squeeze(1))
