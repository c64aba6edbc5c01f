"""Keys inside compiled code: no graph break, and no recompilation when one changes."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import thinned
from process import output
from thinned import Key, spec

X = torch.ones(4, 50)
Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture(params=["aot_eager", "inductor"])
def compiled(request: pytest.FixtureRequest) -> Compiler:
    return lambda function: torch.compile(function, fullgraph=True, backend=request.param)


def thin(x: Tensor, key: Key) -> Tensor:
    return thinned.functional.dropout(x, 0.5, key=key)


def twice(x: Tensor, key: Key, step: int) -> Tensor:
    key = key.fold("encoder").fold(step)
    return thinned.functional.dropout(thin(x, key.fold("attention")), 0.3, key=key.fold("output"))


# A function, arguments that may compile it, and arguments that must not compile it again.
CALLS: dict[str, tuple[Callable[..., Tensor], list[tuple[Any, ...]], list[tuple[Any, ...]]]] = {
    "another key": (thin, [(X, Key(1))], [(X, Key(seed)) for seed in (2, 2**64 - 1, 0)]),
    "another integer to fold": (
        lambda x, key, step: thin(x, key.fold(step)),
        [(X, Key(1), 5), (X, Key(1), 6)],  # the second makes it dynamic
        [(X, Key(3), step) for step in (7, 2**40, 1000)],
    ),
    "a negative integer": (
        lambda x, key, step: thin(x, key.fold(step)),
        [(X, Key(1), step) for step in (-1, -(2**63), -5)],
        [],
    ),
    "integers beyond 63 bits": (
        lambda x, key, step: thin(x, key.fold(step).fold(-(2**70))),
        [(X, Key(1), step) for step in (3, 4, 2**63, 2**64 - 1, 2**70 + 5, -(2**64) + 1)],
        [(X, Key(1), 7), (X, Key(1), 2**62)],
    ),
    "strings and chains": (twice, [(X, Key(9), step) for step in range(4)], []),
    "a key made inside": (lambda x: thin(x, Key(2**63 + 5).fold(3)), [(X,)], []),
    "a seed from outside": (
        lambda x, seed: thin(x, Key(seed)),
        [(X, seed) for seed in (3, 4, 2**64 - 1, 2**63 + 5)],
        [(X, seed) for seed in (5, -6, 2**62, -(2**63))],
    ),
    "a key for each row": (
        lambda x, key, ids: thin(x, key.fold(ids)),
        [(X, Key(1), torch.arange(4))],
        [(X, Key(2), torch.tensor([9, 9, -1, 2**62]))],
    ),
    "a key that comes out": (lambda key, step: key.fold(step).bits, [(Key(5), 3)], []),
    "the mask": (lambda key: thinned.keep_mask(key, (4, 50), 0.3), [(Key(1),)], [(Key(2),)]),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_the_eager_ones(compiled: Compiler, name: str) -> None:
    function, first, then = CALLS[name]
    fast = compiled(function)
    for arguments in first:
        assert fast(*arguments).equal(function(*arguments))
    with torch.compiler.set_stance("fail_on_recompile"):
        for arguments in then:
            assert fast(*arguments).equal(function(*arguments))


def test_seeds_and_samples_of_an_address_in_compiled_code(compiled: Compiler) -> None:
    model = torch.nn.Sequential(thinned.Dropout(0.5))
    thinned.address(model, seed=0, step=0)

    def run(x: Tensor, seed: int, step: int, samples: Any) -> Tensor:
        with thinned.address(model, seed=seed, step=step, samples=samples):
            return model(x)  # type: ignore[no-any-return]

    fast = compiled(run)
    for seed, step, samples in (
        (3, 4, [5, 6, 7, 8]),
        (2**63 + 5, 2**63, [2**63 + 1, -1, 0, 2**64 - 1]),
        (-1, 2**64 - 1, torch.arange(4)),
    ):
        assert fast(X, seed, step, samples).equal(run(X, seed, step, samples))


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_a_seed_out_of_range_is_refused_in_compiled_code(seed: int) -> None:
    fast = torch.compile(lambda x, seed: thin(x, Key(seed)), backend="aot_eager")
    fast(X, 3)
    with pytest.raises(ValueError, match=f"must be in .*, got {seed}"):
        fast(X, seed)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_integers_beyond_63_bits(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return thin(x, Key(2**64 - 1).fold(2**63).fold(-1))

    assert torch.export.export(Model(), (X,), strict=strict).module()(X).equal(Model()(X))


def test_a_key_of_inference_mode_in_compiled_training(compiled: Compiler) -> None:
    fast = compiled(thin)
    with torch.inference_mode():
        keys = [Key(7), Key(7).fold(torch.arange(4)), Key.from_bits(torch.tensor(7))]
    for key in keys:
        x = X.clone().requires_grad_()
        fast(x, key).sum().backward()
        assert x.grad is not None
        assert x.grad.equal(thin(X, key))


BITS = [7, -1, 2**63 - 1, -(2**63), 0x3243F6A8885A308D, -0x61C8864680B583EB]


def test_children_of_keys_with_high_bits(compiled: Compiler) -> None:
    """One key or many, folded once and in a chain, by integers, strings and tensors."""

    def f(keys: Tensor, data: Tensor) -> tuple[Tensor, ...]:
        first = Key.from_bits(keys[0])
        chain = Key.from_bits(keys).fold(data).fold("site").fold(2**62)
        return first.fold(data).bits, first.fold(data[1]).bits, chain.bits

    keys, fast = torch.tensor(BITS), compiled(f)
    for data in (keys.flip(0), torch.arange(6)):
        children, child, chain = fast(keys, data)
        assert [int(bits) % 2**64 for bits in children] == [spec.fold(BITS[0], int(n)) for n in data]
        assert int(child) % 2**64 == spec.fold(BITS[0], int(data[1]))
        expected = [
            spec.fold(spec.fold(spec.fold(key % 2**64, int(n)), "site"), 2**62)
            for key, n in zip(BITS, data, strict=True)
        ]
        assert [int(bits) % 2**64 for bits in chain] == expected


def addressed(count: int) -> int:
    """How many of ``count`` random steps have another mask or gradient compiled by Inductor than eager."""
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 8),
        thinned.Dropout(0.5),
        torch.nn.Tanh(),
        thinned.Dropout(0.3),
        thinned.DropPath(0.4),
    )
    thinned.address(model, seed=0, step=0)
    fast, x = torch.compile(model, fullgraph=True), torch.randn(6, 8, requires_grad=True)
    number, differ = random.Random(0), 0
    for _ in range(count):
        seed = number.choice(
            [number.randrange(2**64), number.randrange(-(2**63), 2**63), number.randrange(9)]
        )
        step = number.choice([torch.tensor(number.randrange(2**63)), number.randrange(2**63)])
        ids = [number.randrange(-(2**63), 2**63) for _ in range(number.choice([2, 3, 6]))]
        samples = number.choice([None, torch.tensor(ids)])
        results = []
        for run in (model, fast):
            with thinned.address(model, seed=seed, step=step, samples=samples):
                y = run(x)
            (grad,) = torch.autograd.grad(y.square().sum(), x)
            results.append((y.detach(), grad))
        differ += any(not fast.ne(0).equal(eager.ne(0)) for eager, fast in zip(*results, strict=True))
        torch.testing.assert_close(*results)
    return differ


def test_addressed_steps_under_inductor() -> None:
    assert addressed(40) == 0


@pytest.mark.slow
def test_a_thousand_addressed_steps_under_inductor() -> None:
    assert addressed(1000) == 0


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_children_in_plain_operations(backend: str) -> None:
    """Exported graphs have the decomposition in place of the operation."""
    decomposed = thinned.decompositions()[torch.ops.thinned.fold.default]
    fast = torch.compile(decomposed, fullgraph=True, backend=backend)
    keys = torch.tensor(BITS)
    for key, data in ((keys, keys.flip(0)), (keys[2], keys[3])):
        assert fast(key, data).equal(torch.ops.thinned.fold(key, data))


@pytest.mark.slow
def test_generated_code_has_no_undefined_behaviour(tmp_path: Path) -> None:
    """Inductor's C++ for the plain operations, one element at a time, under UBSan."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, which the sanitised code is compiled by")
    compiler = tmp_path / "cxx"
    compiler.write_text(
        '#!/bin/sh\nexec g++ "$@" -fsanitize=signed-integer-overflow -fno-sanitize-recover=all\n'
    )
    compiler.chmod(0o755)
    printed = output(
        f"""
        import torch, torch._inductor.config as config
        from thinned.backends import portable
        config.cpp.cxx, config.cpp.simdlen = (None, {str(compiler)!r}), 1
        keys = torch.tensor({BITS})
        fold, data = portable.fold, keys.flip(0)
        print(torch.compile(fold)(keys, data).equal(fold(keys, data)))
        """,
        TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"),
        TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
    )
    assert printed.split() == ["True"]
