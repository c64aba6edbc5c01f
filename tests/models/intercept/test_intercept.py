"""No dropout kernel of torch runs within the context, and nothing changes outside of it."""

from __future__ import annotations

import copy
import pickle
import re
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
import thinned
from models import zoo
from thinned import functional as F
from thinned.models.convert import convert
from thinned.models.intercept import _HANDLERS, Intercept, Intercepted, intercept

KEY = thinned.Key(7)
P = 0.3


class Spy(TorchDispatchMode):
    """Records the kernels of torch that drop something."""

    NAMES = re.compile("dropout|bernoulli|rrelu|scaled_dot_product|_cudnn_rnn|native_multi_head|::rand$")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if self.NAMES.search(name) and self._drops(func, args, kwargs or {}):
            self.seen.append(name)
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _drops(func: Any, args: Any, kwargs: Any) -> bool:
        """Unless the kernel has a probability, and it is 0."""
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args, strict=False)) | kwargs
        return all(given.get(name, 0.0) != 0 for name in ("dropout_p", "dropout") if name in names)


def spied(run: Callable[[], Any]) -> list[str]:
    spy = Spy()
    with warnings.catch_warnings(), spy:
        warnings.simplefilter("ignore")
        run()
    return spy.seen


X = torch.randn(2, 3, 4, 5)
OURS: dict[str, Callable[[Tensor, thinned.Key], Tensor]] = {
    "elements": lambda x, key: F.dropout(x, P, key=key),
    "mask": lambda x, key: thinned.keep_mask(key, x.shape, P),
    "1d": lambda x, key: F.dropout1d(x[0], P, key=key),
    "2d": lambda x, key: F.dropout2d(x, P, key=key),
    "3d": lambda x, key: F.dropout3d(x[None], P, key=key),
    "alpha": lambda x, key: F.alpha_dropout(x, P, True, key=key),
    "feature alpha": lambda x, key: F.feature_alpha_dropout(x, P, True, key=key),
}
CALLS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "F.dropout": (lambda x: torch_functional.dropout(x, P), "elements"),
    "F.dropout inplace": (lambda x: torch_functional.dropout(x, P, True, True), "elements"),
    "F.dropout1d": (lambda x: torch_functional.dropout1d(x[0], P), "1d"),
    "F.dropout2d": (lambda x: torch_functional.dropout2d(input=x, p=P), "2d"),
    "F.dropout3d": (lambda x: torch_functional.dropout3d(x[None], P), "3d"),
    "F.alpha_dropout": (lambda x: torch_functional.alpha_dropout(x, P, training=True), "alpha"),
    "F.feature_alpha_dropout": (
        lambda x: torch_functional.feature_alpha_dropout(x, P, True),
        "feature alpha",
    ),
    "torch.dropout": (lambda x: torch.dropout(x, p=P, train=True), "elements"),
    "torch.dropout_": (lambda x: torch.dropout_(x, P, True), "elements"),
    "torch.feature_dropout": (lambda x: torch.feature_dropout(x, P, True), "2d"),
    "torch.feature_dropout_": (lambda x: torch.feature_dropout_(x, P, True), "2d"),
    "torch.alpha_dropout": (lambda x: torch.alpha_dropout(x, P, True), "alpha"),
    "torch.alpha_dropout_": (lambda x: torch.alpha_dropout_(x, P, True), "alpha"),
    "torch.feature_alpha_dropout": (lambda x: torch.feature_alpha_dropout(x, P, True), "feature alpha"),
    "torch.feature_alpha_dropout_": (lambda x: torch.feature_alpha_dropout_(x, P, True), "feature alpha"),
    "torch.native_dropout": (lambda x: torch.native_dropout(x, P, True)[0], "elements"),
    "torch.native_dropout mask": (lambda x: torch.native_dropout(x, P, None)[1], "mask"),
    "aten.dropout": (lambda x: torch.ops.aten.dropout(x, P, True), "elements"),
    "aten.dropout.default": (lambda x: torch.ops.aten.dropout.default(x, P, True), "elements"),
    "nn.Dropout2d": (lambda x: nn.Dropout2d(P)(x), "2d"),
}


@pytest.mark.parametrize("name", CALLS)
def test_each_function_is_thinneds(name: str) -> None:
    torchs, ours = CALLS[name]
    assert spied(lambda: torchs(X.clone()))
    with intercept(key=KEY) as context:
        assert not spied(lambda: torchs(X.clone()))
        y = torchs(X.clone())
    assert context.count == 2
    oracle.assert_same(y, OURS[ours](X, KEY.fold(1)))


@pytest.mark.parametrize("name", [name for name in CALLS if name.endswith("_") or "inplace" in name])
def test_in_place_functions_write_in_place(name: str) -> None:
    x = X.clone()
    with intercept():
        assert CALLS[name][0](x) is x


def test_native_dropout_of_infinities_and_everything() -> None:
    x = torch.tensor([torch.inf, torch.nan, 1.0, -1.0] * 8)
    with intercept(key=KEY):
        y, keep = torch.native_dropout(x, P, True)
        nothing, none = torch.native_dropout(x, 1.0, True)
    oracle.assert_same(y, F.dropout(x, P, key=KEY.fold(0)))
    assert keep.dtype == torch.bool
    assert nothing.eq(0).all()
    assert not none.any()


@pytest.mark.parametrize("p", [0.0, P])
def test_what_drops_nothing_is_torchs_own(p: float) -> None:
    """PyTorch returns the input itself, of any dtype."""
    x, training = torch.arange(6), p == 0
    with intercept() as context:
        for function in (torch_functional.dropout, torch_functional.alpha_dropout):
            assert function(x, p, training) is x
        assert torch.dropout(x, p, training) is x
    assert context.count == 0


def results(model: nn.Module, **arguments: Any) -> Tensor:
    torch.manual_seed(5)
    return zoo.output(model, **arguments)


EVERY_MODEL = [
    pytest.param(name, attention, id=f"{name} {attention}" if attention else name)
    for name in zoo.MODELS
    for attention in (("eager", "sdpa") if name in ("bert", "gpt2", "vit", "llama", "t5") else ("",))
]


def made(name: str, attention: str) -> nn.Module:
    return zoo.MODELS[name](attn_implementation=attention) if attention else zoo.MODELS[name]()


@pytest.mark.parametrize(("name", "attention"), EVERY_MODEL)
def test_models(name: str, attention: str) -> None:
    """No kernel of torch's drops, converted or not; evaluation is as it was, bit for bit."""
    model = made(name, attention)
    plain = results(model)
    assert spied(lambda: zoo.output(model))
    with intercept():
        if name != "swin":  # its DropPath is a module with torch.rand, which only convert reaches
            assert spied(lambda: zoo.output(model).sum().backward()) == []
        assert not plain.equal(results(model)), "the masks are not thinned's"
    convert(model)
    with intercept():
        assert spied(lambda: zoo.output(model).sum().backward()) == []
        assert results(model).equal(results(model))
    model.eval()
    for grad in (nullcontext(), torch.no_grad()):
        with grad:
            expected = results(model)
            with intercept():
                oracle.assert_same(results(model), expected)


MODULES: dict[str, tuple[nn.Module, Callable[[Tensor], tuple[Any, ...]]]] = {
    "lstm": (nn.LSTM(8, 8, 2, dropout=P), lambda x: (x,)),
    "gru": (nn.GRU(8, 8, 2, dropout=P, bidirectional=True), lambda x: (x,)),
    "packed": (nn.LSTM(8, 8, 2, dropout=P), lambda x: (pack_sequence([x[:, 0], x[:2, 1]]),)),
    "attention weights": (nn.MultiheadAttention(8, 2, dropout=P), lambda x: (x, x, x)),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_of_torch(name: str) -> None:
    model, arguments = MODULES[name]
    x = torch.randn(4, 3, 8)
    assert spied(lambda: model(*arguments(x)))
    with intercept():
        assert not spied(lambda: model(*arguments(x)))


def encoder() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, P, batch_first=True)
    x = torch.randn(3, 6, 8)
    return nn.TransformerEncoder(layer, 2), x, torch.arange(6) >= torch.tensor([6, 4, 2])[:, None]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_fast_path_in_evaluation() -> None:
    """Padded positions are zeros on the fast path alone, which a function mode shuts otherwise."""
    model, x, padding = encoder()
    model.eval()
    with torch.no_grad():
        expected = model(x, src_key_padding_mask=padding)
        assert expected[padding].eq(0).all(), "this no longer is the fast path"
        with intercept():
            oracle.assert_same(model(x, src_key_padding_mask=padding), expected)
        one_layer = model.layers[0](x)
        with intercept(), intercept():
            oracle.assert_same(model.layers[0](x), one_layer)
        mha = model.layers[0].self_attn
        seen = Spy()
        with intercept(), seen:
            mha(x, x, x)
    assert seen.seen == ["aten::_native_multi_head_attention"]


def test_modes_of_others_still_shut_the_fast_path() -> None:
    class Other(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2)
    with intercept():
        assert not torch.overrides.has_torch_function((x,))
        with Other(), intercept():
            before = _get_current_function_mode_stack()
            assert torch.overrides.has_torch_function((x,))
            assert _get_current_function_mode_stack() == before


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_the_check_for_the_fast_path_is_scripted() -> None:
    """As in nn.MultiheadAttention, which TorchScript compiles once a process."""

    class Checks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if torch.overrides.has_torch_function((x,)) else x + 1

    with intercept():
        scripted = torch.jit.script(Checks())
    oracle.assert_same(scripted(X), X + 1)


def test_nothing_is_left_behind() -> None:
    before = torch.overrides.has_torch_function
    checkpointing = dict(vars(torch.utils.checkpoint))
    functions = dict(vars(torch_functional)), dict(vars(torch.nn.modules.rnn))

    def fails() -> None:
        with intercept(), intercept(key=KEY):
            torch_functional.dropout(X, 1.5)

    with pytest.raises(ValueError, match=r"1\.5"):
        fails()
    assert _get_current_function_mode_stack() == []
    assert torch.overrides.has_torch_function is before
    assert dict(vars(torch.utils.checkpoint)) == checkpointing
    assert (dict(vars(torch_functional)), dict(vars(torch.nn.modules.rnn))) == functions
    torch.manual_seed(3)
    expected = torch_functional.dropout(X, P)
    with intercept():
        torch_functional.dropout(X, P)
    torch.manual_seed(3)
    assert torch_functional.dropout(X, P).equal(expected)


def test_other_threads_are_not_affected() -> None:
    torch.manual_seed(3)
    expected = torch_functional.dropout(X, P)
    found = []

    def other() -> None:
        torch.manual_seed(3)
        found.append(torch_functional.dropout(X, P))

    with intercept():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert found[0].equal(expected)


def test_errors_are_torchs() -> None:
    for context in (nullcontext(), intercept()):
        with context:
            for training in (True, False):
                with pytest.raises(ValueError, match=r"between 0 and 1, but got 1\.5"):
                    torch_functional.dropout(X, 1.5, training)
            with pytest.raises(RuntimeError, match="Feature dropout requires at least 2 dimensions"):
                torch.feature_dropout(torch.ones(3), P, True)
            with pytest.raises(TypeError):
                torch_functional.dropout(X, P, nonsense=1)
    for make in (intercept, partial(Intercepted, nn.Identity())):
        with pytest.raises(TypeError, match=r"thinned\.Key, got 7 .*; write thinned\.Key\(7\)"):
            make(key=7)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "function", [torch_functional.dropout, torch_functional.alpha_dropout, torch.dropout, torch.dropout_]
)
def test_an_argument_that_only_torch_knows_is_left_to_torch(function: Callable[..., Any]) -> None:
    """A later PyTorch may give dropout a generator, from which torch then draws."""
    context, handler = Intercept(KEY), _HANDLERS[function]
    with context:
        assert handler(context, X, P, True, generator=torch.Generator()) is None
        assert context.count == 0
        assert handler(context, X, P, True, generator=None) is not None
        assert context.count == 1


class Forgetful(nn.Module):
    """pytorch#99293, #124464: dropout_p whatever the training flag says."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        return torch_functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)


def test_sdpa_follows_training_if_asked() -> None:
    model, x = nn.Sequential(Forgetful(), nn.Dropout(P)), torch.randn(2, 3, 4)
    plain = torch_functional.scaled_dot_product_attention(x, x, x)
    model.eval()
    with intercept():
        assert not model(x).equal(plain)
    with intercept(sdpa_follows_training=True) as context:
        oracle.assert_same(model(x), plain)
        assert context.count == 0
        model[0].train()
        model[0].inner.eval()  # has been left
        assert not model(x).equal(plain)
        assert not torch_functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5).equal(plain)
    model.eval()
    oracle.assert_same(Intercepted(model, sdpa_follows_training=True)(x), plain)


def test_wrapper() -> None:
    model = Intercepted(nn.Sequential(nn.Linear(5, 5), nn.Dropout(P)), key=KEY)
    y = model(X)
    oracle.assert_same(y, F.dropout(model.module[0](X), P, key=KEY.fold(0)))
    oracle.assert_same(model(X), y)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        oracle.assert_same(other(X), y)
    assert set(model.state_dict()) == {"module.0.weight", "module.0.bias"}
    assert _get_current_function_mode_stack() == []


def test_one_context_twice() -> None:
    context = intercept(key=KEY)
    ys = []
    for _ in range(2):
        with context:
            ys.append(torch_functional.dropout(X, P))
    assert ys[0].equal(ys[1])


Context = Callable[[], AbstractContextManager[Any]]


def placed(
    body: nn.Module, place: str, key: thinned.Key | None
) -> tuple[Callable[[Tensor], Tensor], Context]:
    """A function that calls ``body``, and a context for its calls, one of which intercepts."""

    def inside(x: Tensor) -> Tensor:
        with intercept(key=key):
            return body(x)  # type: ignore[no-any-return]

    run = {"inside": inside, "outside": body, "wrapper": Intercepted(body, key=key)}[place]
    return run, partial(intercept, key=key) if place == "outside" else nullcontext


def assert_same_values_and_gradients(
    functions: Sequence[Callable[[Tensor], Tensor]], context: Context, leaf: Tensor, parameters: list[Tensor]
) -> None:
    found = []
    for function in functions:
        torch.manual_seed(3)
        with context():
            y = function(leaf)
        found.append((y.detach(), *torch.autograd.grad(y.sum(), [leaf, *parameters])))
    for again in found[1:]:
        for got, want in zip(again, found[0], strict=True):
            oracle.assert_same(got, want)


class Functions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = torch_functional.dropout(x, P)
        y = torch_functional.scaled_dot_product_attention(y, y, y, dropout_p=P, is_causal=True)
        return torch.dropout(torch_functional.alpha_dropout(y, P, True), P, True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, dropout=P, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y, weights = self.mha(x, x, x)
        normed: Tensor = self.mha(y, y, y, need_weights=False)[0] + weights.mean()
        return normed


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("kind", "place", "key"),
    [
        (Functions, "inside", None),
        (Functions, "outside", KEY),
        (Functions, "wrapper", None),
        (Attention, "inside", KEY),
        (Attention, "outside", None),
        (Attention, "wrapper", None),
    ],
)
def test_compiled(kind: type[nn.Module], place: str, key: thinned.Key | None) -> None:
    run, context = placed(kind(), place, key)
    fast = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            assert_same_values_and_gradients(
                (run, fast), context, torch.randn(2, 5, 8, requires_grad=True), []
            )


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # Dynamo's, after a break
@pytest.mark.parametrize(
    ("place", "kind", "allow_rnn"),
    [
        ("inside", nn.LSTM, False),
        ("outside", nn.LSTM, False),
        ("wrapper", nn.LSTM, False),
        ("outside", nn.LSTM, True),
        ("outside", nn.GRU, True),
    ],
)
def test_compiled_recurrent(place: str, kind: type[nn.RNNBase], allow_rnn: bool) -> None:
    """Dynamo breaks its graph for recurrent networks; they are intercepted all the same."""
    model, x = zoo.lstm(P), torch.randn(3, 5, zoo.WIDTH, requires_grad=True)
    model.lstm = kind(zoo.WIDTH, zoo.WIDTH, 2, dropout=P, batch_first=True)
    run, context = placed(model, place, KEY)
    with torch._dynamo.config.patch(allow_rnn=allow_rnn):
        fast = torch.compile(run, backend="aot_eager")
        assert_same_values_and_gradients((run, fast, fast), context, x, list(model.parameters()))


def test_exported() -> None:
    """pytorch#103681: in evaluation no dropout is left in the graph; in training it is thinned's."""
    model, x = Intercepted(zoo.attention(P)), torch.randn(2, 5, zoo.WIDTH)
    for training, expected in ((False, set()), (True, {"thinned.draw_key", "thinned.masked_affine"})):
        program = torch.export.export(model.train(training), (x,))
        names = [str(node.target) for node in program.graph.nodes]
        found = {name.removesuffix(".default") for name in names if "drop" in name or "thinned" in name}
        assert found == expected


def test_vmap() -> None:
    def attend(x: Tensor) -> Tensor:
        return torch_functional.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    with intercept():
        same = torch.vmap(attend, randomness="same")(torch.ones(3, 4, 5))
        different = torch.vmap(attend, randomness="different")(torch.ones(3, 4, 5))
        assert same[0].equal(same[1])
        assert not different[0].equal(different[1])
        with pytest.raises(RuntimeError, match="randomness error mode"):
            torch.vmap(attend)(torch.ones(3, 4, 5))
