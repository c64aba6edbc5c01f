"""Monte-Carlo dropout: predictive distributions of models that drop."""

from thinned.montecarlo.predict import predict, stream
from thinned.montecarlo.prediction import Prediction

__all__ = ["Prediction", "predict", "stream"]
