"""The registered operations as torch.library wants them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import oracle
from thinned import op, spec
from thinned.geometry import Geometry, shared

T = spec.threshold(0.3)
SCALE = spec.scale(T)
KEYS = torch.tensor([7, -8, 2**62])


def arguments(x: torch.Tensor, key: torch.Tensor, broadcast_dims: tuple[int, ...] = ()) -> tuple[Any, ...]:
    return x, key, *shared(x.shape, broadcast_dims, key.dim()), T, SCALE, 0.0, 0.0


SAMPLES = {
    "matrix": arguments(torch.randn(3, 5), KEYS[0]),
    "differentiated": arguments(torch.randn(3, 5, requires_grad=True), KEYS[0]),
    "permuted": arguments(torch.randn(2, 3, 4).permute(2, 0, 1).requires_grad_(), KEYS[0]),
    "channels_last": arguments(
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_(), KEYS[0]
    ),
    "every other": arguments(torch.randn(4, 10)[:, ::2], KEYS[0]),
    "expanded": arguments(torch.randn(1, 5).expand(3, 5), KEYS[0]),
    "complex": arguments(torch.randn(3, 5, dtype=torch.complex128, requires_grad=True), KEYS[0]),
    "bfloat16": arguments(torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True), KEYS[0]),
    "shared": arguments(torch.randn(3, 5, 2, requires_grad=True), KEYS[0], (2,)),
    "a key for each row": arguments(torch.randn(3, 5, requires_grad=True), KEYS),
    "0-d": arguments(torch.randn(()), KEYS[0]),
    "empty": arguments(torch.randn(0, 3, requires_grad=True), KEYS[0]),
    "shift and fill": (torch.randn(3, 5, requires_grad=True), KEYS[0], [5, 1], 2**40, T, SCALE, 0.5, -1.0),
}


# In 2.15 opcheck makes non-leaf inputs, of whose gradient torch hides a warning where it is no error.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("sample", SAMPLES)
def test_opcheck_of_masked_affine(sample: str) -> None:
    torch.library.opcheck(torch.ops.thinned.masked_affine.default, SAMPLES[sample])


@pytest.mark.parametrize("key", [KEYS[0], KEYS], ids=["one key", "a key for each row"])
def test_opcheck_of_keep_mask_and_uniform(key: torch.Tensor) -> None:
    torch.library.opcheck(torch.ops.thinned.keep_mask.default, (key, [3, 50], [50, 1], 2**40, T))
    torch.library.opcheck(torch.ops.thinned.uniform.default, (key, [3, 50], [50, 1], 2**40))


def test_opcheck_of_draw_key() -> None:
    torch.library.opcheck(
        torch.ops.thinned.draw_key.default,
        (torch.empty((), dtype=torch.int64),),
        test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
    )


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("sample", SAMPLES)
def test_both_code_paths_agree(sample: str) -> None:
    """Values, gradients and their strides: straight to the backend, and through the dispatcher."""
    x, key, strides, base, T, scale, *rest = SAMPLES[sample]
    geometry = Geometry(tuple(strides), base)
    weights = torch.randn_like(x)
    results = []
    for y in (
        op.masked_affine(x, key, geometry, T, scale, *rest),
        torch.ops.thinned.masked_affine(*SAMPLES[sample]),
    ):
        results.append((y, *torch.autograd.grad(y, x, weights)) if x.requires_grad else (y,))
    expected = (
        oracle.masked_affine(x, key, geometry, T, scale, *rest),
        oracle.masked_affine(weights, key, geometry, T, scale),
    )
    for short, dispatched, wanted in zip(*results, expected, strict=False):
        oracle.assert_same(short, dispatched)
        assert short.stride() == dispatched.stride()
        oracle.assert_same(short, wanted)


def test_schemas() -> None:
    """Nothing is written but what is returned; the operations are pure functions of their arguments."""
    for name in ("masked_affine", "keep_mask", "uniform"):
        overload = getattr(torch.ops.thinned, name).default
        assert not overload._schema.is_mutable
        assert torch.Tag.pt2_compliant_tag in overload.tags
        assert torch.Tag.nondeterministic_seeded not in overload.tags
    assert torch.Tag.nondeterministic_seeded in torch.ops.thinned.draw_key.default.tags
