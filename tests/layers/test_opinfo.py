"""The six dropouts of PyTorch: its own samples of them, its errors, and what all six share."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import cache, partial
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.common_methods_invocations import op_db, sample_inputs_dropout
from torch.testing._internal.opinfo.core import SampleInput

import oracle
import thinned

settings.load_profile("thinned")  # PyTorch's module of samples has loaded a profile of its own

KEY = thinned.Key(7)
ALPHA = 1.7580993408473766
FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

SHAPES = {
    "dropout": (4, 5),
    "dropout1d": (4, 5, 6),
    "dropout2d": (4, 5, 2, 3),
    "dropout3d": (4, 5, 2, 3, 2),
    "alpha_dropout": (4, 5),
    "feature_alpha_dropout": (4, 5, 3),
}
FUNCTIONS: dict[str, Callable[..., Tensor]] = {name: getattr(thinned.functional, name) for name in SHAPES}
LAYERS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")

each_function = pytest.mark.parametrize(
    ("function", "shape"), [pytest.param(FUNCTIONS[name], SHAPES[name], id=name) for name in SHAPES]
)
each_layer = pytest.mark.parametrize(
    ("layer", "torchs", "function"),
    [
        pytest.param(getattr(thinned, layer), getattr(nn, layer), function, id=layer)
        for layer, function in zip(LAYERS, FUNCTIONS.values(), strict=True)
    ],
)

Inputs = Callable[[torch.dtype], Iterator[SampleInput]]


def opinfos() -> Iterator[tuple[str, Inputs, list[torch.dtype]]]:
    """Function, samples of a dtype and the dtypes that PyTorch promises."""
    for info in op_db:
        name = info.name.removeprefix("nn.functional.")
        if name in FUNCTIONS:
            assert info.error_inputs_func is None  # test_errors would have to use them
            # From 2.15 on torch promises complex numbers, of which thinned refuses those for the alphas.
            dtypes = [dtype for dtype in info.dtypes if not (dtype.is_complex and "alpha" in name)]
            yield name, partial(info.sample_inputs, "cpu"), sorted(dtypes, key=str)
    # dropout1d has no OpInfo; its siblings' samples are made by this function.
    one = partial(sample_inputs_dropout, None, "cpu", requires_grad=False, valid_input_dim=(2, 3))
    yield "dropout1d", one, FLOATS


OPS = list(opinfos())
CASES = [
    pytest.param(name, inputs, dtype, id=f"{name}-{dtype}")
    for name, inputs, dtypes in OPS
    for dtype in dtypes
]
GRAD_CASES = [case for case in CASES if case.values[2] in FLOATS]


@cache
def plain(inputs: Inputs, dtype: torch.dtype) -> list[SampleInput]:
    return list(inputs(dtype))


def samples(inputs: Inputs, dtype: torch.dtype) -> Iterator[SampleInput]:
    """PyTorch's samples, also in other layouts: reversed, every other element, channels last, one row."""
    for sample in plain(inputs, dtype):
        x: Tensor = sample.input
        views = [x, x.permute(tuple(reversed(range(x.dim()))))]
        if x.dim() and dtype == torch.float32:
            views += [x[..., ::2], x[1:2], x[:0]]
        if x.dim() in (4, 5):
            form = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            views += [x.to(memory_format=form)[:, 1:3]]
        for view in views:
            yield SampleInput(view, args=sample.args, kwargs=sample.kwargs)


def settings_of(name: str, sample: SampleInput) -> tuple[float, bool]:
    """``p`` and ``training`` of a call, with PyTorch's defaults."""
    return sample.kwargs.get("p", 0.5), sample.kwargs.get("training", "alpha" not in name)


@cache
def mask(name: str, shape: torch.Size, p: float) -> Tensor:
    """The mask of the specification in the shape of PyTorch's noise."""
    own = len(shape)
    if name in ("dropout2d", "feature_alpha_dropout"):
        own = 2
    elif name in ("dropout1d", "dropout3d"):
        own = 2 if len(shape) == (3 if name == "dropout1d" else 5) else 1
    noise = (*shape[:own], *(1,) * (len(shape) - own))
    return torch.from_numpy(thinned.spec.keep_mask(int(KEY), noise, p)).expand(shape)


def constants(name: str, p: float) -> tuple[float, float, float]:
    """``scale, shift, fill`` at the realised probability."""
    T = thinned.spec.threshold(p)
    q = T / 2**32
    if "alpha" not in name or not T:
        return thinned.spec.scale(T), 0.0, 0.0
    a = 1 / math.sqrt(q * (1 + ALPHA**2 * (1 - q)))
    return a, a * ALPHA * (1 - q), -a * ALPHA * q


def in_torch(name: str, x: Tensor, keep: Tensor, p: float) -> Tensor:
    """ATen's own arithmetic, with the given mask for its Bernoulli noise."""
    if p == 1:
        return x * 0
    noise = keep.to(x.dtype)
    if "alpha" not in name:
        return x * (noise / (1 - p))
    a = 1 / math.sqrt((ALPHA**2 * p + 1) * (1 - p))
    return x * (noise * a) + ((noise - 1) * (ALPHA * a) + ALPHA * a * p)


def copy_of(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.preserve_format)


def quietly(function: Callable[..., Tensor], *args: object, **kwargs: object) -> tuple[Tensor, list[str]]:
    """The result and the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function(*args, **kwargs)
    return result, [str(warning.message) for warning in caught]


def test_samples_cover_functions_and_arguments() -> None:
    assert {name for name, _, _ in OPS} == set(FUNCTIONS)
    for name in FUNCTIONS:
        seen = {
            settings_of(name, sample)
            for other, inputs, _ in OPS
            if other == name
            for sample in plain(inputs, torch.float32)
        }
        assert seen == {(p, training) for p in (0.0, 0.5, 1.0) for training in (False, True)}
        assert {dtype for other, _, dtypes in OPS if other == name for dtype in dtypes} >= set(FLOATS)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("name", "inputs", "dtype"), CASES)
def test_samples(name: str, inputs: Inputs, dtype: torch.dtype, inplace: bool) -> None:
    ours, torchs = FUNCTIONS[name], getattr(nn.functional, name)
    for sample in samples(inputs, dtype):
        p, training = settings_of(name, sample)
        before = sample.input.clone()
        x, other = (copy_of(sample.input) if inplace else sample.input for _ in range(2))
        y, warned = quietly(ours, x, **sample.kwargs, inplace=inplace, key=KEY)
        reference, theirs = quietly(torchs, other, **sample.kwargs, inplace=inplace)
        assert warned == theirs
        assert (y.shape, y.dtype, y.stride()) == (reference.shape, reference.dtype, reference.stride())
        assert (y is x) == (inplace or not training or p == 0)
        if not training or p == 0:
            assert torch.equal(y, before)
            continue
        assert inplace or torch.equal(x, before)
        keep = mask(name, x.shape, p)
        scale, shift, fill = constants(name, p)
        exact = torch.promote_types(dtype, torch.float64)
        wide = before.to(dtype if dtype == exact else torch.promote_types(dtype, torch.float32))
        value = wide * scale + shift if shift else wide * scale
        oracle.assert_same(y, torch.where(keep, value, fill).to(dtype))
        torch.testing.assert_close(y, in_torch(name, before.to(exact), keep, p).to(dtype))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(("name", "inputs", "dtype"), GRAD_CASES)
def test_gradients_of_samples(name: str, inputs: Inputs, dtype: torch.dtype, inplace: bool) -> None:
    for sample in samples(inputs, dtype):
        p, training = settings_of(name, sample)
        leaf = sample.input.detach().requires_grad_()
        results = []
        incoming = torch.empty_like(leaf).copy_(oracle.specials(tuple(leaf.shape), dtype))
        for function in (partial(FUNCTIONS[name], key=KEY), getattr(nn.functional, name)):
            x = copy_of(leaf)
            y, _ = quietly(function, x, **sample.kwargs, inplace=inplace)
            (gradient,) = torch.autograd.grad(y, leaf, incoming)
            results.append((y, gradient))
        (y, gradient), (reference, theirs) = results
        assert (y.requires_grad, y.is_leaf) == (reference.requires_grad, reference.is_leaf) == (True, False)
        assert (gradient.shape, gradient.dtype) == (theirs.shape, theirs.dtype)
        assert gradient.stride() == theirs.stride()
        if not training or p == 0:
            oracle.assert_same(gradient, incoming)
            continue
        scaled = incoming.to(torch.promote_types(dtype, torch.float32)) * constants(name, p)[0]
        oracle.assert_same(gradient, torch.where(mask(name, leaf.shape, p), scaled, 0.0).to(dtype))


@pytest.mark.parametrize(("name", "inputs"), [(name, inputs) for name, inputs, _ in OPS])
def test_finite_differences(name: str, inputs: Inputs) -> None:
    """Reverse and forward mode, batched, and second derivatives, as PyTorch checks for an OpInfo."""
    for sample in plain(inputs, torch.float64):
        p, training = settings_of(name, sample)
        if not training or p == 0:
            continue  # the input itself

        def function(x: Tensor, sample: SampleInput = sample) -> Tensor:
            torch.manual_seed(3)
            return quietly(FUNCTIONS[name], x, **sample.kwargs)[0]

        x = sample.input.detach().requires_grad_()
        torch.autograd.gradcheck(
            function,
            x,
            fast_mode=True,
            check_forward_ad=True,
            check_batched_grad=True,
            check_undefined_grad=x.numel() > 0,
        )
        torch.autograd.gradgradcheck(function, x, fast_mode=True, check_fwd_over_rev=True)


@pytest.mark.parametrize(("name", "inputs"), [(name, inputs) for name, inputs, _ in OPS])
def test_fake_tensors(name: str, inputs: Inputs) -> None:
    for sample in samples(inputs, torch.float32):
        y, _ = quietly(FUNCTIONS[name], sample.input, **sample.kwargs)
        with FakeTensorMode() as mode:
            x = mode.from_tensor(sample.input)
            fake, _ = quietly(FUNCTIONS[name], x, **sample.kwargs)
            assert (fake is x) == (y is sample.input)
        assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())


ERRORS = {
    "p below 0": lambda f: f(torch.ones(2, 3), -0.1),
    "p above 1": lambda f: f(torch.ones(2, 3), 1.1),
    "p below 0 in evaluation": lambda f: f(torch.ones(2, 3), -0.1, False),
    "a leaf in place": lambda f: f(torch.ones(2, 3, requires_grad=True), 0.5, True, True),
    "a leaf in place at p = 1": lambda f: f(torch.ones(2, 3, requires_grad=True), 1.0, True, True),
    "a view of a leaf in place": lambda f: f(torch.ones(4, 3, requires_grad=True)[:2], 0.5, True, True),
    "overlapping memory in place": lambda f: f(torch.ones(2, 1).expand(2, 3), 0.5, True, True),
    "integers": lambda f: f(torch.ones(2, 3, dtype=torch.int64), 0.5, True),
    "no dimension": lambda f: f(torch.ones(()), 0.5, True),
    "no dimension at p = 1": lambda f: f(torch.ones(()), 1.0, True),
    "no dimension in evaluation": lambda f: f(torch.ones(()), 0.5, False),
    "one dimension": lambda f: f(torch.ones(3), 0.5, True),
    "one dimension at p = 0": lambda f: f(torch.ones(3), 0.0, True),
    "one dimension at p = 1": lambda f: f(torch.ones(3), 1.0, True),
    "one dimension in evaluation": lambda f: f(torch.ones(3), 0.5, False),
    "four dimensions": lambda f: f(torch.ones(2, 2, 2, 2), 0.5, False),
}


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors(name: str, error: str) -> None:
    """PyTorch's type of error and its words, where there is one, and none where there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            ERRORS[error](getattr(nn.functional, name))
        except Exception as theirs:
            with pytest.raises(type(theirs)) as ours:
                ERRORS[error](FUNCTIONS[name])
            if error != "integers":
                words = str(theirs).removesuffix(".").partition(". Please")[0]
                assert str(ours.value).startswith(words), theirs  # noqa: PT017
        else:
            ERRORS[error](FUNCTIONS[name])


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
@each_layer
def test_layers(
    layer: type[nn.Module], torchs: type[nn.Module], function: Callable[..., Tensor], p: float, inplace: bool
) -> None:
    """A layer takes the place of PyTorch's, and is its function."""
    ours, theirs = layer(p, inplace), torchs(p, inplace)
    assert isinstance(ours, torchs)
    assert repr(ours) == f"thinned.{theirs}"
    assert vars(ours).keys() == vars(theirs).keys()
    assert (ours.state_dict(), list(ours.parameters())) == ({}, [])
    made = [samples(inputs, torch.float32) for name, inputs, _ in OPS if name == function.__name__]
    for sample in chain(*made):
        if sample.kwargs.get("p") != p:
            continue
        training = sample.kwargs["training"]
        ours.train(training)
        x, twin, other = (copy_of(sample.input) for _ in range(3))
        y, warned = quietly(ours, x, key=KEY)
        expected, also = quietly(function, twin, p, training, inplace, key=KEY)
        assert warned == also
        oracle.assert_same(y, expected)
        assert (y is x) == (inplace or not training or p == 0)
        reference, _ = quietly(theirs.train(training), other)
        assert (y.shape, y.stride(), y.dtype) == (reference.shape, reference.stride(), reference.dtype)


@each_layer
def test_arguments_of_layers(layer: type[nn.Module], torchs: type[nn.Module], function: object) -> None:  # noqa: ARG001
    assert repr(layer()) == f"thinned.{torchs()}"
    assert repr(layer(inplace=True, p=1)) == f"thinned.{torchs(inplace=True, p=1)}"
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="between 0 and 1") as theirs:
            torchs(p)
        with pytest.raises(ValueError, match=re.escape(str(theirs.value))):
            layer(p)
    with pytest.raises(ValueError, match="between 0 and 1, but got nan"):  # which torch accepts
        layer(math.nan)


@pytest.mark.parametrize("p", [1.0, 1 - 2**-40])
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@each_function
def test_everything_dropped_is_plus_zero(
    function: Callable[..., Tensor], shape: tuple[int, ...], dtype: torch.dtype, p: float
) -> None:
    """T is 0 for both p, and alpha dropout's constants are infinite."""
    x = oracle.specials((9, *shape[1:]), dtype).requires_grad_()
    y = function(x, p, True)
    oracle.assert_same(y, torch.zeros_like(x))
    (gradient,) = torch.autograd.grad(y, x, torch.full_like(y, math.nan))
    oracle.assert_same(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("training", [True, False])
@each_function
def test_arguments_are_checked_in_evaluation_too(
    function: Callable[..., Tensor], shape: tuple[int, ...], training: bool
) -> None:
    x = torch.ones(shape)
    for p in (-0.1, 1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"between 0 and 1, but got {p}"):
            function(x, p, training)
    with pytest.raises(TypeError, match=r"write thinned\.Key\(7\)"):
        function(x, 0.5, training, key=7)
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit"):
        function(x, 0.5, training, key=KEY.fold(torch.arange(3)))
    with pytest.raises(
        TypeError, match=rf"^{function.__name__}\(\): argument 'input' must be Tensor, not list"
    ):
        function([1.0], 0.5, training)


def outcome(call: Callable[..., Tensor], x: object, *arguments: object) -> object:
    """The input itself, a new result, or the type of the error."""
    try:
        y = call(x, *arguments)
    except Exception as error:
        return type(error)
    return "itself" if y is x else "a result"


def odd_tensors() -> Iterator[tuple[str, Tensor]]:
    for dtype in (torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.float32):
        for dims in range(7):
            yield f"{dtype} {dims}-d", torch.ones((2,) * dims).to(dtype)
    x = torch.ones(2, 2, 2)
    yield "quantized", torch.quantize_per_tensor(x, 0.1, 0, torch.quint8)
    yield "sparse", x.to_sparse()
    yield "csr", x[0].to_sparse_csr()
    yield "mkldnn", x.to_mkldnn()
    yield "complex32", torch.ones(2, 2, 2, dtype=torch.complex32)


@pytest.mark.filterwarnings("ignore")  # of torch, on the odd tensors
@pytest.mark.parametrize(
    ("p", "training"), [(0.5, False), (1.0, False), (0.0, True), (0, True), (0.0, False)]
)
@pytest.mark.parametrize("inplace", [False, True])
@each_function
def test_what_passes_where_nothing_is_dropped(
    function: Callable[..., Tensor], shape: tuple[int, ...], p: float, training: bool, inplace: bool
) -> None:
    """Any tensor, as in PyTorch, which returns at p = 0 in training some inputs multiplied by 1."""
    torchs = getattr(nn.functional, function.__name__)
    for name, x in odd_tensors():
        expected = outcome(torchs, x, p, training, inplace)
        found = outcome(function, x, p, training, inplace)
        if not isinstance(expected, type):
            assert found == "itself", name
        elif x.layout is torch.strided:  # what torch has not implemented for the others is no rule
            assert found is expected, name
    assert outcome(function, [1.0], p, training) is TypeError
    with pytest.raises(TypeError, match=r"key must be a thinned\.Key, got 7"):
        function(torch.ones(shape), p, training, key=7)  # type: ignore[arg-type]


PROBABILITIES = [
    *(nn.Parameter(torch.full(size, 0.5)) for size in ((), (1,), (2,))),
    *(torch.full(size, 0.5) for size in ((), (1,), (2,))),
    *(torch.tensor(1), torch.tensor(True), nn.Parameter(torch.tensor(0.5), requires_grad=False)),
    *(1, True, np.float32(0.5), np.float16(1), np.int64(0), np.bool_(True), np.array(0.5), np.array([0.5])),
    *("0.5", "half", b"0.5", None, 0.5j, [0.5], (0.5,), {0.5}, object(), torch.float32),
]


@pytest.mark.filterwarnings("ignore:dropout2d. Received a 3D input")
@pytest.mark.parametrize("training", [True, False])
@each_layer
def test_what_is_a_probability(
    layer: type, torchs: type, function: Callable[..., Tensor], training: bool
) -> None:
    """The errors of torch's functions and layers, whether ``p`` is given to a layer or set later."""
    name = function.__name__
    x = torch.ones(SHAPES[name])

    def made(kind: type, p: object) -> object:
        return outcome(lambda x: kind(p).train(training)(x), x)

    def set_later(kind: type, p: object) -> object:
        module = kind(0.25).train(training)
        module.p = p
        return outcome(module, x)

    for p in PROBABILITIES:
        for expected, found in (
            (outcome(getattr(nn.functional, name), x, p, training), outcome(function, x, p, training)),
            (made(torchs, p), made(layer, p)),
            (set_later(torchs, p), set_later(layer, p)),
        ):
            if isinstance(expected, type) or isinstance(found, type):
                several = isinstance(p, Tensor) and p.numel() > 1
                assert found is (TypeError if several and found is TypeError else expected), p


@pytest.mark.filterwarnings("ignore:dropout2d. Received a 3D input")
@pytest.mark.parametrize("p", [0.5, 1.0])
@each_function
def test_a_refused_call_has_changed_nothing(
    function: Callable[..., Tensor], shape: tuple[int, ...], p: float
) -> None:
    """Not its input's shape either: torch's own dropout1d leaves a sample with a dimension of 1 in front."""
    for size in (shape, shape[1:]):
        leaf = torch.ones(size, requires_grad=True)
        for x in (leaf, torch.ones(1, *size[1:]).expand(size)):
            with pytest.raises(RuntimeError, match=r"leaf Variable|more than one element"):
                function(x, p, True, True)
            assert x.equal(torch.ones(size))
    x = torch.ones(shape)
    with pytest.raises(RuntimeError, match=r"keys of shape \(3,\) do not fit"):
        function(x, p, True, True, key=KEY.fold(torch.arange(3)))
    assert x.equal(torch.ones(shape))
