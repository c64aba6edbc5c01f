"""The layers: each stores its arguments and calls its function."""

from thinned.layers.alpha import AlphaDropout, FeatureAlphaDropout
from thinned.layers.attention import DropHead, DropKey
from thinned.layers.block import DropBlock1d, DropBlock2d, DropBlock3d
from thinned.layers.channels import Dropout1d, Dropout2d, Dropout3d
from thinned.layers.concrete import ConcreteDropout
from thinned.layers.dropout import Dropout
from thinned.layers.embedding import EmbeddingDropout
from thinned.layers.fused import DropoutAdd, GELUDropout, ReLUDropout, SiLUDropout
from thinned.layers.gaussian import GaussianDropout, VariationalDropout
from thinned.layers.layer_drop import LayerDrop
from thinned.layers.locked import LockedDropout
from thinned.layers.masksembles import Masksembles
from thinned.layers.multi_sample import MultiSampleDropout
from thinned.layers.path import DropPath, StochasticDepth
from thinned.layers.rdrop import RDrop
from thinned.layers.recurrent import VariationalGRU, VariationalLSTM
from thinned.layers.residual import Residual
from thinned.layers.targeted import TargetedDropout
from thinned.layers.tokens import PatchDropout, TokenDropout
from thinned.layers.weights import DropConnect, WeightDrop
from thinned.layers.zoneout import Zoneout

__all__ = [
    "AlphaDropout",
    "ConcreteDropout",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropHead",
    "DropKey",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "EmbeddingDropout",
    "FeatureAlphaDropout",
    "GELUDropout",
    "GaussianDropout",
    "LayerDrop",
    "LockedDropout",
    "Masksembles",
    "MultiSampleDropout",
    "PatchDropout",
    "RDrop",
    "ReLUDropout",
    "Residual",
    "SiLUDropout",
    "StochasticDepth",
    "TargetedDropout",
    "TokenDropout",
    "VariationalDropout",
    "VariationalGRU",
    "VariationalLSTM",
    "WeightDrop",
    "Zoneout",
]
