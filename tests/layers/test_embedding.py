"""EmbeddingDropout: whole words, each at all its positions or at none."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import chance
import oracle
import thinned
from thinned.compare.laws import Verdict
from thinned.compare.layers.embedding import ENTRIES, EmbeddingDropoutFormula, make_embedding_formula
from thinned.functional import embedding_dropout
from verdicts import verdict

KEY = thinned.Key(7)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_specification(dtype: torch.dtype) -> None:
    """The weight under a mask of (words, 1), rounded once, for words of either dtype and of no dimension."""
    weight, words = oracle.specials((50, 5), dtype), torch.randint(50, (4, 5, 8))
    expected = oracle.dropout(weight, KEY.bits, 0.3, (1,))[words]
    oracle.assert_same(embedding_dropout(words, weight, 0.3, key=KEY), expected)
    oracle.assert_same(embedding_dropout(words.int(), weight, 0.3, key=KEY), expected)
    oracle.assert_same(embedding_dropout(words[0, 0, 0], weight, 0.3, key=KEY), expected[0, 0, 0])
    y = embedding_dropout(words, weight, 0.3, key=KEY.fold(torch.arange(4)))
    for n in range(4):
        oracle.assert_same(y[n], oracle.dropout(weight, KEY.fold(n).bits, 0.3, (1,))[words[n]])


def test_as_the_formula_in_distribution() -> None:
    """How many of the positions of 4 words, at 1, 2, 3 and 4 positions, are kept."""
    words, kept = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3]), []
    for layer in (thinned.EmbeddingDropout, EmbeddingDropoutFormula):
        module = layer(nn.Embedding.from_pretrained(torch.ones(4, 1)), 0.3)
        kept.append(torch.stack([(module(words) != 0).sum() for _ in range(4000)]).numpy())
    assert chance.homogeneity(*kept) > chance.FALSE_ALARM


class Elementwise(EmbeddingDropoutFormula):
    def forward(self, words: Tensor) -> Tensor:
        return nn.functional.dropout(self.embedding(words), self.p)


def elementwise(p: float = 0.1, words: int = 40, size: int = 8) -> nn.Module:
    return Elementwise(nn.Embedding(words, size), p)


def too_often(p: float = 0.1, words: int = 40, size: int = 8) -> nn.Module:
    return make_embedding_formula(p * 1.02, words, size)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [
        ("word", elementwise),
        ("sharing", elementwise),
        ("drop rate at p = 0.3", too_often),
        ("kept values", too_often),
    ],
)
def test_wrong_laws_are_seen(law: str, wrong: Callable[..., nn.Module]) -> None:
    assert verdict(ENTRIES[0], law, wrong) is Verdict.BROKEN


@pytest.mark.parametrize(
    "arguments", [{}, {"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": 3}], ids=str
)
def test_gradient(arguments: dict[str, object]) -> None:
    """The embedding's gradient for kept words; 0 for dropped words, NaN included."""
    words, upstream = torch.randint(20, (6, 30)), torch.randn(6, 30, 4)
    weight = torch.randn(20, 4, requires_grad=True)
    kept = thinned.keep_mask(KEY, (20,), 0.3)[words][..., None]
    y = embedding_dropout(words, weight, 0.3, key=KEY, **arguments)
    (grad,) = torch.autograd.grad(y, weight, torch.where(kept, upstream, float("nan")))
    assert grad.is_sparse == arguments.get("sparse", False)
    plain = nn.functional.embedding(words, weight, **arguments)
    q = thinned.spec.threshold(0.3) / 2**32
    (expected,) = torch.autograd.grad(plain, weight, torch.where(kept, upstream / q, 0))
    torch.testing.assert_close(grad.to_dense(), expected.to_dense())


@pytest.mark.parametrize("keys", [KEY, KEY.fold(torch.arange(6))], ids=["one key", "a key a row"])
@pytest.mark.parametrize(
    "options", [{"sparse": True}, {"scale_grad_by_freq": True, "padding_idx": 3}], ids=str
)
def test_a_dropped_word_has_no_row_of_the_gradient(options: dict[str, object], keys: thinned.Key) -> None:
    """Frequencies are those of all places, also of the rows that drop the word."""
    words, upstream = torch.randint(20, (6, 30)), torch.randn(6, 30, 4)
    weight = torch.randn(20, 4, requires_grad=True)
    y = embedding_dropout(words, weight, 0.5, key=keys, **options)
    (grad,) = torch.autograd.grad(y, weight, upstream)
    mask = thinned.keep_mask(keys, (*keys.shape, 20), 0.5).expand(6, 20)
    kept = mask.gather(1, words)[..., None]
    plain = nn.functional.embedding(words, weight, **options)
    (expected,) = torch.autograd.grad(plain, weight, torch.where(kept, 2 * upstream, 0))
    torch.testing.assert_close(grad.to_dense(), expected.to_dense())
    if grad.is_sparse:
        assert grad._indices()[0].equal(words[kept[..., 0]])


def test_words_outside_of_the_embedding_are_refused_though_dropped() -> None:
    for words in (torch.tensor([0, 9]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError, match="out of range"):
            embedding_dropout(words, torch.ones(9, 2), 1.0)


def test_second_derivative() -> None:
    weight, words = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 1, 4])
    torch.autograd.gradgradcheck(lambda w: embedding_dropout(words, w, 0.5, key=KEY), weight)


def test_max_norm_shortens_the_weight_itself() -> None:
    weight, words = torch.full((6, 4), 5.0), torch.tensor([0, 3])
    y = embedding_dropout(words, weight, 0.5, max_norm=1.0, key=KEY)
    assert weight.norm(dim=1).round().tolist() == [1, 10, 10, 1, 10, 10]
    kept = thinned.keep_mask(KEY, (6,), 0.5)[words]
    assert kept.tolist() == [False, True]  # the norm of a dropped word is shortened too
    oracle.assert_same(y, torch.where(kept[:, None], 2 * weight[words], 0))


def test_p_0_is_the_embedding_and_draws_no_number() -> None:
    embedding, words, state = nn.Embedding(9, 4), torch.randint(9, (5,)), torch.get_rng_state()
    oracle.assert_same(thinned.EmbeddingDropout(embedding, 0.0)(words), embedding(words))
    assert torch.get_rng_state().equal(state)


def test_the_embedding_is_shared_and_can_be_tied() -> None:
    embedding = nn.Embedding(9, 4, padding_idx=2)
    layer, decoder = thinned.EmbeddingDropout(embedding, 0.5), nn.Linear(4, 9, bias=False)
    decoder.weight = layer.embedding.weight
    decoder(layer(torch.arange(9), key=KEY)).square().sum().backward()
    assert embedding.weight.grad is decoder.weight.grad is not None
    assert list(layer.state_dict()) == ["embedding.weight"]
    with torch.no_grad():
        embedding.weight.fill_(1)
    assert layer.eval()(torch.arange(9)).equal(torch.ones(9, 4))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"padding_idx": 3, "sparse": True},
        {"padding_idx": 3, "max_norm": 1.0, "norm_type": 1.0, "scale_grad_by_freq": True},
    ],
    ids=str,
)
def test_the_arguments_of_the_embedding_are_used(options: dict[str, object], training: bool) -> None:
    layer = thinned.EmbeddingDropout(nn.Embedding(20, 4, **options), 0.3).train(training)
    words, weight = torch.tensor([3, 5, 5, 8]), layer.embedding.weight.detach().clone().requires_grad_()
    results = []
    for y, leaf in (
        (layer(words, key=KEY), layer.embedding.weight),
        (embedding_dropout(words, weight, 0.3, training, **options, key=KEY), weight),
    ):
        (grad,) = torch.autograd.grad(y.sum(), leaf)
        assert grad.is_sparse == ("sparse" in options)
        results.append((y, grad.to_dense()))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_refused() -> None:
    words, weight = torch.arange(3), torch.ones(4, 2)
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Embedding, got Linear"):
        thinned.EmbeddingDropout(nn.Linear(2, 3))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match=re.escape("of shape (words, size), got shape (4,)")):
        embedding_dropout(words, weight[:, 0])
    with pytest.raises(RuntimeError, match=r"complex tensor, got torch\.int64 of shape \(4, 2\)"):
        embedding_dropout(words, weight.long())
    with pytest.raises(RuntimeError, match="indices"):
        embedding_dropout(words.float(), weight)
    with pytest.raises(IndexError, match="out of range"):
        embedding_dropout(words + 2, weight)
