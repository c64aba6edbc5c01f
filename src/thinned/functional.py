"""The layers as functions: each validates, turns ``p`` into a threshold and calls the operation."""

from thinned.layers._torchscript import register
from thinned.layers.alpha import alpha_dropout, feature_alpha_dropout
from thinned.layers.attention import drop_head, drop_head_attention, drop_key
from thinned.layers.block import drop_block1d, drop_block2d, drop_block3d
from thinned.layers.channels import dropout1d, dropout2d, dropout3d
from thinned.layers.concrete import concrete_dropout, concrete_regularization
from thinned.layers.dropout import dropout, keep_mask
from thinned.layers.embedding import embedding_dropout
from thinned.layers.fused import bias_dropout_add, dropout_add, gelu_dropout, relu_dropout, silu_dropout
from thinned.layers.gaussian import gaussian_dropout, variational_dropout, variational_kl
from thinned.layers.graph import dropout_edge, dropout_node
from thinned.layers.locked import locked_dropout
from thinned.layers.masksembles import masksembles, masksembles_masks
from thinned.layers.multi_sample import multi_sample_dropout
from thinned.layers.path import drop_path, drop_path_rates, stochastic_depth
from thinned.layers.rdrop import r_drop_loss
from thinned.layers.residual import residual
from thinned.layers.targeted import targeted_dropout
from thinned.layers.tokens import patch_dropout, token_dropout
from thinned.layers.weights import drop_connect
from thinned.layers.zoneout import zoneout

__all__ = [
    "alpha_dropout",
    "bias_dropout_add",
    "concrete_dropout",
    "concrete_regularization",
    "drop_block1d",
    "drop_block2d",
    "drop_block3d",
    "drop_connect",
    "drop_head",
    "drop_head_attention",
    "drop_key",
    "drop_path",
    "drop_path_rates",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_edge",
    "dropout_node",
    "embedding_dropout",
    "feature_alpha_dropout",
    "gaussian_dropout",
    "gelu_dropout",
    "keep_mask",
    "locked_dropout",
    "masksembles",
    "masksembles_masks",
    "multi_sample_dropout",
    "patch_dropout",
    "r_drop_loss",
    "relu_dropout",
    "residual",
    "silu_dropout",
    "stochastic_depth",
    "targeted_dropout",
    "token_dropout",
    "variational_dropout",
    "variational_kl",
    "zoneout",
]

register(globals()[name] for name in __all__)


def __dir__() -> list[str]:
    return __all__
