"""The layers of attention, blocks and noise: backward regenerates a factor from the key."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from thinned import DropBlock2d, DropHead, DropKey, GaussianDropout, Key
from thinned import functional as F
from thinned.compare.memory import saved_by_call

KEY = Key(7)
KEYS = KEY.fold(torch.arange(4))
SHAPE = (4, 3, 5, 6)
LOG_ALPHA, P_LOGIT = torch.tensor(-0.7), torch.tensor(0.3).logit()

Call = Callable[..., Tensor]
NOISE: dict[str, Call] = {
    "gaussian": partial(F.gaussian_dropout, p=0.3),
    "gaussian shared": partial(F.gaussian_dropout, p=0.3, broadcast_dims=(-1,)),
    "variational": partial(F.variational_dropout, log_alpha=LOG_ALPHA),
    "concrete": partial(F.concrete_dropout, p_logit=P_LOGIT, temperature=0.5),
    "concrete shared": partial(F.concrete_dropout, p_logit=P_LOGIT, temperature=0.5, broadcast_dims=(-1,)),
}
MASKS: dict[str, Call] = {
    "head": F.drop_head,
    "head expected": partial(F.drop_head, normalize="expected"),
    "key": F.drop_key,
    "whole keys": partial(F.drop_key, broadcast_dims=(1, 2)),
    "block": partial(F.drop_block2d, p=0.4, block_size=2),
    "block counted": partial(F.drop_block2d, p=0.4, block_size=2, scale="counted"),
    "block coupled": partial(F.drop_block2d, p=0.4, block_size=2, couple_channels=True),
}
FLAT: dict[str, Call] = {
    "runs": lambda x, key: F.drop_block1d(x.flatten(2), 0.4, 2, key=key),
    "boxes": lambda x, key: F.drop_block3d(x.unflatten(3, (2, 3)), 0.4, 2, key=key),
}
LEARNED: dict[str, Call] = {
    "variational": F.variational_dropout,
    "concrete": partial(F.concrete_dropout, temperature=0.5),
    "concrete cold": F.concrete_dropout,
    "concrete shared": partial(F.concrete_dropout, temperature=0.5, broadcast_dims=(0,)),
}


def each(calls: dict[str, Call]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("call", calls.values(), ids=calls)


@pytest.mark.usefixtures("backend")
@each(MASKS | NOISE)
def test_a_samples_result_depends_on_its_key_alone(call: Call) -> None:
    x, order = torch.randn(SHAPE), torch.tensor([2, 0, 3, 1])
    y = call(x, key=KEYS)
    assert call(x[order], key=Key.from_bits(KEYS.bits[order])).equal(y[order])
    assert call(x[2:3], key=KEY.fold(2)).equal(y[2:3])
    assert not call(x[2:3], key=KEY.fold(3)).equal(y[2:3])


@each(MASKS | NOISE)
def test_strides_change_no_number(call: Call) -> None:
    x = torch.randn(SHAPE)
    dense, sliced = x.transpose(1, 3).contiguous().transpose(1, 3), torch.cat([x, x], 3)[..., :6]
    before = x.clone()
    for view in (dense, sliced, x[:1].expand(SHAPE)):
        assert not view.is_contiguous()
        assert call(view, key=KEY).equal(call(view.contiguous(), key=KEY))
    if call in MASKS.values():
        assert call(dense, key=KEY).stride() == dense.stride()
    assert x.equal(before)


@pytest.mark.parametrize("name", ["gaussian", "variational", "concrete"])
def test_noise_of_a_scalar_and_of_nothing(name: str) -> None:
    for shape in ((), (0, 3)):
        assert NOISE[name](torch.ones(shape), key=KEY).shape == shape
    if name in LEARNED:
        assert LEARNED[name](torch.ones(()), P_LOGIT.reshape(1), key=KEY).shape == ()


@pytest.mark.parametrize("dims", [(0,), (2, 3), (-1,)], ids=str)
@pytest.mark.parametrize("name", ["gaussian", "concrete"])
def test_shared_dimensions_share_one_factor(name: str, dims: tuple[int, ...]) -> None:
    small = [1 if dim in dims or dim - 4 in dims else size for dim, size in enumerate(SHAPE)]
    y = NOISE[name](torch.ones(SHAPE), key=KEY, broadcast_dims=dims)
    assert y.equal(NOISE[name](torch.ones(small), key=KEY).expand(SHAPE))
    assert len(y.unique()) == math.prod(small)
    with pytest.raises(IndexError, match="names dimension 4"):
        NOISE[name](torch.ones(SHAPE), key=KEY, broadcast_dims=(4,))


@pytest.mark.parametrize("key", [KEY, KEY.fold(torch.arange(2))], ids=["one key", "keys"])
@each(MASKS | FLAT | NOISE)
def test_derivatives(call: Call, key: Key) -> None:
    x = torch.randn(2, 3, 2, 6, dtype=torch.float64, requires_grad=True)

    def finite(x: Tensor) -> Tensor:
        return call(x, key=key).clamp(min=-100)

    assert torch.autograd.gradcheck(finite, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(finite, x, fast_mode=True)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (4, 1), (4, 5)], ids=str)
@each(LEARNED)
def test_derivatives_in_a_learned_parameter(call: Call, shape: tuple[int, ...]) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    parameter = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    check = partial(torch.autograd.gradcheck, check_forward_ad=True, check_batched_grad=True)
    for key in (KEY, KEYS):
        call = partial(call, key=key)
        assert check(call, (x, parameter))
        assert check(lambda a, call=call: call(x.detach(), a), (parameter,))
    assert torch.autograd.gradgradcheck(call, (x, parameter))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["variational", "concrete cold"])
def test_gradients_are_in_the_dtypes_of_what_they_are_for(name: str, dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, gradients = torch.randn(200, 50, dtype=torch.float64).to(dtype), []
    for given in (x, x.to(wide)):
        inputs = given.clone().requires_grad_(), LOG_ALPHA.clone().requires_grad_()
        gradients.append(torch.autograd.grad(LEARNED[name](*inputs, key=KEY).square().sum(), inputs))
        assert [gradient.dtype for gradient in gradients[-1]] == [given.dtype, torch.float32]
    tolerance = 8 * torch.finfo(dtype).eps + 1e-5
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours.to(wanted.dtype), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("randomness", ["same", "different"])
@pytest.mark.parametrize("shape", [(1,), (5,)], ids=str)
@each(LEARNED)
def test_gradients_for_each_example(call: Call, shape: tuple[int, ...], randomness: str) -> None:
    parameter, x = torch.randn(shape), torch.randn(3, 4, 5)
    gradient = torch.func.grad(lambda a, x: call(x, a, key=KEY).square().sum(), (0, 1))
    found = torch.func.vmap(gradient, (None, 0), randomness=randomness)(parameter, x)
    for place, example in enumerate(x):
        for ours, wanted in zip(found, gradient(parameter, example), strict=True):
            torch.testing.assert_close(ours[place], wanted)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@each(MASKS | NOISE)
def test_autograd_keeps_no_mask_and_no_noise(call: Call, dtype: torch.dtype) -> None:
    x = torch.randn(4, 4, 32, 32).to(dtype).requires_grad_()
    assert saved_by_call(call, x) * x.numel() <= 8 * 4


@each(MASKS | NOISE)
def test_vmap_over_keys_is_a_loop(call: Call) -> None:
    x, loop_x = torch.randn(2, 3, 4, 3), torch.randn(4, 2, 3, 4, 3)
    loop = torch.stack([call(x, key=KEY.fold(i)) for i in range(4)])
    assert torch.func.vmap(lambda bits: call(x, key=Key.from_bits(bits)))(KEYS.bits).equal(loop)
    both = torch.func.vmap(lambda x, bits: call(x, key=Key.from_bits(bits)), randomness="error")
    loop = torch.stack([call(x, key=KEY.fold(i)) for i, x in enumerate(loop_x)])
    assert both(loop_x, KEYS.bits).equal(loop)
    same = torch.func.vmap(lambda x: call(x, key=KEY))(x.expand(5, *x.shape))
    assert same.equal(call(x, key=KEY).expand(5, *x.shape))


@pytest.mark.parametrize(
    ("function", "layer"),
    [
        (F.drop_head, DropHead),
        (F.drop_key, DropKey),
        (partial(F.drop_block2d, block_size=3), partial(DropBlock2d, block_size=3)),
        (F.gaussian_dropout, GaussianDropout),
    ],
)
def test_p(function: Call, layer: Callable[..., nn.Module]) -> None:
    x, state = torch.ones(2, 3, 4, 5), torch.get_rng_state()
    assert layer(p=0.0)(x) is x
    assert function(x, p=0.3, training=False) is x
    assert torch.get_rng_state().equal(state)
    for p in (-0.1, 1.5, math.nan):
        message = re.escape(f"dropout probability has to be between 0 and 1, but got {p}")
        for call in (lambda p=p: function(x, p=p, training=False), lambda p=p: layer(p=p)):
            with pytest.raises(ValueError, match=message):
                call()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("drop_head", {}),
        ("drop_key", {}),
        *((f"drop_block{dims}d", {"p": 0.5, "block_size": 3}) for dims in (1, 2, 3)),
        ("gaussian_dropout", {}),
        ("variational_dropout", {"log_alpha": LOG_ALPHA}),
        ("concrete_dropout", {"p_logit": P_LOGIT}),
    ],
)
def test_a_refusal_names_the_function(name: str, arguments: dict[str, Any]) -> None:
    function = partial(getattr(F, name), **arguments)
    with pytest.raises(
        RuntimeError, match=rf"^{name} needs a floating-point or complex tensor, got torch.int64"
    ):
        function(torch.ones(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=rf"^{name}\(\): argument 'input' must be Tensor, not list"):
        function([1.0])
