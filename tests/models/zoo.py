"""Small models that other people wrote: random weights, nothing downloaded, all in training mode.

``bert()``, ``gpt2()``, ``bart()``, ``vit()``, ``t5()``, ``llama()``, ``swin()``, ``transformer()``,
``encoder()``, ``lstm()`` and ``attention()`` give a model each; ``inputs(model, batch)`` what to call it
with, by name, and ``output(model, batch)`` one tensor of a call. ``MODELS`` is most of them by name.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import sys
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from thinned.compare.layers import _peers as peers

WIDTH, LAYERS, HEADS, VOCABULARY, LENGTH = 32, 2, 2, 50, 12
P = 0.1
SMALL: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SMALL |= {"intermediate_size": 2 * WIDTH}


def _torchvision_fits() -> bool:
    """Whether torchvision imports; if not, it will not be found from now on."""
    try:
        importlib.import_module("torchvision.ops")
    except Exception:  # its compiled part does not fit the installed torch
        sys.modules.setdefault("torchvision", None)  # type: ignore[arg-type]
        return False
    return True


def import_beside_torchvision(name: str) -> Any:
    """A module that imports torchvision, which may be installed and not fit the installed torch."""
    version = importlib.metadata.version

    def without_torchvision(name: str) -> str:
        if name == "torchvision":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        if not _torchvision_fits():
            imports = importlib.import_module("lightning_utilities.core.imports")
            stack.enter_context(mock.patch.object(imports, "_version", without_torchvision))
        return importlib.import_module(name)


def _transformers() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _torchvision_fits()
        import transformers

        transformers.logging.set_verbosity_error()
        return transformers


def _make(model: str, config: str, **arguments: Any) -> nn.Module:
    """A model of transformers from a small random config; `attn_implementation=` is an argument of it."""
    transformers = _transformers()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**arguments))
    return made.train()


def bert(**arguments: Any) -> nn.Module:
    small = SMALL | {"vocab_size": VOCABULARY, "max_position_embeddings": 32}
    return _make("BertForSequenceClassification", "BertConfig", **(small | arguments))


def gpt2(**arguments: Any) -> nn.Module:
    small = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY, "n_positions": 32}
    small |= {"bos_token_id": 0, "eos_token_id": 0}
    return _make("GPT2LMHeadModel", "GPT2Config", **(small | arguments))


def vit(**arguments: Any) -> nn.Module:
    small = SMALL | {"image_size": 16, "patch_size": 8}
    small |= {"hidden_dropout_prob": P, "attention_probs_dropout_prob": P}
    return _make("ViTModel", "ViTConfig", **(small | arguments))


def wav2vec2() -> nn.Module:
    """With a layerdrop that is read from the config at each call."""
    small = SMALL | {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "layerdrop": 0.5}
    small |= {"num_feat_extract_layers": 2, "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return _make("Wav2Vec2Model", "Wav2Vec2Config", apply_spec_augment=False, **small)


def bart(**arguments: Any) -> nn.Module:
    """With layerdrop, which skips whole layers."""
    small = {"d_model": WIDTH, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
    for part in ("encoder", "decoder"):
        small |= {f"{part}_layers": LAYERS, f"{part}_attention_heads": HEADS, f"{part}_ffn_dim": WIDTH}
        small |= {f"{part}_layerdrop": 0.5}
    return _make("BartModel", "BartConfig", **(small | arguments))


def t5(**arguments: Any) -> nn.Module:
    small = {"d_model": WIDTH, "d_kv": WIDTH // HEADS, "d_ff": 2 * WIDTH, "num_layers": LAYERS}
    small |= {"num_heads": HEADS, "vocab_size": VOCABULARY, "decoder_start_token_id": 0}
    return _make("T5ForConditionalGeneration", "T5Config", **(small | arguments))


def llama(**arguments: Any) -> nn.Module:
    small = SMALL | {"num_key_value_heads": 1, "vocab_size": VOCABULARY}
    small |= {"max_position_embeddings": 32, "attention_dropout": P}
    return _make("LlamaForCausalLM", "LlamaConfig", **(small | arguments))


def swin(**arguments: Any) -> nn.Module:
    """With transformers' DropPath."""
    small = {"image_size": 16, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}
    small |= {"window_size": 2, "drop_path_rate": 0.2, "hidden_dropout_prob": P}
    return _make("SwinModel", "SwinConfig", **(small | arguments))


def transformer(p: float = P) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Transformer(WIDTH, HEADS, LAYERS, LAYERS, 2 * WIDTH, p, batch_first=True)


def encoder(layers: int = LAYERS) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, P, batch_first=True)
        return nn.TransformerEncoder(layer, layers)


class LSTM(nn.Module):
    """A recurrent layer with ``dropout=``, then a dropout module."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, dropout=p, batch_first=True)
        self.dropout = nn.Dropout(p)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        head: Tensor = self.head(self.dropout(y[:, -1]))
        return head


def lstm(p: float = 0.3) -> nn.Module:
    torch.manual_seed(0)
    return LSTM(p)


class Attention(nn.Module):
    """A block with ``nn.MultiheadAttention(dropout=)`` and a functional dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, dropout=p, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        normed: Tensor = self.norm(x + nn.functional.dropout(y, p=self.p, training=self.training))
        return normed


def attention(p: float = P) -> nn.Module:
    torch.manual_seed(0)
    return Attention(p)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "bert": bert,
    "gpt2": gpt2,
    "vit": vit,
    "t5": t5,
    "llama": llama,
    "swin": swin,
    "transformer": transformer,
    "lstm": lstm,
    "attention": attention,
}


def inputs(model: nn.Module, batch: int = 4, seed: int = 0) -> dict[str, Tensor]:
    """The arguments of a call of a model of this file, by name."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, VOCABULARY, (batch, LENGTH), generator=generator)
    vectors = torch.randn(batch, LENGTH, WIDTH, generator=generator)
    name = type(model).__name__
    if name in ("ViTModel", "SwinModel"):
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    if name.startswith(("T5", "Bart")):
        return {"input_ids": words, "decoder_input_ids": words[:, :8]}
    if name == "Transformer":
        return {"src": vectors, "tgt": vectors[:, :8]}
    if name == "TransformerEncoder":
        return {"src": vectors}
    return {"x": vectors} if name in ("LSTM", "Attention") else {"input_ids": words}


def output(model: nn.Module, batch: int = 4, **arguments: Any) -> Tensor:
    """One tensor of a call of a model of this file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = model(**inputs(model, batch), **arguments)
    if isinstance(found, Tensor):
        return found
    first = getattr(found, "logits", None)
    result: Tensor = first if isinstance(first, Tensor) else found.last_hidden_state
    return result


def library_class(path: str) -> Any:
    """A class of timm or torchvision, ``module:Class``; skips the test if the library is not installed."""
    return peers.library_class(path) or pytest.skip(f"{path.partition('.')[0]} is not installed")


class OwnForward(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self.training) + 1


class AlwaysOn(nn.Dropout):
    """Monte-Carlo dropout."""

    def train(self, mode: bool = True) -> AlwaysOn:  # noqa: ARG002
        return super().train(True)
