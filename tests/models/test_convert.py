"""thinned.convert swaps modules and nothing else; thinned.revert gives them back."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import types
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import thinned
from models import zoo
from thinned.models.convert import convert, report, revert
from thinned.models.convert.rules import _by_name, _by_type, register
from thinned.models.sites import rates_of
from thinned.models.walk import ORIGIN, is_ours

SIX = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
BLOCK, PATCHES = "timm.layers.drop:DropBlock2d", "timm.layers.patch_dropout:PatchDropout"
VISION = "torchvision.ops.drop_block:DropBlock"
SHAPES = {"Dropout1d": (4, 6, 5), "Dropout2d": (4, 6, 5, 5), "Dropout3d": (4, 6, 3, 3, 3)}


class OwnName(nn.Dropout):
    pass


class Noise(nn.Module):
    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) >= self.rate) if self.training else x


def small(p: float = 0.5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(p), nn.Linear(8, 8), nn.Dropout(p))


def seeded(call: Callable[[], Tensor], seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return call()


@pytest.fixture(autouse=True)
def registry() -> Any:
    """Undo the registrations of a test."""
    before = dict(_by_type), dict(_by_name)
    yield
    for store, content in zip((_by_type, _by_name), before, strict=True):
        store.clear()
        store.update(content)


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """What the last conversion or revert said at a level, without the name of the caller."""
    caplog.set_level(logging.INFO, "thinned")

    def last(level: int = logging.WARNING) -> str:
        of_call: list[str] = []
        for record in caplog.records:
            said = record.getMessage().partition(": ")[2]
            if record.levelno == logging.INFO:
                of_call = [said] if level == logging.INFO else []  # each call says something at INFO first
            elif record.levelno == level:
                of_call.append(said)
        return "\n".join(of_call)

    return last


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_converted_model_is_the_same_model(name: str) -> None:
    model = zoo.MODELS[name]()
    modules = dict(model.named_modules())
    dropouts = {path for path, module in modules.items() if "drop" in type(module).__name__.lower()}
    keys = list(model.state_dict())
    before = zoo.output(model.eval())
    in_training = seeded(lambda: zoo.output(model.train()))

    assert convert(model) is model
    assert {path for path, module in model.named_modules() if is_ours(module)} == dropouts
    assert [path for path, _ in model.named_modules()] == list(modules)
    assert list(model.state_dict()) == keys
    assert all(module.training for module in model.modules())
    assert torch.equal(zoo.output(model.eval()), before)
    assert not dropouts or not torch.equal(seeded(lambda: zoo.output(model.train())), in_training)

    assert revert(model.train()) is model
    assert dict(model.named_modules()) == modules
    assert torch.equal(seeded(lambda: zoo.output(model)), in_training)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_swapped_site_draws_our_masks(name: str) -> None:
    """Each output is that of our function under the key that the generator gives."""
    model = zoo.MODELS[name]()
    states, wrong, ran = [], [], set()

    def before(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        states.append((torch.get_rng_state(), args[0].clone()))

    def after(module: Any, _: tuple[Tensor, ...], out: Tensor) -> None:
        state, x = states.pop()
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            if isinstance(module, thinned.DropPath):
                expected = thinned.functional.drop_path(x, module.drop_prob, True)
            else:
                expected = thinned.functional.dropout(x, module.p)
        ran.add(module)
        if not torch.equal(out, expected):
            wrong.append(module)

    swapped = [module for module in convert(model).modules() if is_ours(module)]
    for module in swapped:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    zoo.output(model)
    assert not wrong
    # BERT's and GPT-2's attention takes the probability of its dropout and passes it on.
    attention = {"bert": 2, "gpt2": 2}.get(name, 0)
    assert len(ran) == len(swapped) - attention


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("training", [True, False])
def test_each_of_the_six(name: str, training: bool) -> None:
    old = getattr(nn, name)(0.3, True).train(training)
    model = convert(nn.Sequential(old))
    new: Any = model[0]
    assert type(new) is getattr(thinned, name)
    assert (new.p, new.training) == (0.3, training)
    assert new.inplace is not ("Alpha" in name)  # which torch ignores there
    x = torch.randn(SHAPES.get(name, (4, 6, 5)))
    y = new(x.clone())
    expected = seeded(lambda: getattr(thinned, name)(0.3).train(training)(x))
    assert torch.equal(seeded(lambda: new(x.clone())), expected)
    assert torch.equal(y, x) is not training
    assert revert(model)[0] is old


def counted(kind: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
    return kind(*args, scale="counted", **kwargs)


@pytest.mark.parametrize(
    ("path", "arguments", "ours", "shape"),
    [
        ("timm.layers.drop:DropPath", (0.2, False), thinned.DropPath(0.2, False), (6, 4)),
        (PATCHES, (0.5, 2, True), thinned.PatchDropout(0.5, 2, True), (2, 9, 3)),
        (f"{PATCHES}WithIndices", (0.5,), thinned.PatchDropout(0.5, return_indices=True), (2, 9, 3)),
        (f"{VISION}2d", (0.2, 3, True), counted(thinned.DropBlock2d, 0.2, 3, True), (2, 3, 8, 8)),
        (f"{VISION}3d", (0.2, 3), counted(thinned.DropBlock3d, 0.2, 3), (2, 3, 5, 5, 5)),
        (
            "torchvision.ops.stochastic_depth:StochasticDepth",
            (0.3, "batch"),
            thinned.StochasticDepth(0.3, "batch"),
            (6, 4),
        ),
    ],
)
def test_layers_of_other_libraries(
    path: str, arguments: tuple[Any, ...], ours: nn.Module, shape: tuple[int, ...]
) -> None:
    layer = zoo.library_class(path)
    old = layer(*arguments)
    model = convert(nn.Sequential(old))
    assert repr(model[0]) == repr(ours)
    x = torch.randn(shape)
    found, expected = (seeded(lambda m=m: m(x.clone())) for m in (model[0], ours))
    first, second = (y[0] if isinstance(y, tuple) else y for y in (found, expected))
    assert isinstance(found, tuple) is isinstance(expected, tuple)
    assert torch.equal(first, second)
    assert revert(model)[0] is old


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"with_noise": True},
        {"scale_by_keep": False, "inplace": True},
        {"gamma_scale": 0.5, "couple_channels": False},
        {"gamma_scale": 0.0},
    ],
    ids=str,
)
def test_a_block_of_timm_keeps_its_options(options: dict[str, Any]) -> None:
    """And thinned's class takes them by their names."""
    old = zoo.library_class(BLOCK)(drop_prob=0.4, block_size=3, **options)
    model = convert(nn.Sequential(old))
    new: Any = model[0]
    assert new.p == 0.4
    ours = counted(thinned.DropBlock2d, drop_prob=0.4, block_size=3, **{"couple_channels": True, **options})
    assert repr(new) == repr(ours)
    x = torch.randn(2, 3, 8, 8)
    y, expected = (seeded(lambda m=m: m(x.clone())) for m in (new, ours))
    assert torch.equal(y, expected)
    assert torch.equal(y, x) is (options.get("gamma_scale") == 0)
    new.p = 0.07
    assert revert(model)[0].drop_prob == 0.07


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("batchwise", [True, False])
def test_a_block_of_timm_before_1_0_23(fast: bool, batchwise: bool) -> None:
    """It has a mask for each channel; if it is fast, it ignores batchwise."""
    old: Any = type("DropBlock2d", (nn.Module,), {"__module__": "timm.layers.drop"})()
    for name, value in {"drop_prob": 0.4, "block_size": 3, "gamma_scale": 1.0, "with_noise": False}.items():
        setattr(old, name, value)
    old.inplace, old.batchwise, old.fast = False, batchwise, fast
    x = torch.ones(2, 3, 8, 8)
    y = seeded(lambda: convert(nn.Sequential(old))(x))
    ours = counted(thinned.DropBlock2d, 0.4, 3, batchwise=batchwise and not fast)
    assert torch.equal(y, seeded(lambda: ours(x)))


class Scaled(nn.Module):
    def __init__(self, drop_prob: float | None, factor: float) -> None:
        super().__init__()
        self.drop_prob, self.factor = drop_prob, factor


@pytest.mark.parametrize(
    ("before", "factor"), [(0.3, 0.7), (0.4, 0.25), (0.0, 0.25), (0.9, 2.0), (None, 0.5), (1, 1.0)]
)
def test_a_probability_in_another_unit_comes_back(before: float | None, factor: float) -> None:
    """Also 0, None and beyond 1, where the ratio of the two numbers says nothing."""

    def build(old: Any) -> nn.Module:
        return thinned.Dropout(min(1.0, (old.drop_prob or 0.0) * old.factor))

    register(Scaled, build, unit=lambda old: old.factor)
    model = nn.Sequential(Scaled(before, factor))
    assert revert(convert(model))[0].drop_prob is before
    convert(model)
    built = model[0].p
    assert built == min(1, (before or 0) * factor)
    model[0].p = 0.07
    model[0].p = built
    assert revert(model)[0].drop_prob is before
    convert(model)
    model[0].p = 0.07
    assert revert(model)[0].drop_prob == 0.07 / factor
    assert revert(convert(model, p=0.1))[0].drop_prob == 0.1 / factor


@pytest.mark.parametrize("before", [0, 0.0, 0.1, 0.3, 1.0])
@pytest.mark.parametrize("now", [0, 0.0, 0.1, 0.3, 0.1 + 0.2, 1 / 3, 0.1 * 3 / 7, 5e-324, 1.0])
def test_a_probability_comes_back_to_the_last_bit(before: float, now: float) -> None:
    model = small(before)
    for change in (lambda: convert(model, p=now), lambda: (convert(model), setattr(model[1], "p", now))):
        change()
        model[1].p = 0
        model[1].p = now
        assert revert(model)[1].p == now
        model[1].p = before


def test_a_scheduled_probability_comes_back_to_the_last_bit() -> None:
    model = convert(nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.0), zoo.swin()))
    schedule = thinned.DropoutSchedule(model, thinned.schedules.cosine(1.0, 0.0, steps=7))
    for _ in range(4):
        schedule.step()
        expected = schedule.last_p
        assert {rate.key: rate.value for rate in rates_of(revert(model))} == expected
        convert(model)


def test_a_probability_that_is_none_comes_back() -> None:
    layer = zoo.library_class("timm.layers.drop:DropPath")
    model = nn.Sequential(layer(None))
    assert revert(convert(model))[0].drop_prob is None
    convert(model)
    model[0].drop_prob = 0.3
    assert revert(model)[0].drop_prob == 0.3


def test_a_tensor_of_a_probability_comes_back() -> None:
    model = convert(nn.Sequential(nn.Dropout(0.1)))
    p = torch.tensor(0.2)
    model[0].p = p
    assert revert(model)[0].p is p


def test_a_builder_that_makes_nothing_leaves_the_module() -> None:
    register(Noise, lambda _: None)  # type: ignore[arg-type, return-value]
    model = nn.Sequential(Noise(0.2))
    assert type(convert(model)[0]) is Noise
    assert all(site.kind != "module" for site in thinned.inspect(model))


def test_a_registered_type_says_its_unit() -> None:
    register(Noise, lambda old: thinned.Dropout(old.rate / 100), unit=lambda _: 0.01)
    model: Any = convert(nn.Sequential(Noise(20)))
    assert (type(model[0]), model[0].p) == (thinned.Dropout, 0.2)
    model[0].p = 0.5
    assert revert(model)[0].rate == 50


def test_handles_remove_hooks_before_and_after() -> None:
    model = small()
    seen: list[str] = []
    old = model[1]

    def says(word: str) -> Callable[..., None]:
        return lambda *_: seen.append(word)

    handles = [
        old.register_forward_pre_hook(says("pre")),
        old.register_forward_hook(says("forward"), with_kwargs=True),
        old.register_full_backward_hook(says("backward")),
        old.register_full_backward_pre_hook(says("pre backward")),
    ]
    state_hook = old.register_state_dict_post_hook(says("state"))
    convert(model)
    model(torch.ones(2, 8)).sum().backward()
    model.state_dict()
    assert seen == ["pre", "forward", "pre backward", "backward", "state"]
    seen.clear()
    state_hook.remove()
    handles[0].remove()
    late = model[1].register_forward_hook(says("late"))
    revert(model)
    model(torch.ones(2, 8)).sum().backward()
    model.state_dict()
    assert seen == ["forward", "late", "pre backward", "backward"]
    seen.clear()
    late.remove()
    for handle in handles:
        handle.remove()
    model(torch.ones(2, 8)).sum().backward()
    assert not seen


def test_a_hook_gets_the_module_that_is_there() -> None:
    model, x = small(), torch.ones(2, 8)
    seen: list[nn.Module] = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module))
    convert(model)(x)
    assert is_ours(model[1])
    assert seen.pop() is model[1]
    model[1].register_full_backward_hook(lambda module, *_: seen.append(module))
    revert(model)(x).sum().backward()
    assert seen == [model[1]] * 2


@pytest.mark.parametrize("copied", [False, True])
def test_a_hook_of_load_state_dict_gets_the_module_that_is_there(copied: bool) -> None:
    model = small()
    seen: list[nn.Module] = []
    handle = model[1].register_load_state_dict_pre_hook(lambda module, *_: seen.append(module))
    convert(model)
    if copied:
        model = copy.deepcopy(model)
        for hook in model[1]._load_state_dict_pre_hooks.values():
            hook.hook = lambda module, *_: seen.append(module)
    model.load_state_dict(model.state_dict())
    revert(model)
    assert seen.pop() is not model[1]
    model.load_state_dict(model.state_dict())
    assert seen == [model[1]]
    if not copied:
        handle.remove()
        model.load_state_dict(model.state_dict())
        assert seen == [model[1]]


def test_a_shared_module_is_one_module_in_all_its_places() -> None:
    shared = nn.Dropout(0.2)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.Linear(2, 2), shared)})
    convert(model)
    assert model["a"][0] is model["b"][1]
    assert is_ours(model["a"][0])
    revert(model)
    assert model["a"][0] is model["b"][1] is shared


def test_a_shared_module_in_a_list_and_an_attribute() -> None:
    model = nn.Module()
    model.drops = nn.ModuleList([nn.Dropout(0.2), nn.Dropout(0.3)])
    model.first = shared = model.drops[0]
    convert(model, include="first")
    assert model.first is model.drops[0]
    assert [is_ours(module) for module in model.drops] == [True, False]
    model.first.p = 0.7
    revert(model)
    assert model.first is model.drops[0] is shared
    assert shared.p == 0.7


def test_a_place_that_keeps_the_old_module_is_reported(told: Callable[..., str]) -> None:
    inner = nn.Sequential(nn.Dropout(0.2), nn.AlphaDropout(0.3, True), nn.Dropout(0.4))
    model = nn.Sequential(inner)
    inner.drops = [inner[0]]
    model.by_name = {"alpha": inner[1]}
    vars(model)["alias"] = inner[0]
    convert(model)
    assert told() == (
        "alias, 0.drops still hold the old module of 0.0; by_name still holds the old module of 0.1; "
        "thinned.inspect(model) lists all"
    )
    assert revert(model)[0][0] is inner.drops[0]


@pytest.mark.parametrize("include", [None, nn.Dropout, "*"])
def test_a_dropout_that_is_no_child_is_reported(told: Callable[..., str], include: Any) -> None:
    model = nn.Sequential(nn.Dropout(0.2))
    model.drops = [nn.Dropout(0.3), thinned.Dropout(0.4)]
    convert(model, include="0")
    assert told() == ""
    revert(model)
    convert(model, include=include)
    assert told() == (
        "drops[0] is no child of a module, so convert() and eval() do not reach it; "
        "thinned.inspect(model) lists all"
    )


class Wrapper(nn.Sequential):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__(OrderedDict(inner=inner))
        self.rate = 0.1


@pytest.mark.parametrize(
    ("build", "swapped"),
    [
        (lambda _: thinned.Dropout(0.1), "1 dropout module became"),  # without what was in the old one
        (lambda old: thinned.WeightDrop(old.inner, []), "2 dropout modules became"),
        (lambda old: nn.Sequential(nn.Sequential(old)), "2 dropout modules became"),
        (lambda old: nn.Sequential(nn.Sequential(old.inner)), "2 dropout modules became"),
    ],
)
def test_a_dropout_within_one_that_is_swapped(
    build: Callable[[Any], nn.Module], swapped: str, told: Callable[..., str]
) -> None:
    register(Wrapper, build)
    model = nn.Sequential(Wrapper(nn.Dropout(0.2)))
    before = dict(model.named_modules())
    convert(model)
    assert told(logging.INFO).startswith(swapped)
    assert not any(type(module) is nn.Dropout for module in model.modules())
    model(torch.ones(3))
    revert(model)
    assert dict(model.named_modules()) == before


def test_a_model_that_is_a_dropout() -> None:
    old = nn.Dropout(0.2)
    new = convert(old)
    assert type(new) is thinned.Dropout
    assert type(old) is nn.Dropout
    assert revert(new) is old


def test_a_module_that_contains_itself() -> None:
    model = small()
    model.add_module("again", model)
    convert(model)
    assert is_ours(model[1])
    assert is_ours(model[3])
    assert model.again is model


@pytest.mark.parametrize(
    ("include", "exclude", "swapped"),
    [
        (None, None, {"1", "3"}),
        ("1", None, {"1"}),
        (["1", "[0-9]"], None, {"1", "3"}),
        ("*", "3", {"1"}),
        (None, ["1", "3"], set()),
        (lambda _, module: module.p > 0.5, None, {"3"}),
        (None, lambda path, _: path == "1", {"3"}),
        ([], None, set()),
    ],
)
def test_include_and_exclude(include: Any, exclude: Any, swapped: set[str]) -> None:
    model = small()
    model[3].p = 0.6
    convert(model, include=include, exclude=exclude)
    assert {path for path, module in model.named_modules() if is_ours(module)} == swapped


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.channels = OwnName(0.1), nn.Dropout2d(0.2)


def blocks() -> nn.Module:
    layers = [Block(), Block()]
    return nn.ModuleDict(
        {"stem": nn.Dropout(0.1), "body": nn.Sequential(*layers), "head": nn.AlphaDropout(0.3)}
    )


@pytest.mark.parametrize(
    ("include", "exclude", "swapped"),
    [
        (nn.Dropout2d, None, {"body.0.channels", "body.1.channels"}),
        (nn.Dropout, None, {"stem", "body.0.drop", "body.1.drop"}),  # by isinstance
        (nn.AlphaDropout | nn.Dropout2d, "body.0", {"body.1.channels", "head"}),
        (None, (nn.Dropout2d, "stem", lambda path, _: path == "head"), {"body.0.drop", "body.1.drop"}),
        # What is within a module that matches is chosen with it.
        (None, Block, {"stem", "head"}),
        ([Block, "head"], "*.0.*", {"body.1.drop", "body.1.channels", "head"}),
        ("body", nn.Dropout2d, {"body.0.drop", "body.1.drop"}),
        (lambda path, _: path == "body", None, set()),  # a function answers for each module alone
        (
            nn.ModuleDict,
            None,
            {"stem", "head", *(f"body.{i}.{name}" for i in "01" for name in ("drop", "channels"))},
        ),
    ],
)
def test_include_and_exclude_by_class(include: Any, exclude: Any, swapped: set[str]) -> None:
    model = convert(blocks(), include=include, exclude=exclude)
    assert {path for path, module in model.named_modules() if is_ours(module)} == swapped


def test_a_class_is_that_of_before_a_conversion() -> None:
    model: Any = convert(blocks(), p=0.5)
    convert(model, p=0, include=OwnName)
    assert [module.p for module in model.modules() if is_ours(module)] == [0.5, 0, 0.5, 0, 0.5, 0.5]


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("choice", "says"),
    [
        ("bdy.0.*", "'bdy.0.*'; did you mean body.0.* or body.1.* or body.*?"),
        (["head", "body.0.dorp"], "'body.0.dorp'; did you mean body.0.drop or body.1.drop or body.0?"),
        ("channels", "'channels'; did you mean *.channels?"),
        ("model.stem", "'model.stem'; did you mean stem?"),
        ("Dropout2d", "'Dropout2d': a string is a pattern of paths; pass the class Dropout2d itself"),
        ("zzz", "'zzz'"),
        (
            (nn.Dropout3d, "head"),
            "torch.nn.Dropout3d; its dropouts are "
            "torch.nn.AlphaDropout, torch.nn.Dropout, torch.nn.Dropout2d",
        ),
    ],
)
def test_what_matches_no_module_is_a_warning(argument: str, choice: Any, says: str) -> None:
    model = blocks()
    with pytest.warns(UserWarning, match="matches no module of ModuleDict") as warned:
        convert(model, **{argument: choice})
    assert [warning.filename for warning in warned] == [__file__]
    text = str(warned[0].message).replace(" matches no module of ModuleDict", "")
    assert text == f"{argument}={says}"
    revert(model)
    with pytest.raises(UserWarning, match="matches no module"):  # warnings are errors: all is as it was
        convert(model, p=0.5, **{argument: choice})
    assert [(type(module), module.p) for module in model.modules() if hasattr(module, "p")] == [
        (nn.Dropout, 0.1),
        *[(OwnName, 0.1), (nn.Dropout2d, 0.2)] * 2,
        (nn.AlphaDropout, 0.3),
    ]


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.0, self.training)


class ByHand(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand_like(x) > 0.5) if self.training else x


class MyDrop(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.p, self.training)


NONE = "0 dropout modules became thinned's"
ZERO = "its dropouts are no modules and have p=0"


@pytest.mark.parametrize(
    ("make", "options", "informs", "warns"),
    [
        (
            lambda: nn.TransformerDecoderLayer(8, 2, 16),
            {},
            "4 dropout modules became thinned's",
            "2 more places drop and are no modules: torch.nn.MultiheadAttention(dropout=) (2); "
            "thinned.intercept() reaches them; thinned.inspect(model) lists all",
        ),
        (
            lambda: nn.TransformerDecoderLayer(8, 2, 16),
            {"exclude": nn.MultiheadAttention},
            "4 dropout modules became thinned's",
            "",
        ),
        (
            lambda: nn.LSTM(2, 2, 2, dropout=0.1),
            {},
            NONE,
            "1 place drops and is no module: torch.nn.LSTM(dropout=); thinned.intercept() reaches it; "
            "thinned.inspect(model) lists all",
        ),
        (
            lambda: nn.Sequential(zoo.AlwaysOn(0.1), zoo.AlwaysOn(0.0), MyDrop(0.2), MyDrop(0.0)),
            {},
            NONE,
            f"2 dropout modules stayed: {zoo.__name__}.AlwaysOn (a torch.nn.Dropout with its own train), "
            f"{__name__}.MyDrop (no rule for MyDrop); thinned.register adds a type, "
            "thinned.intercept() reaches the calls in 2 of them; thinned.inspect(model) lists all",
        ),
        (
            lambda: nn.Sequential(ByHand(), nn.Dropout()),
            {"p": 0.25},
            "1 dropout module became thinned's",
            "1 place is perhaps a dropout: torch.rand_like (draws random numbers); "
            "thinned.inspect(model) lists all",
        ),
        (lambda: thinned.Intercepted(thinned.Dropout()), {}, f"{NONE}, 1 module already was thinned's", ""),
        (lambda: nn.Linear(2, 2), {}, NONE, "found no dropout in its modules and their source"),
        (lambda: nn.Linear(2, 2), {"p": 0}, NONE, "found no dropout in its modules and their source"),
        (small, {"exclude": "*"}, NONE, "include and exclude choose none of its dropouts"),
        (lambda: nn.MultiheadAttention(4, 2), {}, f"{NONE}\n{ZERO}", ""),
        (Zero, {}, f"{NONE}\n{ZERO}", ""),
        (lambda: nn.LSTM(2, 2, 2, dropout=0.1), {"p": 0}, f"{NONE}, 1 number set to p=0", ""),
    ],
)  # fmt: skip
def test_the_log(
    make: Callable[[], nn.Module],
    options: dict[str, Any],
    informs: str,
    warns: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "thinned")
    model = make()
    convert(model, **options)
    caller = f"thinned.convert({type(model).__name__}): "
    said = [(record.levelname, record.getMessage().removeprefix(caller)) for record in caplog.records]
    expected = [("INFO", line) for line in informs.splitlines()] + [
        ("WARNING", line) for line in warns.splitlines()
    ]
    assert said == expected


@pytest.mark.parametrize("quiet", [False, True])
def test_a_report_that_fails_fails_no_conversion(
    quiet: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And a logger that is off saves the reading of the source."""
    calls = []

    def fails(model: nn.Module) -> None:
        calls.append(model)
        raise RuntimeError("no source")

    monkeypatch.setattr(report, "inspect", fails)
    caplog.set_level(logging.ERROR if quiet else logging.INFO, "thinned")
    assert is_ours(convert(small())[1])
    assert len(calls) == (not quiet)
    assert [record.levelname for record in caplog.records] == ["INFO"] * (not quiet)


def test_a_function_that_fails_for_what_is_no_module_is_no_failure(told: Callable[..., str]) -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.LSTM(2, 2, 2, dropout=0.1), thinned.RDrop())
    convert(model, include=lambda _, module: module.p < 0.5)  # the others have no p
    assert is_ours(model[0])
    assert "torch.nn.LSTM(dropout=)" in told()


def test_one_of_the_paths_of_a_shared_module_decides() -> None:
    shared = nn.Dropout()
    assert is_ours(convert(nn.Sequential(shared, shared), include="1")[0])
    assert not is_ours(convert(nn.Sequential(shared, shared), exclude="1")[0])


def test_p_overrides_every_probability() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.AlphaDropout(0.2), thinned.Dropout(0.3))
    convert(model, p=0.7)
    assert [module.p for module in model] == [0.7, 0.7, 0.7]
    swin = zoo.swin()
    convert(swin, p=1)
    assert all(m.drop_prob == 1 for m in swin.modules() if isinstance(m, thinned.DropPath))


def falcon() -> nn.Module:
    """With two floats of the config that a forward passes to one function of its file."""
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "parallel_attn": False}
    small |= {"vocab_size": zoo.VOCABULARY, "hidden_dropout": 0.2, "attention_dropout": 0.3}
    return zoo._make("FalconModel", "FalconConfig", **small)


def inputs(model: nn.Module) -> dict[str, Tensor]:
    if type(model).__name__.startswith("Wav2Vec2"):
        return {"input_values": torch.randn(2, 400)}
    return zoo.inputs(model)


@pytest.mark.parametrize("make", [*zoo.MODELS.values(), zoo.bart, zoo.wav2vec2, falcon])
def test_with_p_0_nothing_drops(make: Callable[[], nn.Module], told: Callable[..., str]) -> None:
    model = make()
    before = {rate.key: rate.value for rate in rates_of(model)}
    given = inputs(model)

    def passes() -> list[Tensor]:
        results = [model(**given) for _ in range(2)]
        return [out if isinstance(out, Tensor) else out[0] for out in results]

    assert not torch.equal(*passes())
    convert(model, p=0)
    assert torch.equal(*passes())
    assert not any(site.calls for site in thinned.inspect(model, **given) if site.p)
    assert "p=" not in told()
    assert all(rate.value == 0 for rate in rates_of(model))
    swapped = {path for path, module in model.named_modules() if ORIGIN in vars(module)}
    revert(model)
    now = {rate.key: 0 if rate.key in swapped else rate.value for rate in rates_of(model)}
    assert now == {key: 0 if key in swapped else p for key, p in before.items()}


def test_without_p_no_number_changes() -> None:
    model = nn.ModuleList([zoo.bart(), zoo.transformer(), zoo.lstm(), zoo.wav2vec2()])
    before = {rate.key: rate.value for rate in rates_of(model)}
    convert(model)
    assert {rate.key: rate.value for rate in rates_of(model)} == before


class Drops(nn.Module):
    """Numbers with which a forward drops, and others."""

    of_class = 0.2

    def __init__(self) -> None:
        super().__init__()
        self.mixed_dropout_prob, self.dropouth, self.rate, self.one, self.second = 0.1, 0.3, 0.4, 1, 0.5
        self.drop_last, self.dropout_keep_prob, self.drop_threshold, self.use_dropout = 0.5, 0.9, 0.7, True
        self.dropped, self.mask_time_prob, self.eps = 0, 0.05, 0.6
        self.options = {"dropout": 0.15, "seed": 0.5}
        self.args = types.SimpleNamespace(relu_dropout=0.25, unread_dropout=0.35)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, self.rate, self.training)
        x = nn.functional.dropout(x, p=self.of_class if self.eps else 0.1, training=self.training)
        x = nn.functional.dropout(x, self.options["dropout"], self.training)
        x = nn.functional.alpha_dropout(x, self.one, self.training)
        return twice(x, self.args.relu_dropout, self.training) + twice(x, self.second, self.training)


def twice(x: Tensor, p: float, training: bool) -> Tensor:
    return nn.functional.dropout(x, p, training)


def test_which_numbers_p_sets(told: Callable[..., str]) -> None:
    model = nn.Sequential(Drops(), nn.MultiheadAttention(4, 2), nn.GRU(2, 2, 2), nn.LSTM(2, 2))
    module: Any = model[0]
    others = (
        "drop_last",
        "dropout_keep_prob",
        "drop_threshold",
        "use_dropout",
        "dropped",
        "mask_time_prob",
        "eps",
    )
    before = [getattr(module, name) for name in others]
    rates = {rate.key: rate for rate in rates_of(model)}
    expected = {"mixed_dropout_prob": 0.1, "dropouth": 0.3, "rate": 0.4, "of_class": 0.2, "dropout": 0.15}
    expected |= {"one": 1, "relu_dropout": 0.25, "second": 0.5}
    assert {rate.name: rate.value for rate in rates.values() if rate.paths == ("0",)} == expected
    assert [key for key in rates if not key.startswith("0")] == ["1.dropout", "2.dropout"]
    convert(model, p=0.75)
    assert {rate.value for rate in rates.values()} == {0.75}
    assert "10 numbers set to p=0.75" in told(logging.INFO)
    assert "another p" not in told()
    assert [getattr(module, name) for name in others] == before
    assert module.options == {"dropout": 0.75, "seed": 0.5}
    assert vars(module.args) == {"relu_dropout": 0.75, "unread_dropout": 0.35}
    assert (Drops.of_class, model[1].dropout, model[2].dropout, model[3].dropout) == (0.2, 0.75, 0.75, 0.0)
    convert(model, p=0.25)  # a revert undoes both, in a copy too
    model[2].dropout = 0.125
    model = revert(pickle.loads(pickle.dumps(model)))
    assert told(logging.INFO) == "0 modules and 9 numbers came back"
    assert {rate.name: rate.value for rate in rates_of(model[0])} == expected
    assert (model[1].dropout, model[2].dropout) == (0.0, 0.125)


class Holds(nn.Module):
    """Numbers that a forward reads in a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(attention=types.SimpleNamespace(rate=0.1))
        self.options = {"layers": [{"q": 0.2}, {"q": 0.3}], "drop": 0.4}
        self.rates = [0.5, 0.6]
        self.hidden = 0.7
        self.keywords = {"p": 0.8}
        self.drop = partial(nn.functional.dropout, p=0.9)
        self.ours, self.aten, self.path = 0.15, 0.25, 0.35
        self.each, self.named = [0.45, 0.55, 0.0], {"first": 0.65}

    @property
    def rate(self) -> float:
        return self.hidden

    def forward(self, x: Tensor) -> Tensor:
        dropout, training = nn.functional.dropout, self.training
        x = dropout(x, self.config.attention.rate, training)
        x = dropout(x, self.options["layers"][1]["q"], training)  # type: ignore[index]
        x = dropout(x, self.options.get("drop", 0.0), training)  # type: ignore[arg-type]
        x = dropout(x, self.rates[-1], training)
        x = dropout(x, self.rate, training)
        x = dropout(x, **self.keywords, training=training)
        x = self.drop(x, training=training)
        for i in range(len(self.each)):
            x = dropout(x, self.each[i], training)
        for rate in self.named.values():
            x = dropout(x, p=rate, training=training)
        x = thinned.functional.dropout(x, self.ours, training)
        x = thinned.functional.drop_path(x, drop_prob=self.path, training=training)
        return torch.ops.aten.dropout(x, self.aten, training)


def test_numbers_that_are_read_in_a_few_steps(told: Callable[..., str]) -> None:
    model, x = Holds(), torch.ones(1000)
    expected = {"config.attention.rate": 0.1, "options.layers.1.q": 0.3, "options.drop": 0.4, "rates.-1": 0.6}
    expected |= {"hidden": 0.7, "keywords.p": 0.8, "drop.p": 0.9, "ours": 0.15, "path": 0.35, "aten": 0.25}
    expected |= {"each.0": 0.45, "each.1": 0.55, "each.2": 0.0, "named.first": 0.65}
    assert {rate.key: rate.value for rate in rates_of(model)} == expected
    convert(model, p=0.5)
    assert model.each == [0.5, 0.5, 0.0]  # as PyTorch Geometric's MLP has it, whose last layer drops nothing
    revert(model)
    convert(model, p=0)
    assert not any(rate.value for rate in rates_of(model))
    assert not told()
    assert model(x).equal(x)
    assert model.options["layers"][0] == {"q": 0.2}  # type: ignore[index]
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        revert(copied)
        assert {rate.key: rate.value for rate in rates_of(copied)} == expected
        assert not copied(x).equal(x)
    assert model(x).equal(x)


def test_a_layerdrop_of_0_stays_0() -> None:
    model: Any = zoo.bart()
    model.encoder.layerdrop = 0.0
    convert(model, p=0.2)
    assert (model.encoder.layerdrop, model.decoder.layerdrop) == (0.0, 0.2)


class Frozen(NamedTuple):
    dropout: float = 0.3


SHARED = types.SimpleNamespace(dropout=0.2)


class Literal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = Frozen()
        self.drop = thinned.ConcreteDropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(x, self.config.dropout, self.training)
        x = nn.functional.dropout(x, SHARED.dropout, self.training)
        return nn.functional.dropout(x, 0.5, self.training)


class DropsByHand(nn.Module):
    def __init__(self, drop_prob: float | None) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        return x * (torch.rand(len(x)) >= self.drop_prob)[:, None] if self.drop_prob else x


def test_what_p_cannot_set_is_reported(told: Callable[..., str]) -> None:
    model = nn.Sequential(nn.Dropout(0.1), Literal(), zoo.AlwaysOn(0.4), DropsByHand(0.2), DropsByHand(None))
    convert(model, p=0)
    assert "; 4 places keep another p than 0: 1 (F.dropout, p=0.3), 1 (F.dropout, p=0.2), " in told()
    assert "1 (F.dropout, p=0.5), 1.drop (thinned.ConcreteDropout, p=unknown);" in told()
    assert SHARED.dropout == 0.2  # a global of all models
    assert (model[2].p, model[3].drop_prob, model[4].drop_prob) == (0, 0, None)
    convert(model, p=0, exclude="1*")
    assert "another p" not in told()


def test_a_config_is_chosen_by_the_modules_that_read_it() -> None:
    model: Any = falcon()
    convert(model, p=0, include="word_embeddings")
    assert model.config.hidden_dropout == 0.2
    convert(model, p=0, exclude="h.1*")
    assert (model.config.hidden_dropout, model.h[0].mlp.hidden_dropout) == (0.2, 0.0)
    copied: Any = convert(model, p=0, inplace=False)
    assert (model.config.hidden_dropout, copied.config.hidden_dropout) == (0.2, 0.0)
    assert copied.h[1].config is copied.config


def test_a_number_that_refuses_leaves_all_as_it_was() -> None:
    class Refuses(nn.Module):
        def __setattr__(self, name: str, value: Any) -> None:
            if name == "dropout" and value == 0.5:
                raise KeyError(name)
            super().__setattr__(name, value)

    refuses = Refuses()
    refuses.dropout = 0.1  # type: ignore[assignment]
    model = nn.Sequential(nn.MultiheadAttention(4, 2, 0.2), refuses, nn.Dropout(0.3))
    with pytest.raises(KeyError):
        convert(model, p=0.5)
    assert [rate.value for rate in rates_of(model)] == [0.2, 0.1, 0.3]
    assert type(model[2]) is nn.Dropout


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_an_impossible_p_changes_nothing(p: float) -> None:
    model = small()
    with pytest.raises(ValueError, match="between 0 and 1"):
        convert(model, p=p)
    assert not any(map(is_ours, model.modules()))


def test_other_impossible_arguments() -> None:
    with pytest.raises(TypeError, match=r"include must be a pattern .*, got 3"):
        convert(small(), include=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"exclude must be a pattern .*, got \[3\]"):
        convert(small(), exclude=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match=r"include must be a pattern .*, got Linear\("):
        convert(small(), include=nn.Linear(2, 2))
    with pytest.raises(TypeError, match="class of modules"):
        register(int, lambda old: old)  # type: ignore[arg-type]


@pytest.mark.parametrize("function", [convert, revert, thinned.inspect])
@pytest.mark.parametrize(
    ("given", "got"),
    [
        (3, "3 of type int$"),
        (None, "None$"),
        (Block, rf"the class {__name__}\.Block: call it, as in thinned\.NAME\(Block\(\.\.\.\)\)$"),
        (int, r"the class builtins\.int$"),
        (small, "the function small: call it, if it makes a model$"),
        (small().parameters, "the method parameters: pass the Sequential itself$"),
        (small().parameters(), "the generator parameters: pass the model itself$"),
        (small().state_dict(), r"OrderedDict\(.* of type OrderedDict: pass the model itself$"),
        ([small()], r"\[Sequential\(.*\] of type list: pass each module by itself$"),
    ],
)
def test_what_is_no_model_is_named(function: Any, given: Any, got: str) -> None:
    says = "^model must be a torch.nn.Module, got " + got.replace("NAME", function.__name__)
    with pytest.raises(TypeError, match=says) as raised:
        function(given)
    assert len(str(raised.value)) < 160


def test_a_copy_leaves_the_model_alone() -> None:
    model = small()
    before = dict(model.named_modules())
    copied: Any = convert(model, inplace=False)
    assert copied is not model
    assert dict(model.named_modules()) == before
    assert is_ours(copied[1])
    assert torch.equal(copied[0].weight, model[0].weight)
    assert copied[0].weight is not model[0].weight


def test_convert_twice_and_revert_twice(told: Callable[..., str]) -> None:
    model = small()
    convert(model)
    assert told(logging.INFO) == "2 dropout modules became thinned's"
    ours = model[1]
    convert(model)
    assert told(logging.INFO) == "0 dropout modules became thinned's, 2 modules already were thinned's"
    assert not told()
    assert model[1] is ours
    revert(model)
    assert told(logging.INFO) == "2 modules and 0 numbers came back"
    revert(model)
    assert told(logging.INFO) == "0 modules and 0 numbers came back"
    assert type(model[1]) is nn.Dropout


def test_revert_keeps_what_changed_since() -> None:
    model = small(0.5)
    old = model[1], model[3]
    convert(model)
    model[1].p = 0.25
    model.eval()
    revert(model)
    assert (model[1], model[3]) == old
    assert [model[1].p, model[3].p] == [0.25, 0.5]
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_a_copy_can_be_reverted(way: str) -> None:
    stock = small()
    model = convert(stock, inplace=False)
    if way == "deepcopy":
        copied = copy.deepcopy(model)
    elif way == "pickle":
        copied = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    x = torch.randn(8, 8)
    assert torch.equal(seeded(lambda: copied(x)), seeded(lambda: model(x)))
    revert(copied)
    assert type(copied[1]) is nn.Dropout
    assert is_ours(model[1])
    assert torch.equal(seeded(lambda: copied(x)), seeded(lambda: stock(x)))


class Mixin:
    def reset(self) -> None:
        pass


def subclass(*bases: type, **namespace: Any) -> nn.Dropout:
    """A dropout of a class with further bases and names."""
    made: nn.Dropout = type("Own", bases or (nn.Dropout,), namespace)(0.5)
    return made


def dropout_with(name: str, value: Any) -> nn.Dropout:
    """A torch.nn.Dropout on which an attribute was set."""
    module = OwnName(0.5) if isinstance(value, nn.Module | nn.Parameter) else nn.Dropout(0.5)
    setattr(module, name, value)
    return module


def changed(change: Callable[[nn.Dropout], Any]) -> nn.Dropout:
    """A torch.nn.Dropout to which something was done."""
    module = nn.Dropout(0.5)
    change(module)
    return module


def parametrized(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.ones(2))
    parametrize.register_parametrization(module, "weight", nn.Identity())


def halve(module: Any) -> None:
    module.p /= 2


@pytest.mark.parametrize(
    ("make", "own"),
    [
        (zoo.AlwaysOn, "train"),
        (zoo.OwnForward, "forward"),
        (lambda: subclass(p=property(lambda _: 0.25, lambda *_: None)), "p"),
        (lambda: subclass(training=property(lambda _: True, lambda *_: None)), "training"),
        (lambda: subclass(halve=halve), "halve"),
        (lambda: subclass(strength=None), "strength"),
        (lambda: subclass(__getattr__=lambda self, name: nn.Module.__getattr__(self, name)), "__getattr__"),
        (lambda: subclass(__setattr__=lambda *args: nn.Module.__setattr__(*args)), "__setattr__"),
        (lambda: subclass(_apply=lambda *args: nn.Module._apply(*args)), "_apply"),
        (lambda: subclass(__deepcopy__=lambda self, _: self), "__deepcopy__"),
        (lambda: subclass(_version=2), "_version"),
        (lambda: subclass(__slots__=("count",)), "count"),
        (lambda: subclass(Mixin, nn.Dropout), "reset"),
        (lambda: subclass(nn.Dropout, Mixin), "reset"),
        (lambda: subclass(zoo.AlwaysOn), "train"),
        (lambda: dropout_with("train", lambda mode=True: mode), "train"),
        (lambda: dropout_with("forward", lambda x: x), "forward"),
        (lambda: dropout_with("eval", nn.Identity), "eval"),
        (lambda: dropout_with("weight", nn.Parameter(torch.ones(()))), "weight"),
        (lambda: dropout_with("after", nn.ReLU()), "after"),
        (lambda: changed(lambda module: module.register_buffer("calls", torch.zeros(()))), "calls"),
        (lambda: changed(lambda module: module.register_buffer("calls", torch.zeros(()), False)), "calls"),
        (lambda: changed(lambda module: setattr(module, "halve", types.MethodType(halve, module))), "halve"),
        (lambda: changed(lambda module: vars(module).update(me=module)), "me"),
        (lambda: changed(lambda module: module.compile(backend="eager")), "_compiled_call_impl"),
        (lambda: changed(parametrized), "__deepcopy__, __getstate__, parametrizations, weight"),
    ],
)
def test_what_a_dropout_has_of_its_own_is_named_and_it_stays(
    make: Callable[[], nn.Module], own: str, told: Callable[..., str]
) -> None:
    module = make()
    model = nn.Sequential(module)
    convert(model)
    assert model[0] is module
    assert told().startswith("1 dropout module stayed")
    assert f" (a torch.nn.Dropout with its own {own})" in told()
    site = thinned.inspect(model)[0]
    assert (site.path, site.p) == ("0", module.p)
    assert f"a torch.nn.Dropout with its own {own}" in site.note


class Documented(nn.Dropout):
    """A dropout with a name that no library has."""

    p: float
    other: int
    __constants__ = ["p", "inplace", "other"]  # noqa: RUF012

    def __new__(cls, *_: Any, **__: Any) -> Documented:
        return super().__new__(cls)

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__(rate)
        self.rate, self.drop_prob, self.label = rate, "a word", "first"

    forward = nn.Dropout.forward

    def extra_repr(self) -> str:
        return "mine"

    def __repr__(self) -> str:
        return "mine"

    def _get_name(self) -> str:
        return "mine"


class BareSlots(nn.Dropout):
    __slots__ = ()


@pytest.mark.parametrize("kind", [OwnName, Documented, BareSlots])
def test_a_subclass_with_nothing_but_a_constructor_and_a_representation_is_swapped(
    kind: type[nn.Dropout],
) -> None:
    old = kind(0.3)
    old.extra_repr = lambda: "printed"  # type: ignore[method-assign]
    data = {name: value for name, value in vars(old).items() if isinstance(value, int | float | str)}
    model = convert(nn.Sequential(old))
    assert type(model[0]) is thinned.Dropout
    assert data.items() <= vars(model[0]).items()
    assert repr(model[0]) == "thinned.Dropout(printed)"
    model[0].p = 0.1
    assert revert(model)[0] is old
    assert vars(old).items() >= (data | {"p": 0.1}).items()


def test_a_subclass_by_the_name_of_its_base_is_not_taken_for_it(told: Callable[..., str]) -> None:
    base = zoo.library_class("timm.layers.drop:DropPath")
    kind = type("DropPath", (base,), {"train": lambda self, _=True: self})
    assert type(convert(nn.Sequential(kind(0.2)))[0]) is kind
    assert "DropPath with its own train" in told()
    plain = type("DropPath", (base,), {"p": None})  # as data of the instance
    del plain.p
    old = plain(0.2)
    old.p = 0.9
    model: Any = convert(nn.Sequential(old))
    assert type(model[0]) is thinned.DropPath
    assert (model[0].drop_prob, model[0].p) == (0.2, 0.9)
    model[0].drop_prob = 0.4
    assert revert(model)[0] is old
    assert (old.drop_prob, old.p) == (0.4, 0.9)


def test_what_a_registered_type_has_is_its_builders_to_keep_or_not(told: Callable[..., str]) -> None:
    class Loud(Noise):
        def shout(self) -> None:
            pass

    register(Noise, lambda old: thinned.Dropout(old.rate))
    assert [is_ours(module) for module in convert(nn.Sequential(Noise(0.1), Loud(0.1)))] == [True, False]
    assert f"(a {__name__}.Noise with its own shout)" in told()
    register(Loud, lambda old: thinned.Dropout(old.rate))
    assert is_ours(convert(nn.Sequential(Loud(0.1)))[0])
    register(Noise, lambda old: old)
    assert not is_ours(convert(nn.Sequential(Noise(0.1)))[0])


def test_register_a_name_and_the_last_counts() -> None:
    register(f"{__name__}.N*e", lambda old: thinned.AlphaDropout(old.rate))
    register(f"{__name__}.Noise", lambda old: thinned.Dropout(old.rate))
    assert type(convert(Noise(0.1))) is thinned.Dropout
    register(f"{__name__}.N*e", lambda old: thinned.AlphaDropout(old.rate))
    assert type(convert(Noise(0.1))) is thinned.AlphaDropout
    register(Noise, lambda old: thinned.DropPath(old.rate))
    assert type(convert(Noise(0.1))) is thinned.DropPath


def test_buffers_that_a_new_module_keeps_are_kept() -> None:
    class Counting(thinned.Dropout):
        def __init__(self, old: Noise) -> None:
            super().__init__(old.rate)
            self.register_buffer("count", old.count)

    register(Noise, Counting)
    model = nn.Sequential(Noise(0.1))
    keys = list(model.state_dict())
    convert(model).double()
    assert list(model.state_dict()) == keys == ["0.count"]
    assert revert(model)[0].count.dtype == torch.float64


def test_a_registered_function_may_refuse_or_fail(told: Callable[..., str]) -> None:
    def refuse(old: Noise) -> nn.Module:
        raise ValueError("too loud") if old.rate < 0.5 else KeyError("rate")

    register(Noise, refuse)
    assert type(convert(nn.Sequential(Noise(0.1)))[0]) is Noise
    assert "(too loud)" in told()
    model = nn.Sequential(nn.Dropout(), Noise(0.9))
    with pytest.raises(KeyError):
        convert(model)
    assert type(model[0]) is nn.Dropout


def test_p_with_nowhere_to_go_changes_nothing() -> None:
    register(Noise, lambda _: nn.Identity())
    model = nn.Sequential(nn.Dropout(0.1), Noise(0.9))
    with pytest.raises(ValueError, match="'1': Identity has no probability"):
        convert(model, p=0.2)
    assert type(model[0]) is nn.Dropout


@pytest.mark.parametrize("wrong", [0.1, "Dropout", nn.Dropout])
def test_a_registered_function_that_makes_no_module_is_named(wrong: Any) -> None:
    register(Noise, lambda _: wrong)
    for function in (convert, thinned.inspect):
        with pytest.raises(TypeError, match=r"build .*\.Noise must make a torch.nn.Module, got .* of type"):
            function(nn.Sequential(Noise(0.1)))
    with pytest.raises(TypeError, match=r"build must be a function of the old module, got 0\.1"):
        register(Noise, 0.1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"unit must be a function of the old module, got 0\.01"):
        register(Noise, nn.Dropout, unit=0.01)  # type: ignore[arg-type]


def test_scripted_modules_are_left(told: Callable[..., str]) -> None:
    with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit"):  # the latter from torch 2.15
        scripted = torch.jit.script(nn.Sequential(nn.Dropout()))
    model = convert(nn.Sequential(scripted, nn.Dropout()))
    assert model[0] is scripted
    assert is_ours(model[1])
    assert "1 place is out of reach: F.dropout (TorchScript: convert before torch.jit.script)" in told()
    statuses = [site.status for site in thinned.inspect(model, torch.ones(2))]
    assert statuses == ["beyond", "beyond", "thinned"]  # what runs, what the source says, and the other
    with thinned.intercept(key=thinned.Key(7)):
        first = scripted(torch.ones(64))
    with thinned.intercept(key=thinned.Key(7)):
        assert not scripted(torch.ones(64)).equal(first)


def test_p_leaves_the_number_that_a_learned_probability_begins_with(told: Callable[..., str]) -> None:
    """``reset_parameters`` could not restore 0."""
    layers = nn.Sequential(thinned.ConcreteDropout(0.2), thinned.VariationalDropout(0.3))
    convert(layers, p=0)
    assert [layer.initial_p for layer in layers] == [0.2, 0.3]
    assert "2 places keep another p than 0: 0 (thinned.Conc" in told()
