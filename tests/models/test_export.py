"""Exported, a model in evaluation has no dropout, and a Keyed one masks that are functions of its key."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import pickle
import warnings
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

import thinned
from models import zoo
from thinned import Key, address, spec
from thinned.geometry import Geometry, shared
from thinned.layers._arguments import threshold_and_scale
from thinned.models.export import Keyed
from thinned.models.export.decompositions import decompositions

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    # torch warns of itself when it lowers a program,
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.:FutureWarning"),
    # of nn.LSTM's lists of weights,
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights:UserWarning"),
    # and of the context that a strict export goes into and comes out of.
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects:UserWarning"),
]

KEYS = (7, -5, 2**40 + 1)
BATCH = torch.export.Dim("batch", min=1, max=1000)


def cnn() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.Dropout2d(0.2),
        nn.Flatten(),
        nn.AlphaDropout(0.1),
        nn.Linear(4 * 14 * 14, 5),
        nn.Dropout(0.5, inplace=True),
    )


def inputs(model: nn.Module, batch: int = 4) -> dict[str, Any]:
    if isinstance(model, nn.Sequential):
        return {"input": torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(0))}
    found: dict[str, Any] = zoo.inputs(model, batch)
    config = getattr(model, "config", None)
    return found | {"use_cache": False} if hasattr(config, "use_cache") else found


MODELS: dict[str, Callable[..., nn.Module]] = {**zoo.MODELS, "cnn": cnn, "encoder": zoo.encoder}


def tensor_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def operations(program: ExportedProgram) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def random_ones(names: set[str]) -> list[str]:
    parts = ("thinned", "drop", "bernoulli", "rand", "normal_", "uniform")
    return sorted(name for name in names if any(part in name.lower() for part in parts))


@pytest.fixture
def in_onnx() -> Callable[..., Any]:
    """From a model or a program to a function from NumPy arrays to such, run by onnxruntime."""
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1

    def translate(model: Any, *args: Any, **kwargs: Any) -> tuple[set[str], Callable[..., list[Any]]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and onnxscript, about themselves
            program = torch.onnx.export(model, *args, dynamo=True, verbose=False, optimize=False, **kwargs)
        proto = program.model_proto
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options)

        def run(**arrays: Tensor) -> list[Any]:
            return session.run(None, {name: array.numpy() for name, array in arrays.items()})

        return {node.op_type for node in proto.graph.node}, run

    return translate


class TestEvaluation:
    @pytest.mark.parametrize("intercepted", [False, True])
    @pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "transformer", "encoder", "cnn"])
    def test_no_dropout_is_left(self, name: str, intercepted: bool) -> None:
        model = thinned.convert(MODELS[name]()).eval()
        arguments = inputs(model)
        with torch.no_grad(), thinned.intercept() if intercepted else contextlib.nullcontext():
            program = torch.export.export(model, (), arguments, strict=False)
            expected = tensor_of(model(**arguments))
        assert random_ones(operations(program)) == []
        torch.testing.assert_close(tensor_of(program.module()(**arguments)), expected)

    def test_a_call_of_torchs_own_leaves_one(self) -> None:
        """An intercept reaches it, and convert does not (pytorch#103681)."""
        model = thinned.convert(zoo.attention()).eval()
        arguments = inputs(model)
        stock = torch.export.export(model, (), arguments, strict=False)
        assert random_ones(operations(stock)) == ["aten.dropout.default"]
        with thinned.intercept():
            ours = torch.export.export(model, (), arguments, strict=False)
        assert random_ones(operations(ours)) == []

    @pytest.mark.parametrize("name", ["bert", "gpt2", "vit", "encoder", "cnn"])
    def test_onnx(self, name: str, in_onnx: Callable[..., Any]) -> None:
        model = thinned.convert(MODELS[name]()).eval()
        arguments = inputs(model)
        with torch.no_grad():
            types, run = in_onnx(model, (), kwargs=arguments)
            expected = tensor_of(model(**arguments))
        assert random_ones(types) == []
        tensors = {key: value for key, value in arguments.items() if isinstance(value, Tensor)}
        np.testing.assert_allclose(run(**tensors)[0], expected.numpy(), rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    """Two rates, shared decisions, one layer called twice, and the mask of ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.channels = thinned.Dropout2d(0.5)
        self.dropout = thinned.Dropout(0.1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.channels(self.conv(self.norm(x)))
        return self.dropout(y.flatten(1)), self.dropout(torch.ones_like(x))


def monte_carlo(model: nn.Module) -> nn.Module:
    """In evaluation, thinned's layers excepted."""
    model.eval()
    for module in model.modules():
        if type(module).__module__.startswith("thinned.layers"):
            module.train()
    return model


def image(batch: int) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))


def call(model: Any, x: Tensor, key: int, ids: Tensor | None = None) -> tuple[Tensor, ...]:
    samples = {} if ids is None else {"samples": ids}
    with torch.no_grad():
        found: tuple[Tensor, ...] = model(x, key=torch.tensor(key), **samples)
    return found


def exported(model: nn.Module, samples: bool = False, strict: bool = False) -> ExportedProgram:
    keywords, shapes = {"key": torch.tensor(1)}, {"args": ({0: BATCH},), "key": None}
    if samples:
        keywords["samples"], shapes["samples"] = torch.arange(4), {0: BATCH}
    return torch.export.export(model, (image(4),), keywords, dynamic_shapes=shapes, strict=strict)


def assert_equal(these: tuple[Tensor, ...], those: tuple[Tensor, ...]) -> None:
    for a, b in zip(these, those, strict=True):
        assert a.equal(b)


@pytest.fixture
def keyed() -> nn.Module:
    return Keyed(monte_carlo(Net()))


class TestKeyed:
    def test_repr(self) -> None:
        assert repr(Keyed(nn.ReLU())) == "thinned.Keyed(\n  (model): ReLU()\n)"

    def test_formula(self, keyed: Any) -> None:
        root = Key(7).fold(0)
        _, second = call(keyed, image(4), 7)
        assert (second != 0).equal(thinned.keep_mask(root.fold("dropout#1"), (4, 3, 8, 8), 0.1))
        ids = torch.tensor([9, -1, 3, 2**62])
        _, second = call(keyed, image(4), 7, ids)
        keys = root.fold("dropout#1").fold(ids)
        assert (second != 0).equal(thinned.keep_mask(keys, (4, 3, 8, 8), 0.1))

    @pytest.mark.slow
    @pytest.mark.usefixtures("fresh_compiler")
    @pytest.mark.filterwarnings("ignore")  # AOTInductor's own, of which each version has others
    @pytest.mark.parametrize("decomposed", [False, True])
    def test_compiled_ahead_of_time(self, decomposed: bool, tmp_path: Path) -> None:
        """Its masks are the eager ones, for keys and ids with high bits set."""
        model = Keyed(nn.Sequential(nn.Linear(8, 8), thinned.Dropout(0.5), nn.Tanh(), thinned.Dropout(0.3)))
        x, numbers = torch.randn(6, 8), torch.Generator().manual_seed(0)
        given = {"key": torch.tensor(7), "samples": torch.arange(6)}
        program = torch.export.export(model, (x,), given, strict=False)
        if decomposed:
            program = program.run_decompositions(decompositions())
        inductor = importlib.import_module("torch._inductor")
        path = inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        compiled = inductor.aoti_load_package(path)
        for _ in range(20):
            key, samples = (torch.empty(n, dtype=torch.int64).random_(generator=numbers) for n in ((), 6))
            given = {"key": key - 2**62, "samples": samples - 2**62}
            assert compiled(x, **given).ne(0).equal(model(x, **given).ne(0))

    def test_it_is_address(self, keyed: Any) -> None:
        with torch.no_grad(), address(keyed.model, seed=Key(2**64 - 5), step=0):
            assert_equal(call(keyed, image(4), -5), keyed.model(image(4)))

    @pytest.mark.filterwarnings(
        "ignore:The given buffer is not writable:UserWarning"
    )  # torch.export.load, 2.11
    @pytest.mark.parametrize("samples", [False, True])
    def test_exported(self, samples: bool) -> None:
        model = Keyed(Small(0.1) if samples else monte_carlo(Net()))
        program = exported(model, samples)
        assert random_ones(operations(program)) == ["thinned.fold.default", "thinned.masked_affine.default"]
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        self.assert_like_eager(torch.export.load(file).module(), model, samples)

    def test_exported_strictly(self) -> None:
        model = Keyed(monte_carlo(nn.Sequential(thinned.Dropout(0.1))))
        program = exported(model, samples=True, strict=True)
        assert random_ones(operations(program)) == ["thinned.fold.default", "thinned.masked_affine.default"]
        self.assert_like_eager(program.module(), model, samples=True)

    @staticmethod
    def assert_like_eager(program: Any, model: nn.Module, samples: bool) -> None:
        for batch in (4, 9, 2):
            ids = torch.arange(batch) * 2**33 - 1 if samples else None
            seen = [call(program, image(batch), key, ids) for key in KEYS]
            for key, outputs in zip(KEYS, seen, strict=True):
                assert_equal(outputs, call(model, image(batch), key, ids))
            assert len({(outputs[-1] != 0).numpy().tobytes() for outputs in seen}) == len(KEYS)

    def test_takes_a_key_or_its_bits(self, keyed: Any) -> None:
        expected = call(keyed, image(4), -5)
        assert_equal(keyed(image(4), key=Key(2**64 - 5)), expected)
        compiled = torch.compile(keyed, backend="eager", fullgraph=True)
        assert_equal(compiled(image(4), key=Key(2**64 - 5)), expected)

    @pytest.mark.parametrize(
        ("key", "error", "got"),
        [
            (7, TypeError, r"got 7 of type int; write thinned\.Key\(7\)$"),
            ("7", TypeError, "got '7' of type str$"),
            (None, TypeError, "got None of type NoneType$"),
            (torch.tensor(7.0), TypeError, r"got a Tensor of shape \(\) and torch\.float32$"),
            (torch.tensor([7, 8]), ValueError, r"got one of shape \(2,\)"),
            (Key(7).fold(torch.arange(2)), ValueError, r"got one of shape \(2,\)"),
        ],
    )
    def test_what_is_no_key(self, key: Any, error: type[Exception], got: str, keyed: Any) -> None:
        with pytest.raises(error, match=f"^key must be .*{got}"):
            keyed(image(4), key=key)

    def test_warns_once_a_place_where_no_mask_depends_on_the_key(self) -> None:
        def warnings_of(model: nn.Module, *training: int) -> list[str]:
            keyed = Keyed(model).train(not training)
            for i in training[1:]:
                model.get_submodule(str(i)).train()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("default")
                for _ in range(2):
                    keyed(image(4), key=Key(7))
                keyed(image(4), key=Key(7))
            assert all(each.filename == __file__ for each in caught)
            return [str(each.message).partition("Keyed: ")[2] for each in caught]

        in_evaluation, none = "the layers of thinned are in evaluation", "the model has no layer of thinned"
        ours = [nn.Dropout(0.5), thinned.Dropout(0.5), thinned.Dropout2d(0.5)]
        theirs = nn.Sequential(nn.Dropout(0.5))
        for model, training, expected in (
            (nn.Sequential(*ours), (), None),
            (nn.Sequential(*ours), (0,), in_evaluation),
            (nn.Sequential(*ours), (0, 0), in_evaluation),  # only torch's drops
            (nn.Sequential(*ours), (0, 1), None),  # Monte-Carlo dropout
            (nn.Sequential(thinned.Dropout(0.0)), (), None),
            (Small(0.1), (0,), None),  # a function that drops in evaluation too
            (theirs, (), f"{none};"),
            (theirs, (0,), f"{none} and is in evaluation"),
            (thinned.Intercepted(theirs), (), None),
            (thinned.Intercepted(theirs), (0,), in_evaluation),
        ):
            found = warnings_of(model, *training)
            assert [each.startswith(expected or "") for each in found] == [True] * (2 if expected else 0)

    @pytest.mark.usefixtures("fresh_compiler")
    def test_warns_when_it_is_compiled_or_exported(self) -> None:
        keyed, given = Keyed(nn.Sequential(thinned.Dropout(0.5))).eval(), {"key": torch.tensor(7)}
        with pytest.warns(UserWarning, match="no mask depends on the key"):
            torch.export.export(keyed, (image(4),), given, strict=False)
        with pytest.warns(UserWarning, match="no mask depends on the key"):
            torch.compile(keyed, backend="eager", fullgraph=True)(image(4), **given)

    def test_a_sample_has_its_mask(self, keyed: nn.Module) -> None:
        _, whole = call(keyed, image(4), 7, torch.tensor([5, 6, 7, 8]))
        _, part = call(keyed, image(4)[:2], 7, torch.tensor([8, 6]))
        assert part.equal(whole[[3, 1]])

    @pytest.mark.parametrize("make", [zoo.attention, partial(zoo.bert, num_hidden_layers=1), zoo.lstm])
    def test_models(self, make: Callable[[], nn.Module]) -> None:
        """All sites are in training mode, also those that are no modules."""
        model = thinned.convert(make())
        keyed, arguments = Keyed(thinned.Intercepted(model)), inputs(model)
        with torch.no_grad():
            program = torch.export.export(keyed, (), {**arguments, "key": torch.tensor(1)}, strict=False)
            assert random_ones(operations(program)) == [
                "thinned.fold.default",
                "thinned.masked_affine.default",
            ]
            first, second = (tensor_of(program.module()(**arguments, key=torch.tensor(k))) for k in (3, 4))
            assert first.equal(tensor_of(keyed(**arguments, key=torch.tensor(3))))
        assert not first.equal(second)

    @pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, keyed: nn.Module, through: Callable[[Any], Any]) -> None:
        assert_equal(call(through(keyed), image(4), 7), call(keyed, image(4), 7))


TABLE = decompositions()
KEEP, UNIFORM, AFFINE = (
    TABLE[getattr(torch.ops.thinned, name).default] for name in ("keep_mask", "uniform", "masked_affine")
)
GEOMETRIES = {
    "one": ((), Geometry(())),
    "plain": ((3, 200), shared((3, 200))),
    "shared": ((3, 4, 5, 2), shared((3, 4, 5, 2), (0, 3))),
    "a shard": ((3, 50), Geometry((400, 2), 77)),
    "far": ((3, 100), Geometry((100, 1), 2**39 - 100)),
    "none": ((0, 5), shared((0, 5))),
}


class Small(nn.Module):
    """A model with few masks: each is hundreds of nodes when it is lowered."""

    def __init__(self, *rates: float) -> None:
        super().__init__()
        self.rates = rates

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(thinned.functional.dropout(torch.ones_like(x), p) for p in self.rates)


class Each(nn.Module):
    """Each of the three operations: with a key, with a key for each row, with a shared decision."""

    def forward(self, x: Tensor, key: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
        ones = torch.ones_like(x)
        return (
            thinned.functional.dropout(ones, 0.1, key=Key.from_bits(keys)),
            thinned.functional.dropout2d(ones, 0.5, key=Key.from_bits(key)),
            thinned.keep_mask(Key.from_bits(key), x.shape, 0.5),
            torch.ops.thinned.uniform(key, [50], [1], 100),
        )


@cache
def lowered(name: str) -> tuple[nn.Module, ExportedProgram]:
    if name == "keyed":
        keyed = Keyed(Small(0.1))
        return keyed, exported(keyed).run_decompositions(decompositions())
    arguments, shapes = (image(4), torch.tensor(1), torch.arange(4)), ({0: BATCH}, None, {0: BATCH})
    program = torch.export.export(Each(), arguments, dynamic_shapes=shapes, strict=False)
    return Each(), program.run_decompositions(decompositions())


def named_inputs(name: str, batch: int, key: int) -> dict[str, Tensor]:
    if name == "keyed":
        return {"args_0": image(batch), "key": torch.tensor(key)}
    ids = torch.arange(batch) * 2**33 - 1
    return {"x": image(batch), "key": torch.tensor(key), "keys": Key(key).fold(ids).bits}


def outputs_of(model: Any, name: str, batch: int, key: int) -> tuple[Tensor, ...]:
    first, *others = named_inputs(name, batch, key).values()
    found: tuple[Tensor, ...] = model(first, key=others[0]) if name == "keyed" else model(first, *others)
    return found


class TestDecompositions:
    @pytest.mark.parametrize("p", [0.0, 1e-9, 0.1, 0.25, 1 / 3, 0.5, 0.75, 1.0])
    def test_the_specification(self, p: float) -> None:
        T, _ = threshold_and_scale(p)
        for key, start in ((7, 0), (2**64 - 5, 1000), (2**40 + 1, 2**39 - 100)):
            bits = torch.tensor(key if key < 2**63 else key - 2**64)
            ours = KEEP(bits, (5, 100), (100, 1), start, T)
            np.testing.assert_array_equal(ours.numpy(), spec.keep_mask(key, (5, 100), p, start=start))
            index = np.arange(500, dtype=np.uint64) + np.uint64(start)
            numbers = UNIFORM(bits, (500,), (1,), start).numpy().astype(np.int64) + 2**31
            np.testing.assert_array_equal(numbers, spec.uniform(key, index))

    @pytest.mark.parametrize("name", GEOMETRIES)
    @pytest.mark.parametrize("keys", [False, True], ids=["a key", "a key a row"])
    def test_the_operations(self, name: str, keys: bool) -> None:
        shape, geometry = GEOMETRIES[name]
        if keys and shape:
            geometry = Geometry((0, *geometry.strides[1:]), geometry.base)
        key = torch.tensor([7, -5, 2**40])[: shape[0]] if keys and shape else torch.tensor(7)
        T = threshold_and_scale(0.3)[0]
        operations = torch.ops.thinned
        assert KEEP(key, shape, *geometry, T).equal(operations.keep_mask(key, shape, *geometry, T))
        assert UNIFORM(key, shape, *geometry).equal(operations.uniform(key, shape, *geometry))
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64):
            x = torch.randn(shape).to(dtype)
            if len(shape) == 4:
                x = x.to(memory_format=torch.channels_last)
            ours = AFFINE(x, key, *geometry, T, 1.3, 0.25, -2.0)
            theirs = operations.masked_affine(x, key, *geometry, T, 1.3, 0.25, -2.0)
            assert ours.equal(theirs)
            assert ours.stride() == theirs.stride()

    @pytest.mark.parametrize("name", ["keyed", "each"])
    def test_a_program(self, name: str) -> None:
        model, plain = lowered(name)
        assert not any("thinned" in name for name in operations(plain))
        for batch, key in zip((4, 9, 2), KEYS, strict=True):
            assert_equal(outputs_of(plain.module(), name, batch, key), outputs_of(model, name, batch, key))

    @pytest.mark.parametrize("name", ["keyed", "each"])
    def test_onnx(self, name: str, in_onnx: Callable[..., Any]) -> None:
        model, plain = lowered(name)
        types, run = in_onnx(plain)
        assert random_ones(types) == []
        for batch in (4, 9, 2, 1):
            for key in KEYS:
                there = run(**named_inputs(name, batch, key))
                for a, b in zip(there, outputs_of(model, name, batch, key), strict=True):
                    np.testing.assert_array_equal(a, b.numpy())
