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
from torch import nn

from process import output
from thinned.montecarlo.estimators import MCDropoutClassifier, MCDropoutRegressor

QUICK: dict[str, Any] = {
    "hidden_layer_sizes": (20,),
    "samples": 10,
    "method": "independent",
    "max_iter": 5,
    "learning_rate": 0.03,
}


@parametrize_with_checks([MCDropoutClassifier(**QUICK), MCDropoutRegressor(**QUICK)])
def test_scikit_learn(estimator: Any, check: Any) -> None:
    check(estimator)
