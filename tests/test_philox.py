"""Philox4x32 against the known answers of its authors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from backend_under_test import BackendUnderTest
from thinned import spec
from thinned.geometry import Geometry
from thinned.philox import high32, join, low32, philox4x32, signed64


class Answer(NamedTuple):
    rounds: int
    counter: tuple[int, ...]
    key: tuple[int, ...]
    words: tuple[int, ...]


def read(path: Path) -> list[Answer]:
    answers = []
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            rounds, *words = line.split()
            numbers = tuple(int(word, 16) for word in words)
            answers.append(Answer(int(rounds), numbers[:4], numbers[4:6], numbers[6:]))
    return answers


ANSWERS = read(Path(__file__).parent / "data" / "philox4x32.kat")
each_answer = pytest.mark.parametrize(
    "answer", ANSWERS, ids=lambda a: f"{a.rounds} rounds, {a.counter[0]:08x}"
)


def test_answers_cover_both_numbers_of_rounds() -> None:
    assert sorted(answer.rounds for answer in ANSWERS) == [7, 7, 7, 10, 10, 10]


@each_answer
def test_specification(answer: Answer) -> None:
    assert tuple(spec.philox4x32(answer.counter, answer.key, answer.rounds)) == answer.words
    arrays = [np.array([word, 0, word]) for word in answer.counter]
    assert spec.philox4x32(arrays, answer.key, answer.rounds)[:, ::2].T.tolist() == [list(answer.words)] * 2


@each_answer
def test_integers(answer: Answer) -> None:
    c0, c1, c2, c3 = answer.counter
    key = answer.key[0] | answer.key[1] << 32
    assert philox4x32((c0, c1, c2, c3), key, answer.rounds) == answer.words
    assert philox4x32((c0, c1, c2, c3), signed64(key), answer.rounds) == answer.words


@pytest.mark.parametrize("rounds", [7, 10])
def test_tensors(rounds: int) -> None:
    answers = [answer for answer in ANSWERS if answer.rounds == rounds]
    c0, c1, c2, c3 = torch.tensor([answer.counter for answer in answers]).T
    key = torch.tensor([signed64(answer.key[0] | answer.key[1] << 32) for answer in answers])
    words = torch.stack(philox4x32((c0, c1, c2, c3), key, rounds), dim=-1)
    assert words.tolist() == [list(answer.words) for answer in answers]


def test_backends(backend: BackendUnderTest) -> None:
    """At p = 0.5 plane 0 decides alone, so that the mask of block 0 is the complement of its words."""
    answer = ANSWERS[0]
    assert answer[:3] == (7, (0, 0, 0, 0), (0, 0))
    mask = backend.keep_mask(torch.tensor(0), (128,), Geometry((1,)), 2**31)
    words = [sum(1 << b for b in range(32) if not mask[32 * w + b]) for w in range(4)]
    assert tuple(words) == answer.words


@pytest.mark.parametrize("value", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, -1, -(2**63), -(2**32)])
def test_halves_of_a_number(value: int) -> None:
    unsigned = value % 2**64
    assert low32(value) == int(low32(torch.tensor(value))) == unsigned % 2**32
    assert high32(value) == int(high32(torch.tensor(value))) == unsigned >> 32
    assert signed64(unsigned) == join(low32(value), high32(value)) == value
    number = torch.tensor(value)
    assert join(low32(number), high32(number)).equal(number)


class Int64(int):
    """An integer that refuses a result beyond 64 bits, where C++ would overflow."""

    def __new__(cls, value: int) -> Int64:
        assert -(2**63) <= value < 2**63, f"{value} does not fit into int64"
        return super().__new__(cls, value)


def _checked(name: str) -> Callable[[int, int], Int64]:
    return lambda *operands: Int64(getattr(int, name)(*operands))


for _name in ("add", "sub", "mul", "lshift", "rshift", "and", "or", "xor"):
    setattr(Int64, f"__{_name}__", _checked(f"__{_name}__"))
    setattr(Int64, f"__r{_name}__", _checked(f"__r{_name}__"))


@pytest.mark.parametrize("counter", [0, 1, 2**31, 2**32 - 1])
@pytest.mark.parametrize("key", [0, 2**63 - 1, -(2**63), -1])
def test_nothing_overflows_64_bits(counter: int, key: int) -> None:
    """In C++, which Inductor makes of these lines, a signed integer that overflows may become anything."""
    words = philox4x32((Int64(counter), Int64(counter), Int64(counter), 0), Int64(key), rounds=10)
    assert all(type(word) is Int64 for word in words)
    assert type(join(words[0], words[1])) is Int64
