"""From a name on the command line to an implementation, or to one line that says what is wrong."""

from __future__ import annotations

import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thinned
from thinned.compare.laws import Level, Verdict, examine
from thinned.compare.layers import entry_of
from thinned.compare.loading import resolve, resolve_all
from thinned.compare.settings import Settings
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


LAYERS = """
import abc, functools, torch
from torch import nn
from torch.nn import functional as F

class Layer(nn.Module):
    def __init__(self, **arguments):
        super().__init__()
        self.seen = arguments

    def forward(self, x):
        return x

class Path(Layer):
    def __init__(self, drop_prob=0.1, inplace=False):
        super().__init__(p=drop_prob, inplace=inplace)

class Keep(Layer):
    def __init__(self, keep_prob, keep_dims=True):
        super().__init__(keep_prob=keep_prob)

class Passes(nn.Dropout):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)

class Features(Layer):
    def __init__(self, features, p=0.5, *, axis=-1):
        super().__init__(features=features, p=p, axis=axis)

class Sigma(Layer):
    def __init__(self, sigma, size=3):
        super().__init__(sigma=sigma, size=size)

class Two(Layer):
    def __init__(self, attn_drop=0.0, proj_drop=0.0):
        super().__init__(attn_drop=attn_drop, proj_drop=proj_drop)

class NoP(Layer):
    def __init__(self):
        super().__init__()

class Abstract(abc.ABC, nn.Module):
    @abc.abstractmethod
    def drop(self, x): ...

class Plain:
    def __init__(self, p): ...

class Raises(nn.Module):
    def __init__(self, p):
        raise RuntimeError("no licence")

class Fails(nn.Dropout):
    def forward(self, x):
        n, c, h, w = x.shape

class Nothing(nn.Dropout):
    def forward(self, x): ...

made = nn.Dropout(0.3)
own = Path()
NUMBER = 3
half = functools.partial(nn.Dropout, inplace=True)

def ours(x, p, training):
    return F.dropout(x, p, training)

def mean(x, rate=0.5, *, is_training):
    return F.dropout(x, rate, is_training)

def kept(x, keep_prob, train=True, inplace=False):
    return F.dropout(x, 1 - keep_prob, train, inplace)

def always(x, p=0.5):
    return F.dropout(x, p)

def make(p):
    return nn.Dropout(p)

def of_two(x, y, p, training):
    return x
"""


@pytest.fixture
def layers(tmp_path: Path) -> str:
    file = tmp_path / "layers.py"
    file.write_text(LAYERS)
    return str(file)


DROPOUT = entry_of("Dropout").case


@pytest.mark.parametrize(
    ("name", "kwargs", "seen"),
    [
        ("Path", {}, {"p": 0.25, "inplace": False}),
        ("Keep", {}, {"keep_prob": 0.75}),
        ("Features", {"features": 8, "axis": 0}, {"features": 8, "p": 0.25, "axis": 0}),
        ("Sigma", {"sigma": "p"}, {"sigma": 0.25, "size": 3}),
        ("Two", {"proj_drop": "1 - p"}, {"attn_drop": 0.0, "proj_drop": 0.75}),
        ("Two", {"proj_drop": 0.5}, {"attn_drop": 0.25, "proj_drop": 0.5}),
    ],
)
def test_the_argument_that_is_p(layers: str, name: str, kwargs: dict[str, Any], seen: dict[str, Any]) -> None:
    text = f"{layers}:{name}"
    (found,) = resolve_all([text], {text: kwargs}, DROPOUT)
    assert found.make(p=0.25).seen == seen
    (under_another_name,) = resolve_all([text], {text: kwargs}, entry_of("DropPath").case)
    assert under_another_name.make(drop_prob=0.25).seen == seen


def test_arguments_that_are_passed_on_count(layers: str) -> None:
    make = resolve(f"{layers}:Passes").make
    assert make(p=0.3, inplace=True).inplace
    assert "inplace" in inspect.signature(make).parameters
    assert "inplace" in inspect.signature(resolve(f"{layers}:Path").make).parameters


@pytest.mark.parametrize("name", ["ours", "mean", "kept", "torch"])
def test_a_function_is_a_layer(layers: str, name: str) -> None:
    text = "torch.nn.functional:dropout" if name == "torch" else f"{layers}:{name}"
    (found,) = resolve_all([text], {}, DROPOUT)
    layer = found.make(p=0.25)
    x = torch.ones(10_000)
    assert (layer(x) == 0).double().mean() == pytest.approx(0.25, abs=0.03)
    assert layer(x).max() == pytest.approx(1 / 0.75)
    assert torch.equal(layer.eval()(x), x)
    assert ("inplace" in inspect.signature(found.make).parameters) == (name in ("kept", "torch"))


@pytest.mark.parametrize("name", ["make", "half"])
def test_a_function_of_p_makes_layers(layers: str, name: str) -> None:
    (found,) = resolve_all([f"{layers}:{name}"], {}, DROPOUT)
    assert isinstance(found.make(p=0.3), nn.Dropout)


def test_what_a_function_does_not_offer(layers: str) -> None:
    """Evaluation is a law of functions that know of it, copies and state are laws of modules."""
    laws = {law.name: law for law in entry_of("Dropout").laws}
    verdicts = {
        name: {
            law: examine(laws[law], resolve(f"{layers}:{name}"), Settings(quick=True)).verdict for law in laws
        }
        for name in ("ours", "always")
    }
    missing = {
        name: {law for law, verdict in of_all.items() if verdict is Verdict.NOT_OFFERED}
        for name, of_all in verdicts.items()
    }
    module = {"in place", "in place on a leaf", "deepcopy", "pickle", "state_dict"}
    for laws_missing in missing.values():
        laws_missing.discard("complex")  # F.dropout takes complex numbers from 2.15 on
    assert missing == {"ours": module, "always": {*module, "evaluation", "no copy"}}
    for of_all in verdicts.values():
        broken = {law for law, verdict in of_all.items() if verdict.is_breach}
        assert not {law for law in broken if laws[law].level is Level.WRONG}


def test_classes_of_one_name_go_by_their_whole_text() -> None:
    names = [each.name for each in resolve_all(["thinned:Dropout", "torch.nn:Dropout", "torch", "torch"])]
    assert names == ["thinned:Dropout", "torch.nn:Dropout", "torch"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("thinnd", "unknown implementation 'thinnd'; did you mean thinned?"),
        (
            "nothing",
            "unknown implementation 'nothing'; accepted are thinned, torch, textbook, package",
        ),
        ("no_such_module:Dropout", "cannot import no_such_module: ModuleNotFoundError"),
        ("thinned.compare.textbok:T", "'thinned.compare.textbok'; did you mean textbook"),
        ("no/such/file.py:Dropout", "cannot import no/such/file.py: FileNotFoundError"),
        ("FOLDER/layer.py:Path", "/layer.py'; did you mean layers.py"),
        ("FOLDER/layers.py:Pth", "layers.py has nothing called 'Pth'; did you mean Path?"),
        ("thinned.compare.textbook:X", "has nothing called 'X'; it has TUTORIAL, TextbookDropout, Tutorial"),
        ("FOLDER/layers.py:foo", "layers.py has nothing called 'foo'; it has Abstract, Fails,"),
        ("FOLDER/layers.py:foo", "Path, Plain and 10 more"),
        ("FOLDER/layers.py:NUMBER", "NUMBER is neither a class nor a function, but 3"),
        ("FOLDER/layers.py:Plain", "Plain is a class, but no torch.nn.Module"),
        (
            "FOLDER/layers.py:Abstract",
            "Abstract is abstract: it leaves drop to a class",
        ),
        (
            "FOLDER/layers.py:made",
            "laws need one for each p: name its class, torch.nn.modules.dropout:Dropout",
        ),
        ("FOLDER/layers.py:own", "FOLDER/layers.py:Path"),
        ("FOLDER/layers.py:NoP", "NoP takes no probability of dropping"),
        (
            "FOLDER/layers.py:Sigma",
            "sigma, size: none of them looks like the probability of dropping",
        ),
        (
            "FOLDER/layers.py:Two",
            "say which is, as in --kwargs 'attn_drop=p' or kwargs of [tool.thinned]",
        ),
        (
            "torch:dropout",
            "torch:dropout does not tell its arguments: wrap it in a function",
        ),
        (
            "FOLDER/layers.py:Raises",
            "made with p=0.5: RuntimeError: no licence (FOLDER/layers.py, line ",
        ),
        (
            "FOLDER/layers.py:Features",
            "; give what it needs beside p=0.5 by --kwargs 'features=...' or kwargs of [tool.thinned]",
        ),
        (
            "FOLDER/layers.py:of_two",
            "TypeError: of_two() missing 1 required positional argument: 'y'",
        ),
        (
            "FOLDER/layers.py:Fails",
            "Fails cannot be called with torch.float32 of shape (6, 20): ValueError",
        ),
        ("FOLDER/layers.py:Fails", "line 55, in forward); --layer NAME examines layers for other inputs"),
        (
            "FOLDER/layers.py:Nothing",
            "returns no tensor when called with torch.float32 of shape (6, 20), but",
        ),
        ("FOLDER/leaves.py:Path", "cannot import FOLDER/leaves.py: SystemExit: 3 (FOLDER/leaves.py, line 2"),
    ],
)
def test_what_cannot_be_examined_gets_one_line(layers: str, text: str, message: str) -> None:
    folder = str(Path(layers).parent)
    Path(folder, "leaves.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(ValueError, match=re.escape(message.replace("FOLDER", folder))) as raised:
        resolve_all([text.replace("FOLDER", folder)], {}, DROPOUT)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"featurs": 8}, "Features takes no argument 'featurs'; did you mean features?"),
        ({"zzz": 8}, "Features takes no argument 'zzz'; it takes features, p, axis"),
    ],
)
def test_unknown_arguments_get_one_line(layers: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(f"{layers}:Features", kwargs)
