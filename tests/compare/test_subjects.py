"""From a name to a layer, or to one line that says what is wrong with the name."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
from torch import nn

import thinned
from thinned.compare.loading import NotOfferedError, resolve, resolve_all
from thinned.compare.textbook import TextbookDropout

EXAMPLES = Path(__file__).parents[2] / "examples" / "broken_dropout.py"


def test_aliases() -> None:
    layers = [resolve(alias).layer for alias in ("thinned", "torch", "textbook")]
    assert layers == [thinned.Dropout, nn.Dropout, TextbookDropout]


def test_class_of_a_module_and_of_a_file() -> None:
    assert resolve("torch.nn:AlphaDropout").layer is nn.AlphaDropout
    assert resolve(f"{EXAMPLES}:ReusesMask").name == "ReusesMask"


def test_classes_of_one_file_can_all_be_pickled() -> None:
    for subject in resolve_all(f"{EXAMPLES}:{name}" for name in ("ReusesMask", "DropsRows")):
        layer = subject.make(0.3)
        assert type(pickle.loads(pickle.dumps(layer))) is subject.layer
    assert resolve(f"{EXAMPLES}:DropsRows").layer is resolve(f"{EXAMPLES}:DropsRows").layer


def test_a_layer_without_inplace_offers_none() -> None:
    subject = resolve(f"{EXAMPLES}:ReusesMask")
    assert subject.make(0.3).p == 0.3
    with pytest.raises(NotOfferedError):
        subject.make(0.3, inplace=True)
    assert resolve("torch").make(0.3, inplace=True).inplace


def test_classes_of_one_name_go_by_their_whole_text() -> None:
    names = [
        subject.name for subject in resolve_all(["thinned:Dropout", "torch.nn:Dropout", "torch", "torch"])
    ]
    assert names == ["thinned:Dropout", "torch.nn:Dropout", "torch"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tinned", "unknown implementation 'tinned'; accepted are thinned, torch, textbook, package.module:"),
        ("no_such_module:Dropout", "cannot import no_such_module: ModuleNotFoundError"),
        ("no/such/file.py:Dropout", "cannot import no/such/file.py: FileNotFoundError"),
        ("thinned.compare.textbook:Dropout", "has no nn.Module called 'Dropout'; it has TextbookDropout"),
        ("math:pi", "has no nn.Module called 'pi'; it has none"),
    ],
)
def test_wrong_names_get_one_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        resolve(text)
    assert "\n" not in str(raised.value)
