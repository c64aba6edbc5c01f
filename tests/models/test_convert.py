"""thinned.convert swaps modules and nothing else; thinned.revert gives them back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thinned
from models import zoo
from thinned.models.convert import convert, revert
from thinned.models.registry import _by_name, _by_type, is_ours, register

SIX = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
SHAPES = {"Dropout1d": (4, 6, 5), "Dropout2d": (4, 6, 5, 5), "Dropout3d": (4, 6, 3, 3, 3)}


class OwnForward(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


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
    """What a test registers ends with it."""
    before = dict(_by_type), dict(_by_name)
    yield
    for store, content in zip((_by_type, _by_name), before, strict=True):
        store.clear()
        store.update(content)


@pytest.mark.parametrize("name", zoo.MODELS)
def test_a_converted_model_is_the_same_model(name: str) -> None:
    model = zoo.MODELS[name]()
    modules = dict(model.named_modules())
    dropouts = {path for path, module in modules.items() if "drop" in type(module).__name__.lower()}
    keys = list(model.state_dict())
    before = zoo.output(model.eval())
    in_training = seeded(lambda: zoo.output(model.train()))

    conversion = convert(model)

    assert conversion.model is model
    assert {swap.path for swap in conversion} == dropouts
    assert not conversion.left
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
    """Wherever one runs, its answer is what our function answers under the key that the generator gives."""
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

    swapped = [model.get_submodule(swap.path) for swap in convert(model)]
    for module in swapped:
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)
    zoo.output(model)
    assert not wrong
    # BERT's and GPT-2's attention takes the probability of its dropout and passes it on.
    attention = {"bert": 2, "gpt2": 2}.get(name, 0)
    assert len(ran) == len(swapped) - attention


def test_masks_are_those_of_the_function() -> None:
    model = convert(nn.Sequential(nn.Dropout(0.3), nn.Dropout(0.4))).model
    x = torch.randn(64, 64)
    torch.manual_seed(3)
    expected = thinned.functional.dropout(thinned.functional.dropout(x, 0.3), 0.4)
    assert torch.equal(seeded(lambda: model(x), 3), expected)


@pytest.mark.parametrize("name", SIX)
@pytest.mark.parametrize("training", [True, False])
def test_each_of_the_six(name: str, training: bool) -> None:
    old = getattr(nn, name)(0.3, True).train(training)
    conversion = convert(nn.Sequential(old))
    new = conversion.model[0]
    assert type(new) is getattr(thinned, name)
    assert (new.p, new.training) == (0.3, training)
    alpha = "Alpha" in name
    assert new.inplace is not alpha
    assert ("inplace" in conversion[0].note) is alpha
    x = torch.randn(SHAPES.get(name, (4, 6, 5)))
    y = new(x.clone())
    expected = seeded(lambda: getattr(thinned, name)(0.3).train(training)(x))
    assert torch.equal(seeded(lambda: new(x.clone())), expected)
    assert torch.equal(y, x) is not training
    assert revert(conversion.model)[0] is old


@pytest.mark.parametrize(
    ("path", "arguments", "ours", "shape"),
    [
        ("timm.layers.drop:DropPath", (0.2, False), thinned.DropPath(0.2, False), (6, 4)),
        (
            "timm.layers.drop:DropBlock2d",
            (0.4, 3, 0.5),
            thinned.DropBlock2d(0.2, 3, couple_channels=True, scale="counted"),
            (2, 3, 8, 8),
        ),
        (
            "timm.layers.patch_dropout:PatchDropout",
            (0.5, 2, True),
            thinned.PatchDropout(0.5, 2, True),
            (2, 9, 3),
        ),
        (
            "timm.layers.patch_dropout:PatchDropoutWithIndices",
            (0.5,),
            thinned.PatchDropout(0.5, return_indices=True),
            (2, 9, 3),
        ),
        (
            "torchvision.ops.stochastic_depth:StochasticDepth",
            (0.3, "batch"),
            thinned.StochasticDepth(0.3, "batch"),
            (6, 4),
        ),
        (
            "torchvision.ops.drop_block:DropBlock2d",
            (0.2, 3, True),
            thinned.DropBlock2d(0.2, 3, True, scale="counted"),
            (2, 3, 8, 8),
        ),
        (
            "torchvision.ops.drop_block:DropBlock3d",
            (0.2, 3),
            thinned.DropBlock3d(0.2, 3, scale="counted"),
            (2, 3, 5, 5, 5),
        ),
    ],
)
def test_layers_of_other_libraries(
    path: str, arguments: tuple[Any, ...], ours: nn.Module, shape: tuple[int, ...]
) -> None:
    layer = zoo.library_class(path)
    if layer is None:
        pytest.skip(f"{path.partition('.')[0]} is not installed")
    old = layer(*arguments)
    model = convert(nn.Sequential(old)).model
    assert repr(model[0]) == repr(ours)
    x = torch.randn(shape)
    found, expected = (seeded(lambda m=m: m(x.clone())) for m in (model[0], ours))
    first, second = (y[0] if isinstance(y, tuple) else y for y in (found, expected))
    assert isinstance(found, tuple) is isinstance(expected, tuple)
    assert torch.equal(first, second)
    assert revert(model)[0] is old


def test_what_ours_cannot_do_is_left_and_reported() -> None:
    layer = zoo.library_class("timm.layers.drop:DropBlock2d")
    if layer is None:
        pytest.skip("timm is not installed")
    conversion = convert(nn.Sequential(layer(0.1, with_noise=True), layer(0.1, scale_by_keep=False)))
    assert not conversion
    assert [swap.note for swap in conversion.left] == ["left: with_noise=True", "left: scale_by_keep=False"]


def test_a_scaled_rate_comes_back_in_its_own_unit() -> None:
    layer = zoo.library_class("timm.layers.drop:DropBlock2d")
    if layer is None:
        pytest.skip("timm is not installed")
    model = convert(nn.Sequential(layer(0.4, gamma_scale=0.25))).model
    assert model[0].p == pytest.approx(0.1)
    model[0].p = 0.05
    assert revert(model)[0].drop_prob == pytest.approx(0.2)


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


def test_a_backward_hook_from_after_convert_stays_after_revert() -> None:
    model = convert(small()).model
    seen: list[nn.Module] = []
    model[1].register_full_backward_hook(lambda module, *_: seen.append(module))
    revert(model)(torch.ones(2, 8)).sum().backward()
    assert seen == [model[1]]


@pytest.mark.usefixtures("fresh_compiler")
def test_a_converted_model_compiles_whole() -> None:
    model = convert(small()).model
    x = torch.randn(4, 8)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(seeded(lambda: compiled(x)), seeded(lambda: model(x)))


def test_a_hook_gets_the_new_module() -> None:
    model = small()
    seen: list[nn.Module] = []
    model[1].register_forward_hook(lambda module, *_: seen.append(module))
    convert(model).model(torch.ones(2, 8))
    assert seen == [model[1]]
    assert is_ours(seen[0])


def test_a_shared_module_is_one_module_in_all_its_places() -> None:
    shared = nn.Dropout(0.2)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(nn.Linear(2, 2), shared)})
    conversion = convert(model)
    assert [swap.paths for swap in conversion] == [("a.0", "b.1")]
    assert model["a"][0] is model["b"][1]
    assert is_ours(model["a"][0])
    revert(model)
    assert model["a"][0] is model["b"][1] is shared


def test_a_model_that_is_a_dropout() -> None:
    old = nn.Dropout(0.2)
    conversion = convert(old)
    assert type(conversion.model) is thinned.Dropout
    assert type(old) is nn.Dropout
    assert conversion[0].path == ""
    assert revert(conversion.model) is old


def test_a_module_that_contains_itself() -> None:
    model = small()
    model.add_module("again", model)
    assert len(convert(model)) == 2


@pytest.mark.parametrize(
    ("include", "exclude", "swapped"),
    [
        (None, None, {"1", "3"}),
        ("1", None, {"1"}),
        (["1", "9"], None, {"1"}),
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
    assert {swap.path for swap in convert(model, include=include, exclude=exclude)} == swapped
    assert {path for path, module in model.named_modules() if is_ours(module)} == swapped


def test_one_of_the_paths_of_a_shared_module_decides() -> None:
    shared = nn.Dropout()
    assert len(convert(nn.Sequential(shared, shared), include="1")) == 1
    assert len(convert(nn.Sequential(shared, shared), exclude="1")) == 0


def test_p_overrides_every_probability() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.AlphaDropout(0.2), thinned.Dropout(0.3))
    assert [swap.p for swap in convert(model, p=0.7)] == [0.7, 0.7]
    assert [module.p for module in model] == [0.7, 0.7, 0.3]
    swin = zoo.swin()
    convert(swin, p=1)
    assert all(m.drop_prob == 1 for m in swin.modules() if isinstance(m, thinned.DropPath))


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_an_impossible_p_changes_nothing(p: float) -> None:
    model = small()
    with pytest.raises(ValueError, match="between 0 and 1"):
        convert(model, p=p)
    assert not any(map(is_ours, model.modules()))


def test_other_impossible_arguments() -> None:
    with pytest.raises(TypeError, match="model must be"):
        convert(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match="include must be a pattern"):
        convert(small(), include=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="exclude must be a pattern"):
        convert(small(), exclude=[3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="class of modules"):
        register(int, lambda old: old)  # type: ignore[arg-type]


def test_a_copy_leaves_the_model_alone() -> None:
    model = small()
    before = dict(model.named_modules())
    conversion = convert(model, inplace=False)
    assert conversion.model is not model
    assert dict(model.named_modules()) == before
    assert is_ours(conversion.model[1])
    assert torch.equal(conversion.model[0].weight, model[0].weight)
    assert conversion.model[0].weight is not model[0].weight


def test_convert_twice_and_revert_twice() -> None:
    model = small()
    assert len(convert(model)) == 2
    ours = model[1]
    assert len(convert(model)) == 0
    assert model[1] is ours
    revert(revert(model))
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
    model = convert(stock, inplace=False).model
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


def test_revert_gives_the_outputs_of_the_original() -> None:
    x, model = torch.randn(8, 8), small()
    before = seeded(lambda: model(x))
    convert(model)
    assert not torch.equal(seeded(lambda: model(x)), before)
    revert(model)
    assert torch.equal(seeded(lambda: model(x)), before)


def test_a_forward_of_ones_own_is_reported_and_left() -> None:
    patched = nn.Dropout(0.2)
    patched.forward = lambda x: x  # type: ignore[method-assign]
    model = nn.Sequential(OwnForward(0.1), OwnName(0.1), patched)
    conversion = convert(model)
    assert [swap.path for swap in conversion] == ["1"]
    assert [(swap.path, swap.p) for swap in conversion.left] == [("0", 0.1), ("2", 0.2)]
    assert "a torch.nn.Dropout with a forward of its own" in str(conversion)
    assert "replaced on the module itself" in str(conversion)
    assert type(model[0]) is OwnForward


def test_register_a_type() -> None:
    register(Noise, lambda old: thinned.Dropout(old.rate))
    model = nn.Sequential(nn.Linear(2, 2), Noise(0.2))
    conversion = convert(model)
    assert (conversion[0].new, conversion[0].p) == ("thinned.Dropout", 0.2)
    model[1].p = 0.3
    assert revert(model)[1].rate == 0.3


def test_register_a_name_and_the_last_counts() -> None:
    register(f"{__name__}.N*e", lambda old: thinned.AlphaDropout(old.rate))
    register(f"{__name__}.Noise", lambda old: thinned.Dropout(old.rate))
    assert type(convert(Noise(0.1)).model) is thinned.Dropout
    register(f"{__name__}.N*e", lambda old: thinned.AlphaDropout(old.rate))
    assert type(convert(Noise(0.1)).model) is thinned.AlphaDropout
    register(Noise, lambda old: thinned.DropPath(old.rate))
    assert type(convert(Noise(0.1)).model) is thinned.DropPath


def test_buffers_that_a_new_module_keeps_are_kept() -> None:
    class Counting(thinned.Dropout):
        def __init__(self, old: Noise) -> None:
            super().__init__(old.rate)
            self.register_buffer("count", old.count)

    register(Noise, Counting)
    model = nn.Sequential(Noise(0.1))
    keys = list(model.state_dict())
    convert(model).model.double()
    assert list(model.state_dict()) == keys == ["0.count"]
    assert revert(model)[0].count.dtype == torch.float64


def test_a_registered_function_may_refuse_or_fail() -> None:
    def refuse(old: Noise) -> nn.Module:
        raise ValueError("too loud") if old.rate < 0.5 else KeyError("rate")

    register(Noise, refuse)
    assert convert(nn.Sequential(Noise(0.1))).left[0].note == "left: too loud"
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


def test_attributes_of_ones_own_come_along() -> None:
    model = small()
    model[1].label = "first"
    assert convert(model).model[1].label == "first"


def test_scripted_modules_are_left() -> None:
    with pytest.warns(DeprecationWarning, match="torch.jit"):
        scripted = torch.jit.script(nn.Sequential(nn.Dropout()))
    assert len(convert(nn.Sequential(scripted, nn.Dropout()))) == 1


def test_the_table() -> None:
    conversion = convert(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.25), OwnForward(0.1)))
    lines = [line.split() for line in str(conversion).splitlines()]
    assert " ".join(lines[0]) == "1 dropout module became thinned's, 1 stayed"
    assert lines[1] == ["path", "type", "becomes", "p", "note"]
    assert lines[2] == ["1", "torch.nn.Dropout", "thinned.Dropout", "0.25"]
    assert lines[3][:4] == ["2", f"{OwnForward.__module__}.OwnForward", "0.1", "left:"]
    assert conversion[0] is conversion[:1][0]
    assert str(convert(nn.Linear(2, 2))) == "0 dropout modules became thinned's"
