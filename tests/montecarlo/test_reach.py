"""Every kind of dropout that a key reaches is on; what none reaches is named."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned
from models import zoo
from montecarlo.common import METHODS, as_it_is, both_methods, mlp, ulps
from thinned.models.intercept import intercept
from thinned.montecarlo import MonteCarlo, member, predict

F = nn.functional
ULPS = 64  # measured at most 12: several layers, and products of other sizes


class Calls(nn.Module):
    """A function of torch that drops."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = getattr(F, self.function)(x, 0.4, self.training)
        return y


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)


class First(nn.Module):
    """The first of a module's results."""

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x: Tensor) -> Tensor:
        inputs = (x, x, x) if isinstance(self.module, nn.MultiheadAttention) else (x,)
        y: Tensor = self.module(*inputs, **self.options)[0]
        return y


class InList(nn.Module):
    """A module that is in a list, where ``train`` and ``eval`` do not reach it."""

    def __init__(self) -> None:
        super().__init__()
        self.drops = [nn.Dropout().eval()]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drops[0](x)
        return y


vectors, sequences, images = torch.randn(6, 8), torch.randn(6, 5, 8), torch.randn(6, 4, 6, 6)


def layer(**options: Any) -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(8, 2, 16, 0.3, **options)


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoder(layer(batch_first=True), 2, **options)


class Transposed(nn.Module):
    """An encoder whose samples are in dimension 1; as many as the sequence is long."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(layer(), 2, enable_nested_tensor=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.encoder(x.transpose(0, 1)).transpose(0, 1)
        return y


KINDS: dict[str, tuple[Any, Tensor]] = {
    "Dropout": (lambda: nn.Dropout(0.4), vectors),
    "in place": (lambda: nn.Sequential(nn.Tanh(), nn.Dropout(0.4, inplace=True)), vectors),
    "Dropout1d": (lambda: nn.Dropout1d(0.4), sequences),
    "Dropout2d": (lambda: nn.Dropout2d(0.4), images),
    "Dropout3d": (lambda: nn.Dropout3d(0.4), images[..., None]),
    "AlphaDropout": (lambda: nn.AlphaDropout(0.4), vectors),
    "FeatureAlphaDropout": (lambda: nn.FeatureAlphaDropout(0.4), images),
    **{
        name: (lambda name=name: Calls(name), rows)
        for name, rows in (
            ("dropout", vectors),
            ("dropout1d", sequences),
            ("dropout2d", images),
            ("alpha_dropout", vectors),
            ("feature_alpha_dropout", images),
        )
    },
    "scaled_dot_product_attention": (Scaled, sequences),
    "MultiheadAttention": (lambda: First(nn.MultiheadAttention(8, 2, 0.4, batch_first=True)), sequences),
    "MultiheadAttention without weights": (
        lambda: First(nn.MultiheadAttention(8, 2, 0.4, batch_first=True), need_weights=False),
        sequences,
    ),
    "TransformerEncoder": (encoder, sequences),
    "TransformerEncoder of 5 by 5": (Transposed, sequences[:5]),
    "LSTM": (lambda: First(nn.LSTM(8, 8, 2, dropout=0.4, batch_first=True)), sequences),
    "GRU": (lambda: First(nn.GRU(8, 8, 2, dropout=0.4, batch_first=True)), sequences),
    "RNN": (lambda: First(nn.RNN(8, 8, 3, dropout=0.4, batch_first=True)), sequences),
    "thinned.Dropout": (lambda: thinned.Dropout(0.4), vectors),
    "thinned.Dropout2d": (lambda: thinned.Dropout2d(0.4), images),
    "thinned.DropPath": (lambda: thinned.DropPath(0.4), images),
    "thinned.GaussianDropout": (lambda: thinned.GaussianDropout(0.4), vectors),
    "converted": (lambda: thinned.convert(encoder()), sequences),
    "DataParallel": (lambda: nn.DataParallel(mlp()), vectors),
    "in a list": (InList, vectors),
    "timm's DropPath": (lambda: zoo.library_class("timm.layers.drop:DropPath")(0.4), vectors),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor:UserWarning")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", KINDS)
def test_it_drops(name: str, training: bool) -> None:
    """Draw 3 of example 2 is that of thinned.address, by every route, and no two draws are the same."""
    torch.manual_seed(0)
    make, x = KINDS[name]
    model = make().train(training)
    options: dict[str, Any] = {"samples": 20, "task": as_it_is, "keep_draws": True}
    found = predict(model, x, method="independent", **options)
    draws = found.outputs
    assert draws is not None
    assert found.route in ("vmap", "batch")
    assert found.standard_error.amax() > 0
    assert all(not draws[:, 0].equal(draws[:, t]) for t in range(1, 20) if len(draws) > 1)
    assert not draws[0].equal(draws[1])
    model.train()
    modules = [*model.modules(), *getattr(model, "drops", ())]
    for module in modules:  # what is on beside dropout would be seen
        module.train()
    with torch.no_grad(), intercept(), thinned.address(model, seed=0, step=3, samples=[2]):
        alone = model(x[2:3])
    assert ulps(draws[2, 3], alone[0]) <= ULPS
    stratified = predict(model, x, method=METHODS[-1], **options)
    assert stratified.standard_error.amax() > 0
    assert stratified.route == found.route


def test_an_encoder_with_padding() -> None:
    """Its fast path, which has no dropout, is not taken."""
    model, padding = encoder(enable_nested_tensor=True).eval(), torch.zeros(6, 5, dtype=torch.bool)
    padding[1, 3:] = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors, by torch
        found = predict(model, {"src": sequences, "src_key_padding_mask": padding}, 10, task=as_it_is)
    assert (found.variance[0] > 0).all()


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_transformers(name: str, attention: str) -> None:
    model = getattr(zoo, name)(attn_implementation=attention).eval()
    inputs = zoo.inputs(model)
    read = {"bert": "classification", "gpt2": lambda output: output.logits[:, -1]}[name]
    found = predict(model, inputs, 20, task=read, method="independent", keep_draws=True)
    assert found.outputs is not None
    assert found.route == "batch"  # little precedes the first dropout
    assert not any(module.training for module in model.modules())
    assert any("attention" in site or "attn" in site for site in found.sites)
    model.train()
    with torch.no_grad(), intercept(), thinned.address(model, seed=0, step=17, samples=[3]):
        logits = model(inputs["input_ids"][3:4]).logits
    alone = logits.softmax(1) if name == "bert" else logits[:, -1]
    assert ulps(found.outputs[3, 17], alone[0]) <= ULPS
    assert (found.variance > 0).all()


@torch.no_grad()
def test_predictions_within_compiled_code() -> None:
    model, x = mlp(), torch.randn(4, 8)
    wrapper, one = MonteCarlo(model, 5).eval(), member(model, 3)
    expected, of_one = wrapper(x).mean, one(x)
    compiled: Any = torch.compile(lambda x: (wrapper(x).mean * 2, one(x) * 2), backend="eager")
    assert compiled(x)[0].equal(expected * 2)
    assert compiled(x)[1].equal(of_one * 2)
    whole: Any = torch.compile(one, backend="eager")
    assert whole(x).equal(of_one)


def test_compiled_code_runs_without_the_compiler() -> None:
    model = mlp().eval()
    x = torch.randn(6, 8)
    expected = predict(model, x, 20)
    compiled: Any = torch.compile(model, backend="eager")
    found = predict(compiled, x, 20)
    assert found.mean.equal(expected.mean)
    assert found.route == "vmap"
    model.compile(backend="eager")
    assert predict(model, x, 20).mean.equal(expected.mean)


def test_torchscript_is_refused_by_name() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, by torch
        scripted = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout()))
    for model in (scripted, nn.Sequential(scripted)):
        with pytest.raises(ValueError, match=r"drops nowhere.*F\.dropout at '.*1' is out of reach"):
            predict(model, vectors)
    model = nn.Sequential(nn.Dropout(), scripted, nn.Linear(8, 3))
    scripted.train()
    with pytest.warns(UserWarning, match=r"no key reaches F\.dropout at '1\.1', which stays off"):
        found = predict(model, vectors, 10)
    assert found.sites == ("0",)
    assert scripted.training


@both_methods
def test_a_layer_that_all_examples_skip_or_none(method: Any) -> None:
    """Its mask has one element, so draws are computed one by one."""
    model = zoo.bart().eval()
    found = predict(model, zoo.inputs(model), 10, task=lambda output: output.last_hidden_state, method=method)
    assert found.route == "one by one"
    assert (found.variance.flatten(1).amax(1) > 0).all()
    (in_batch,) = (note for note in found.notes if note.startswith("batch"))
    assert "share a mask" in in_batch or "do not fit" in in_batch


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_a_model_that_is_random_beside_its_dropouts() -> None:
    model = nn.Sequential(nn.Dropout(), Noisy(), nn.Linear(8, 3))
    with pytest.warns(UserWarning, match="gives two results for one draw"):
        found = predict(model, vectors, 10)
    assert found.route == "one by one"


def test_sample_dim_where_a_layer_cannot_tell() -> None:
    """Windows of Swin come as (windows, examples' size, width), which has a batch's size in dimension 1."""
    model = zoo.swin().eval()
    inputs = zoo.inputs(model)  # 4 images, windows of 4 patches
    options: dict[str, Any] = {"task": lambda output: output.last_hidden_state, "samples": 10}
    with pytest.raises(RuntimeError, match="sample_dim"):
        predict(model, inputs, **options)
    found = predict(model, inputs, sample_dim=0, **options)
    alone = predict(model, inputs, sample_dim=0, batch_size=1, **options)
    torch.testing.assert_close(found.mean, alone.mean, rtol=1e-4, atol=1e-5)
