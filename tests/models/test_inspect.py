"""thinned.inspect lists every place at which a model drops: held against what comes to ATen."""

from __future__ import annotations

import copy
import json
import queue
import re
import runpy
import textwrap
from collections import OrderedDict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import fields
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner, Result

import thinned
from layers.test_overrides import CALLS
from models import zoo
from thinned.cli import app
from thinned.compare.loading import model_of
from thinned.models.inspect import IN_EVALUATION, INTERCEPTED, NO_CHILD, Site, inspect
from thinned.models.inspect.names import UNCONDITIONAL
from thinned.models.inspect.targets import ELSEWHERE, HAND_WRITTEN

RANDOM = ("bernoulli", "native_dropout", "rand", "uniform")


class Count(TorchDispatchMode):
    """How many operations that make a mask come to ATen: an oracle that shares no code with inspect."""

    def __init__(self) -> None:
        super().__init__()
        self.masks = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().removeprefix("aten::")
        self.masks += name.startswith(RANDOM)
        return function(*args, **(kwargs or {}))


def masks(model: nn.Module, *args: Any, **kwargs: Any) -> int:
    with Count() as count, torch.no_grad():
        model(*args, **kwargs)
    return count.masks


def drops(found: Iterable[Site]) -> int:
    return sum(site.calls or 0 for site in found)


CASES = [*zoo.MODELS, "bert eager", "gpt2 eager", "vit eager", "t5 eager", "llama eager"]


def make(case: str) -> nn.Module:
    name, _, eager = case.partition(" ")
    return zoo.MODELS[name](attn_implementation="eager") if eager else zoo.MODELS[name]()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_no_site_is_missed(case: str) -> None:
    """Reading and run agree on the places and on p, and the calls of a run make all the masks of ATen."""
    model = make(case)
    inputs = zoo.inputs(model)
    from_source, from_run = inspect(model), inspect(model, **inputs)

    assert drops(from_run) == masks(model, **inputs) > 0
    places = [(site.paths, site.type, site.where) for site in from_run]
    assert [(site.paths, site.type, site.where) for site in from_source] == places
    assert len(set(places)) == len(places)
    assert not any(site.note for site in from_run)
    # In these models every probability is written plainly.
    assert all(a.p == b.p for a, b in zip(from_source, from_run, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_no_dropout_but_ours_is_left_where_inspect_says_so(case: str) -> None:
    """After convert the masks that ATen makes are those of the sites that convert does not take."""
    model = make(case)
    inputs = zoo.inputs(model)
    before = inspect(model, **inputs)
    model = thinned.convert(model)
    after = inspect(model, **inputs)
    left, ours = ([site for site in after if (site.status == "thinned") is which] for which in (False, True))
    assert masks(model, **inputs) == drops(left) == drops(s for s in before if s.status != "convert")
    assert [(site.paths, site.type, site.was, site.p) for site in ours] == [
        (site.paths, site.becomes, site.type, site.p) for site in before if site.status == "convert"
    ]
    with thinned.intercept():
        assert {site.status for site in inspect(model)} <= {"thinned", "off"}
        assert masks(model, **inputs) == 0
    thinned.revert(model)
    assert [site.status for site in inspect(model)] == [site.status for site in before]
    # BERT's and GPT-2's attention takes the probability of its dropout and passes it on.
    attention = 2 if case.split()[0] in ("bert", "gpt2") else 0
    assert [site.calls for site in ours].count(0) == attention


MASK = "F.scaled_dot_product_attention"
# The lines of a forward, and what a reading finds in them: the function, p, and the note.
FORWARDS: dict[str, list[tuple[str, float | None, str]]]
FORWARDS = {
    # Plainly written: a reading knows p.
    "return F.dropout(x, 0.1, self.training)": [("F.dropout", 0.1, "")],
    "return F.dropout(x, p=self.p, training=self.training)": [("F.dropout", 0.3, "")],
    "return nn.functional.dropout1d(x, self.p, self.training)": [("F.dropout1d", 0.3, "")],
    "return torch.alpha_dropout(x, 0.125, self.training)": [("torch.alpha_dropout", 0.125, "")],
    "return imported(x, self.p, self.training)": [("F.dropout", 0.3, "")],
    "return checkpoint(self.method, x, use_reentrant=False)": [("F.dropout", 0.3, "")],
    "return F.dropout(x, self.inner.p, self.training)": [("F.dropout", 0.5, "")],
    "return F.dropout(x, self.config['p'], self.training)": [("F.dropout", 0.2, "")],
    "return F.dropout(x, self.config.get('q', 0.25), self.training)": [("F.dropout", 0.25, "")],
    "return attend(x, dropout_p=self.p if self.training else 0.0)": [(MASK, 0.3, "")],
    "return attend(x,\n  dropout_p=self.p if self.training else 0.0,\n)": [(MASK, 0.3, "")],
    "return attend(x, dropout_p=0.0 if not self.training else self.p)": [(MASK, 0.3, "")],
    "p = self.p if self.training else 0.0\nreturn F.dropout(x, p)": [("F.dropout", 0.3, "")],
    "return helper(x, dropout=0.0 if not self.training else self.p, training=self.training)": [
        ("F.dropout", 0.3, "")
    ],
    "return F.alpha_dropout(x, 0.1) + F.dropout(x, 0.2, False)": [
        ("F.alpha_dropout", 0.0, ""),
        ("F.dropout", 0.0, ""),
    ],
    "return F.dropout(x, max(0.1, self.p), self.training)": [("F.dropout", 0.3, "")],
    "return F.dropout(x, 1 - 2 * self.p - 0.1, self.training)": [("F.dropout", 1 - 2 * 0.3 - 0.1, "")],
    "return helper(x, self.p, self.training)": [("F.dropout", 0.3, "")],
    "return F.dropout(x, float(self.p), self.training)": [("F.dropout", 0.3, "")],
    "return F.dropout(x, [0.1, self.p][self.index], self.training)": [("F.dropout", 0.3, "")],
    # It asks for training before the call.
    "if not self.training: return x\nreturn F.dropout(x, 0.1)": [("F.dropout", 0.1, "")],
    # pytorch#99293, #124464: attention drops whenever its caller passes a probability.
    "return attend(x, dropout_p=self.p) + F.dropout(x, 0.1)": [
        (MASK, 0.3, UNCONDITIONAL),
        ("F.dropout", 0.1, UNCONDITIONAL),
    ],
    "return F.dropout(x, 0.1) if self.training else x": [("F.dropout", 0.1, "")],
    "on = self.training and self.p > 0\nif on: x = F.dropout(x, 0.1)\nreturn x": [("F.dropout", 0.1, "")],
    "y = self.training and F.dropout(x, 0.1)\nreturn x if y is False else y": [("F.dropout", 0.1, "")],
    # It asks for something else.
    "if self.training: self.steps = 1\nreturn F.dropout(x, 0.1)": [("F.dropout", 0.1, UNCONDITIONAL)],
    # Only a run knows p.
    "return F.dropout(x, sorted([0.1, self.p])[1], self.training)": [("F.dropout", None, "")],
    "return F.dropout(*(x, 0.3, self.training))": [("F.dropout", None, "")],
    "p = self.p\nif self.training: p = 0.3\nreturn F.dropout(x, p, self.training)": [("F.dropout", None, "")],
}


def written(forward: str, folder: Path) -> nn.Module:
    """A module with the lines of a forward, in a file of its own."""
    file = folder / "written.py"
    body = textwrap.indent(forward.replace("attend(x,", "F.scaled_dot_product_attention(x, x, x,"), " " * 8)
    file.write_text(HEAD + body, encoding="utf-8")
    model: nn.Module = runpy.run_path(str(file))["Net"]()
    return model


HEAD = """
import functools
import numpy as np
import thinned
import torch
from thinned import functional as TF
from thinned.functional import drop_path as from_thinned
from torch import nn
from torch.nn import functional as F
from torch.nn.functional import dropout as imported
from torch.utils.checkpoint import checkpoint

def helper(x, dropout, training):
    return F.dropout(x, p=dropout, training=training)

def named(function):
    return functools.wraps(function)(lambda *args: function(*args))

def drop_rows(x, p):
    return x * (torch.rand(len(x), 1, 1) >= p)

class Dropper:
    def __call__(self, x, training):
        return F.dropout(x, 0.45, training)

class Base(nn.Module):
    def propagate(self, x):
        return self.message(x)

    def forward(self, x):
        return F.dropout(x, 0.55, self.training)

class Net(Base):
    p, layerdrop, config, kind, index = 0.3, 0.2, {"p": 0.2}, "od", 1
    functions, table = {"plain": F.dropout}, {2: "eval", 3: "do_drop"}
    partial = staticmethod(functools.partial(F.dropout, p=0.15))

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout(0.5)
        self.object = Dropper()
        self.made = (lambda x: F.dropout(x, 0.35, self.training))

    def message(self, x):
        return F.dropout(x, p=0.25, training=self.training)

    def rate(self):
        return self.p / 2

    def asking(self, x):
        return F.dropout(x, 0.1)

    @named
    def wrapped(self, x, p):
        return F.dropout(x, p, self.training)

    @property
    def dropped(self):
        return F.dropout(torch.ones(2, 4, 8), 0.65, self.training)

    def both(self, x, p):
        return F.dropout(x, p, self.training)

    def do_drop(self, x):
        return F.dropout(x, 0.85, self.training)

    def never(self, x):
        return F.dropout(x, 0.9)

    def method(self, x):
        return imported(x, self.p, self.training)

    def patches(self, n):
        return torch.rand(n, 1, 1) < 0.5

    def forward(self, x):
"""


@pytest.mark.parametrize("forward", FORWARDS)
def test_a_reading_knows_a_plain_p_and_a_run_every_p(forward: str, tmp_path: Path) -> None:
    model, x = written(forward, tmp_path), torch.ones(2, 4, 8)
    read, run = (found[:-1] for found in (inspect(model), inspect(model, x)))  # without the module `inner`
    assert [(site.type, site.p, site.note) for site in read] == FORWARDS[forward]
    for before, after in zip(read, run, strict=True):
        p = 0.3 if before.p is None else before.p
        note = IN_EVALUATION if before.note else ""
        assert (after.where, after.p, after.calls, after.note) == (before.where, p, int(p > 0), note)
        function = next((name for name in ("helper", "method") if name in forward), "forward")
        assert after.function.rpartition(".")[2] == function
        line = Path(after.file).read_text(encoding="utf-8").splitlines()[after.line - 1]
        assert after.type.rpartition(".")[2] in line or "imported" in line
    assert sum(site.calls or 0 for site in run) == masks(model, x)
    assert sum(site.note == IN_EVALUATION for site in run) == masks(model.eval(), x)


# The lines of a forward, and what they reach: p, and the function around the call.
REACHED: dict[str, tuple[float | None, str]] = {
    # A name is computed, or the module holds the function.
    "return getattr(self, 'method')(x)": (0.3, "method"),
    "return getattr(self, f'meth{self.kind}')(x)": (0.3, "method"),
    "return getattr(self, '_'.join(['do', 'drop']))(x)": (0.85, "do_drop"),
    "return getattr(self, self.table[x.dim()])(x)": (0.85, "do_drop"),
    "return type(self).do_drop(self, x)": (0.85, "do_drop"),
    "return getattr(F, 'drop' + 'out')(x, self.p, self.training)": (0.3, "forward"),
    "return getattr(self, f'meth{x.dim() and self.kind}')(x)": (0.3, "method"),
    "return (F.dropout if x.dim() else F.alpha_dropout)(x, self.p, self.training)": (0.3, "forward"),
    "return self.functions['plain'](x, self.p, self.training)": (0.3, "forward"),
    "for f in self.functions.values(): x = f(x, self.p, self.training)\nreturn x": (0.3, "forward"),
    "return self.partial(x, training=self.training)": (0.15, "forward"),
    "return self.made(x)": (0.35, "<lambda>"),
    "return self.object(x, self.training)": (0.45, "__call__"),
    "return checkpoint(F.dropout, x, 0.1, self.training, use_reentrant=False)": (0.1, "forward"),
    "return F.dropout(x, **self.config, training=self.training)": (0.2, "forward"),
    "return F.dropout(x, self.rate(), self.training)": (0.15, "forward"),
    "p = self.p\nreturn (lambda y: F.dropout(y, p, self.training))(x)": (0.3, "<lambda>"),
    # The module inherits, overrides or wraps the function.
    "return self.propagate(x)": (0.25, "message"),
    "return super().forward(x)": (0.55, "forward"),
    "return self.dropped": (0.65, "dropped"),
    "return self.wrapped(x, 0.75)": (0.75, "wrapped"),
    # The caller asks for training.
    "return self.asking(x) if self.training else x": (0.1, "asking"),
    # The same call with two probabilities.
    "return self.both(x, 0.1) + self.both(x, self.p)": (None, "both"),
}


@pytest.mark.parametrize("forward", REACHED)
def test_a_reading_reaches_what_a_run_reaches(forward: str, tmp_path: Path) -> None:
    model, x = written(forward, tmp_path), torch.ones(2, 4, 8)
    (read, *_), (run, *_) = inspect(model), inspect(model, x)
    p, function = REACHED[forward]
    assert (read.type, read.p, read.note) == ("F.dropout", p, "")
    assert read.function.rpartition(".")[2] in (function, "forward" if function == "<lambda>" else function)
    assert (run.type, run.line, run.note) == (read.type, read.line, "")
    assert run.calls == masks(model, x) > 0


class Unhashable(nn.Module):
    pairs = (({"q": 1}, max),)

    def forward(self, x: Tensor) -> Tensor:
        for pair in self.pairs:
            if callable(pair):
                x = pair(x)
        return nn.functional.dropout(x, 0.5, self.training)


def test_what_a_loop_may_call_has_no_hash() -> None:
    (site,) = inspect(Unhashable())
    assert (site.type, site.p) == ("F.dropout", 0.5)


def test_functions_of_thinned_are_sites() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.logit, self.p = nn.Parameter(torch.zeros(1)), 0.25
            self.layer, self.concrete = thinned.Dropout(0.5), thinned.ConcreteDropout()

        def forward(self, x: Tensor) -> Tensor:
            x = thinned.functional.zoneout(x, x, self.p, training=self.training)
            x = thinned.functional.concrete_dropout(x, self.logit, training=self.training)
            return self.concrete(self.layer(x))

    read, run = inspect(Model()), inspect(Model(), torch.ones(3))
    names = ["functional.zoneout", "functional.concrete_dropout", "Dropout", "ConcreteDropout"]
    expected = [(f"thinned.{name}", p) for name, p in zip(names, [0.25, None, 0.5, None], strict=True)]
    assert [(site.type, site.p) for site in read] == [(site.type, site.p) for site in run] == expected
    assert {(site.status, site.note) for site in (*read, *run)} == {("thinned", "")}
    assert [site.calls for site in run] == [1, 1, 1, 1]


DROPPING = [name for name in CALLS if not name.endswith(("_kl", "_regularization", "_loss", "masksembles"))]


@pytest.mark.parametrize("name", CALLS)
def test_every_function_of_thinned_that_drops_is_a_site(name: str, tmp_path: Path) -> None:
    args, kwargs = CALLS[name]
    parameters = signature(getattr(thinned.functional, name))
    given = parameters.bind(*args, **kwargs).arguments
    given |= {"training": True} if "training" in parameters.parameters else {}
    model = written(f"return TF.{name}(**self.given) if self.training else x", tmp_path)
    vars(model).update(given=given)
    read, run = inspect(model)[:-1], inspect(model, torch.ones(1))[:-1]
    p = given.get("p", given.get("drop_prob"))
    expected = [(f"thinned.functional.{name}", p, "thinned", "")] if name in DROPPING else []
    for found in (read, run):
        assert [(site.type, site.p, site.status, site.note) for site in found] == expected
    assert drops(run) == len(expected)


SPELLINGS = [
    "return thinned.functional.drop_path(x, 0.3, self.training)",
    "return TF.drop_path(x, drop_prob=self.p, training=self.training)",
    "return from_thinned(x, self.p, self.training)",
    "from thinned.functional import drop_path\nreturn drop_path(x, 0.3, self.training)",
    "import thinned.functional as ours\nreturn ours.drop_path(x, 0.3, self.training)",
    "import torch\nimport thinned\nreturn thinned.functional.drop_path(x, 0.3, self.training)",
    "f = TF.drop_path if self.p else F.dropout\nreturn f(x, 0.3, self.training)",
    "return checkpoint(TF.drop_path, x, 0.3, self.training, use_reentrant=False)",
]


@pytest.mark.parametrize("forward", SPELLINGS)
def test_a_function_of_thinned_is_read_however_it_is_imported(forward: str, tmp_path: Path) -> None:
    model, x = written(forward, tmp_path), torch.ones(2, 4, 8)
    for found in (inspect(model), inspect(model, x)):
        assert [(site.type, site.p, site.status, site.note) for site in found[:-1]] == [
            ("thinned.functional.drop_path", 0.3, "thinned", "")
        ]


class Hidden(nn.Module):
    """A dropout in a list is no child; two are made in the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.child = nn.Dropout(0.1)
        deep = nn.Sequential(thinned.LayerDrop([nn.ReLU()], 0.3))
        self.drops = [nn.Dropout(0.2), self.child, {"deep": deep}]

    def forward(self, x: Tensor) -> Tensor:
        x = self.drops[0](self.child(x))  # type: ignore[operator]
        return thinned.Dropout(0.4)(self.drops[2]["deep"](x))  # type: ignore[index]


def test_modules_that_are_no_children_are_sites() -> None:
    model = thinned.convert(Hidden())
    found = [
        ("child", "thinned.Dropout", 0.1, "thinned", ""),
        ("drops[0]", "torch.nn.Dropout", 0.2, "intercept", NO_CHILD),
        ("drops[1]", "torch.nn.Dropout", 0.1, "intercept", NO_CHILD),  # which convert has swapped
        ("drops[2]['deep'].0", "thinned.LayerDrop", 0.3, "thinned", NO_CHILD),
    ]
    assert [(site.path, site.type, site.p, site.status, site.note) for site in inspect(model)] == found
    run = inspect(model, torch.ones(2, 3))
    assert [(site.path, site.type, site.calls) for site in run] == [
        ("", "thinned.Dropout", 1),
        *((path, kind, path != "drops[1]") for path, kind, *_ in found),
    ]
    always = ["", "drops[0]", "drops[2]['deep'].0"]  # eval() does not reach them
    assert [site.path for site in run if IN_EVALUATION in site.note] == always
    with Count() as count:
        model.eval()(torch.ones(2, 3))
    assert count.masks == 1  # of torch's, for drops[0]


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_intercept_reaches_is_thinneds_within_it(wrapped: bool) -> None:
    model = zoo.lstm()
    inputs = zoo.inputs(model)
    whole = thinned.Intercepted(model) if wrapped else model
    with nullcontext() if wrapped else thinned.intercept():
        found = inspect(whole, **inputs)
    assert [(site.status, site.note, site.calls) for site in found] == [("thinned", INTERCEPTED, 1)] * 2
    assert [site.status for site in inspect(model)] == ["intercept", "convert"]


class Percent(nn.Module):
    """It counts in percent."""

    def __init__(self, rate: float = 20) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.rate / 100, self.training)


class LeftPercent(Percent):
    def extra(self) -> None:
        """By which it is more than the rule knows."""


class RefusedPercent(Percent):
    def forward(self, x: Tensor) -> Tensor:
        return x


def refuse(_: nn.Module) -> nn.Module:
    raise ValueError("no layer does this")


thinned.register(RefusedPercent, refuse, unit=lambda _: 0.01)
thinned.register(Percent, lambda old: thinned.Dropout(old.rate / 100), unit=lambda _: 0.01)


def reads(body: str, folder: Path, **attributes: Any) -> nn.Module:
    model = written(body, folder)
    vars(model).update(attributes)
    return nn.Sequential(model)


SAME_P: dict[str, Callable[[Path], nn.Module]] = {
    **{name: lambda _, name=name: zoo.MODELS[name]() for name in zoo.MODELS if name != "swin"},
    "attention with p = 0": lambda _: nn.MultiheadAttention(4, 2),
    "attention with a number of NumPy": lambda _: nn.MultiheadAttention(4, 2, dropout=np.float32(0.1)),
    "recurrent with p = 0": lambda _: nn.GRU(4, 4, 2),
    "several probabilities": lambda _: thinned.VariationalLSTM(4, 4, 2, input_p=0.1, recurrent_p=0.2),
    "a tensor": lambda _: nn.Dropout(torch.tensor(0.1)),  # type: ignore[arg-type]
    "another unit": lambda _: Percent(),
    "another unit, left": lambda _: LeftPercent(),
    "left": lambda _: nn.Sequential(zoo.AlwaysOn(0.1), zoo.OwnForward(0.1)),
    "a number of NumPy": lambda folder: reads(
        "return F.dropout(x, self.rate, self.training)", folder, rate=np.float32(0.1)
    ),
    "a config": lambda folder: reads(
        "return TF.drop_path(x, self.config.rate, self.training)", folder, config=SimpleNamespace(rate=0.1)
    ),
}


@pytest.mark.parametrize("case", SAME_P)
def test_it_says_the_same_p_as_convert(case: str, tmp_path: Path) -> None:
    model = SAME_P[case](tmp_path)
    found = inspect(thinned.convert(model, p=0.3))
    # The class of `reads` has another dropout, which nothing calls.
    assert {site.p for site in found if site.path != "0.inner"} == {0.3}
    assert all(site.p == 0 for site in inspect(thinned.convert(model, p=0)))


def test_a_p_before_the_conversion() -> None:
    """None for 0, a unit, a tensor, and what has no one number or none."""
    drop_path = zoo.library_class("timm.layers.drop:DropPath")
    several = thinned.VariationalLSTM(4, 4, 2, input_p=0.1, recurrent_p=0.2)
    model = nn.Sequential(drop_path(None), Percent(), RefusedPercent(), several, thinned.RDrop())
    model.append(nn.Dropout(torch.tensor(0.25)))  # type: ignore[arg-type]
    model.append(nn.MultiheadAttention(4, 2, dropout=None))  # type: ignore[arg-type]
    assert [(site.p, site.note) for site in inspect(model)] == [
        (0, ""),
        (0.2, ""),
        (0.2, "no layer does this"),
        (None, "input_p=0.1, recurrent_p=0.2"),
        (0.25, ""),
    ]


def test_a_method_from_another_file_leads_back(tmp_path: Path) -> None:
    """A template generates PyTorch Geometric's propagate. A method that nothing mentions is no site."""
    file = tmp_path / "generated.py"
    file.write_text("def propagate(self, x):\n    return self.message(x)\n")
    model = written("return self.propagate(x)", tmp_path)
    type(model).propagate = runpy.run_path(str(file), run_name="generated")["propagate"]
    found = inspect(model)[:-1]
    assert [(site.function, site.p) for site in found] == [("Net.message", 0.25)]


def test_layerdrop_is_a_site() -> None:
    """Reading finds each of its calls in a model of transformers, with p and what replaces it."""
    model = zoo.bart(encoder_layerdrop=1e-9, decoder_layerdrop=2e-9)  # it draws, and skips nothing
    read, run = inspect(model), inspect(model, **zoo.inputs(model))
    layers = [site for site in run if site.kind == "layer"]
    assert [(site.path, site.type, site.p, site.status, site.calls) for site in layers] == [
        ("encoder", "torch.rand", 1e-9, "intercept", zoo.LAYERS),
        ("decoder", "torch.rand", 2e-9, "intercept", zoo.LAYERS),
    ]
    assert [(site.path, site.where, site.p) for site in read] == [(s.path, s.where, s.p) for s in run]
    assert drops(run) == masks(model, **zoo.inputs(model))


DRAWS = {
    "if self.training and torch.rand(1).item() < self.layerdrop: return x\nreturn x + 1": (
        ("layer", "torch.rand", 0.2, "intercept", "")
    ),
    "skip = np.random.uniform(0, 1)\nreturn x if self.training and skip < self.layerdrop else x + 1": (
        ("layer", "numpy.random.uniform", 0.2, "beyond", ELSEWHERE)
    ),
    "return drop_rows(x, self.p) if self.training else x": (("random", "torch.rand", 0.3, "intercept", "")),
    "return x + (torch.rand([]) if self.training else 0)": (
        "random",
        "torch.rand",
        None,
        "perhaps",
        HAND_WRITTEN,
    ),
}


@pytest.mark.parametrize("forward", DRAWS)
def test_random_numbers_are_known_by_what_draws_them(forward: str, tmp_path: Path) -> None:
    model, x = written(forward, tmp_path), torch.ones(2, 4, 8)
    (read, _), (run, _) = inspect(model), inspect(model, x)
    assert (read.kind, read.type, read.p, read.status, read.note) == DRAWS[forward]
    assert run.where == read.where
    assert run.calls == (None if read.note == ELSEWHERE else masks(model, x))


def test_a_run_reports_what_source_does_not(tmp_path: Path) -> None:
    hidden = 'x = eval("F.dropout(x, 0.5, on)", {"F": F, "x": x, "on": self.training})\n'
    hidden += 'return x * (vars(torch)["rand_like"](x) > 0.2) if self.training else x'
    found = inspect(written(hidden, tmp_path), torch.ones(4, 8))[:-1]
    assert [(site.kind, site.type, site.p, site.calls, site.status) for site in found] == [
        ("call", "F.dropout", 0.5, 1, "intercept"),
        ("random", "aten.rand_like", None, 1, "perhaps"),
    ]
    assert (found[1].function, found[1].where) == ("Net.forward", f"written.py:{found[1].line}")


def test_masks_made_by_hand(tmp_path: Path) -> None:
    model = written(
        "keep = x.new_empty(x.shape).bernoulli_(0.5)\n"
        "keep = keep * torch.bernoulli(keep) * (torch.rand_like(x) < 0.5)\n"
        "return x * keep * self.patches(len(x)) if self.training else x",
        tmp_path,
    )
    found, run = inspect(model)[:-1], inspect(model, torch.ones(2, 4, 8))[:-1]
    names = ("Tensor.bernoulli_", "torch.bernoulli", "torch.rand_like", "torch.rand")
    assert [(site.kind, site.type) for site in found] == [("random", name) for name in names]
    assert [site.calls for site in run] == [1, 1, 1, 1]


class MyDropout(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_modules_that_convert_leaves() -> None:
    found = inspect(nn.Sequential(zoo.OwnForward(0.1), MyDropout(), thinned.Dropout(0.2)), torch.ones(4))
    assert [(site.path, site.type.rpartition(".")[2], site.status, site.calls) for site in found] == [
        ("0", "dropout", "intercept", 1),
        ("1", "MyDropout", "register", 0),
        ("2", "Dropout", "thinned", 1),
    ]
    assert [site.note for site in found[:2]] == [
        "a torch.nn.Dropout with its own forward",
        "no rule for MyDropout",
    ]


def test_the_calls_of_a_left_dropout_are_reported() -> None:
    """Source and run agree on it, whether the subclass or the module itself has a method of its own."""
    patched = nn.Dropout(0.2)
    patched.train = lambda mode=True: patched  # type: ignore[assignment, misc] # noqa: ARG005
    model = nn.Sequential(zoo.AlwaysOn(0.1), patched)
    found = inspect(model)
    assert [(site.path, site.type, site.p, site.status) for site in found] == [
        ("0", "F.dropout", 0.1, "intercept"),
        ("1", "F.dropout", 0.2, "intercept"),
    ]
    left = "a torch.nn.Dropout with its own train"
    assert [site.note for site in found] == [left] * 2
    run = inspect(model, torch.ones(4))
    # The second was patched to ignore its mode, and it is in training.
    assert [(site.calls, site.note) for site in run] == [(1, f"{left}; {IN_EVALUATION}")] * 2
    assert [(site.path, site.type, site.p, site.where) for site in run] == [
        (site.path, site.type, site.p, site.where) for site in found
    ]
    assert [site.note for site in inspect(thinned.convert(model))] == [site.note for site in found]


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers(kind: type[nn.RNNBase], packed: bool) -> None:
    model = kind(4, 4, 3, dropout=0.2)
    x: Any = torch.ones(5, 2, 4)
    if packed:
        x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3]))
    found = inspect(model, x)
    assert [(site.type, site.kind, site.p, site.calls) for site in found] == [
        (f"torch.nn.{kind.__name__}(dropout=)", "argument", 0.2, 1)
    ]
    assert [(site.p, site.status, site.calls) for site in inspect(kind(4, 4, 3), x)] == [(0.0, "off", 0)]
    with pytest.warns(UserWarning, match="expects num_layers greater than 1"):
        single = kind(4, 4, dropout=0.2)
    assert not inspect(single, x)
    assert masks(single, x) == 0


def test_a_shared_module_is_one_site() -> None:
    shared = nn.Dropout(0.2)
    found = inspect(nn.Sequential(shared, nn.Linear(2, 2), shared), torch.ones(2))
    assert [(site.paths, site.calls) for site in found] == [(("0", "2"), 2)]


def test_the_model_and_the_generator_stay_as_they_were() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 4).eval())
    before, state = copy.deepcopy(model), torch.get_rng_state()
    hooks = {
        name: dict(value)
        for name, value in vars(nn.modules.module).items()
        if name.startswith("_global_") and isinstance(value, dict)
    }
    inspect(model, torch.ones(8, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == [True, True, True, False]
    for name, value in before.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert all(dict(vars(nn.modules.module)[name]) == value for name, value in hooks.items())


def test_what_a_run_raises_comes_out_and_leaves_nothing_behind() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(4, 4)).eval()
    with pytest.raises(RuntimeError, match="shapes"):
        inspect(model, torch.ones(2, 3))
    assert not model.training
    assert torch._C._len_torch_function_stack() == 0
    assert masks(nn.Linear(4, 4), torch.ones(2, 4)) == 0


def test_the_table() -> None:
    found = inspect(zoo.attention())
    assert str(found).splitlines() == [
        "2 dropout sites: 2 need thinned.intercept()",
        "path       type                                   p    status",
        f"(model)    F.dropout, zoo.py:{found[0].line}                  0.1  needs thinned.intercept()",
        "attention  torch.nn.MultiheadAttention(dropout=)  0.1  needs thinned.intercept()",
    ]
    assert found[:1][0] is found[0]
    assert str(inspect(nn.Linear(2, 2))) == "0 dropout sites"


class Block(nn.Module):
    """Two branches of 4 * FLOPS, the second with a batch normalization, and one linear layer behind them."""

    FLOPS = 2 * 4 * 4  # of a row of a linear layer

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.drop_path1, self.drop_path2 = thinned.DropPath(0.25), thinned.DropPath(0.5)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.narrow(self.wide(self.norm(x))))
        x = x + self.drop_path2(self.mlp(x))
        head: Tensor = self.head(x)
        return head


def test_which_branches_skip_and_how_much_that_saves() -> None:
    model, x = Block(), torch.ones(6, 4)
    refused = "cannot skip: BatchNorm1d at 'mlp.1' takes its statistics over the batch"
    for verb in ("can skip", "skips", "can skip"):
        for site in (inspect(model)[0], first := inspect(model, x)[0]):
            assert site.skip == f"{verb} norm, wide, narrow"
        second = inspect(model, x)[1]
        assert second.skip.startswith(refused)
        assert second.saves is None
        assert first.saves == 0.25 * 4 / 9
        assert (first.calls, second.calls) == (1, 1)
        table = inspect(model, x).table(200)
        assert table.startswith("2 dropout sites: 2 are thinned's; skipping saves 11.1 % of the FLOPs")
        assert f"thinned's: {verb} norm, wide, narrow (11.1 % of the FLOPs)" in table
        thinned.revert(model) if verb == "skips" else thinned.convert(model, skip=True)
    thinned.convert(model, skip=True, allow_batch_norm=True)
    first, second = inspect(model, x)
    assert (second.skip, second.saves) == ("skips mlp", 0.5 * 4 / 9)
    assert inspect(Block().narrow, torch.ones(1, 8)).table() == "0 dropout sites"


def test_attention_counts_and_so_does_a_residual() -> None:
    """For three tokens attention takes 2 * 2 * 3 * 3 * WIDTH, and its four projections 8 * 3 * WIDTH**2."""
    branch = nn.TransformerEncoderLayer(zoo.WIDTH, 1, 1, 0.0, batch_first=True)
    (site, *_) = inspect(
        nn.Sequential(thinned.Residual(branch, 0.5), nn.Linear(zoo.WIDTH, zoo.WIDTH)),
        torch.ones(2, 3, zoo.WIDTH),
    )
    of_branch = 36 * zoo.WIDTH + 24 * zoo.WIDTH**2 + 2 * 6 * zoo.WIDTH
    assert (site.type, site.skip) == ("thinned.Residual", "skips branch")
    assert site.saves == 0.5 * of_branch / (of_branch + 6 * zoo.WIDTH**2)


def test_only_modules() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got 3"):
        inspect(3)  # type: ignore[arg-type]


def test_a_model_named_on_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\ndef make():\n    return torch.nn.LSTM(4, 4, 2, dropout=0.2)\nit = make()\n"
    )
    assert isinstance(model_of(f"{file}:make"), nn.LSTM)
    assert model_of(f"{file}:it") is model_of(f"{file}:it")


def test_the_table_fits_100_columns() -> None:
    deep = nn.Sequential(OrderedDict(a_long_name_of_a_stage=nn.Sequential(zoo.swin(), zoo.bert(), Hidden())))
    model = nn.Sequential(deep, *[deep] * 20)
    widest = [max(map(len, found.table(w).splitlines())) for found in [inspect(model)] for w in (100, 80, 60)]
    assert [each <= w for each, w in zip(widest, (100, 80, 60), strict=True)] == [True] * 3


def command(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["inspect", *arguments], env={"COLUMNS": "100"})


def test_the_command() -> None:
    done = command(f"{__file__}:two_blocks")
    assert done.exit_code == 0
    assert done.output == f"{inspect(two_blocks())}\n"
    assert [line.split()[:2] for line in done.output.splitlines()[2:]] == [
        ["0-1", "F.dropout,"],
        ["0-1.attention", "torch.nn.MultiheadAttention(dropout=)"],
    ]


MODELS = """
import argparse, functools, torch, thinned
from torch import nn
from torch.nn import functional as F

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.words, self.drops = nn.Linear(8, 8), nn.Embedding(9, 8), [nn.Dropout(0.1)]

    def forward(self, x, ids=None, mask=None):
        x = self.drops[0](self.linear(x)) + (0 if ids is None else self.words(ids))
        return F.dropout(x, 0.2, self.training) * (1 if mask is None else mask[..., None])

class Half(Net):
    def __init__(self):
        super().__init__()
        print("no part of the output")
        self.bfloat16()

def raises():
    return [helper() for _ in range(2)]

def helper():
    raise TypeError("no weights\\nat all")

def reads_arguments():
    argparse.ArgumentParser(exit_on_error=False).parse_args(["--no-such"])

def uses_torch():
    return nn.Linear(2, 2)(torch.ones(3))

def takes_one(x):
    return x

not_enough = functools.partial(takes_one, y=3)
seq = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
"""


@pytest.mark.parametrize(
    ("name", "inputs"),
    [
        ("Net", ["2x3x8"]),
        ("Net", ["2x3x8", "2x3:int64", "2x3:bool"]),
        ("Net", ["mask=2x3:float64", "2x3x8", "ids=2x3:long"]),
        ("Half", ["2x3x8", "2x3:int32"]),
    ],
)
def test_the_command_runs_the_model(name: str, inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODELS)
    options = [part for each in inputs for part in ("--input", each)]
    done = command(f"{tmp_path}/mine.py:{name}", *options, "--json")
    assert done.exit_code == 0, done.output
    functional, hidden = json.loads(done.stdout)
    assert (functional["type"], functional["p"], functional["calls"]) == ("F.dropout", 0.2, 1)
    assert (functional["status"], functional["where"]) == ("intercept", "mine.py:13")
    assert (hidden["paths"], hidden["calls"], hidden["note"]) == (
        ["drops[0]"],
        1,
        f"{IN_EVALUATION}; {NO_CHILD}",
    )
    assert set(functional) == {field.name for field in fields(Site)} | {"where"}


REFUSED = [
    ("torch.nn", [], "unknown model 'torch.nn'"),
    ("raises", [], "mine.py:raises raises TypeError: no weights (mine.py, line 25, in helper)"),
    ("reads_arguments", [], "raises SystemExit: 2 (mine.py, line 28, in reads_arguments)"),
    ("uses_torch", [], "(mine.py, line 31, in uses_torch)"),
    ("takes_one", [], "mine.py:takes_one cannot be called without arguments: TypeError: takes_one() missing"),
    ("not_enough", [], "mine.py:not_enough cannot be called without arguments: TypeError"),
    ("Net", ["2x7"], "mine.py:Net raises in the run: RuntimeError: "),
    (
        "Net",
        ["2x7"],
        "mat1 and mat2 shapes cannot be multiplied (2x7 and 8x8) (mine.py, line 12, in forward)",
    ),
    ("Net", ["x=2x8", "y=3"], "got an unexpected keyword argument 'y'"),
    ("seq", ["2x4"], "linear.py, line"),
    ("Net", ["2,7"], "input '2,7' is not understood; accepted are sizes, such as 2x3x32x32, with a dtype"),
    ("Net", ["2x7:int128"], "input '2x7:int128' is not understood"),
    ("Net", ["2x7:nn"], "input '2x7:nn' is not understood"),
    ("Net", [""], "input '' is not understood"),
    ("Net", ["99999999x99999999"], "cannot make the inputs: RuntimeError"),
]


@pytest.mark.parametrize(("name", "inputs", "words"), REFUSED)
def test_what_the_command_refuses_is_one_line(
    name: str, inputs: list[str], words: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(MODELS)
    text = name if "." in name else f"{tmp_path}/mine.py:{name}"
    done = command(text, *(part for each in inputs for part in ("--input", each)))
    assert (done.exit_code, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1].replace(f"{tmp_path}/", "")
    assert last.startswith("thinned inspect: ")
    assert words in last
    assert "Traceback" not in done.stderr


def two_blocks() -> nn.Module:
    return nn.Sequential(zoo.attention(), zoo.attention())


def nothing() -> int:
    return 3


def fails() -> nn.Module:
    raise RuntimeError("no weights")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("torch.nn", "unknown model 'torch.nn'"),
        (":make", "unknown model"),
        ("torch.nn:Nothing", "torch.nn has nothing called 'Nothing'"),
        ("torch.nn:Linear", "torch.nn:Linear cannot be called without arguments: TypeError"),
        (f"{__name__}:nothing", "gave no torch.nn.Module, got 3 of type int"),
        (f"{__name__}:fails", "no weights"),
        ("thinned.models.text:zzz", "has nothing called 'zzz'; it has count, format_p, format_paths,"),
        (f"{__name__}:RANDOM", "is neither a model nor a function"),
        ("no.such.module:make", "cannot import no.such.module"),
    ],
)
def test_no_model_by_that_name(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        model_of(text)


def test_a_reading_takes_nothing_from_a_queue() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates: queue.SimpleQueue[float] = queue.SimpleQueue()
            self.rates.put(0.4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.dropout(x, self.rates.get(False), self.training)

    model = Model()
    assert [site.p for site in inspect(model)] == [None]
    assert model.rates.get(False) == 0.4
