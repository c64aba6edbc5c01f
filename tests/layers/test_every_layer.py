"""Laws and properties of every layer in the catalogue."""

from __future__ import annotations

import builtins
import copy
import inspect
import math
import pickle
import pkgutil
import re
from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import attrgetter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import oracle
import thinned
from layers.test_tools import OF_WEIGHTS, SAMPLE_DIM
from thinned.compare.implementation import first
from thinned.compare.laws import Law, Verdict, examine
from thinned.compare.layers import ENTRIES, Entry
from thinned.compare.settings import Settings
from thinned.layers._module import TorchLayer

QUICK = Settings(quick=True)
KEY = thinned.Key(7)
KEYED = [entry for entry in ENTRIES if entry.name not in ("Masksembles", "RDrop", "DropoutSchedule")]
each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
each_keyed_entry = pytest.mark.parametrize("entry", KEYED, ids=lambda entry: entry.name)


def example(entry: Entry, dtype: torch.dtype = torch.float32) -> tuple[Any, list[Tensor]]:
    """The layer and the inputs of its example, with the same numbers each time."""
    torch.manual_seed(0)
    layer = entry.own.make(**entry.example.arguments).to(dtype)
    # Not drawn in the dtype: the numbers would differ, and in PyTorch 2.11 some of 16 bits are zero.
    return layer, [x.to(dtype) if x.is_floating_point() else x for x in entry.example.inputs(torch.float32)]


def result(entry: Entry, key: thinned.Key, dtype: torch.dtype = torch.float32) -> Tensor:
    layer, inputs = example(entry, dtype)
    return first(layer(*inputs, key=key)).detach()


@pytest.fixture(scope="module")
def references() -> dict[str, Tensor]:
    return {entry.name: result(entry, KEY) for entry in KEYED}


@pytest.mark.parametrize(
    ("entry", "law"),
    [pytest.param(entry, law, id=f"{entry.name}: {law.name}") for entry in ENTRIES for law in entry.laws],
)
def test_law_holds(entry: Entry, law: Law) -> None:
    found = examine(law, entry.own, QUICK)
    assert found.verdict is Verdict.HOLDS, found.measured


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "entry",
    [
        pytest.param(entry, id=entry.name, marks=() if entry.name == "DropBlock2d" else pytest.mark.slow)
        for entry in ENTRIES
        if any(law.name == "torch.compile" for law in entry.laws)
    ],
)
def test_compiles_with_inductor(entry: Entry) -> None:
    """Where the law above stops at the graph, unless it is asked for more."""
    law = next(law for law in entry.laws if law.name == "torch.compile")
    found = examine(law, entry.own, Settings(quick=False))
    assert found.verdict is Verdict.HOLDS, found.measured


@each_entry
def test_names_of_laws_are_unique_and_families_together(entry: Entry) -> None:
    """Each name is a row of the table, and each family a section."""
    assert len({law.name for law in entry.laws}) == len(entry.laws)
    families = [law.family for law in entry.laws]
    assert len(set(families)) == len(list(groupby(families)))


@each_entry
def test_is_public_and_documented(entry: Entry) -> None:
    assert getattr(thinned, entry.name) is entry.layer
    assert entry.name in thinned.__all__
    assert ">>> " in (inspect.getdoc(entry.layer) or "")
    assert "Source:" in (inspect.getdoc(entry.layer) or "")
    for name in entry.functional.split(", "):
        place = thinned if name.startswith("schedules.") else thinned.functional
        assert ">>> " in (inspect.getdoc(attrgetter(name)(place)) or "")


@pytest.mark.parametrize(
    "entry", [each for each in ENTRIES if issubclass(each.layer, nn.Module)], ids=lambda entry: entry.name
)
def test_docstring_says_when_to_use_the_layer_and_which_else(entry: Entry) -> None:
    text = inspect.getdoc(entry.layer) or ""
    when = next((part for part in text.split("\n\n") if part.startswith("Use this l")), "")
    others = set(re.findall(r":class:`(\w+)`", when)) - {entry.name}
    assert others, "no other layer is named beside `Use this layer ...`"
    assert others <= set(thinned.__all__)
    assert f"thinned.{entry.name}(" in text.partition(">>> ")[2]
    named = set(re.findall(r":func:`~?thinned.functional.(\w+)`", text))
    assert ".. math::" in text or set(entry.functional.split(", ")) <= named


@pytest.mark.parametrize("place", [thinned, thinned.functional])
def test_references_of_docstrings_exist(place: Any) -> None:
    known = {*thinned.__all__, *thinned.functional.__all__, *dir(builtins)}
    for name in place.__all__:
        text = inspect.getdoc(getattr(place, name)) or ""
        for reference in re.findall(r":(?:func|class):`~?([\w.]+)`", text):
            if "." in reference:
                assert pkgutil.resolve_name(reference) is not None
            else:
                assert reference in known, f"{name} refers to {reference}"


@each_keyed_entry
def test_a_key_decides(entry: Entry, references: dict[str, Tensor]) -> None:
    oracle.assert_same(result(entry, KEY), references[entry.name])
    others = [result(entry, KEY.fold(i)) for i in range(20)]
    assert any(
        other.shape != references[entry.name].shape or not other.equal(references[entry.name])
        for other in others
    )


@each_keyed_entry
@pytest.mark.usefixtures("backend")
def test_backends_agree(references: dict[str, Tensor], entry: Entry) -> None:
    y, expected = result(entry, KEY), references[entry.name]
    if entry.name in ("GELUDropout", "SiLUDropout"):  # the kernel rounds erf and exp in its own way
        oracle.assert_same(y != 0, expected != 0)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        return
    oracle.assert_same(y, expected)


@each_keyed_entry
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_floating_dtype_has_the_same_mask(
    entry: Entry, dtype: torch.dtype, references: dict[str, Tensor]
) -> None:
    y, reference = result(entry, KEY, dtype), references[entry.name]
    assert y.dtype == dtype
    assert y.shape == reference.shape
    assert not y[reference == 0].any()
    assert not (reference[y == 0].abs() > 1e-3).any()


@each_keyed_entry
def test_a_call_draws_one_number_however_it_is_made(entry: Entry) -> None:
    """So that swapping a layer shifts what follows it by one draw, and evaluation by none."""
    layer, inputs = example(entry)
    torch.manual_seed(1)
    layer(*inputs)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    torch.empty((), dtype=torch.int64).random_()
    assert after.equal(torch.get_rng_state())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    layer.eval()(*inputs)
    assert before.equal(torch.get_rng_state())


@each_keyed_entry
def test_repr_names_the_layer_and_its_arguments(entry: Entry) -> None:
    layer = example(entry)[0]
    text = repr(layer)
    assert text.startswith(f"thinned.{entry.name}(")
    for name, value in entry.example.arguments.items():
        if name in inspect.signature(entry.layer).parameters and (name != "p" or entry.example.p_name):
            assert f"{name}={value!r}" in text or f"{entry.name}({value!r}, {value!r}" in text
    assert f"(0): {text.splitlines()[0]}" in repr(nn.ModuleList([layer]))
    own = type("Own", (type(layer),), {})  # a user's subclass prints by its own name
    layer.__class__ = own
    assert repr(layer) == text.replace(f"thinned.{entry.name}(", "Own(", 1)


@each_keyed_entry
def test_what_is_no_key_or_does_not_fit_is_refused(entry: Entry) -> None:
    layer, inputs = example(entry)
    for wrong, hint in ((7, "7 of type int; write thinned.Key(7)"), ("7", "'7' of type str")):
        with pytest.raises(TypeError, match=re.escape(f"key must be a thinned.Key, got {hint}")):
            layer(*inputs, key=wrong)
    for wrong in (KEY.fold(torch.arange(99)), KEY.fold(torch.arange(4).view(2, 2))):
        with pytest.raises(RuntimeError, match=rf"keys of shape {re.escape(str(tuple(wrong.shape)))}"):
            layer(*inputs, key=wrong)


@each_keyed_entry
def test_a_key_of_torch_is_its_key(entry: Entry) -> None:
    layer, inputs = example(entry)
    key = torch.tensor([7, 2**64 - 1], dtype=torch.uint64)
    results = [layer(*inputs, key=each) for each in (key, thinned.Key(7).fold(2**64 - 1))]
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(RuntimeError, match=r"keys of shape \(99,\)"):
        layer(*inputs, key=key.expand(99, 2))


@each_keyed_entry
def test_what_is_no_tensor_is_refused(entry: Entry) -> None:
    if entry.name == "LayerDrop":
        pytest.skip("takes what its layers take")
    layer, inputs = example(entry)
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        layer([1.0], *inputs[1:])


@pytest.mark.parametrize("p", [None, 0.0], ids=["evaluation", "p = 0"])
@pytest.mark.parametrize(
    "entry", [each for each in KEYED if each.example.identity_in_evaluation], ids=lambda entry: entry.name
)
@pytest.mark.filterwarnings("ignore")  # of torch, on quantized and sparse tensors
def test_any_tensor_passes_where_nothing_is_dropped(entry: Entry, p: float | None) -> None:
    if p is not None and not entry.example.p_name:
        pytest.skip("p is a parameter to learn")
    arguments = {**entry.example.arguments, **({} if p is None else {entry.example.p_name: p})}
    layer = entry.own.make(**arguments).train(p is not None)
    inputs = entry.example.inputs(torch.float32)
    x = inputs[0]
    for odd in (
        *(x.to(dtype) for dtype in (torch.int64, torch.bool, torch.float8_e5m2, torch.complex32)),
        torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
        x.to_sparse(),
        torch.ones((), dtype=torch.uint8),
        torch.ones((1,) * 7, dtype=torch.int32),
        torch.nested.nested_tensor([x, x]),
    ):
        if entry.name != "Dropout1d" or odd.dim() in (2, 3):  # torch refuses others in evaluation too
            assert layer(odd, *inputs[1:]) is odd
    with pytest.raises(TypeError, match="must be Tensor, not list"):
        layer([1.0], *inputs[1:])


@pytest.mark.parametrize(
    "entry", [each for each in KEYED if each.name not in OF_WEIGHTS], ids=lambda each: each.name
)
def test_a_sample_depends_on_its_key_and_not_on_its_place(entry: Entry) -> None:
    layer, inputs = example(entry)
    dim = SAMPLE_DIM.get(entry.name, 0)
    order = torch.arange(inputs[0].shape[dim]).roll(1)
    y = first(layer(*inputs, key=KEY.fold(order.sort().values)))
    other = first(layer(*(x.index_select(dim, order) for x in inputs), key=KEY.fold(order)))
    oracle.assert_same(other, y.index_select(dim, order))


@each_keyed_entry
def test_jacobians(entry: Entry) -> None:
    """Both modes agree, alone and one over the other, for parameters and for a factor of the inputs."""
    layer, inputs = example(entry, torch.float64)
    inputs = [x.narrow(SAMPLE_DIM.get(entry.name, 0), 0, 2) for x in inputs]
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    if len(list(layer.parameters())) > 1 or any(x.numel() > 100 for x in parameters.values()):
        parameters = {}  # a Hessian of few numbers

    def call(values: tuple[dict[str, Tensor], Tensor]) -> Tensor:
        own = [x * values[1] if x.is_floating_point() else x for x in inputs]
        return first(torch.func.functional_call(layer, values[0], tuple(own), {"key": KEY})).sin().sum()

    values = (parameters, torch.tensor(0.7, dtype=torch.float64))
    jacrev, jacfwd = torch.func.jacrev, torch.func.jacfwd
    torch.testing.assert_close(jacfwd(call)(values), jacrev(call)(values))
    expected = jacrev(jacrev(call))(values)
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        torch.testing.assert_close(outer(inner(call))(values), expected)


@each_keyed_entry
def test_p_is_checked_as_a_float(entry: Entry) -> None:
    if not entry.example.p_name:
        pytest.skip("p is a parameter to learn")
    shown = "2" if issubclass(entry.layer, TorchLayer) else "2.0"  # as torch.nn, or as the function
    with pytest.raises(ValueError, match=f"but got {re.escape(shown)}$"):
        entry.own.make(**{**entry.example.arguments, entry.example.p_name: 2})


@pytest.mark.parametrize("p", [-0.1, 1.5, math.nan])
@each_keyed_entry
def test_p_that_is_set_later_is_checked_and_used(entry: Entry, p: float) -> None:
    layer, inputs = example(entry)
    name = entry.example.p_name
    if not hasattr(layer, name):
        pytest.skip("p is a parameter to learn")
    setattr(layer, name, p)
    with pytest.raises(ValueError, match=f"but got {p}"):
        layer(*inputs)
    setattr(layer, name, 0.0)
    expected = entry.own.make(**{**entry.example.arguments, name: 0.0})
    expected.load_state_dict(layer.state_dict())
    oracle.assert_same(first(layer(*inputs, key=KEY)), first(expected(*inputs, key=KEY)))


@each_keyed_entry
def test_the_default_device_is_not_that_of_the_mask(entry: Entry, references: dict[str, Tensor]) -> None:
    layer, inputs = example(entry)
    drawn = []
    for device in ("cpu", "meta"):
        torch.manual_seed(1)
        with torch.device(device):
            oracle.assert_same(first(layer(*inputs, key=thinned.Key(7))).detach(), references[entry.name])
            drawn.append(first(layer(*inputs)))
        drawn.append(torch.get_rng_state())
    assert drawn[0].equal(drawn[2])
    assert drawn[1].equal(drawn[3])


@each_keyed_entry
def test_a_meta_tensor_gives_one(entry: Entry, references: dict[str, Tensor]) -> None:
    layer, inputs = example(entry)
    layer = copy.deepcopy(layer).to("meta")
    for options in ({}, {"key": KEY}):
        y = first(layer(*(x.to("meta") for x in inputs), **options))
        assert y.is_meta
        assert (y.shape, y.dtype) == (references[entry.name].shape, references[entry.name].dtype)


COMPLEX = ["Dropout", "DropBlock2d", "DropHead", "GaussianDropout", "VariationalDropout", "ConcreteDropout"]


@pytest.mark.parametrize("grad", [True, False])
@each_keyed_entry
def test_a_subclass_with_torch_dispatch_stays_one(
    entry: Entry, grad: bool, references: dict[str, Tensor]
) -> None:
    """As DTensor has to; the gradient is of the subclass too."""
    layer, inputs = example(entry)
    wrapped = [TwoTensor(x, x.clone()).requires_grad_(grad and x.is_floating_point()) for x in inputs]
    with torch.set_grad_enabled(grad):
        y = first(layer(*wrapped, key=KEY))
    for part in y.a, y.b:
        torch.testing.assert_close(part.detach(), references[entry.name])
    if y.requires_grad:
        y.sum().backward()
        assert {type(x.grad) for x in wrapped if x.requires_grad} <= {TwoTensor}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("make", [thinned.DropBlock2d, thinned.GaussianDropout, thinned.Dropout])
def test_a_subclass_in_compiled_code(make: Callable[..., nn.Module]) -> None:
    x, layer = torch.ones(2, 3, 9, 9), make(0.3)
    y = torch.compile(layer, backend="aot_eager", fullgraph=True)(TwoTensor(x, x.clone()), key=KEY)
    assert type(y) is TwoTensor
    torch.testing.assert_close(y.a, layer(x, key=KEY))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*COMPLEX, "Zoneout", "EmbeddingDropout"])
def test_a_finite_part_beside_infinity_stays_finite(name: str, training: bool) -> None:
    layer, inputs = example(next(entry for entry in ENTRIES if entry.name == name))
    infinite = [torch.complex(x, x + math.inf) if x.is_floating_point() else x for x in inputs]
    if isinstance(layer, thinned.EmbeddingDropout):
        weight = layer.embedding.weight.data
        layer.embedding.weight = nn.Parameter(
            torch.complex(weight, torch.full_like(weight, math.inf)), requires_grad=False
        )
    y = torch.view_as_real(layer.train(training)(*infinite, key=KEY).detach())
    assert y[..., 0].isfinite().all()
    assert (y[..., 1] == math.inf).any()
    assert not y.isnan().any()


LEARNED: dict[str, partial[nn.Module]] = {
    "ConcreteDropout": partial(thinned.ConcreteDropout, 0.3, broadcast_dims=(1,)),
    "VariationalDropout": partial(thinned.VariationalDropout, 0.3, num_features=(4, 1)),
    "VariationalDropout of one alpha": partial(thinned.VariationalDropout, 0.9, max_alpha=math.inf),
    "VariationalLSTM": partial(thinned.VariationalLSTM, 3, 4, 2, bidirectional=True, weight_p=0.5),
    "VariationalGRU": partial(thinned.VariationalGRU, 3, 4, 2, bidirectional=True, weight_p=0.5),
}
each_learned = pytest.mark.parametrize("make", LEARNED.values(), ids=LEARNED)


def spoil(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        parameter.data.fill_(math.nan)
    return layer


def reset(layer: nn.Module) -> nn.Module:
    """Call ``reset_parameters`` as distributed trainers and ``model.apply`` do."""
    torch.manual_seed(0)
    return layer.apply(lambda module: getattr(module, "reset_parameters", int)())


def on_meta(make: partial[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        layer = nn.Sequential(make())
    assert all(parameter.is_meta for parameter in layer.parameters())
    return spoil(layer.to_empty(device="cpu"))[0]  # type: ignore[index]


@pytest.mark.parametrize(
    "left",
    [
        lambda make: spoil(make()),
        on_meta,
        lambda make: spoil(nn.utils.skip_init(make.func, *make.args, device="cpu", **make.keywords)),
        lambda make: spoil(copy.deepcopy(make())),
        lambda make: pickle.loads(pickle.dumps(spoil(make()))),
    ],
    ids=["after training", "on meta", "skip_init", "copied", "pickled"],
)
@each_learned
def test_reset_parameters_restores_what_the_constructor_set(
    make: partial[nn.Module], left: Callable[[partial[nn.Module]], nn.Module]
) -> None:
    torch.manual_seed(0)
    made = make()
    restored = reset(left(make)).state_dict()
    assert list(restored) == list(made.state_dict())
    for name, value in made.state_dict().items():
        oracle.assert_same(restored[name], value)


@each_learned
def test_device_and_dtype_of_parameters(make: partial[nn.Module]) -> None:
    parameters = list(make(device="meta", dtype=torch.float64).parameters())
    assert parameters
    assert all(parameter.is_meta and parameter.dtype == torch.float64 for parameter in parameters)


@each_entry
def test_a_layer_with_parameters_of_its_own_is_among_the_learned(entry: Entry) -> None:
    own = list(example(entry)[0].parameters(recurse=False))
    assert bool(own) == (entry.name in LEARNED)
