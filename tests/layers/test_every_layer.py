"""What is true of every layer in the catalogue."""

from __future__ import annotations

import inspect
from operator import attrgetter

import pytest
import torch
from torch import Tensor

import oracle
import thinned
from thinned.compare.laws import Verdict, examine
from thinned.compare.layers import ENTRIES, Entry, Law, first
from thinned.compare.settings import Settings

QUICK = Settings(quick=True)
KEY = thinned.Key(7)
WITHOUT_RANDOMNESS = {"RDrop", "DropoutSchedule"}

each_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)
each_random_entry = pytest.mark.parametrize(
    "entry",
    [entry for entry in ENTRIES if entry.name not in WITHOUT_RANDOMNESS],
    ids=lambda entry: entry.name,
)


def result(entry: Entry, key: thinned.Key, dtype: torch.dtype = torch.float32) -> Tensor:
    """What the layer makes of its example under a key, with the same inputs and parameters each time."""
    torch.manual_seed(0)
    layer = entry.own.make(**entry.example.arguments).to(dtype)
    # Not drawn in the dtype: the numbers would differ, and in PyTorch 2.11 some of 16 bits are zero.
    inputs = [x.to(dtype) if x.is_floating_point() else x for x in entry.example.inputs(torch.float32)]
    return first(layer(*inputs, key=key)).detach()


@pytest.fixture(scope="module")
def references() -> dict[str, Tensor]:
    return {entry.name: result(entry, KEY) for entry in ENTRIES if entry.name not in WITHOUT_RANDOMNESS}


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
def test_names_of_laws_are_unique(entry: Entry) -> None:
    assert len({law.name for law in entry.laws}) == len(entry.laws)


@each_entry
def test_is_public_and_documented(entry: Entry) -> None:
    assert getattr(thinned, entry.name) is entry.layer
    assert entry.name in thinned.__all__
    assert ">>> " in (inspect.getdoc(entry.layer) or "")
    assert "Source:" in (inspect.getdoc(entry.layer) or "")
    for name in entry.functional.split(", "):
        place = thinned if name.startswith("schedules.") else thinned.functional
        assert ">>> " in (inspect.getdoc(attrgetter(name)(place)) or "")


@each_random_entry
def test_a_key_decides(entry: Entry, references: dict[str, Tensor]) -> None:
    state = torch.get_rng_state()
    oracle.assert_same(result(entry, KEY), references[entry.name])
    others = [result(entry, KEY.fold(i)) for i in range(20)]
    assert any(
        other.shape != references[entry.name].shape or not other.equal(references[entry.name])
        for other in others
    )
    torch.manual_seed(3)
    torch.set_rng_state(state)


@each_random_entry
@pytest.mark.usefixtures("subject")
def test_backends_agree(references: dict[str, Tensor], entry: Entry) -> None:
    oracle.assert_same(result(entry, KEY), references[entry.name])


@each_random_entry
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_every_floating_dtype_has_the_same_mask(
    entry: Entry, dtype: torch.dtype, references: dict[str, Tensor]
) -> None:
    y, reference = result(entry, KEY, dtype), references[entry.name]
    assert y.dtype == dtype
    assert y.shape == reference.shape
    assert not y[reference == 0].any()
    assert not (reference[y == 0].abs() > 1e-3).any()


@each_random_entry
def test_a_call_draws_one_number_however_it_is_made(entry: Entry) -> None:
    """So that swapping a layer shifts what follows it by one draw, and evaluation by none."""
    torch.manual_seed(0)
    layer, inputs = entry.own.make(**entry.example.arguments), entry.example.inputs(torch.float32)
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


@each_entry
def test_second_derivatives(entry: Entry) -> None:
    torch.manual_seed(0)
    layer = entry.own.make(**entry.example.arguments).double()
    x, *rest = entry.example.inputs(torch.float64)
    if not x.is_floating_point():
        pytest.skip("no gradient in the first input")

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return first(layer(x, *rest)).tanh()

    assert torch.autograd.gradgradcheck(call, x.requires_grad_(), fast_mode=True)


@each_random_entry
def test_repr_names_the_layer(entry: Entry) -> None:
    assert entry.name in repr(entry.own.make(**entry.example.arguments))
