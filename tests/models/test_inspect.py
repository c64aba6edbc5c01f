"""thinned.inspect lists every place at which a model drops: held against what comes to ATen."""

from __future__ import annotations

import copy
import math
import queue
import re
import runpy
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import thinned
from models import zoo
from thinned.cli import app
from thinned.compare.loading import model_of
from thinned.models.convert import convert
from thinned.models.convert.rules import probability_of
from thinned.models.inspect import IN_EVALUATION, UNKNOWN, Inspection, inspect
from thinned.models.inspect.names import UNCONDITIONAL
from thinned.models.inspect.targets import ELSEWHERE, HAND_WRITTEN
from thinned.models.walk import modules_with_paths, original, qualified_name

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


def drops(found: Inspection) -> int:
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
    """After convert the masks that ATen makes are those of the sites beyond convert."""
    model = make(case)
    inputs = zoo.inputs(model)
    beyond = sum(site.calls or 0 for site in inspect(model, **inputs).unreached)
    convert(model)
    after = inspect(model, **inputs)
    assert masks(model, **inputs) == beyond == sum(site.calls or 0 for site in after.unreached)
    ours = [site for site in after if site not in after.unreached]
    assert all(site.type.startswith("thinned.") for site in ours)
    # BERT's and GPT-2's attention takes the probability of its dropout and passes it on.
    attention = 2 if case.split()[0] in ("bert", "gpt2") else 0
    assert [site.calls for site in ours].count(0) == attention


@pytest.mark.parametrize("name", ["bert", "swin", "lstm"])
def test_what_becomes_of_a_module_is_what_convert_does(name: str) -> None:
    model = zoo.MODELS[name]()
    expected = [
        (site.paths, site.type, site.becomes, site.p) for site in inspect(model) if site.kind == "module"
    ]
    convert(model)
    found = []
    for module, paths in modules_with_paths(model):
        if (old := original(module)) is not module:
            kinds = [qualified_name(type(each)) for each in (old, module)]
            found.append((paths, *kinds, probability_of(module)))
    assert found == expected


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
import torch
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
    assert all(site.becomes == site.type and not site.note for site in (*read, *run))
    assert [site.calls for site in run] == [1, 1, 1, 1]
    assert read.unreached == ()


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
    assert [(site.path, site.type, site.p, site.becomes, site.calls) for site in layers] == [
        ("encoder", "torch.rand", 1e-9, "thinned.intercept()", zoo.LAYERS),
        ("decoder", "torch.rand", 2e-9, "thinned.intercept()", zoo.LAYERS),
    ]
    assert [(site.path, site.where, site.p) for site in read] == [(s.path, s.where, s.p) for s in run]
    assert drops(run) == masks(model, **zoo.inputs(model))


DRAWS = {
    "if self.training and torch.rand(1).item() < self.layerdrop: return x\nreturn x + 1": (
        ("layer", "torch.rand", 0.2, "thinned.intercept()", "")
    ),
    "skip = np.random.uniform(0, 1)\nreturn x if self.training and skip < self.layerdrop else x + 1": (
        ("layer", "numpy.random.uniform", 0.2, "", ELSEWHERE)
    ),
    "return drop_rows(x, self.p) if self.training else x": (
        ("random", "torch.rand", 0.3, "thinned.intercept()", "")
    ),
    "return x + (torch.rand([]) if self.training else 0)": ("random", "torch.rand", None, "", HAND_WRITTEN),
}


@pytest.mark.parametrize("forward", DRAWS)
def test_random_numbers_are_known_by_what_draws_them(forward: str, tmp_path: Path) -> None:
    model, x = written(forward, tmp_path), torch.ones(2, 4, 8)
    (read, _), (run, _) = inspect(model), inspect(model, x)
    assert (read.kind, read.type, read.p, read.becomes, read.note) == DRAWS[forward]
    assert run.where == read.where
    assert run.calls == (None if read.note == ELSEWHERE else masks(model, x))


def test_a_run_reports_what_source_does_not(tmp_path: Path) -> None:
    hidden = 'x = eval("F.dropout(x, 0.5, on)", {"F": F, "x": x, "on": self.training})\n'
    hidden += 'return x * (vars(torch)["rand_like"](x) > 0.2) if self.training else x'
    found = inspect(written(hidden, tmp_path), torch.ones(4, 8))[:-1]
    assert [(site.kind, site.type, site.p, site.calls, site.becomes) for site in found] == [
        ("call", "F.dropout", 0.5, 1, "thinned.intercept()"),
        ("random", "aten.rand_like", None, 1, ""),
    ]
    assert found[1].where.startswith("Net.forward, line")


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
    assert [(site.path, site.type.rpartition(".")[2], site.becomes) for site in found] == [
        ("0", "OwnForward", ""),
        ("0", "dropout", "thinned.intercept()"),
        ("1", "MyDropout", ""),
        ("2", "Dropout", "thinned.Dropout"),
    ]
    assert "a torch.nn.Dropout with its own forward" in found[0].note
    assert found[2].note == UNKNOWN
    assert [site.calls for site in found] == [None, 1, None, 1]


def test_the_calls_of_a_left_dropout_are_reported() -> None:
    """Source and run agree on it, whether the subclass or the module itself has a method of its own."""
    patched = nn.Dropout(0.2)
    patched.train = lambda mode=True: patched  # type: ignore[assignment, misc] # noqa: ARG005
    model = nn.Sequential(zoo.AlwaysOn(0.1), patched)
    found = inspect(model)
    assert [(site.path, site.type.rpartition(".")[2], site.p, site.becomes) for site in found] == [
        ("0", "AlwaysOn", 0.1, ""),
        ("0", "dropout", 0.1, "thinned.intercept()"),
        ("1", "Dropout", 0.2, ""),
        ("1", "dropout", 0.2, "thinned.intercept()"),
    ]
    assert [site.note for site in found[::2]] == ["left: a torch.nn.Dropout with its own train"] * 2
    run = inspect(model, torch.ones(4))
    # The second was patched to ignore its mode, and it is in training.
    assert [(site.calls, site.note) for site in run[1::2]] == [(1, IN_EVALUATION)] * 2
    assert [(site.path, site.type, site.p, site.where) for site in run] == [
        (site.path, site.type, site.p, site.where) for site in found
    ]
    assert [site.note for site in inspect(convert(model))] == [site.note for site in found]


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
    assert not inspect(kind(4, 4, 3), x)
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
    lines = str(found).splitlines()
    assert lines[0] == "2 dropout sites, 2 of them beyond thinned.convert"
    assert lines[1].split() == ["path", "type", "p", "becomes", "where"]
    assert lines[2].split()[:4] == ["(model)", "F.dropout", "0.1", "thinned.intercept()"]
    assert lines[2].endswith(f"Attention.forward, line {found[0].line} of zoo.py")
    assert found[:1][0] is found[0]
    assert str(inspect(nn.Linear(2, 2))) == "0 dropout sites, 0 of them beyond thinned.convert"
    assert math.isclose(found[0].p or 0, zoo.P)


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


def test_the_command() -> None:
    done = CliRunner().invoke(app, ["inspect", f"{__file__}:two_blocks"])
    assert done.exit_code == 0
    assert done.output == f"{inspect(two_blocks())}\n"
    assert [line.split()[:2] for line in done.output.splitlines()[2:]] == [
        ["0-1", "F.dropout"],
        ["0-1.attention", "torch.nn.MultiheadAttention(dropout=)"],
    ]
    failed = CliRunner().invoke(app, ["inspect", "torch.nn"])
    assert failed.exit_code == 2
    assert "thinned inspect: unknown model 'torch.nn'" in failed.output


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
        (f"{__name__}:nothing", "gave no torch.nn.Module, but a int"),
        (f"{__name__}:fails", "no weights"),
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
