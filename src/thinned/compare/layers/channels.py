"""Dropout of whole channels: Dropout1d, Dropout2d, Dropout3d."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from thinned.compare.laws import Finding
from thinned.compare.laws.every_layer import general_laws
from thinned.compare.laws.law import holds_if
from thinned.compare.laws.mask import Masked, masked_laws
from thinned.compare.layers.entry import Entry, Example, Implementation, LayerLaw, Workload
from thinned.compare.layers.peers import from_torch
from thinned.compare.settings import Settings
from thinned.layers.channels import Dropout1d, Dropout2d, Dropout3d

__all__ = ["ENTRIES"]

FAMILY = "channels"
SPATIAL = ("L", "H, W", "D, H, W")


def batch_of_one(layer: Implementation, settings: Settings, shape: tuple[int, ...]) -> Finding:
    """What a sample without a batch dimension becomes, against the same sample as a batch."""
    module, x = layer.make(p=0.5), settings.normal(*shape, dtype=torch.float32)
    alone = _under_seed(module, x, settings)
    batched = _under_seed(module, x.unsqueeze(0), settings)
    same = alone.shape == x.shape and torch.equal(alone, batched.squeeze(0))
    return holds_if(same, "the same mask" if same else "another mask")


def three_dimensions(layer: Implementation, settings: Settings) -> Finding:
    """Of Dropout2d: ``(N, C, L)`` for now, with a warning, as in PyTorch."""
    x = torch.ones(50, 40, 3, device=settings.device)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kept = layer.make(p=0.5)(x) != 0
    warned = any("interpreted as shape (N, C, L)" in str(each.message) for each in caught)
    rows_alike = bool((kept == kept[..., :1]).all())
    samples_differ = not bool((kept == kept[:, :1]).all())
    wrong = [
        *([] if warned else ["no warning"]),
        *([] if rows_alike else ["a channel is split"]),
        *([] if samples_differ else ["channels of a sample share a decision"]),
    ]
    return holds_if(not wrong, ", ".join(wrong) or "(N, C, L)")


def channels_last(layer: Implementation, settings: Settings, shape: tuple[int, ...]) -> Finding:
    """The memory format changes neither the mask nor itself, in the output and in the gradient."""
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    module, x = layer.make(p=0.5), settings.normal(*shape, dtype=torch.float32)
    last = x.to(memory_format=memory_format).requires_grad_()
    y = _under_seed(module, last, settings)
    (gradient,) = torch.autograd.grad(y, last, torch.ones_like(y))
    wrong = [
        *([] if torch.equal(y, _under_seed(module, x, settings)) else ["another mask"]),
        *([] if y.is_contiguous(memory_format=memory_format) else ["output in another format"]),
        *([] if gradient.is_contiguous(memory_format=memory_format) else ["gradient in another format"]),
    ]
    return holds_if(not wrong, ", ".join(wrong) or "kept")


def ranks(layer: Implementation, settings: Settings, wrong: Sequence[int], word: str) -> Finding:
    """Another number of dimensions is refused or, where it was allowed before, deprecated."""
    module, quiet = layer.make(p=0.5), []
    for dims in wrong:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                module(torch.ones((2,) * dims, device=settings.device))
            except (RuntimeError, UserWarning) as error:
                if word in str(error) and f"eceived a {dims}" in str(error):
                    continue
            quiet.append(dims)
    return holds_if(not quiet, f"accepts {quiet} dimensions" if quiet else f"says {word!r}")


def _under_seed(module: nn.Module, x: Tensor, settings: Settings) -> Tensor:
    torch.manual_seed(settings.seed)
    y: Tensor = module(x)
    return y


def _laws(spatial: int) -> list[LayerLaw]:
    law = partial(LayerLaw, FAMILY)
    if spatial == 1:
        fate, word, wrong = "refused", "Expected 2D or 3D input", (1, 4)
    else:
        fate, word, wrong = "deprecated", "deprecated", (2, spatial + 3)
    laws = [
        law(
            "other ranks",
            f"an input of {' or '.join(map(str, wrong))} dimensions is {fate}",
            partial(ranks, wrong=wrong, word=word),
        )
    ]
    if spatial == 2:
        laws.append(law("3 dimensions", "count as (N, C, L), with a warning", three_dimensions))
    else:
        shape = (200, *(2,) * spatial)
        statement = "a sample without a batch dimension has the mask of a batch of one"
        laws.append(law("batch of one", statement, partial(batch_of_one, shape=shape)))
    if spatial > 1:
        statement = "the mask is that of a contiguous tensor; output and gradient keep the format"
        laws.append(law("channels_last", statement, partial(channels_last, shape=(8, 25, *(3,) * spatial))))
    return laws


def _entry(layer: type[nn.Module], peer: type[nn.Module], spatial: int, pixels: tuple[int, ...]) -> Entry:
    def inputs(dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(4, 5, *(3,) * (spatial - 1), 8, dtype=dtype),)

    example = Example(inputs, {"p": 0.5})
    shared = tuple(range(2, 2 + spatial))
    return Entry(
        layer,
        functional=layer.__name__.lower(),
        mask=f"(N, C, {', '.join('1' * spatial)}) for (N, C, {SPATIAL[spatial - 1]})",
        source="Tompson et al. 2015, section 3.2; PyTorch",
        peer=from_torch(peer),
        laws=(
            *general_laws(example),
            *masked_laws(Masked((200, 100, *(2,) * spatial), shared=shared)),
            *_laws(spatial),
        ),
        example=example,
        workload=Workload(
            lambda: (torch.ones(16, 64, *pixels),), {"p": 0.2}, broadcast=(16, 64, *(1,) * spatial)
        ),
    )


ENTRIES = [
    _entry(Dropout1d, nn.Dropout1d, 1, pixels=(1024,)),
    _entry(Dropout2d, nn.Dropout2d, 2, pixels=(32, 32)),
    _entry(Dropout3d, nn.Dropout3d, 3, pixels=(4, 16, 16)),
]
