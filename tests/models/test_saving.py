"""What a file has of thinned: nothing in a ``state_dict``, in ``save_pretrained`` or after ``revert``."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import process
import thinned
from models import zoo

MODELS = {"bert": zoo.bert, "gpt2": zoo.gpt2, "llama": zoo.llama, "bart": zoo.bart, "swin": zoo.swin}


def saved_and_loaded(model: Any, path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
        return type(model).from_pretrained(path).train()


def rates(model: nn.Module) -> dict[str, float | None]:
    return {site.path: site.p for site in thinned.inspect(model)}


@pytest.mark.parametrize("name", MODELS)
def test_save_pretrained_gives_back_the_stock_model(name: str, tmp_path: Path) -> None:
    stock = MODELS[name]()
    config, stock_rates = stock.config.to_dict(), rates(stock)
    model = thinned.convert(MODELS[name](), p=0.3)
    loaded = saved_and_loaded(model, tmp_path)
    assert not any("thinned" in type(module).__module__ for module in loaded.modules())
    for file in tmp_path.iterdir():
        assert b"thinned" not in file.read_bytes()
    assert rates(loaded) == stock_rates
    assert model.config.to_dict().items() >= {key: config[key] for key in config if "drop" in key}.items()

    again = thinned.convert(loaded, p=0.3)
    outputs = []
    for each in (model, again):
        with thinned.intercept(), thinned.address(each, seed=7, step=3):
            outputs.append(zoo.output(each, 2))
    assert outputs[0].equal(outputs[1])


def test_a_number_of_the_config_that_a_forward_reads_is_saved(tmp_path: Path) -> None:
    loaded = saved_and_loaded(thinned.convert(zoo.wav2vec2(), p=0.3), tmp_path)
    assert (loaded.config.layerdrop, loaded.config.hidden_dropout) == (0.3, 0.1)


def swapped(model: nn.Module) -> nn.Module:
    return thinned.convert(model)


def reverted(model: nn.Module) -> nn.Module:
    return thinned.revert(swapped(model))


def addressed(model: nn.Module) -> nn.Module:
    with thinned.address(swapped(model), seed=7, step=0):
        model(torch.ones(2, 4))
    return thinned.revert(model)


WITHOUT_THINNED = """
    import sys

    class Uninstalled:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] == "thinned":
                raise ModuleNotFoundError("No module named 'thinned'")

    sys.meta_path.insert(0, Uninstalled())
    import torch
    stock = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.5))
    for way in ("swapped", "reverted", "addressed"):
        print(stock.load_state_dict(torch.load(f"{path}/{way}.state")))
        try:
            print(way, type(torch.load(f"{path}/{way}.model", weights_only=False)[1]).__module__)
        except ModuleNotFoundError as error:
            print(way, error)
"""


def test_where_thinned_is_not_installed(tmp_path: Path) -> None:
    ways: list[Callable[[nn.Module], nn.Module]] = [swapped, reverted, addressed]
    for way in ways:
        model = way(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)))
        torch.save(model.state_dict(), tmp_path / f"{way.__name__}.state")
        torch.save(model, tmp_path / f"{way.__name__}.model")
    lines = process.output(WITHOUT_THINNED.replace("{path}", str(tmp_path))).splitlines()
    assert lines[::2] == ["<All keys matched successfully>"] * 3
    assert lines[1::2] == [
        "swapped No module named 'thinned'",
        "reverted torch.nn.modules.dropout",
        "addressed No module named 'thinned'",
    ]
