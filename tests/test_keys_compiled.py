"""Keys inside compiled code: no graph break, and no recompilation when one changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import thinned
from thinned import Key

X = torch.ones(4, 50)

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_another_key_is_no_recompile() -> None:
    def f(x: Tensor, key: Key) -> Tensor:
        return thinned.functional.dropout(x, 0.5, key=key)

    fast = compiled(f)
    fast(X, Key(1))
    with torch.compiler.set_stance("fail_on_recompile"):
        for seed in (2, 2**64 - 1, 0):
            assert fast(X, Key(seed)).equal(f(X, Key(seed)))


def test_another_integer_to_fold_is_no_recompile() -> None:
    def f(x: Tensor, key: Key, step: int) -> Tensor:
        return thinned.functional.dropout(x, 0.5, key=key.fold(step))

    fast = compiled(f)
    for step in (5, 6):  # the second makes it dynamic
        fast(X, Key(1), step)
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in (7, 2**40, 1000):
            assert fast(X, Key(3), step).equal(f(X, Key(3), step))


def test_a_negative_integer_is_the_same_child() -> None:
    def f(x: Tensor, key: Key, step: int) -> Tensor:
        return thinned.functional.dropout(x, 0.5, key=key.fold(step))

    fast = compiled(f)
    for step in (-1, -(2**63), -5):
        assert fast(X, Key(1), step).equal(f(X, Key(1), step))


def test_strings_and_chains() -> None:
    def f(x: Tensor, key: Key, step: int) -> Tensor:
        key = key.fold("encoder").fold(step)
        y = thinned.functional.dropout(x, 0.5, key=key.fold("attention"))
        return thinned.functional.dropout(y, 0.3, key=key.fold("output"))

    fast = compiled(f)
    for step in range(4):
        assert fast(X, Key(9), step).equal(f(X, Key(9), step))


def test_keys_made_inside() -> None:
    def f(x: Tensor) -> Tensor:
        return thinned.functional.dropout(x, 0.5, key=Key(2**63 + 5).fold(3))

    assert compiled(f)(X).equal(f(X))


def test_a_seed_from_outside() -> None:
    def f(x: Tensor, seed: int) -> Tensor:
        return thinned.functional.dropout(x, 0.5, key=Key(seed))

    fast = compiled(f)
    for seed in (3, 4, 5, -6):
        assert fast(X, seed).equal(f(X, seed))


def test_a_key_for_each_row() -> None:
    def f(x: Tensor, key: Key, ids: Tensor) -> Tensor:
        return thinned.functional.dropout(x, 0.5, key=key.fold(ids))

    fast = compiled(f)
    fast(X, Key(1), torch.arange(4))
    with torch.compiler.set_stance("fail_on_recompile"):
        ids = torch.tensor([9, 9, -1, 2**62])
        y = fast(X, Key(2), ids)
    assert y.equal(f(X, Key(2), ids))
    assert y[0].equal(y[1])


def test_a_key_that_comes_out() -> None:
    def f(key: Key, step: int) -> Tensor:
        return key.fold(step).bits

    assert int(compiled(f)(Key(5), 3)) % 2**64 == thinned.spec.fold(5, 3)


def test_the_mask() -> None:
    def f(key: Key) -> Tensor:
        return thinned.keep_mask(key, (4, 50), 0.3)

    fast = compiled(f)
    fast(Key(1))
    with torch.compiler.set_stance("fail_on_recompile"):
        assert fast(Key(2)).equal(f(Key(2)))


def test_inductor() -> None:
    """Its C++ compiler rules out that int64 overflows; where a product did, half of the keys were wrong."""
    names = [f"encoder.{layer}.dropout" for layer in range(8)]

    def f(key: Key) -> Tensor:
        return torch.stack([key.fold(name).bits for name in names])

    for seed in range(4):
        assert torch.compile(f, fullgraph=True)(Key(seed)).equal(f(Key(seed)))
