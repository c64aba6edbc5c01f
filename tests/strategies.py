"""Tensors of any layout and geometries of any kind, for hypothesis to choose from."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st
from torch import Tensor

from oracle import key_bits
from thinned import spec
from thinned.geometry import Geometry, shared

keys = st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**32, 2**63, 2**64 - 1])
thresholds = (
    st.integers(0, 2**32)
    | st.sampled_from([0, 1, 2**23, 2**24, 2**24 + 1, 2**31, 3 * 2**30, 2**32 - 1, 2**32])
    | st.sampled_from([0.001, 0.1, 0.25, 0.3, 0.5, 0.9, 1.0, 1e-9, 1e-12]).map(spec.threshold)
)
bases = st.sampled_from([0, 1, 127, 2**32 - 5, 2**39 - 70, 2**40 + 3, 2**62]) | st.integers(0, 2**62)


# Around the sizes at which a kernel takes another way.
SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 63, 64, 65, 66, 70, 127, 128, 129, 200, 513)


@st.composite
def shapes(draw: st.DrawFn, most: int = 4500) -> tuple[int, ...]:
    """Any number of dimensions, and now and then one of size 0."""
    sizes: list[int] = []
    for _ in range(draw(st.sampled_from([0, 1, 2, 2, 3, 3, 4]))):
        sizes.append(min(draw(st.sampled_from(SIZES)), most // math.prod(sizes)))
    if sizes and draw(st.integers(0, 19)) == 7:
        sizes[0] = 0
    return tuple(draw(st.permutations(sizes)))


@st.composite
def geometries(draw: st.DrawFn, shape: tuple[int, ...], key_dims: int = 0) -> Geometry:
    """Dimensions shared, a part of a larger whole, or any strides at all."""
    held = [dim for dim in range(len(shape)) if draw(st.booleans())]
    kind = draw(st.sampled_from(["shared", "part", "any"]))
    if kind == "shared":
        return shared(shape, held, key_dims)
    if kind == "part":
        before = [draw(st.integers(0, 9)) for _ in shape]
        whole = [size + more + draw(st.integers(0, 9)) for size, more in zip(shape, before, strict=True)]
        part = shared(whole, held, key_dims).shard(before)
        return Geometry(part.strides, part.base + draw(bases))
    strides = [draw(st.integers(0, 300)) for _ in shape]
    return Geometry(tuple(strides), draw(bases))


@st.composite
def batches(draw: st.DrawFn, shape: tuple[int, ...]) -> Tensor:
    """One key, or one for each leading index; rows may share a key, and the batch may be a slice."""
    dims = draw(st.sampled_from([d for d in (0, 0, 1, 2) if d <= len(shape)]))
    some = torch.stack([key_bits(draw(keys)) for _ in range(5)])
    batch = some.repeat(math.prod(shape[:dims]))[: 2 * math.prod(shape[:dims])]
    layout = draw(st.sampled_from(["contiguous", "slice", "expanded"]))
    if dims == 0:
        return some[0]
    if layout == "slice":
        return batch[::2].reshape(shape[:dims])
    if layout == "expanded":
        return some[0].expand(shape[:dims])
    return batch[: math.prod(shape[:dims])].reshape(shape[:dims])


@st.composite
def layouts(draw: st.DrawFn, shape: tuple[int, ...], expanding: bool = True) -> Callable[[Tensor], Tensor]:
    """A function that gives a tensor another place in memory: permuted, sliced with steps, expanded."""
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    offsets = [draw(st.sampled_from([0, 0, 1, 5])) for _ in shape]
    expanded = [dim for dim in range(len(shape)) if expanding and draw(st.integers(0, 5)) == 0]

    def lay(x: Tensor) -> Tensor:
        for dim in expanded:
            x = x.narrow(dim, 0, min(1, x.shape[dim]))
        room = [x.shape[d] * steps[d] + offsets[d] for d in order]
        memory = torch.zeros(room, dtype=x.dtype)
        window = tuple(slice(offsets[d], offsets[d] + x.shape[d] * steps[d], steps[d]) for d in order)
        view = memory[window].permute([order.index(d) for d in range(len(shape))])
        return view.copy_(x).expand(shape)

    return lay
