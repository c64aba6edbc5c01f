"""Estimators of scikit-learn that predict by Monte-Carlo dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
    from sklearn.preprocessing import StandardScaler
    from sklearn.utils import check_random_state
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "thinned.montecarlo.estimators needs the extra: pip install 'thinned[uncertainty]'"
    ) from error

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from thinned.checks import check_integer
from thinned.layers.dropout import Dropout
from thinned.montecarlo.dropping import Dropouts
from thinned.montecarlo.predict import Method, Task, predict
from thinned.montecarlo.prediction import Prediction

__all__ = ["MCDropoutClassifier", "MCDropoutRegressor"]


class _MCDropout(BaseEstimator):
    task: Task

    def __init__(
        self,
        hidden_layer_sizes: Sequence[int] = (100,),
        p: float = 0.1,
        *,
        module: Callable[[int, int], nn.Module] | None = None,
        max_iter: int = 200,
        batch_size: int = 32,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        samples: int = 100,
        method: Method = "stratified",
        random_state: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.p = p
        self.module = module
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.samples = samples
        self.method = method
        self.random_state = random_state

    def predict_distribution(self, X: Any) -> Prediction:
        """All statistics of the predictive distribution, in the units of ``y``."""
        check_is_fitted(self)
        x = torch.tensor(validate_data(self, X, reset=False, dtype=np.float64, order="C"))
        # With masks of its own, the prediction of an example would depend on its place in X.
        return predict(
            self.module_,
            x,
            self.samples,
            seed=self.seed_,
            task=self.task,
            method=self.method,
            consistent=True,
        )

    def _fit(self, X: NDArray[Any], outputs: int, targets: Tensor, targets_scaler: Any = None) -> None:
        check_integer("max_iter", self.max_iter, least=1)
        check_integer("batch_size", self.batch_size, least=1)
        self.seed_ = int(check_random_state(self.random_state).randint(2**31 - 1))
        make = self.module or self._mlp
        scaler = StandardScaler().fit(X)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed_)
            module = make(X.shape[1], outputs).double()
            self.module_ = Standardized(module, scaler, targets_scaler)
            Dropouts(self.module_)  # raises if it drops nowhere
            self._train(module, torch.from_numpy(scaler.transform(X)), targets)
        self.module_.eval()
        self.n_iter_ = self.max_iter

    def _mlp(self, features: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in pairwise((features, *self.hidden_layer_sizes)):
            layers += [nn.Linear(before, after), nn.ReLU(), Dropout(self.p)]
        return nn.Sequential(*layers, nn.Linear((features, *self.hidden_layer_sizes)[-1], outputs))

    def _train(self, module: nn.Module, x: Tensor, targets: Tensor) -> None:
        optimizer = torch.optim.Adam(
            module.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay, fused=True
        )
        batches = -(-len(x) // self.batch_size)
        module.train()
        for _ in range(self.max_iter):
            # Batches of nearly equal size: batch normalization refuses a last batch of one example.
            for rows in torch.randperm(len(x)).tensor_split(batches):
                loss = self._loss(module(x[rows]), targets[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

    def _loss(self, output: Any, targets: Tensor) -> Tensor:
        raise NotImplementedError


class MCDropoutClassifier(ClassifierMixin, _MCDropout):
    r"""A network that is trained with dropout, and whose probabilities are means over draws.

    .. math:: p(y | x) = \frac1T \sum_{t=1}^T \operatorname{softmax}(f_t(x))_y

    Features are standardized within. It is trained in float64 by Adam on the cross entropy. Each draw is one
    thinned network for all examples, so a prediction depends on the example alone.

    Args:
        hidden_layer_sizes: the widths of the hidden layers, of a linear layer, ReLU and dropout each.
        p: the probability of dropping.
        module: makes another network, of the number of features and of classes; it takes ``(n, features)`` to
            logits ``(n, classes)``. Then ``hidden_layer_sizes`` and ``p`` have no meaning.
        max_iter: the number of epochs.
        batch_size: the most examples of a step.
        learning_rate: of Adam.
        weight_decay: of Adam.
        samples: the number of draws of a prediction.
        method: of the draws, ``"stratified"`` or ``"independent"``; see :func:`thinned.montecarlo.predict`.
        random_state: an integer, a NumPy ``RandomState``, or None for NumPy's own. First weights, order of
            examples and masks follow from it. torch's generators are what they were afterwards.

    Attributes:
        classes_: (classes,); the labels.
        module_: the trained network, which takes features as they are.
        seed_: of the masks.
        n_iter_, n_features_in_, feature_names_in_: as scikit-learn defines them.

    Raises:
        ValueError: in ``fit``, for one class alone, or for a network that drops nowhere.

    Source: Gal & Ghahramani, "Dropout as a Bayesian approximation", ICML 2016, section 4.

    >>> from sklearn.datasets import load_iris
    >>> X, y = load_iris(return_X_y=True)
    >>> classifier = MCDropoutClassifier(max_iter=20, random_state=0).fit(X, y)
    >>> classifier.predict_proba(X[:5]).shape, bool(classifier.score(X, y) > 0.9)
    ((5, 3), True)
    >>> classifier.predict_distribution(X[:5]).mutual_information.shape
    torch.Size([5])
    """

    task = "classification"

    def fit(self, X: Any, y: Any) -> MCDropoutClassifier:
        """Train the network on features ``(n, features)`` and labels ``(n,)``."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(f"y must have 2 classes or more, but has 1 class: {self.classes_[0]!r}")
        self._fit(X, len(self.classes_), torch.from_numpy(labels))
        return self

    def predict(self, X: Any) -> NDArray[Any]:
        """The classes of the highest mean probabilities, of shape ``(n,)``."""
        numbers = self.predict_distribution(X).label.numpy()  # first: it raises if there are no classes_ yet
        labels: NDArray[Any] = self.classes_[numbers]
        return labels

    def predict_proba(self, X: Any) -> NDArray[Any]:
        """The mean probabilities of ``classes_``, of shape ``(n, classes)``."""
        return self.predict_distribution(X).mean.numpy()

    def _loss(self, output: Any, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, targets)


class MCDropoutRegressor(RegressorMixin, _MCDropout):
    r"""A network that is trained with dropout, and whose prediction is the mean over draws.

    .. math:: \mu = \frac1T \sum_{t=1}^T \mu_t(x), \qquad
        \sigma^2 = \operatorname{Var}_t \mu_t(x) \; [+ \frac1T \sum_{t=1}^T \sigma_t^2(x)]

    Features and targets are standardized within. It is trained in float64 by Adam on the squared error. Each
    draw is one thinned network for all examples, so a prediction depends on the example alone.

    Arguments and attributes are those of :class:`MCDropoutClassifier`, but for ``classes_`` and these:

    Args:
        module: makes another network, of the number of features and of targets; it takes ``(n, features)`` to
            ``(n, targets)``, or to a tuple of such a mean and the variance of the noise, both of standardized
            targets. It is then trained on the likelihood, and ``std`` has both parts. With ``module``,
            ``hidden_layer_sizes`` and ``p`` have no meaning.

    Attributes:
        module_: the trained network, which takes features and gives targets as they are.

    Raises:
        ValueError: in ``fit``, for a network that drops nowhere.

    Source: Gal & Ghahramani, "Dropout as a Bayesian approximation", ICML 2016, section 4; with a variance,
    Kendall & Gal, "What uncertainties do we need in Bayesian deep learning?", NeurIPS 2017, section 3.

    >>> from sklearn.datasets import load_diabetes
    >>> X, y = load_diabetes(return_X_y=True)
    >>> regressor = MCDropoutRegressor(max_iter=20, random_state=0).fit(X, y)
    >>> mean, std = regressor.predict(X[:5], return_std=True)
    >>> mean.shape, std.shape, bool((std > 0).all())
    ((5,), (5,), True)
    """

    task = "regression"

    def fit(self, X: Any, y: Any) -> MCDropoutRegressor:
        """Train the network on features ``(n, features)`` and targets ``(n,)`` or ``(n, targets)``."""
        X, y = validate_data(self, X, y, dtype=np.float64, y_numeric=True, multi_output=True)
        self._shape = y.shape[1:]
        columns = y.reshape(len(y), -1).astype(np.float64)
        scaler = StandardScaler().fit(columns)
        self._fit(X, columns.shape[1], torch.from_numpy(scaler.transform(columns)), scaler)
        return self

    def predict(self, X: Any, return_std: bool = False) -> Any:
        """The mean, of the shape of ``y``; with ``return_std`` a tuple of it and the deviation.

        The deviation is that of the draws; where the network predicts the variance of the noise, that of
        a target.
        """
        found = self.predict_distribution(X)
        parts = found.mean, found.total_variance.sqrt()
        mean, std = (part.reshape(-1, *self._shape).numpy() for part in parts)
        return (mean, std) if return_std else mean

    def _loss(self, output: Any, targets: Tensor) -> Tensor:
        if isinstance(output, tuple):
            mean, variance = (part.reshape(targets.shape) for part in output)
            return nn.functional.gaussian_nll_loss(mean, targets, variance)
        return nn.functional.mse_loss(output.reshape(targets.shape), targets)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags


class Standardized(nn.Module):
    """A network of standardized features, and targets if they have a scaler, that takes them as they are."""

    x_mean: Tensor
    x_scale: Tensor
    y_mean: Tensor
    y_scale: Tensor

    def __init__(self, module: nn.Module, x: Any, y: Any) -> None:
        super().__init__()
        self.module = module
        self.has_y = y is not None
        for name, scaler in {"x": x, **({"y": y} if self.has_y else {})}.items():
            self.register_buffer(f"{name}_mean", torch.from_numpy(scaler.mean_))
            self.register_buffer(f"{name}_scale", torch.from_numpy(scaler.scale_))

    def forward(self, x: Tensor) -> Any:
        output = self.module((x - self.x_mean) / self.x_scale)
        if not self.has_y:
            return output
        mean, *variance = output if isinstance(output, tuple) else (output,)
        mean = mean * self.y_scale + self.y_mean
        return (mean, variance[0] * self.y_scale**2) if variance else mean
