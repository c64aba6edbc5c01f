"""An activation or a sum and a dropout as one function: the masks, values and gradients of the two steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import oracle
import thinned
from backend_under_test import BackendUnderTest
from thinned import backends, op
from thinned.functional import (
    bias_dropout_add,
    dropout,
    dropout_add,
    gelu_dropout,
    relu_dropout,
    silu_dropout,
)

KEY = thinned.Key(7)
WRONG: Any = "sigmoid"
Activation = Callable[..., Tensor]
ACTIVATIONS: dict[str, tuple[Activation, Callable[[Tensor], Tensor]]] = {
    "relu": (relu_dropout, F.relu),
    "gelu": (gelu_dropout, F.gelu),
    "gelu_tanh": (partial(gelu_dropout, approximate="tanh"), partial(F.gelu, approximate="tanh")),
    "silu": (silu_dropout, F.silu),
}
REAL = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
each_activation = pytest.mark.parametrize("name", ACTIVATIONS)


def fused(function: Callable[..., Tensor], x: Tensor, p: float = 0.3, **options: Any) -> Tensor:
    """Any of the five functions as a function of one tensor."""
    if function is dropout_add:
        return dropout_add(x, torch.full_like(x, 3), p, **options)
    if function is bias_dropout_add:
        return bias_dropout_add(x, x.new_ones(x.shape[-1:]), torch.full_like(x, 3), p, **options)
    return function(x, p, **options)


def composed(function: Callable[..., Tensor], x: Tensor, p: float = 0.3, **options: Any) -> Tensor:
    """The same in two steps."""
    if function is dropout_add:
        return 3 + dropout(x, p, **options)
    if function is bias_dropout_add:
        return 3 + dropout(x + 1, p, **options)
    return dropout(next(step for ours, step in ACTIVATIONS.values() if ours is function)(x), p, **options)


FUNCTIONS: list[Activation] = [*(ours for ours, _ in ACTIVATIONS.values()), dropout_add, bias_dropout_add]
each_function = pytest.mark.parametrize("function", FUNCTIONS, ids=[*ACTIVATIONS, "add", "bias_add"])


def numbers(dtype: torch.dtype) -> Tensor:
    """All numbers of half precision; of the others some of every magnitude, and many that are common."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    large = torch.logspace(-38, 38, 3000, dtype=dtype)
    common = torch.linspace(-20, 20, 2**14 + 1, dtype=dtype)
    return torch.cat([common, large, -large, torch.linspace(-110, 110, 5000, dtype=dtype)])


def specials(dtype: torch.dtype) -> Tensor:
    return torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0, -1.0] * 60, dtype=dtype)


def reference(name: str, x: Tensor) -> Any:
    """In float64, without differences of nearly equal numbers."""
    if name == "gelu":
        return x * torch.special.erfc(-x * math.sqrt(0.5)) / 2
    if name == "gelu_tanh":
        return x * torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
    step = ACTIVATIONS[name][1]
    return step(x)


def with_gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y, x, torch.ones_like(y))[0]


@pytest.mark.parametrize("dtype", REAL, ids=str)
@each_activation
def test_errors_are_at_most_twice_those_of_torch(name: str, dtype: torch.dtype) -> None:
    """Over all magnitudes of the input, and for the gradients too. T is 2**32, and everything is kept."""
    ours, step = ACTIVATIONS[name]
    x = numbers(dtype)
    x = x[x.isfinite()]
    exact = with_gradient(partial(reference, name), x.double())
    of_torch = with_gradient(step, x)
    of_ours = with_gradient(lambda x: ours(x, 1e-12, key=KEY), x)
    bins = (x.double().abs().clamp(2.0**-10, 128).log2() * 2).floor().to(torch.int64) + 20
    bins = bins + 64 * (x < 0)
    units = 32 if dtype is torch.float64 else 1
    for mine, other, value in zip(of_ours, of_torch, exact, strict=True):
        sound = value.isfinite() & other.isfinite()
        assert mine[sound].isfinite().all()
        worst = []
        for result in (mine, other):
            error = torch.where(sound, (result.double() - value).abs(), 0.0)
            worst.append(torch.zeros(128, dtype=torch.float64).scatter_reduce(0, bins, error, "amax"))
        # Where torch happens to be exact; in float64 the reference has errors of its own.
        size = torch.zeros(128, dtype=torch.float64).scatter_reduce(
            0, bins, torch.where(sound, value.abs(), 0.0), "amax"
        )
        bound = 2 * worst[1] + size * units * torch.finfo(dtype).eps + 2 * torch.finfo(dtype).tiny
        assert (worst[0] <= bound).all(), (worst[0] / bound).max()


@pytest.mark.parametrize("dtype", REAL, ids=str)
@each_activation
def test_special_numbers(name: str, dtype: torch.dtype) -> None:
    ours, step = ACTIVATIONS[name]
    x = specials(dtype)
    expected = with_gradient(lambda x: dropout(step(x), 0.5, key=KEY), x)
    result = with_gradient(lambda x: ours(x, 0.5, key=KEY), x)
    kept = thinned.keep_mask(KEY, x.shape, 0.5)
    sure = kept if name != "gelu" else kept & (x != math.inf)  # torch's vectors have NaN for gelu(inf)
    for one, other in zip(result, expected, strict=True):
        torch.testing.assert_close(one[sure], other[sure], equal_nan=True)
    # In two steps the gradient of a dropped element is 0 * NaN.
    for each in result if op.fuses(x) else result[:1]:
        oracle.assert_same(each[~kept], torch.zeros_like(each[~kept]))


@pytest.mark.parametrize("p", [0.5, 0.1, 1.0])
@each_function
def test_masks_are_those_of_the_specification(
    function: Activation, p: float, backend: BackendUnderTest
) -> None:
    for shape in (0,), (1,), (63,), (65,), (3, 129), (300, 77), (20001,), (40000,):
        if backend.enough(2):
            return
        x = torch.ones(shape)
        for key in KEY, KEY.fold(torch.arange(shape[0])) if len(shape) > 1 else KEY:
            expected = oracle.dropout(x, key.bits, p) != 0
            if not math.prod(shape):
                assert fused(function, x, p, key=key).shape == shape
                continue
            y = fused(function, x, p, key=key)
            assert ((y != 3) if y.max() >= 3 else (y != 0)).equal(expected)


@pytest.mark.parametrize("dtype", REAL, ids=str)
@pytest.mark.parametrize("shape", [(1,), (5, 77), (40, 1000), (3, 5, 64)], ids=str)
def test_values_of_float32_are_those_of_two_steps(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bit for bit, -0 included, for relu and sums; half precision is rounded once."""
    wide = torch.float32 if dtype.itemsize == 2 else dtype
    x, residual = torch.randn(2, *shape, dtype=dtype)
    bias = torch.randn(shape[-1:], dtype=dtype)
    x[..., ::3] = -0.0
    for key in KEY, KEY.fold(torch.arange(shape[0])):
        oracle.assert_same(relu_dropout(x, 0.3, key=key), dropout(F.relu(x.to(wide)), 0.3, key=key).to(dtype))
        oracle.assert_same(
            dropout_add(x, residual, 0.3, key=key),
            (residual.to(wide) + dropout(x.to(wide), 0.3, key=key)).to(dtype),
        )
        oracle.assert_same(
            bias_dropout_add(x, bias, residual, 0.3, key=key),
            (residual.to(wide) + dropout(x.to(wide) + bias.to(wide), 0.3, key=key)).to(dtype),
        )
        oracle.assert_same(
            bias_dropout_add(x, None, residual, 0.3, key=key), dropout_add(x, residual, 0.3, key=key)
        )


def test_a_large_result_goes_past_the_caches() -> None:
    """Its stores are others; a row whose size is no multiple of a cache line has the common ones."""
    for shape in (2**22 + 5,), (3, 2**21), (3, 2**21 + 1):
        x = torch.randn(shape)
        key = KEY if len(shape) == 1 else KEY.fold(torch.arange(3))
        oracle.assert_same(relu_dropout(x, 0.1, key=key), dropout(F.relu(x), 0.1, key=key))


@pytest.mark.usefixtures("restore_threads")
@each_activation
def test_results_depend_on_neither_instruction_set_nor_threads(name: str) -> None:
    if "native" in backends.missing():
        pytest.skip(backends.missing()["native"])
    from thinned.backends import _native, native

    for dtype in REAL:
        x = torch.cat([numbers(dtype), specials(dtype)])
        results = []
        for isa in _native.supported_isas():
            for threads in 1, 3:
                torch.set_num_threads(threads)
                with native.instruction_set(isa):
                    results.append(with_gradient(lambda x: ACTIVATIONS[name][0](x, 0.3, key=KEY), x))
        for result in results[1:]:
            for one, other in zip(result, results[0], strict=True):
                oracle.assert_same(one.nan_to_num(7), other.nan_to_num(7))


@each_function
def test_gradients(function: Activation) -> None:
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for key in KEY, KEY.fold(torch.arange(4)):
        call = partial(fused, function, key=key)
        assert torch.autograd.gradcheck(call, x, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(call, x)
        for transform in torch.func.jacrev, torch.func.jacfwd, torch.func.hessian:
            torch.testing.assert_close(transform(call)(x), transform(partial(composed, function, key=key))(x))


def test_gradients_of_every_tensor_of_a_sum() -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, 3, 4), (4,), (5, 3, 4))]
    for needed in [True, True, True], [False, True, False], [False, False, True], [True, False, False]:
        some = [x.detach().requires_grad_(needs) for x, needs in zip(inputs, needed, strict=True)]
        assert torch.autograd.gradcheck(partial(bias_dropout_add, key=KEY), some)
        assert torch.autograd.gradgradcheck(partial(bias_dropout_add, key=KEY), some)
    x = torch.randn(6, requires_grad=True)
    bias_dropout_add(x, x, x, 0.5, key=KEY).sum().backward()  # one tensor in three places, of one dimension
    assert x.grad is not None
    assert x.grad.equal(1 + 4 * thinned.keep_mask(KEY, (6,), 0.5))


@each_function
def test_the_gradient_of_any_strides(function: Activation) -> None:
    for grad in torch.randn(6, 5).t(), torch.ones(()).expand(5, 6), torch.randn(5, 12)[:, ::2]:
        results = []
        for call in fused, composed:
            x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
            call(function, x, key=KEY).backward(grad)
            results.append(x.grad)
        torch.testing.assert_close(*results)


def test_the_gradient_of_relu_where_its_result_is_zero_or_no_number() -> None:
    x = torch.tensor([0.0, -0.0, 1e-45, -1e-45, math.nan, math.inf, -math.inf, 65504.0] * 40)
    for dtype in REAL:
        for p in 0.5, 1.0:
            expected = with_gradient(partial(composed, relu_dropout, p=p, key=KEY), x.to(dtype))
            result = with_gradient(partial(fused, relu_dropout, p=p, key=KEY), x.to(dtype))
            oracle.assert_same(result[1], expected[1])


def test_what_is_saved() -> None:
    """Of relu the result, of the other activations the input, of a sum the key."""
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.data_ptr())
        return x

    x = torch.randn(1000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = relu_dropout(x)
        assert saved == [y.data_ptr()]
        gelu_dropout(x)
        silu_dropout(x)
        assert saved[1:] == [x.data_ptr()] * 2
        dropout_add(x, x)
        assert len(saved) == 3


@pytest.mark.parametrize("function", [relu_dropout, gelu_dropout])
def test_a_write_to_what_was_saved_is_noticed(function: Activation) -> None:
    x = torch.randn(100, requires_grad=True) * 1
    y = function(x, key=KEY)
    (y if function is relu_dropout else x).data.add_(0)  # not seen by autograd, and harmless
    (y if function is relu_dropout else x).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@each_function
def test_a_call_draws_what_dropout_draws(function: Activation) -> None:
    x = torch.randn(20, 30)
    torch.manual_seed(3)
    y = fused(function, x)
    state = torch.get_rng_state()
    torch.manual_seed(3)
    torch.testing.assert_close(y, composed(function, x))
    assert state.equal(torch.get_rng_state())
    for training, p in (False, 0.3), (True, 0.0):
        step = composed(function, x, p, training=training)
        torch.testing.assert_close(fused(function, x, p, training=training), step, rtol=0, atol=0)
    assert state.equal(torch.get_rng_state())


class Calls(nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


@pytest.mark.parametrize("sample_dim", [0, 1])
@each_function
def test_masks_of_an_address(function: Activation, sample_dim: int) -> None:
    x = torch.randn(6, 8)
    results = []
    for call in fused, composed:
        model = Calls(partial(call, function))
        for samples in None, torch.arange(x.shape[sample_dim]):
            where = {} if samples is None else {"samples": samples, "sample_dim": sample_dim}
            with thinned.address(model, seed=7, step=3, **where):  # type: ignore[arg-type]
                results.append(torch.stack([model(x), model(x)]))
    torch.testing.assert_close(results[:2], results[2:])


def test_a_checkpoint_recomputes_the_mask() -> None:
    x = torch.randn(50, 8)
    for function in FUNCTIONS:
        grads = []
        for call in (
            partial(checkpoint, partial(fused, function), use_reentrant=False),
            partial(fused, function),
        ):
            leaf = x.clone().requires_grad_()
            torch.manual_seed(5)
            call(leaf).square().sum().backward()
            grads.append(leaf.grad)
        torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_has_the_mask_of_eager_code() -> None:
    def all_of_them(x: Tensor, key: thinned.Key) -> list[Tensor]:
        return [fused(each, x, key=key) for each in (relu_dropout, gelu_dropout, bias_dropout_add)]

    compiled = torch.compile(all_of_them, backend="aot_eager", fullgraph=True)
    x, other = torch.randn(9, 33, requires_grad=True), torch.randn(9, 33)
    for one, two in zip(compiled(x, KEY), all_of_them(x, KEY), strict=True):
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(
            torch.autograd.grad(one, x, other, retain_graph=True),
            torch.autograd.grad(two, x, other, retain_graph=True),
        )


@each_function
def test_tensors_that_the_kernel_does_not_serve(function: Activation) -> None:
    x = torch.randn(4, 6)
    for odd in x.t(), x[:, ::2], torch._neg_view(x), nn.Parameter(x), x[0].expand(4, 6):
        torch.testing.assert_close(fused(function, odd, key=KEY), composed(function, odd, key=KEY))
    keys = KEY.fold(torch.arange(4))
    torch.testing.assert_close(
        torch.vmap(lambda x, bits: fused(function, x, key=thinned.Key.from_bits(bits)))(
            x.unsqueeze(1), keys.bits
        ).squeeze(1),
        fused(function, x, key=keys),
    )


def test_sums_that_the_kernel_does_not_serve() -> None:
    x = torch.randn(4, 6)
    for residual in torch.ones(6), torch.ones(()), torch.ones(3, 4, 6), torch.ones(4, 6, dtype=torch.float64):
        expected = residual + dropout(x, 0.3, key=KEY)
        torch.testing.assert_close(dropout_add(x, residual, 0.3, key=KEY), expected)
    z = torch.randn(4, 6, dtype=torch.complex64)
    torch.testing.assert_close(dropout_add(z, z, 0.3, key=KEY), z + dropout(z, 0.3, key=KEY))


@each_function
def test_autocast_changes_nothing(function: Activation) -> None:
    x = torch.randn(4, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(function, x, key=KEY)
        torch.testing.assert_close(y, composed(function, x, key=KEY))
        assert y.dtype == x.dtype
        half = x.bfloat16()
        mixed = bias_dropout_add(half, torch.ones(6), x, 0.3, key=KEY)
    torch.testing.assert_close(mixed, x + dropout(half + torch.ones(6), 0.3, key=KEY))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: relu_dropout(x.int()), "relu_dropout needs a floating-point or complex tensor"),
        (lambda x: gelu_dropout(x, approximate=WRONG), 'approximate must be "none" or "tanh", got'),
        (lambda x: dropout_add(x, torch.ones(5)), r"residual of shape \(5,\) does not broadcast"),
        (lambda x: bias_dropout_add(x, torch.ones(5), x), r"bias must have the size of input's last dim"),
        (lambda x: bias_dropout_add(x[0, 0], torch.ones(1), x), r"bias must have the size of input's last"),
    ],
)
def test_errors(call: Callable[[Tensor], Tensor], message: str) -> None:
    x, state = torch.randn(4, 6), torch.get_rng_state()
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(x)
    assert state.equal(torch.get_rng_state())


def test_what_fuses() -> None:
    if "native" in backends.missing():
        pytest.skip(backends.missing()["native"])
    x = torch.randn(4, 6)
    assert op.fuses(x)
    assert op.fuses(nn.Parameter(x))
    assert op.fuses(torch.empty(0))
    for odd in x.t(), x.to(torch.complex64), x.to("meta"), torch._neg_view(x), x.int():
        assert not op.fuses(odd)
