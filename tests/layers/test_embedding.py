"""EmbeddingDropout: whole words, each at all its places or at none."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import chance
import oracle
import thinned
from thinned.compare.laws import Verdict, examine
from thinned.compare.implementation import Implementation
from thinned.compare.layers.embedding import ENTRIES, EmbeddingDropoutFormula, make_embedding_formula
from thinned.compare.settings import Settings
from thinned.functional import embedding_dropout

KEY = thinned.Key(7)
LAWS = {law.name: law for law in ENTRIES[0].laws}
Q = round(0.7 * 2**32) / 2**32


@pytest.mark.usefixtures("subject")
def test_formula() -> None:
    weight, words = torch.randn(50, 6), torch.randint(50, (7, 40))
    mask = torch.from_numpy(
        oracle.keep_mask(KEY.bits, (50,), thinned.geometry.shared((50,)), round(Q * 2**32))
    )
    assert mask.equal(thinned.keep_mask(KEY, (50,), 0.3))
    y = embedding_dropout(words, weight, 0.3, key=KEY)
    oracle.assert_same(y, torch.where(mask[words][..., None], weight[words] * (1 / Q), 0))
    oracle.assert_same(embedding_dropout(words.int(), weight, 0.3, key=KEY), y)
    oracle.assert_same(embedding_dropout(words[0, 0], weight, 0.3, key=KEY), y[0, 0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_special_numbers(dtype: torch.dtype) -> None:
    """As the specification has it, which rounds once; what is dropped is +0."""
    weight = oracle.specials((60, 5), dtype)
    y = embedding_dropout(torch.arange(60), weight, 0.3, key=KEY)
    oracle.assert_same(y, oracle.dropout(weight, KEY.bits, 0.3, (1,)))


@pytest.mark.usefixtures("subject")
def test_a_key_for_each_sequence() -> None:
    weight, words = torch.randn(50, 6), torch.randint(50, (4, 5, 8))
    ids = torch.arange(4)
    y = embedding_dropout(words, weight, key=KEY.fold(ids), p=0.5)
    for n in range(4):
        oracle.assert_same(y[n], embedding_dropout(words[n], weight, 0.5, key=KEY.fold(n)))
    order = torch.tensor([2, 0, 3, 1])
    oracle.assert_same(embedding_dropout(words[order], weight, 0.5, key=KEY.fold(order)), y[order])


def test_chance() -> None:
    weight = torch.ones(100_000, 1)
    mask, other = (
        (embedding_dropout(torch.arange(100_000), weight, 0.3, key=KEY.fold(i)) != 0).numpy()
        for i in range(2)
    )
    assert chance.rate(mask, 0.3) > chance.FALSE_ALARM
    for pair in [(mask, other), (mask[::2], mask[1::2])]:
        assert chance.independence(*pair, p=0.3) > chance.FALSE_ALARM
    values = embedding_dropout(torch.arange(100_000), weight, 0.3, key=KEY).double().numpy()
    assert chance.mean(values, 1.0, 0.3 / 0.7) > chance.FALSE_ALARM


def test_as_the_formula_in_distribution() -> None:
    """How many of the places of 4 words, at 1, 2, 3 and 4 places, are kept."""
    torch.manual_seed(0)
    words = torch.tensor([0, 1, 1, 2, 2, 2, 3, 3, 3, 3])
    counts = []
    for layer in (thinned.EmbeddingDropout, EmbeddingDropoutFormula):
        module = layer(nn.Embedding.from_pretrained(torch.ones(4, 1)), 0.3)
        kept = torch.stack([(module(words) != 0).sum() for _ in range(4000)])
        counts.append(np.bincount(kept.numpy(), minlength=11))
    assert stats.chi2_contingency(np.array(counts)).pvalue > chance.FALSE_ALARM


def elementwise(p: float = 0.1, words: int = 40, size: int = 8) -> nn.Module:
    class Elementwise(EmbeddingDropoutFormula):
        def forward(self, words: Tensor) -> Tensor:
            return nn.functional.dropout(self.embedding(words), self.p)

    return Elementwise(nn.Embedding(words, size), p)


def too_often(p: float = 0.1, words: int = 40, size: int = 8) -> nn.Module:
    return make_embedding_formula(p * 1.02, words, size)


@pytest.mark.parametrize(
    ("law", "wrong"),
    [("word", elementwise), ("sharing", elementwise), ("rate", too_often), ("kept values", too_often)],
)
def test_wrong_laws_are_seen(law: str, wrong: type[nn.Module]) -> None:
    assert examine(LAWS[law], Implementation("wrong", wrong), Settings(quick=True)).verdict is Verdict.BROKEN


@pytest.mark.parametrize(
    "arguments", [{}, {"sparse": True}, {"scale_grad_by_freq": True}, {"padding_idx": 3}], ids=str
)
def test_gradient(arguments: dict[str, object]) -> None:
    """That of the embedding, of the words that are kept; of NaN where dropped, 0."""
    words = torch.randint(20, (6, 30))
    weight = torch.randn(20, 4, requires_grad=True)
    kept = thinned.keep_mask(KEY, (20,), 0.3)[words]
    upstream = torch.randn(6, 30, 4)
    y = embedding_dropout(words, weight, 0.3, key=KEY, **arguments)
    (grad,) = torch.autograd.grad(y, weight, torch.where(kept[..., None], upstream, float("nan")))
    assert grad.is_sparse == arguments.get("sparse", False)
    plain = nn.functional.embedding(words, weight, **arguments)
    (expected,) = torch.autograd.grad(plain, weight, torch.where(kept[..., None], upstream / Q, 0))
    torch.testing.assert_close(grad.to_dense(), expected.to_dense())


def test_max_norm_shortens_the_weight_itself() -> None:
    weight, words = torch.full((6, 4), 5.0), torch.tensor([0, 3])
    y = embedding_dropout(words, weight, 0.5, max_norm=1.0, key=KEY)
    assert weight.norm(dim=1).round().tolist() == [1, 10, 10, 1, 10, 10]
    oracle.assert_same(y, torch.where(thinned.keep_mask(KEY, (6,), 0.5)[words, None], 2 * weight[words], 0))


def test_evaluation_is_the_embedding() -> None:
    embedding, words, state = nn.Embedding(9, 4), torch.randint(9, (5,)), torch.get_rng_state()
    for layer in (thinned.EmbeddingDropout(embedding, 0.5).eval(), thinned.EmbeddingDropout(embedding, 0.0)):
        oracle.assert_same(layer(words), embedding(words))
    assert torch.get_rng_state().equal(state)


def test_the_embedding_is_shared_and_can_be_tied() -> None:
    embedding = nn.Embedding(9, 4, padding_idx=2)
    layer, decoder = thinned.EmbeddingDropout(embedding, 0.5), nn.Linear(4, 9, bias=False)
    decoder.weight = layer.embedding.weight
    loss = decoder(layer(torch.arange(9), key=KEY)).square().sum()
    loss.backward()
    assert embedding.weight.grad is decoder.weight.grad is not None
    assert list(layer.state_dict()) == ["embedding.weight"]
    with torch.no_grad():
        embedding.weight.fill_(1)
    assert layer.eval()(torch.arange(9)).equal(torch.ones(9, 4))


def test_module() -> None:
    embedding = nn.Embedding(20, 4, padding_idx=3, max_norm=1.0, sparse=True)
    layer = thinned.EmbeddingDropout(embedding, 0.3)
    assert "p=0.3" in repr(layer)
    words = torch.arange(20)
    expected = embedding_dropout(words, embedding.weight, 0.3, True, 3, 1.0, sparse=True, key=KEY)
    for each in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        y = each(words, key=KEY)
        oracle.assert_same(y, expected)
        (grad,) = torch.autograd.grad(y.sum(), each.embedding.weight)
        assert grad.is_sparse
        assert thinned.keep_mask(KEY, (20,), 0.3)[3]
        assert grad.to_dense().any(1).equal(thinned.keep_mask(KEY, (20,), 0.3) & (words != 3))


def test_derivatives() -> None:
    weight, words = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([0, 1, 1, 4])
    torch.autograd.gradcheck(lambda w: embedding_dropout(words, w, 0.5, key=KEY), weight)
    torch.autograd.gradgradcheck(lambda w: embedding_dropout(words, w, 0.5, key=KEY), weight)


@pytest.mark.parametrize("p", [-0.1, 1.5, float("nan")])
def test_p_outside_0_to_1(p: float) -> None:
    with pytest.raises(ValueError, match=re.escape(f"between 0 and 1, but got {p}")):
        thinned.EmbeddingDropout(nn.Embedding(2, 3), p)


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
    with pytest.raises(RuntimeError, match=r"keys of shape \(5,\) do not fit"):
        embedding_dropout(words, weight, key=KEY.fold(torch.arange(5)))
    with pytest.raises(TypeError, match=r"write thinned\.Key\(7\)"):
        embedding_dropout(words, weight, key=7)  # type: ignore[arg-type]
