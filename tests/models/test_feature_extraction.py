"""The feature extractors of torchvision and timm, and quantization-aware training, on converted models."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned

pytestmark = [
    pytest.mark.slow,
    # torch.ao is deprecated; torchvision notes that the graphs of training and evaluation differ.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning"),
]

PATH, VIT = {"drop_path_rate": 0.4}, {"img_size": 64, "drop_path_rate": 0.4, "proj_drop_rate": 0.2}
MODELS: list[tuple[str, dict[str, Any]]] = [
    ("torchvision.mobilenet_v3_small", {}),
    ("torchvision.efficientnet_b0", {"stochastic_depth_prob": 0.4}),
    ("torchvision.convnext_tiny", {"stochastic_depth_prob": 0.4}),
    ("torchvision.swin_t", {"dropout": 0.1}),
    ("torchvision.vit_b_16", {"image_size": 64, "dropout": 0.1, "attention_dropout": 0.1}),
    ("timm.deit_tiny_patch16_224", VIT | {"pos_drop_rate": 0.1}),
    ("timm.vit_tiny_patch16_224", VIT | {"patch_drop_rate": 0.25}),  # the original has no symbolic trace
    ("timm.convnext_atto", PATH),
    ("timm.efficientnet_b0", PATH),
    ("timm.swin_tiny_patch4_window7_224", PATH | {"img_size": 64, "window_size": 2}),
    ("timm.resnet18", PATH | {"drop_block_rate": 0.1, "zero_init_last": False}),  # nor has this one
]


def _feature_extraction() -> Any:
    try:
        return importlib.import_module("torchvision.models.feature_extraction")
    except Exception as error:  # the compiled part of torchvision fits one release of torch
        pytest.skip(f"torchvision.models does not import: {error}")


def _build(name: str, arguments: dict[str, Any]) -> nn.Module:
    library, model = name.split(".")
    torch.manual_seed(0)
    if library == "timm":
        made: nn.Module = importlib.import_module("timm").create_model(model, **arguments)
    else:
        made = getattr(importlib.import_module("torchvision.models"), model)(weights=None, **arguments)
    return made


def _features(model: nn.Module, nodes: list[str], x: Tensor, seed: int) -> list[Tensor]:
    """The first results of the modules of these names, and the model's, in one call."""
    outputs: dict[str, Tensor] = {}

    def keep(node: str, output: Tensor) -> None:
        if node not in outputs:
            outputs[node] = output.clone()  # the model may add to it in place, a symbolic trace does not

    hooks = [
        model.get_submodule(node).register_forward_hook(lambda _m, _x, y, node=node: keep(node, y))
        for node in nodes
    ]
    torch.manual_seed(seed)
    last = model(x)
    for hook in hooks:
        hook.remove()
    return [*(outputs[node] for node in nodes), last]


def _extracted(extractor: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return list(extractor(x).values())


@pytest.mark.parametrize(("name", "arguments"), MODELS, ids=[name for name, _ in MODELS])
def test_create_feature_extractor(name: str, arguments: dict[str, Any]) -> None:
    """Each dropout is one node, and the features are those of the modules in the model itself."""
    torchvision = _feature_extraction()
    stock = _build(name, arguments)
    ours = thinned.convert(copy.deepcopy(stock))
    tracing: dict[str, Any] = {}
    create = torchvision.create_feature_extractor
    if name.startswith("timm"):
        timm = importlib.import_module("timm.models._features_fx")
        tracing["leaf_modules"] = list(timm.get_notrace_modules())
        tracing["autowrap_functions"] = list(timm.get_notrace_functions())
        create = timm.create_feature_extractor
    names = torchvision.get_graph_node_names(ours, tracer_kwargs=tracing)[0]
    dropped = [site.path for site in thinned.inspect(ours) if site.p and site.path in names]
    nodes = list(dict.fromkeys([dropped[0], dropped[-1]]))
    extractor = create(ours, [*nodes, names[-1]])
    x = torch.randn(8, 3, 64, 64)

    stock.eval(), ours.eval(), extractor.eval()
    with torch.no_grad():
        for mine, theirs in zip(_extracted(extractor, x, 0), _features(stock, nodes, x, 0), strict=True):
            assert torch.equal(mine, theirs)

    ours.train(), extractor.train()
    first, second = _extracted(extractor, x, 1), list(extractor(x).values())
    for mine, model in zip(first, _features(ours, nodes, x, 1), strict=True):
        assert torch.equal(mine, model)
    assert any(not torch.equal(drawn, again) for drawn, again in zip(first, second, strict=True))
    extractor.zero_grad()
    first[-1].square().sum().backward()
    assert all(parameter.grad is not None for parameter in extractor.parameters())

    ours.eval(), extractor.eval()
    with torch.no_grad():
        for mine, model in zip(_extracted(extractor, x, 2), _features(ours, nodes, x, 3), strict=True):
            assert torch.equal(mine, model)


@pytest.mark.parametrize(("name", "arguments"), MODELS[5:], ids=[name for name, _ in MODELS[5:]])
def test_features_only(name: str, arguments: dict[str, Any]) -> None:
    """The feature models of timm itself convert like others."""
    _feature_extraction()  # timm imports torchvision
    stock = _build(name, arguments | {"features_only": True, "out_indices": (1, 2)})
    ours = thinned.convert(copy.deepcopy(stock))
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        for mine, theirs in zip(ours.eval()(x), stock.eval()(x), strict=True):
            assert torch.equal(mine, theirs)
    ours.train()
    torch.manual_seed(1)
    first, second = ours(x), ours(x)
    torch.manual_seed(1)
    again = ours(x)
    assert all(torch.equal(drawn, same) for drawn, same in zip(first, again, strict=True))
    assert any(not torch.equal(drawn, other) for drawn, other in zip(first, second, strict=True))


@pytest.mark.parametrize("name", ["mobilenet_v2", "efficientnet_b0"])
def test_quantization_aware_training(name: str) -> None:
    """``prepare_qat_fx`` of a converted model, trained a step and converted to int8."""
    _feature_extraction()
    quantization = importlib.import_module("torch.ao.quantization")
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    converted = thinned.convert(_build(f"torchvision.{name}", {"num_classes": 4}).train())
    x = torch.randn(8, 3, 64, 64)
    mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
    model = quantize_fx.prepare_qat_fx(converted, mapping, (x,))
    assert any(type(module).__module__.startswith("thinned.") for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(1)
    first = model(x)
    nn.functional.cross_entropy(first, torch.arange(8) % 4).backward()
    optimizer.step()
    assert any(not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    assert not torch.equal(model(x), model(x))
    quantized = quantize_fx.convert_fx(model.eval())
    with torch.no_grad():
        assert torch.equal(quantized(x), quantized(x))
