"""Monte-Carlo dropout: predictive distributions of models that drop."""

from thinned.montecarlo.member import Member, member
from thinned.montecarlo.predict import predict, stream
from thinned.montecarlo.prediction import Prediction
from thinned.montecarlo.wrapper import MonteCarlo

__all__ = ["Member", "MonteCarlo", "Prediction", "member", "predict", "stream"]
