"""Keys: their values, children, equality, printing and travelling."""

from __future__ import annotations

import copy
import importlib
import io
import pickle
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import thinned
from thinned import Key, spec

BATCH = Key(7).fold(torch.arange(6).reshape(2, 3))
STRATIFIED = Key(7).stratified(3, 20)
DRAWS = Key(7).stratified(torch.arange(4), 20)


@pytest.mark.parametrize("seed", [0, 1, 2**63 - 1, 2**63, 2**64 - 1])
def test_value(seed: int) -> None:
    key = Key(seed)
    assert int(key) == seed
    assert repr(key) == f"Key({seed})"
    assert key.shape == ()
    assert key.bits.dtype == torch.int64
    assert int(key.bits) % 2**64 == seed


@pytest.mark.parametrize("seed", [-1, -7, -(2**63)])
def test_negative_seed_stands_for_its_bits(seed: int) -> None:
    assert Key(seed) == Key(seed + 2**64)
    assert repr(Key(seed)) == f"Key({seed + 2**64})"


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 10**30])
def test_seed_out_of_range(seed: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"-2**63 .. 2**64-1, got {seed}")):
        Key(seed)


@pytest.mark.parametrize("seed", [1.0, "7", None, torch.tensor(1.5)], ids=repr)
def test_seed_of_another_type(seed: object) -> None:
    with pytest.raises(TypeError, match="seed must be an integer, got "):
        Key(seed)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [np.int64(1), np.uint8(1), torch.tensor(1), True], ids=repr)
def test_seed_that_is_an_integer_by_another_name(seed: int) -> None:
    assert Key(seed) == Key(1)


@given(st.integers(0, 2**64 - 1), st.integers(-(2**70), 2**70) | st.text())
def test_fold_of_a_number_or_a_string_is_the_specification(seed: int, data: int | str) -> None:
    assert int(Key(seed).fold(data)) == spec.fold(seed, data)


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5), st.integers(0, 2**64 - 1))
def test_fold_of_a_tensor_is_the_specification(data: list[int], seed: int) -> None:
    batch = Key(seed).fold(torch.tensor(data, dtype=torch.int64))
    assert [bits % 2**64 for bits in batch.bits.tolist()] == [spec.fold(seed, one) for one in data]


def test_fold_of_a_batch() -> None:
    """An integer or a string goes to every key; a tensor broadcasts."""
    for data in (5, "name"):
        folded = BATCH.fold(data)
        assert [b % 2**64 for b in folded.bits.flatten().tolist()] == [
            spec.fold(spec.fold(7, i), data) for i in range(6)
        ]
    both = BATCH.fold(torch.tensor([[10], [20]]))
    assert both.shape == (2, 3)
    assert int(both.bits[1, 2]) % 2**64 == spec.fold(spec.fold(7, 5), 20)


def test_fold_of_a_number_by_another_name() -> None:
    assert Key(7).fold(np.int64(3)) == Key(7).fold(3) == Key(7).fold(torch.tensor(3))


@pytest.mark.parametrize("data", [1.0, None, b"name"], ids=repr)
def test_fold_of_another_type(data: object) -> None:
    with pytest.raises(TypeError, match="data must be an integer, a string or an int64 tensor, got "):
        Key(7).fold(data)  # type: ignore[arg-type]


def test_fold_of_a_tensor_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"data must be an int64 tensor .* and torch\.int32"):
        Key(7).fold(torch.arange(3, dtype=torch.int32))


@pytest.mark.parametrize("bits", [7, torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)], ids=repr)
def test_bits_of_another_type(bits: object) -> None:
    with pytest.raises(TypeError, match="bits must be an int64 tensor, got "):
        Key.from_bits(bits)  # type: ignore[arg-type]


PAIRS = torch.tensor([[7, 0], [7, 2**64 - 1], [2**64 - 1, 5]], dtype=torch.uint64)


def test_a_key_of_torch_is_a_fold_of_the_specification() -> None:
    expected = [spec.fold(seed, offset) for seed, offset in PAIRS.tolist()]
    assert [bits % 2**64 for bits in Key.from_torch(PAIRS).bits.tolist()] == expected
    assert [int(Key.from_torch(pair)) for pair in PAIRS] == expected
    assert Key.from_torch(PAIRS.view(3, 1, 2)).shape == (3, 1)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_key_of_torch_serves_as_a_key() -> None:
    x, keys, key = torch.randn(3, 6), Key.from_torch(PAIRS), Key.from_torch(PAIRS[1])
    mask = thinned.keep_mask(keys, x.shape, 0.5)
    assert thinned.keep_mask(PAIRS, x.shape, 0.5).equal(mask)  # type: ignore[arg-type]

    def dropped(x: Tensor, key: Any) -> Tensor:
        return thinned.functional.dropout(x, 0.5, key=key)

    assert torch.func.vmap(dropped)(x, PAIRS).ne(0).equal(mask)
    compiled = torch.compile(dropped, fullgraph=True, backend="aot_eager")
    assert compiled(x, PAIRS).ne(0).equal(mask)
    assert compiled(x, PAIRS[1]).equal(dropped(x, key))

    model = nn.Sequential(thinned.Dropout())
    stock = nn.Dropout()
    keyed = thinned.Keyed(model)
    results: list[list[Tensor]] = []
    each: Any
    for each in (PAIRS[1], key):
        with thinned.address(model, seed=each, step=0):
            results.append([model(x), keyed(x, key=each)])
        with thinned.intercept(key=each):
            results[-1].append(stock(x))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(
    "tensor",
    [PAIRS[0, 0], PAIRS.view(2, 3), torch.zeros(0, dtype=torch.uint64)],
    ids=lambda each: str(each.shape),
)
def test_a_tensor_that_is_no_key_of_torch(tensor: Tensor) -> None:
    message = re.escape(f"uint64 tensor of shape (*, 2), got a Tensor of shape {tuple(tensor.shape)}")
    for call in (Key.from_torch, lambda key: thinned.keep_mask(key, (3, 6), 0.5)):
        with pytest.raises(TypeError, match=message):
            call(tensor)
    with pytest.raises(TypeError, match=r"got a Tensor of shape \(2,\) and torch.int64"):
        Key.from_torch(torch.tensor([7, 0]))


@pytest.mark.skipif(torch.__version__ < "2.14", reason="PyTorch 2.14 made it run on the CPU")
@pytest.mark.filterwarnings("ignore:.*_philox_key_fold_in")  # in 2.15
def test_keys_that_torch_makes() -> None:
    random = importlib.import_module("torch.func._random")
    key = random.key(7)
    assert Key.from_torch(key) == Key(7).fold(0)
    children = random.split(key, 3)
    assert Key.from_torch(random.fold_in(key, 2)) == Key.from_torch(children[2])
    assert Key.from_torch(random.split(children, 4)).shape == (4, 3)
    x = torch.ones(3, 64)
    y = thinned.functional.dropout(x, key=children)
    assert y.ne(0).equal(thinned.keep_mask(Key.from_torch(children), x.shape, 0.5))
    assert len({tuple(row.tolist()) for row in y}) == 3

    def dropped(x: Tensor, key: Tensor, number: int) -> Tensor:
        return thinned.functional.dropout(x, key=random.fold_in(key, number))

    compiled = torch.compile(dropped, fullgraph=True, backend="aot_eager")
    assert compiled(x, key, 2).equal(dropped(x, key, 2))
    mapped = torch.func.vmap(lambda row, key: dropped(row, key, 2))(x, children)
    assert mapped.equal(torch.stack([dropped(x[0], child, 2) for child in children]))


def test_children_are_different_and_the_parent_is_unchanged() -> None:
    key = Key(7)
    children = {int(key.fold(i)) for i in range(1000)} | {int(key.fold(str(i))) for i in range(1000)}
    assert len(children) == 2000
    assert key == Key(7)
    assert key.fold(1).fold(2) != key.fold(2).fold(1)


def test_equality_and_hash() -> None:
    assert Key(7) == Key(7)
    assert hash(Key(7)) == hash(Key(7))
    assert Key(7) != Key(8)
    assert Key(7) != 7
    assert Key(7).fold(torch.arange(3)) == Key(7).fold(torch.arange(3))
    assert hash(BATCH) == hash(copy.deepcopy(BATCH))
    assert Key(7) != Key.from_bits(torch.tensor([7]))
    assert Key.from_bits(torch.tensor([7, 7])) != Key.from_bits(torch.tensor([7, 8]))
    assert {Key(7): "seven"}[Key(7)] == "seven"


@pytest.mark.parametrize("key", [Key.from_bits(torch.tensor([1, -1])), STRATIFIED, DRAWS])
def test_repr_makes_it_again(key: Key) -> None:
    assert eval(repr(key), {"Key": Key, "tensor": torch.tensor}) == key


def test_a_stratified_key_is_the_independent_one_to_other_code() -> None:
    assert STRATIFIED.bits.equal(Key(7).fold(3).bits)
    assert STRATIFIED.fold("name") == Key(7).fold(3).fold("name")
    assert type(STRATIFIED.fold("name")) is Key
    assert int(STRATIFIED) == int(Key(7).fold(3))
    assert DRAWS.shape == (4,)
    assert Key(7).fold(torch.arange(3)).stratified(3).shape == (3,)
    assert Key(7).fold(torch.arange(3)).stratified(torch.arange(4)[:, None]).shape == (4, 3)


def test_equality_of_stratified_keys() -> None:
    assert Key(7).stratified(torch.tensor(3), 20) == STRATIFIED
    assert hash(STRATIFIED) == hash(copy.deepcopy(STRATIFIED))
    assert Key(7).stratified(3, 21) != STRATIFIED
    assert Key(7).stratified(4, 20) != STRATIFIED
    assert Key(8).stratified(3, 20) != STRATIFIED
    assert Key(7).fold(3) != STRATIFIED
    assert Key(7).fold(3) != STRATIFIED
    assert STRATIFIED != 3


@pytest.mark.parametrize(
    ("draw", "strata", "error", "message"),
    [
        (20, 20, ValueError, "draw has to be below strata, 20, but got 20"),
        (-1, 20, ValueError, "draw has to be at least 0, but got -1"),
        (0, 0, ValueError, "strata has to be at least 1, but got 0"),
        (0, 65522, ValueError, "strata has to be at most 65521, but got 65522"),
        (0, 2.5, TypeError, "strata must be an integer, got 2.5 of type float"),
        (1.0, 20, TypeError, "draw must be an integer, got 1.0 of type float"),
        (torch.tensor(1.0), 20, TypeError, "draw must be an int64 tensor where it is a tensor, got "),
    ],
)
def test_refused_draws(draw: Any, strata: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        Key(7).stratified(draw, strata)
    with pytest.raises(RuntimeError, match="must match"):
        BATCH.stratified(torch.arange(4))


def test_stratified_keys_in_a_graph_of_fx() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, draw: Tensor) -> Tensor:
            x = thinned.functional.dropout(x, 0.5, key=Key(7).stratified(draw, 20))
            return thinned.functional.dropout(x, 0.5, key=STRATIFIED)

    x, draw = torch.ones(4, 50), torch.tensor(5)
    assert torch.fx.symbolic_trace(Model())(x, draw).equal(Model()(x, draw))


@pytest.mark.parametrize("key", [Key(0), Key(2**64 - 1), BATCH, STRATIFIED, DRAWS], ids=repr)
def test_copies(key: Key) -> None:
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(key, protocol)) == key
    assert copy.copy(key) == key
    assert copy.deepcopy(key) == key
    assert key.to("cpu") == key


def test_keys_of_a_batch_are_those_of_its_numbers() -> None:
    mask = thinned.keep_mask(Key(7).fold(torch.arange(3)), (3, 100), 0.5)
    for i in range(3):
        assert (mask[i].numpy() == spec.keep_mask(spec.fold(7, i), 100, 0.5)).all()


def test_fold_of_an_integer_under_vmap() -> None:
    bits = torch.tensor([7, -8, 2**62])
    mapped = torch.func.vmap(lambda each: Key.from_bits(each).fold(3).fold("name").bits)(bits)
    assert mapped.equal(Key.from_bits(bits).fold(3).fold("name").bits)


def saved(what: object, **options: Any) -> Any:
    """``what`` after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(what, file)
    file.seek(0)
    return torch.load(file, weights_only=True, **options)


class WithKey(nn.Module):
    key = Key(0)

    def get_extra_state(self) -> Key:
        return self.key

    def set_extra_state(self, state: Key) -> None:
        self.key = state


@pytest.mark.parametrize(
    "key",
    [Key(2**64 - 1), BATCH, BATCH.fold("name"), Key(7).to("meta"), STRATIFIED, STRATIFIED.to("meta"), DRAWS],
    ids=repr,
)
def test_weights_only_loads_a_key(key: Key) -> None:
    def same(loaded: Key) -> bool:
        return repr(loaded) == repr(key) if key.bits.is_meta else loaded == key

    assert same(saved(key))
    assert same(saved({"step": 3, "keys": [key]}, map_location="cpu")["keys"][0])
    module = WithKey()
    module.key = key
    module.load_state_dict(saved(module.state_dict()))
    assert same(module.key)


def test_pickles_of_earlier_versions_load() -> None:
    """A batch of keys was the bound method ``Key.from_bits`` and its bits."""

    class Former:
        def __reduce__(self) -> tuple[Any, ...]:
            return Key.from_bits, (BATCH.bits,)

    assert pickle.loads(pickle.dumps(Former())) == BATCH


@contextmanager
def meta_by_default() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize(
    "default", [lambda: torch.device("meta"), meta_by_default], ids=["with", "set_default"]
)
def test_the_default_device_does_not_matter(default: Callable[[], Any]) -> None:
    ids = torch.arange(3)
    model = nn.Sequential(thinned.Dropout(0.5))
    with default():
        keys = [Key(7), Key(7).fold(2**70), Key(7).fold("name"), Key(7).fold(ids)]
        keys.append(pickle.loads(pickle.dumps(keys[0])))
        mask = thinned.keep_mask(Key(7), (40,), 0.5)
        address = thinned.address(model, seed=7, step=1, samples=[0, 1, 2])
        masks = address.mask_of("0", (3, 40)), address.mask_of("0", (3, 40), 0.5)
        assert repr(keys[0]) == "Key(7)"
        assert keys[3] == Key(7).fold(ids)
    assert keys == [Key(7), Key(7).fold(2**70), Key(7).fold("name"), Key(7).fold(ids), Key(7)]
    assert mask.equal(thinned.keep_mask(Key(7), (40,), 0.5))
    assert masks[0].equal(masks[1])
    assert masks[1].equal(thinned.address(model, seed=7, step=1, samples=ids).mask_of("0", (3, 40), 0.5))


def test_bits_go_to_meta_when_asked() -> None:
    key = Key(7).to("meta")
    assert key.fold(3).bits.is_meta
    assert repr(key).startswith("Key.from_bits(tensor(..., device='meta'")
    assert thinned.keep_mask(Key(7), (3, 4), 0.5, device="meta").is_meta
    assert copy.deepcopy(key).bits.is_meta
    with FakeTensorMode():
        assert repr(Key(7)).startswith("Key.from_bits(FakeTensor(")
        assert thinned.functional.dropout(torch.ones(3, 4), 0.5, key=Key(7).fold(3)).shape == (3, 4)


def batch_of_four() -> Key:
    return Key(7).fold(torch.arange(4))


MADE = {
    "seed": lambda: Key(7),
    "batch": batch_of_four,
    "bits": lambda: Key.from_bits(torch.arange(4)),
    "folded": lambda: batch_of_four().fold(3).fold("name"),
    "copied": lambda: copy.deepcopy(batch_of_four()),
    "pickled": lambda: pickle.loads(pickle.dumps(batch_of_four())),
    "loaded": lambda: saved(Key(7)),
    "compiled": lambda: torch.compile(batch_of_four, backend="aot_eager")(),
    "stratified": lambda: batch_of_four().stratified(torch.arange(4)),
    "one draw of a batch": lambda: batch_of_four().stratified(3),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_a_key_of_inference_mode_serves_autograd(make: Callable[[], Key]) -> None:
    """Eager code saves a batch of keys for backward, GaussianDropout any key."""
    with torch.inference_mode():
        key = make()
    expected = make()
    assert key == expected
    for drop in (thinned.functional.dropout, thinned.functional.gaussian_dropout):
        x = torch.ones(4, 50, requires_grad=True)
        y = drop(x, 0.5, key=key)
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.equal(drop(torch.ones(4, 50), 0.5, key=expected))


def test_an_address_of_inference_mode_serves_training() -> None:
    model = nn.Sequential(nn.Linear(8, 8), thinned.Dropout(0.5))
    with torch.inference_mode():
        address = thinned.address(model, seed=7, step=1, samples=range(4))
        mask = address.mask_of("1", (4, 8))
        with address:
            model(torch.ones(4, 8))
    with address:
        y = model(torch.ones(4, 8))
    y.sum().backward()
    assert mask.equal(y != 0)


def escaped(run: Callable[[Callable[[Tensor], Tensor], Tensor], Any]) -> tuple[Key, Key]:
    """Keys that a function makes while ``run`` calls it."""
    made: list[Key] = []

    def function(x: Tensor) -> Tensor:
        made[:] = Key(7).fold(3), Key(7).fold(torch.arange(4))
        return thinned.functional.dropout(x, 0.5, key=made[1]).sum()

    run(function, torch.ones(4, 8))
    return made[0], made[1]


@pytest.mark.parametrize(
    "run",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vmap(f)(x.expand(3, 4, 8)),
        lambda f, x: torch.no_grad()(f)(x),
        lambda f, x: torch.func.hessian(f)(x),
    ],
    ids=["grad", "jvp", "vmap", "no_grad", "hessian"],
)
def test_keys_made_under_a_transform_outlive_it(run: Callable[..., Any]) -> None:
    one, batch = escaped(run)
    assert one == Key(7).fold(3)
    assert batch == Key(7).fold(torch.arange(4))
    x = torch.ones(4, 50, requires_grad=True)
    thinned.functional.dropout(x, 0.5, key=batch).sum().backward()
    assert x.grad is not None
    assert x.grad.equal(thinned.functional.dropout(torch.ones(4, 50), 0.5, key=Key(7).fold(torch.arange(4))))
