"""Keys: their values, children, equality, printing and travelling."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import thinned
from thinned import Key, spec

BATCH = Key(7).fold(torch.arange(6).reshape(2, 3))


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
    with pytest.raises(TypeError, match="folds an integer, a string or an int64 tensor, got "):
        Key(7).fold(data)  # type: ignore[arg-type]


def test_fold_of_a_tensor_of_another_dtype() -> None:
    with pytest.raises(TypeError, match=r"must be int64, got torch\.int32"):
        Key(7).fold(torch.arange(3, dtype=torch.int32))


@pytest.mark.parametrize("bits", [7, torch.tensor(7.0), torch.tensor(7, dtype=torch.int32)], ids=repr)
def test_bits_of_another_type(bits: object) -> None:
    with pytest.raises(TypeError, match="bits must be an int64 tensor, got "):
        Key.from_bits(bits)  # type: ignore[arg-type]


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


def test_repr_of_a_batch_makes_it_again() -> None:
    key = Key.from_bits(torch.tensor([1, -1]))
    assert eval(repr(key), {"Key": Key, "tensor": torch.tensor}) == key


@pytest.mark.parametrize("key", [Key(0), Key(2**64 - 1), BATCH], ids=repr)
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
