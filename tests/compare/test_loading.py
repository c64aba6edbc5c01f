"""From a name on the command line to an implementation, or to one line that says what is wrong."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path

import pytest
from torch import nn

import thinned
from thinned.compare.loading import resolve, resolve_all
from thinned.compare.textbook import TextbookDropout

EXAMPLES = Path(__file__).parents[2] / "examples" / "broken_dropout.py"


def test_aliases() -> None:
    layers = [resolve(alias).make for alias in ("thinned", "torch", "textbook")]
    assert layers == [thinned.Dropout, nn.Dropout, TextbookDropout]


def test_class_of_a_module_and_of_a_file() -> None:
    assert resolve("torch.nn:AlphaDropout").make is nn.AlphaDropout
    assert resolve(f"{EXAMPLES}:ReusesMask").name == "ReusesMask"


def test_classes_of_one_file_can_all_be_pickled() -> None:
    for each in resolve_all(f"{EXAMPLES}:{name}" for name in ("ReusesMask", "DropsRows")):
        layer = each.make(p=0.3)
        assert type(pickle.loads(pickle.dumps(layer))) is each.make
    assert resolve(f"{EXAMPLES}:DropsRows").make is resolve(f"{EXAMPLES}:DropsRows").make


def test_a_class_may_give_p_another_name(tmp_path: Path) -> None:
    module = tmp_path / "layer.py"
    module.write_text(
        "import torch\nclass Path(torch.nn.Module):\n"
        "    def __init__(self, drop_prob=0.1, inplace=False):\n"
        "        super().__init__()\n        self.seen = drop_prob, inplace\n"
    )
    make = resolve(f"{module}:Path").make
    assert make(p=0.3, inplace=True).seen == (0.3, True)
    assert make(drop_prob=0.2).seen == (0.2, False)
    assert "inplace" in inspect.signature(make).parameters


def test_classes_of_one_name_go_by_their_whole_text() -> None:
    names = [each.name for each in resolve_all(["thinned:Dropout", "torch.nn:Dropout", "torch", "torch"])]
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
