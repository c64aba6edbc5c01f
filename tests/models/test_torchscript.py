"""TorchScript: models and functions, and the legacy ONNX exporter; test_tools.py has every layer."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import oracle
import thinned
from process import output, python
from thinned import functional as F
from thinned.compare.implementation import first
from thinned.compare.layers import ENTRIES, Entry

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning"),
]

TOOLS: dict[str, Callable[..., Any]] = {
    "script": lambda layer, _: torch.jit.script(layer),
    "trace": lambda layer, inputs: torch.jit.trace(layer, tuple(inputs), check_trace=False),
}


def assert_same_draws(ours: Callable[..., Any], eager: Callable[..., Any], *inputs: Tensor) -> None:
    """Equal results and random states: TorchScript optimizes its graph from the second call on."""
    results = []
    for seed in range(4):
        torch.manual_seed(seed)
        expected, state = first(eager(*inputs)), torch.get_rng_state()
        torch.manual_seed(seed)
        results.append(first(ours(*inputs)))
        oracle.assert_same(results[-1].detach(), expected.detach())
        assert torch.get_rng_state().equal(state)


def saved(scripted: Any) -> Any:
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


# Some checks of shapes warn in a trace, as those of torch.nn.LSTM do.
checks_shapes = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")


@checks_shapes
@pytest.mark.parametrize(
    "entry", [entry for entry in ENTRIES if entry.name != "DropoutSchedule"], ids=lambda entry: entry.name
)
def test_a_trace_of_evaluation_has_no_node_of_ours(entry: Entry) -> None:
    layer = entry.own.make(**entry.example.arguments).eval()
    traced = TOOLS["trace"](layer, entry.example.inputs(torch.float32))
    assert "thinned::" not in str(traced.inlined_graph)


@pytest.mark.parametrize("tool", TOOLS)
def test_gradients(tool: str) -> None:
    layers = [thinned.Dropout(), thinned.ConcreteDropout(0.3), thinned.VariationalDropout(0.5, max_alpha=1.0)]
    model = nn.Sequential(nn.Linear(6, 8), *layers, thinned.MultiSampleDropout(nn.Linear(8, 2)))
    x = torch.randn(4, 6, requires_grad=True)
    made = TOOLS[tool](model, [x])
    for seed in range(3):
        gradients = []
        for module in model, made:
            torch.manual_seed(seed)
            loss = module(x).square().sum()
            gradients.append(torch.autograd.grad(loss, [x, *module.parameters()]))
        for expected, gradient in zip(*gradients, strict=True):
            torch.testing.assert_close(gradient, expected)


class _Twice(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x), self.layer(x)


def _of_a_constant(x: Tensor) -> tuple[Tensor, Tensor]:
    return F.dropout(torch.ones(100)), x + F.dropout(torch.ones(100))


@pytest.mark.parametrize("model", [_Twice(thinned.Dropout()), _of_a_constant])
@pytest.mark.parametrize("tool", TOOLS)
def test_equal_calls_are_two_draws(tool: str, model: Any) -> None:
    """Common subexpression elimination and constant folding would make one of them."""
    made = TOOLS[tool](model, [torch.ones(100)])
    results = [y for _ in range(4) for y in made(torch.ones(100))]
    assert len({tuple(y.tolist()) for y in results}) == 8


def _functions(x: Tensor, training: bool) -> list[Tensor]:
    maps, overwritten = x.unsqueeze(0), x + 1
    F.dropout(overwritten, 0.5, training, True)  # a result that nobody uses
    return [
        overwritten,
        F.dropout(x, 0.5, training),
        F.dropout(x, 0.3, training, broadcast_dims=(1,)),
        F.dropout(x + 1, p=0.5, training=training, inplace=True),
        F.dropout1d(x, training=training),
        F.alpha_dropout(x, 0.5, training),
        F.drop_path(x, 0.5, training, scale_by_keep=False),
        F.stochastic_depth(x, 0.5, "row", training),
        F.gaussian_dropout(x, training=training),
        F.drop_block2d(maps, 0.3, 2, training=training),
        F.drop_block2d(maps, 0.3, (2, 3), couple_channels=True, training=training),
        F.zoneout(x, -x, training=training),
        F.multi_sample_dropout(x, samples=3, training=training),
        F.relu_dropout(x, training=training),
        F.gelu_dropout(x, 0.3, training, approximate="tanh"),
        F.bias_dropout_add(x, None, -x, training=training),
    ]


def test_functions_in_scripted_code() -> None:
    """A default, a list, a string, and a size for all dimensions or for each."""
    scripted = torch.jit.script(_functions)
    for training in True, False, True:
        torch.manual_seed(int(training))
        expected = _functions(torch.ones(6, 4, 8), training)
        torch.manual_seed(int(training))
        for one, other in zip(scripted(torch.ones(6, 4, 8), training), expected, strict=True):
            oracle.assert_same(one, other)
    alone = torch.jit.script(F.dropout)
    assert_same_draws(alone, F.dropout, torch.ones(50))
    with pytest.raises(RuntimeError, match=r"between 0 and 1, but got 1\.5"):
        alone(torch.ones(50), 1.5, False)


@checks_shapes
@pytest.mark.parametrize(
    "function",
    [
        F.dropout,
        lambda x: F.dropout(x, broadcast_dims=(0,)),
        lambda x: F.dropout(x + 1, inplace=True),
        F.feature_alpha_dropout,
        F.locked_dropout,
        lambda x: F.drop_head(x, normalize="expected"),
        lambda x: F.dropout(x, key=thinned.Key(7).fold(torch.arange(x.shape[0]))),
        F.multi_sample_dropout,
    ],
)
def test_traced_functions_follow_the_shape(function: Callable[[Tensor], Tensor]) -> None:
    traced = torch.jit.trace(function, torch.ones(4, 6, 5), check_trace=False)
    for shape in (4, 6, 5), (7, 3, 9), (2, 8, 1), (1, 1, 40):
        assert_same_draws(traced, function, torch.ones(shape))


@checks_shapes
@pytest.mark.parametrize("function", [F.gaussian_dropout, F.drop_head, F.zoneout])
def test_a_traced_function_whose_shape_would_be_constant_is_refused(function: Callable[..., Tensor]) -> None:
    x = torch.ones(4, 6, 5)
    inputs = (x, x) if function is F.zoneout else (x,)
    with pytest.raises(NotImplementedError, match=r"torch.ops.thinned.NAME"):
        torch.jit.trace(function, inputs)
    operation = getattr(torch.ops.thinned, function.__name__)  # type: ignore[attr-defined]
    traced = torch.jit.trace(operation, inputs, check_trace=False)
    assert_same_draws(traced, function, *(torch.cat([x, x]) for x in inputs))


class _FollowsTraining(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x = F.drop_path(F.dropout(x, 0.5, self.training), 0.1, self.training)
        return F.variational_dropout(x, torch.zeros(1), training=self.training)


def test_a_frozen_model_in_evaluation_needs_no_thinned() -> None:
    layers = thinned.Dropout(), thinned.DropBlock1d(0.3, 2), _FollowsTraining()
    model = nn.Sequential(nn.Linear(5, 4), *layers, nn.Linear(4, 2)).eval()
    scripted = torch.jit.script(model)
    frozen = torch.jit.freeze(scripted)
    assert "thinned::" not in str(frozen.inlined_graph)
    x = torch.ones(3, 5)
    for made in frozen, torch.jit.optimize_for_inference(scripted):
        torch.testing.assert_close(made(x), model(x))


@pytest.mark.parametrize("make", [thinned.Dropout, nn.Dropout])
def test_what_stock_accepts(make: Any) -> None:
    for p in 0.0, 0.5, 1.0:
        scripted = torch.jit.script(make(p))
        assert scripted.p == p
        y = scripted(torch.tensor(1.0))
        assert y.shape == ()
        assert y == 0 or p < 1
    x = torch.ones(20)
    torch.jit.script(make(0.5, True))(x)
    assert not x.equal(torch.ones(20))
    integers = torch.arange(3)
    assert torch.jit.script(make(0.5)).eval()(integers).equal(integers)
    with pytest.raises(RuntimeError):
        torch.jit.script(make(0.5))(integers)


def test_two_layers_of_a_class_keep_their_arguments() -> None:
    model = nn.Sequential(
        thinned.Dropout(0.1), thinned.Dropout(0.9), thinned.Dropout(0.5, broadcast_dims=(0,))
    )
    assert_same_draws(torch.jit.script(model), model, torch.ones(3, 50))


class _Doubled(thinned.Dropout):
    def forward(self, input: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * input


class _Named(thinned.Dropout):
    """A subclass without a forward of its own."""


def test_subclasses() -> None:
    x = torch.ones(50)
    assert torch.jit.script(_Doubled())(x).equal(2 * x)
    assert torch.jit.trace(_Doubled(), x)(x).equal(2 * x)
    assert_same_draws(torch.jit.script(_Named()), thinned.Dropout(), x)


def _exported(model: nn.Module) -> nn.Module:
    torch.export.export(model, (torch.ones(2, 50),), strict=False)  # which copies the attributes of modules
    return model


@pytest.mark.parametrize(
    "copied", [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _exported]
)
def test_scripting_leaves_the_model_as_it_was(copied: Callable[[nn.Module], nn.Module]) -> None:
    """TorchScript replaces the children of a model by what it is given to compile."""
    model = nn.Sequential(thinned.Dropout(), thinned.DropPath(0.5))
    layers = list(model)
    torch.jit.script(model)
    assert all(one is other for one, other in zip(model, layers, strict=True))
    model = copied(model)
    key, x = thinned.Key(3), torch.ones(2, 50)
    model[0].p = 0.25
    assert model[0](x, key=key).equal(F.dropout(x, 0.25, key=key))
    assert "forward" not in vars(model[0])
    model(x)
    with thinned.address(model, seed=1, step=0):
        y = model(x)
    with thinned.address(model, seed=1, step=0):
        assert model(x).equal(y)


@checks_shapes
@pytest.mark.parametrize("tool", TOOLS)
def test_within_an_address(tool: str) -> None:
    """A scripted layer has a mask of the address, at the site of the module around it."""
    inner = nn.Sequential(
        thinned.Dropout(), thinned.LayerDrop([nn.Tanh() for _ in range(9)], 0.5), thinned.GaussianDropout()
    )
    model = nn.Sequential(TOOLS[tool](inner, [torch.ones(500)]), thinned.Dropout())
    results = {}
    for seed, step in (1, 0), (1, 0), (1, 1), (2, 0):
        with thinned.address(model, seed=seed, step=step):
            y = model(torch.ones(500))
        assert results.setdefault((seed, step), y).equal(y)
    assert len({tuple(y.tolist()) for y in results.values()}) == 3


def test_a_scripted_layer_drop_runs_all_layers() -> None:
    layers = thinned.LayerDrop([nn.Linear(4, 4) for _ in range(9)], 0.5, run_all=True)
    scripted, x = torch.jit.script(layers), torch.ones(2, 4)
    torch.manual_seed(0)
    y = scripted(x)
    y.sum().backward()
    assert all(each.grad is not None for each in layers.parameters())
    torch.manual_seed(0)
    assert layers(x).equal(y)


class _Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x)


def test_what_an_address_cannot_reach_is_refused() -> None:
    x = torch.ones(5)
    traced = torch.jit.trace(nn.Sequential(_Functional()), x, check_trace=False)
    model = nn.Sequential(traced)
    with thinned.address(model, seed=1, step=0), pytest.raises(RuntimeError, match=r"thinned\.Dropout"):
        model(x)
    with pytest.raises(TypeError, match="ScriptModule"):
        thinned.address(torch.jit.script(thinned.Dropout()), seed=1, step=0).__enter__()
    addressed = nn.Sequential(thinned.Dropout())
    with thinned.address(addressed, seed=1, step=0):
        addressed(x)
    with pytest.raises(AttributeError, match="before its first address"):
        torch.jit.script(addressed)


@checks_shapes
def test_a_traced_keyed_model_takes_the_key_and_the_samples() -> None:
    keyed = thinned.Keyed(nn.Sequential(nn.Linear(5, 5), thinned.Dropout(), thinned.DropPath(0.5)))

    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.keyed = keyed

        def forward(self, x: Tensor, key: Tensor, samples: Tensor) -> Tensor:
            return self.keyed(x, key=key, samples=samples)  # type: ignore[no-any-return]

    traced = saved(torch.jit.trace(Positional(), (torch.ones(3, 5), torch.tensor(7), torch.arange(3))))
    for key, rows in (7, 3), (8, 3), (-9, 20):
        x, ids = torch.randn(rows, 5), torch.arange(rows) * 5
        oracle.assert_same(
            traced(x, torch.tensor(key), ids).detach(),
            keyed(x, key=torch.tensor(key), samples=ids).detach(),
        )


def test_a_saved_model_needs_thinned_to_be_imported(tmp_path: Any) -> None:
    torch.jit.save(torch.jit.script(nn.Sequential(thinned.Dropout())), tmp_path / "model.pt")
    load = f"import torch; print(torch.jit.load({str(tmp_path / 'model.pt')!r})(torch.ones(9)).shape)"
    assert "Unknown builtin op: thinned::dropout" in python(load).stderr
    assert "[9]" in output(f"import thinned; {load}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the exporter itself
@checks_shapes
def test_legacy_onnx_exporter(tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(5, 4), thinned.Dropout(), thinned.AlphaDropout(), thinned.DropPath(0.3))
    x, path = torch.ones(3, 5), str(tmp_path / "model.onnx")

    def export(training: torch.onnx.TrainingMode) -> None:
        options = {"training": training, "do_constant_folding": False}
        torch.onnx.export(model, (x,), path, dynamo=False, **options)

    export(torch.onnx.TrainingMode.EVAL)
    session = onnxruntime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), model.eval()(x).detach())
    with pytest.raises(torch.onnx.errors.OnnxExporterError, match="thinned::dropout"):
        export(torch.onnx.TrainingMode.TRAINING)
