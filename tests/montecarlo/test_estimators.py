"""The estimators: scikit-learn's own checks, and what these do not look at."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_iris
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn

from process import output, python
from thinned.montecarlo import predict
from thinned.montecarlo.estimators import MCDropoutClassifier, MCDropoutRegressor

QUICK: dict[str, Any] = {"hidden_layer_sizes": (20,), "max_iter": 5, "learning_rate": 0.03}
QUICK |= {"samples": 10}
X, Y = load_diabetes(return_X_y=True)


@parametrize_with_checks([MCDropoutClassifier(**QUICK), MCDropoutRegressor(**QUICK)])
def test_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)


def regressor(**options: Any) -> MCDropoutRegressor:
    return MCDropoutRegressor(**{**QUICK, "random_state": 0, **options})


def test_the_seed_decides_and_torchs_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first = regressor().fit(X, Y).predict(X, return_std=True)
    assert torch.get_rng_state().equal(state)
    torch.rand(3)
    np.testing.assert_array_equal(first, regressor().fit(X, Y).predict(X, return_std=True))
    assert not np.array_equal(first, regressor(random_state=1).fit(X, Y).predict(X, return_std=True))


def test_torchs_generator_is_left_alone_after_an_error() -> None:
    def broken(features: int, outputs: int) -> nn.Module:
        torch.rand(features, outputs)
        raise KeyboardInterrupt

    state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        regressor(module=broken).fit(X, Y)
    assert torch.get_rng_state().equal(state)


def test_the_deviation_is_in_the_units_of_y() -> None:
    mean, std = regressor().fit(X, Y).predict(X[:20], return_std=True)
    far_mean, far_std = (
        regressor().fit(100 * X - 7, 1000 * Y + 5e6).predict(100 * X[:20] - 7, return_std=True)
    )
    assert mean.shape == std.shape == (20,)
    np.testing.assert_allclose(far_mean, 1000 * mean + 5e6, rtol=1e-9)
    np.testing.assert_allclose(far_std, 1000 * std, rtol=1e-6)
    assert (std > 0).all()


def test_the_mean_and_the_deviation_are_those_of_predict() -> None:
    """module_ takes features as they are."""
    fitted = regressor().fit(X, Y)
    mean, std = fitted.predict(X, return_std=True)
    options: dict[str, Any] = {"task": "regression", "consistent": True}
    found = predict(fitted.module_, torch.tensor(X), 10, seed=fitted.seed_, **options)
    np.testing.assert_array_equal(found.mean[:, 0], mean)
    np.testing.assert_array_equal(found.std[:, 0], std)


def test_rows_in_reverse() -> None:
    """An array with negative strides."""
    fitted = regressor().fit(X, Y)
    np.testing.assert_allclose(fitted.predict(X[::-1]), fitted.predict(X)[::-1], rtol=1e-9)


def test_several_targets() -> None:
    several = np.c_[Y, -Y, X[:, 0]]
    mean, std = regressor(max_iter=30).fit(X, several).predict(X, return_std=True)
    assert mean.shape == std.shape == several.shape
    assert np.corrcoef(mean[:, 0], mean[:, 1])[0, 1] < -0.9


class Variance(nn.Module):
    """Predicts a mean, and the variance that it was made with."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.mean = nn.Sequential(nn.Linear(features, outputs), nn.Dropout(0.1))
        self.log_variance = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean = self.mean(x)
        return mean, self.log_variance.exp().expand_as(mean)


def test_a_variance_is_learned_and_added() -> None:
    """The residuals' variance, to which the noise of the draws adds."""
    fitted = regressor(module=Variance, max_iter=60).fit(X, Y)
    mean, std = fitted.predict(X, return_std=True)
    found = fitted.predict_distribution(X)
    assert found.aleatoric is not None
    np.testing.assert_allclose(std**2, (found.variance + found.aleatoric)[:, 0], rtol=1e-12)
    residual = float(((mean - Y) ** 2).mean())
    assert 0.8 < float(found.aleatoric.mean()) / residual < 1.3


def with_batch_norm(features: int, outputs: int) -> nn.Module:
    hidden = nn.Linear(features, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2)
    return nn.Sequential(*hidden, nn.Linear(8, outputs))


def test_a_module_with_batch_normalization() -> None:
    """33 examples in batches of 32 leave none of one example, which batch normalization refuses."""
    fitted = MCDropoutClassifier(**{**QUICK, "module": with_batch_norm}, random_state=0)
    x, labels = X[:33], Y[:33] > np.median(Y[:33])
    fitted.fit(x, labels)
    assert not any(module.training for module in fitted.module_.modules())
    before = {name: value.clone() for name, value in fitted.module_.state_dict().items()}
    probabilities = fitted.predict_proba(x)
    assert fitted.predict(x).dtype == bool
    np.testing.assert_allclose(probabilities.sum(1), 1)
    assert all(value.equal(before[name]) for name, value in fitted.module_.state_dict().items())


def test_labels_are_those_of_the_highest_probability() -> None:
    x, y = load_iris(return_X_y=True)
    names = np.array(["setosa", "versicolor", "virginica"])[y]
    fitted = MCDropoutClassifier(**QUICK, random_state=0).fit(x, names)
    probabilities = fitted.predict_proba(x)
    assert (fitted.predict(x) == fitted.classes_[probabilities.argmax(1)]).all()
    assert fitted.score(x, names) > 0.9
    found = fitted.predict_distribution(x)
    np.testing.assert_array_equal(found.mean, probabilities)
    assert found.mutual_information.shape == (150,)


def test_copies_predict_the_same() -> None:
    fitted = regressor().fit(X, Y)
    mean = fitted.predict(X)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(fitted)).predict(X), mean)
    np.testing.assert_array_equal(clone(fitted).fit(X, Y).predict(X), mean)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"p": 0}, "drops nowhere"),
        ({"p": 1.5}, "1.5"),
        ({"hidden_layer_sizes": ()}, "drops nowhere"),
        ({"max_iter": 0}, "max_iter has to be at least 1"),
        ({"batch_size": 0}, "batch_size has to be at least 1"),
    ],
)
def test_what_fit_refuses(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        regressor(**options).fit(X, Y)


def test_a_single_class_is_refused() -> None:
    with pytest.raises(ValueError, match="2 classes or more, but has 1 class"):
        MCDropoutClassifier(**QUICK).fit(X, np.ones(len(X)))


def test_scikit_learn_is_imported_with_the_estimators_alone() -> None:
    code = "import sys, thinned.montecarlo; print([name in sys.modules for name in ('sklearn', 'rich')])"
    assert output(code) == "[False, False]\n"
    without = python("import sys; sys.modules['sklearn'] = None; import thinned.montecarlo.estimators")
    assert "needs the extra: pip install 'thinned[uncertainty]'" in without.stderr
